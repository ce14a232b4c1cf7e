"""StreamImage: a VM in a stream file, looked into and sent again."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from mig import _core
from mig.channel.uri import FileUri, parse_uri
from mig.dirty import DirtyLog
from mig.errors import ChannelError, OptionError, TruncatedError
from mig.options import Capability
from mig.pages import PagePlaces
from mig.ram.search import SourceBlock
from mig.records import BlockInfo, Command, Configuration
from mig.savevm.devices import DeviceSection, DeviceState
from mig.savevm.load import StreamLoader
from mig.stats import RamCounters
from mig.stream.reader import StreamReader
from mig.wire import DEFAULT_PAGE_BITS


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """What an image holds of one RAM block, in pages.

    data: pages with contents; zero: pages known to be zero; missing: pages never sent
    address: guest-physical, in a stream with x-ignore-shared; None in any other
    """

    idstr: str
    used_length: int
    data: int
    zero: int
    missing: int
    address: int | None = None

    @property
    def ignored(self) -> bool:
        """Whether the block was left out because its memory is shared (x-ignore-shared)."""
        return self.address is not None and not (self.data or self.zero)


class _Index:
    """LoadTarget that notes where things are instead of loading them."""

    def __init__(self, base: int) -> None:
        self._base = base
        self.configuration: Configuration | None = None
        self.page_size = 1 << DEFAULT_PAGE_BITS
        self.blocks: tuple[BlockInfo, ...] = ()
        self.places: list[PagePlaces] = []
        self.section_id = 1
        self.footers = True
        self.switchover_start = False
        self.state = DeviceState(0, b"", None, b"")

    def configure(self, configuration: Configuration | None) -> None:
        self.configuration = configuration

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        self.blocks, self.page_size = tuple(blocks), page_size
        # zeros cost no memory until a place is noted
        self.places = [np.zeros(b.npages(page_size), dtype=np.int64) for b in blocks]

    def ram_started(self, section_id: int, footers: bool) -> None:
        self.section_id, self.footers = section_id, footers

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        if parser.npages:
            parser.index(self._base + start, self.places[parser.current])

    def switchover_started(self) -> None:
        self.switchover_start = True

    def load_devices(self, state: DeviceState) -> None:
        self.state = state


class StreamImage:
    """A whole stream in a file; satisfies SourceGuest, so that it can be sent.

    path:      the file
    offset:    byte where the stream starts
    page_size: target page size in bytes where the stream does not name it

    Opening reads the stream once: a StreamError tells what is wrong with it. Pages stay in the
    file, which is mapped. Any number of migrations may send it at the same time: they share the
    mapping, and each has a dirty bitmap of its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        page_size: int = 1 << DEFAULT_PAGE_BITS,
    ) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path, offset)
        self._view = memoryview(self._map)
        # made when it is first sent: the pages of each block, and which of them the stream has
        self._stored: list[tuple[_core.Pages, _core.Bitmap]] = []
        self._lock = threading.Lock()
        try:
            index, counters = self._read(offset, page_size)
        except BaseException:
            self.close()
            raise
        self._index = index
        self.configuration: Configuration | None = index.configuration
        self.ram_section_id = index.section_id
        self.footers = index.footers
        self.switchover_start = index.switchover_start
        #: bytes of the stream; what follows in the file is not looked at
        self.nbytes = index.state.offset + len(index.state.raw)
        #: PAGE and ZERO records; more than there are pages when pages were sent again
        self.records = counters.records

    def _read(self, offset: int, page_size: int) -> tuple[_Index, RamCounters]:
        index, counters = _Index(offset), RamCounters()
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        with self._view[offset:] as stream:
            reader = StreamReader(data=stream)
            try:
                StreamLoader(
                    reader,
                    index,
                    on_command=_ignore,
                    counters=counters,
                    page_size=page_size,
                    capabilities=None,
                ).run()
            finally:
                # an error's traceback holds the reader
                reader.close()
        self._map.madvise(mmap.MADV_NORMAL)
        return index, counters

    # ---- looking ----------------------------------------------------------------------------

    @property
    def machine(self) -> str | None:
        """Machine type, None when the stream does not say."""
        return self.configuration.machine if self.configuration else None

    @property
    def ignores_shared(self) -> bool:
        """Whether it was sent with capability x-ignore-shared, and must be sent so again."""
        named = self.configuration.capabilities if self.configuration else None
        return Capability.X_IGNORE_SHARED in (named or ())

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        return self._index.page_size

    @property
    def blocks(self) -> tuple[BlockSummary, ...]:
        """The RAM blocks in the order of the block list."""
        out = []
        for block, places in zip(self._index.blocks, self._index.places, strict=True):
            data = int(np.count_nonzero(places > 0))
            zero = int(np.count_nonzero(places == _core.PAGE_ZERO))
            missing = len(places) - data - zero
            out.append(
                BlockSummary(block.idstr, block.used_length, data, zero, missing, block.address)
            )
        return tuple(out)

    @property
    def devices(self) -> tuple[DeviceSection, ...] | None:
        """The device sections; None when the stream has no description to cut them by."""
        return self._index.state.sections

    @property
    def device_state(self) -> DeviceState:
        """Everything behind RAM."""
        return self._index.state

    def page(self, idstr: str, page_index: int) -> bytes | None:
        """Return the contents of one page, None when it was never sent; KeyError, IndexError."""
        for block, places in zip(self._index.blocks, self._index.places, strict=True):
            if block.idstr == idstr:
                if not 0 <= page_index < len(places):
                    raise IndexError(f"page {page_index} of {len(places)}")
                place = int(places[page_index])
                if place == _core.PAGE_NONE:
                    return None
                if place == _core.PAGE_ZERO:
                    return bytes(self.page_size)
                return bytes(self._view[place : place + self.page_size])
        raise KeyError(idstr)

    # ---- sending ----------------------------------------------------------------------------

    def source_blocks(self) -> Sequence[SourceBlock]:
        """Return the blocks; every page that the stream has is to be sent. Any thread.

        ValueError after close().
        """
        with self._lock:
            if self._map.closed:
                raise ValueError(f"{self.path} is closed")
            if not self._stored:
                self._stored = [self._store(places) for places in self._index.places]
            stored = self._stored
        return [
            SourceBlock(
                block.idstr,
                block.used_length,
                pages,
                detect_zero=False,
                dirty=there.copy(),
                # left out once, left out again
                shared=block.address is not None and not there.count(),
                address=block.address,
            )
            for block, (pages, there) in zip(self._index.blocks, stored, strict=True)
        ]

    def _store(self, places: PagePlaces) -> tuple[_core.Pages, _core.Bitmap]:
        there = _core.Bitmap(len(places))
        bits = np.packbits(places != _core.PAGE_NONE, bitorder="little")
        np.asarray(there).view(np.uint8)[: len(bits)] = bits
        return _core.Pages(self._view, self.page_size, where=places), there

    def dirty_log(self) -> DirtyLog | None:
        """Return None: a file does not change."""
        return None

    @property
    def running(self) -> bool:
        """Nothing runs."""
        return False

    def throttle(self, percent: int) -> None:
        """Nothing runs."""

    def stop(self) -> None:
        """Nothing runs."""

    def resume(self) -> None:
        """Nothing ran."""

    def save_devices(self) -> bytes:
        """Return the device state as it was received."""
        return self._index.state.raw

    # ---- ends -------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap the file; BufferError, and nothing done, while a migration still sends from it."""
        with self._lock:
            # a migration takes the first block first and lets go of it last
            for pages, _ in self._stored:
                pages.release()
            self._stored = []
            self._view.release()
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ignore(command: Command) -> None:
    """Commands of a recorded stream that only concern its return path."""


def _map_file(path: Path, offset: int) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes <= offset:
                raise TruncatedError(
                    f"{path} has {nbytes} bytes: no stream starts at {offset}", offset=0
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ChannelError(f"{path}: {error.strerror or error}") from error


def open_image(name: str | os.PathLike[str]) -> StreamImage:
    """Open a captured VM: a path, or ``file:PATH[,offset=N]`` as in a migration URI."""
    if isinstance(name, str) and name.startswith("file:"):
        uri = parse_uri(name)
        if not isinstance(uri, FileUri):
            raise OptionError(f"'{name}' is not a file")
        return StreamImage(uri.path, offset=uri.offset)
    return StreamImage(name)
