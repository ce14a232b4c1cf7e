"""StreamWriter: puts bytes and pages in wire order into a queue and hands it to a sink."""

from __future__ import annotations

from typing import Protocol

from mig import _core
from mig.pages import PageIndex


class Sink(Protocol):
    """Where bytes go."""

    def send(self, out: _core.OutQueue) -> int:
        """Write and empty the queue; returns the number of bytes."""


class StreamWriter:
    """Append-only writer of one stream.

    Bytes are copied into the queue; pages stay where they are until they are sent.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._out = _core.OutQueue(max_iov=4096, arena_size=1 << 17)
        self._sent = 0

    @property
    def offset(self) -> int:
        """Number of bytes written so far, sent or not."""
        return self._sent + self._out.nbytes

    def put(self, data: bytes) -> None:
        """Append bytes of any length."""
        view = memoryview(data)
        while len(view):
            piece = view[:4096]
            if not self._out.put(piece):
                self.flush()
                continue
            view = view[len(piece) :]

    def put_pages(
        self,
        pages: _core.Pages,
        name: bytes | None,
        index: PageIndex,
        zero: _core.Bitmap | None,
    ) -> None:
        """Append the records of pages ``index``; the arguments are those of OutQueue.encode()."""
        first = 0
        while (done := self._out.encode(pages, name, index, first, zero)) < len(index):
            if done > first:
                first, name = done, None
            self.flush()

    def put_deltas(
        self,
        cache: _core.XbzrleCache,
        pages: _core.Pages,
        name: bytes | None,
        index: PageIndex,
        zero: _core.Bitmap | None,
        *,
        address: int,
        generation: int,
        last_stage: bool,
    ) -> None:
        """Append what is new of pages ``index``; the arguments are those of encode_deltas()."""
        first = 0
        while first < len(index):
            before = self.offset
            first = self._out.encode_deltas(
                cache,
                pages,
                name,
                index,
                first,
                zero,
                address=address,
                generation=generation,
                last_stage=last_stage,
            )
            if self.offset > before:
                name = None
            if first < len(index):
                self.flush()

    def put_compressed(
        self,
        compressor: _core.Compressor,
        pages: _core.Pages,
        name: bytes | None,
        index: PageIndex,
        zero: _core.Bitmap | None,
        *,
        skip: bool,
    ) -> None:
        """Append records of pages ``index``; the arguments are those of encode_compressed()."""
        first = 0
        while first < len(index):
            before = self.offset
            first = self._out.encode_compressed(
                compressor, pages, name, index, first, zero, skip=skip
            )
            if self.offset > before:
                name = None
            if first < len(index):
                self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        if self._out.nbytes:
            try:
                self._sent += self._sink.send(self._out)
            finally:
                # what was not sent will not be: the pages are free again
                self._out.clear()
