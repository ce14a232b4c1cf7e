"""StreamReader: pulls typed items out of a byte stream and knows where it is.

The reader does no I/O of its own: bytes come from a `Source`. How a source cuts its bytes into
reads never changes what is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mig.errors import StreamError, TruncatedError

if TYPE_CHECKING:
    from mig import _core

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Source(Protocol):
    """Where bytes come from.

    timeout: seconds that a read may wait for a byte before IdleTimeoutError, None for ever
    """

    timeout: float | None

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        """Fill ``data[start:]`` with at least ``at_least`` bytes, more only without waiting.

        Returns the number of bytes; fewer than ``at_least`` mean end of stream.
        """


@runtime_checkable
class SeekableSource(Source, Protocol):
    """A source that can leave bytes out without reading them: a file."""

    def skip(self, nbytes: int) -> None:
        """Go so many bytes forward; where the source ends before, the next read tells."""


@runtime_checkable
class DescriptorSource(Source, Protocol):
    """A source that others may read from, past the reader's buffer."""

    def read_by(self, loop: Callable[[_core.Descriptor], None]) -> None:
        """Have ``loop`` read."""


class StreamReader:
    """A cursor over a stream, with a buffer that bursts of RAM records are parsed from.

    source:      where more bytes come from; None when ``data`` is all there is
    data:        a whole stream in memory (any buffer), read in place
    buffer_size: bytes read ahead at most
    """

    def __init__(
        self,
        source: Source | None = None,
        data: bytes | bytearray | memoryview = b"",
        *,
        buffer_size: int = 1 << 20,
    ) -> None:
        if source is not None and len(data):
            raise ValueError("a StreamReader reads from a source or from data, not from both")
        #: where more bytes come from
        self.source = source
        self.buffer: bytes | bytearray | memoryview = data
        self._start = 0
        self._end = len(data)
        self._base = 0
        self._eof = source is None
        #: idstr of the section being read, for errors
        self.section: str | None = None
        self._skipped = 0
        if source is not None:
            self.buffer = bytearray(buffer_size)

    def close(self) -> None:
        """Let go of the buffer; nothing is left to be read."""
        self._base, self._start, self._end, self._eof = self.offset, 0, 0, True
        self.buffer = b""

    def widen(self, buffer_size: int) -> None:
        """Read ahead up to so many bytes from now on."""
        buffer = self.buffer
        if isinstance(buffer, bytearray):
            buffer.extend(bytes(max(0, buffer_size - len(buffer))))

    # ---- position ---------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Stream offset of the next byte to be read."""
        return self._base + self._start

    @property
    def nread(self) -> int:
        """Bytes before the next one but for those that were passed over."""
        return self.offset - self._skipped

    @property
    def window(self) -> tuple[int, int]:
        """Start and end in ``buffer`` of what is there unread."""
        return self._start, self._end

    @property
    def available(self) -> int:
        """Number of bytes that can be read without asking the source."""
        return self._end - self._start

    def advance(self, nbytes: int) -> None:
        """Consume bytes of the window."""
        if nbytes > self._end - self._start:
            raise ValueError(f"{nbytes} bytes of {self._end - self._start}")
        self._start += nbytes

    def skip_to(self, offset: int, what: str) -> None:
        """Go on at that offset, not before this one; what lies between is not read.

        TruncatedError, which names ``what``, when the stream is known to end before.
        """
        nbytes = offset - self.offset
        if nbytes < 0:
            raise ValueError(f"{offset} is behind the cursor")
        self._skipped += nbytes
        step = min(nbytes, self.available)
        self._start += step
        nbytes -= step
        if not nbytes:
            return
        if self.source is None:
            self.need(nbytes, what)
        if not isinstance(self.source, SeekableSource):
            raise self.error(f"{what} can only be passed over in a file")
        self.source.skip(nbytes)
        self._base += nbytes

    def take(self, limit: int) -> bytes:
        """Consume and return what is there without asking the source, ``limit`` bytes at most."""
        start, self._start = self._start, min(self._end, self._start + limit)
        return bytes(self.buffer[start : self._start])

    def went_past(self, nbytes: int) -> None:
        """Count bytes that somebody else has read from the source; the window is empty."""
        self._base += nbytes

    def error(self, message: str, *, offset: int | None = None) -> StreamError:
        """Return a StreamError that names this place (or ``offset``) and section."""
        at = self.offset if offset is None else offset
        return StreamError(message, offset=at, section=self.section)

    # ---- filling ----------------------------------------------------------------------------

    def fill(self, need: int) -> bool:
        """Make the window at least ``need`` bytes long; False when the stream ends before."""
        if self._end - self._start >= need:
            return True
        if self._eof:
            return False
        assert self.source is not None
        buffer = self.buffer
        assert isinstance(buffer, bytearray)
        have = self._end - self._start
        if need > len(buffer):
            self.buffer = bytearray(need)
            self.buffer[:have] = memoryview(buffer)[self._start : self._end]
            buffer = self.buffer
        elif self._start:
            # what is left of one record: a few bytes, at most a page
            buffer[:have] = buffer[self._start : self._end]
        self._base += self._start
        self._start, self._end = 0, have
        got = self.source.readinto(buffer, have, need - have)
        self._end += got
        if self._end < need:
            self._eof = True
            return False
        return True

    def land(
        self,
        record_nbytes: int,
        receive: Callable[[_core.Descriptor, bytearray, int], tuple[int, int, bool] | None],
    ) -> int:
        """Have pages read past the buffer, straight to where they belong; returns how many.

        record_nbytes: of the record that each of them comes in
        receive: as land_in_memory() of `mig._core`, called until it says that there is no more
        """
        if not isinstance(self.source, DescriptorSource):
            return 0
        buffer, held, total = self.buffer, self._end - self._start, 0
        assert isinstance(buffer, bytearray)
        result: tuple[int, int, bool] | None = (0, held, True)

        def turn(fd: _core.Descriptor) -> None:
            nonlocal result
            result = receive(fd, buffer, held)

        if self._start:
            buffer[:held] = buffer[self._start : self._end]
        self._base += self._start
        self._start, self._end = 0, held
        while result is not None and result[2]:
            self.source.read_by(turn)
            if result is not None:
                npages, held, _ = result
                # what was in the buffer before is of these records
                self._base += npages * record_nbytes
                self._end = held
                total += npages
        return total

    def need(self, nbytes: int, what: str) -> None:
        """Like `fill`, but the end of the stream is a TruncatedError that names ``what``."""
        if not self.fill(nbytes):
            raise TruncatedError(
                f"stream ends after {self._base + self._end} bytes, inside {what}",
                offset=self.offset,
                section=self.section,
            )

    # ---- items ------------------------------------------------------------------------------

    def read(self, nbytes: int, what: str) -> bytes:
        """Read exactly ``nbytes`` bytes."""
        self.need(nbytes, what)
        start = self._start
        self._start += nbytes
        return bytes(self.buffer[start : self._start])

    def u8(self, what: str) -> int:
        """Read one byte."""
        self.need(1, what)
        self._start += 1
        return self.buffer[self._start - 1]

    def u16(self, what: str) -> int:
        """Read a be16."""
        self.need(2, what)
        self._start += 2
        value: int = _U16.unpack_from(self.buffer, self._start - 2)[0]
        return value

    def u32(self, what: str) -> int:
        """Read a be32."""
        self.need(4, what)
        self._start += 4
        value: int = _U32.unpack_from(self.buffer, self._start - 4)[0]
        return value

    def u64(self, what: str) -> int:
        """Read a be64."""
        self.need(8, what)
        self._start += 8
        value: int = _U64.unpack_from(self.buffer, self._start - 8)[0]
        return value

    def counted(self, what: str) -> bytes:
        """Read a counted string: one length byte, then that many bytes."""
        return self.read(self.u8(what), what)

    def text(self, what: str) -> str:
        """Read a counted string of printable ASCII that is not empty."""
        at = self.offset
        return self.as_text(self.counted(what), what, at)

    def as_text(self, raw: bytes, what: str, at: int) -> str:
        """Return ``raw`` as text; StreamError unless it is printable ASCII and not empty."""
        text = raw.decode("ascii", "replace")
        if not text or not text.isprintable() or "�" in text:
            raise self.error(f"{what} is not a name: {raw[:40]!r}", offset=at)
        return text

    def peek(self) -> int | None:
        """Return the next byte without consuming it, None at the end of the stream."""
        return self.buffer[self._start] if self.fill(1) else None
