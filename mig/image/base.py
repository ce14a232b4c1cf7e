"""Image: a VM in a file, whatever its format: looked into, and sent again."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol, Self, overload

import numpy as np
from numpy.typing import NDArray

from mig import _core
from mig.dirty import DirtyLog
from mig.errors import ChannelError, TruncatedError
from mig.options import Capability
from mig.ram.load import MappedPages
from mig.ram.search import SourceBlock
from mig.records import BlockInfo, Command, Configuration
from mig.savevm.devices import DeviceSection, DeviceState
from mig.savevm.fields import Device, decode_device
from mig.savevm.layout import MachineLayout
from mig.savevm.load import StreamLoader
from mig.stats import RamCounters
from mig.stream.reader import StreamReader
from mig.wire import DEFAULT_PAGE_BITS

#: contents of a page, or of several: uint8, shape (page_size,) or (n, page_size)
PageBytes = NDArray[np.uint8]


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


class BlockPages(Protocol):
    """The pages of one block: uint8, as an array of shape (npages, page_size) that is only read.

    A numpy array where the file has the pages in one piece, else an object that numpy.asarray
    makes one of, by copying all of them.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(npages, page_size)."""

    def __len__(self) -> int:
        """Return the number of pages."""

    @overload
    def __getitem__(self, key: int, /) -> PageBytes: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | NDArray[np.integer], /) -> PageBytes: ...
    def __getitem__(self, key: int | slice | Sequence[int] | NDArray[np.integer], /) -> PageBytes:
        """Return one page of shape (page_size,), or several of shape (n, page_size)."""

    def __iter__(self) -> Iterator[PageBytes]:
        """Return page after page."""


class Contents:
    """LoadTarget that notes where things are instead of loading them."""

    def __init__(self) -> None:
        self.configuration: Configuration | None = None
        self.page_size = 1 << DEFAULT_PAGE_BITS
        self.blocks: tuple[BlockInfo, ...] = ()
        self.section_id = 1
        self.footers = True
        self.switchover_start = False
        self.state = DeviceState(0, b"", None, b"")

    def configure(self, configuration: Configuration | None) -> None:
        """Keep the configuration."""
        self.configuration = configuration

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """Keep the block list."""
        self.blocks, self.page_size = tuple(blocks), page_size

    def ram_started(self, section_id: int, footers: bool) -> None:
        """Keep what sections look like."""
        self.section_id, self.footers = section_id, footers

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """No page is noted here."""

    def switchover_started(self) -> None:
        """Keep that it was announced."""
        self.switchover_start = True

    def load_devices(self, state: DeviceState) -> None:
        """Keep the devices."""
        self.state = state


class StandingStill:
    """What a SourceGuest says that does not run."""

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


class Image(StandingStill, ABC):
    """A VM in a file; satisfies SourceGuest, so that it can be sent.

    path:   the file
    offset: byte where its stream starts

    Any number of migrations may send it at the same time: they share the mapping, and each has a
    dirty bitmap of its own.

    The file is mapped, not read: who changes it under an open image changes what is sent, and who
    cuts it short may end the process.
    """

    #: name of the format, as commands take it
    format: ClassVar[str]

    def __init__(self, path: str | os.PathLike[str], offset: int) -> None:
        self.path = Path(path)
        self._file, self._map = _open(self.path, offset)
        self._view = memoryview(self._map)
        # made when it is first sent
        self._kept: list[SourceBlock] | None = None
        self._lock = threading.Lock()
        self._layout: MachineLayout | None = None

    def _load(
        self, contents: Contents, offset: int, page_size: int, mapped: MappedPages | None = None
    ) -> RamCounters:
        """Walk through the stream; whatever fails, the file is let go."""
        counters = RamCounters()
        try:
            with self._view[offset:] as stream:
                reader = StreamReader(data=stream)
                try:
                    StreamLoader(
                        reader,
                        contents,
                        on_command=_ignore,
                        counters=counters,
                        page_size=page_size,
                        capabilities=None,
                        mapped=mapped,
                    ).run()
                finally:
                    # an error's traceback holds the reader
                    reader.close()
        except BaseException:
            self.close()
            raise
        self._contents = contents
        self.configuration: Configuration | None = contents.configuration
        self.ram_section_id = contents.section_id
        self.footers = contents.footers
        self.switchover_start = contents.switchover_start
        #: bytes of the stream; what follows in the file is not looked at
        self.nbytes = contents.state.offset + len(contents.state.raw)
        #: PAGE and ZERO records; more than there are pages when pages were sent again
        self.records = counters.records
        return counters

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
        return self._contents.page_size

    @property
    def devices(self) -> tuple[DeviceSection, ...] | None:
        """The device sections; None when the stream has no description to cut them by."""
        return self._contents.state.sections

    @property
    def device_state(self) -> DeviceState:
        """Everything behind RAM."""
        return self._contents.state

    def device(self, idstr: str, instance_id: int = 0) -> Device:
        """Return a device with its state as values, such as ``device("cpu")["env.eip"]``.

        KeyError when there is none, StreamError when its state is not as described. Where the
        stream describes nothing `Device.state` is None.
        """
        state = self._contents.state
        for section in state.sections or ():
            if (section.idstr, section.instance_id) == (idstr, instance_id):
                if self._layout is None:
                    described = state.description
                    self._layout = (
                        MachineLayout.parse(described) if described else MachineLayout(())
                    )
                return decode_device(section, self._layout, base=state.offset)
        raise KeyError((idstr, instance_id))

    @property
    def blocks(self) -> tuple[BlockSummary, ...]:
        """The RAM blocks in the order of the block list."""
        out = []
        for number, block in enumerate(self._contents.blocks):
            data, zero = self._count(number)
            missing = block.npages(self.page_size) - data - zero
            out.append(
                BlockSummary(block.idstr, block.used_length, data, zero, missing, block.address)
            )
        return tuple(out)

    @abstractmethod
    def _count(self, number: int) -> tuple[int, int]:
        """Return how many pages of that block have contents, and how many are zero."""

    @property
    @abstractmethod
    def pages(self) -> Mapping[str, BlockPages]:
        """The pages of each block by its name; pages that were never sent read as zeros.

        Neither may be in use when the image is closed.
        """

    def page(self, idstr: str, page_index: int) -> bytes | None:
        """Return the contents of one page, None when it was never sent; KeyError, IndexError."""
        for number, block in enumerate(self._contents.blocks):
            if block.idstr == idstr:
                npages = block.npages(self.page_size)
                if not 0 <= page_index < npages:
                    raise IndexError(f"page {page_index} of {npages}")
                return self._page(number, page_index)
        raise KeyError(idstr)

    @abstractmethod
    def _page(self, number: int, page_index: int) -> bytes | None:
        """Return a page of the block of that number."""

    # ---- sending ----------------------------------------------------------------------------

    def source_blocks(self) -> Sequence[SourceBlock]:
        """Return the blocks; every page that the file has is to be sent. Any thread.

        ValueError after close().
        """
        with self._lock:
            if self._map.closed:
                raise ValueError(f"{self.path} is closed")
            if self._kept is None:
                self._kept = self._make_blocks()
            kept = self._kept
        return [replace(block, dirty=block.dirty.copy()) for block in kept]

    def _make_blocks(self) -> list[SourceBlock]:
        """Return the blocks; their dirty bitmaps say which pages the file has."""
        out = []
        for number, block in enumerate(self._contents.blocks):
            pages, dirty, left_out = self._stored_pages(number)
            out.append(
                SourceBlock(
                    block.idstr,
                    block.used_length,
                    pages,
                    detect_zero=False,
                    dirty=dirty,
                    # left out once, left out again
                    shared=left_out,
                    address=block.address,
                )
            )
        return out

    @abstractmethod
    def _stored_pages(self, number: int) -> tuple[_core.Pages, _core.Bitmap, bool]:
        """Return the pages of that block, which of them the file has, and whether it is one that
        was left out because its memory is shared.
        """

    def save_devices(self) -> bytes:
        """Return the device state as it was received."""
        return self._contents.state.raw

    def save(self, path: str | os.PathLike[str], format: str = "mapped-ram") -> None:  # noqa: A002
        """Write the VM to another file, in any format of `mig.convert`; errors are the same."""
        # who converts opens images
        from mig.conversion import save_image

        save_image(self, path, format)

    # ---- ends -------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap the file; BufferError while a migration sends from it, or `pages` are in use."""
        with self._lock:
            # a migration takes the first block first and lets go of it last
            for block in self._kept or ():
                block.pages.release()
            self._kept = None
            self._view.release()
            try:
                self._map.close()
            except BufferError:
                self._view = memoryview(self._map)
                raise
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ignore(command: Command) -> None:
    """Commands of a recorded stream that only concern its return path."""


def _open(path: Path, offset: int) -> tuple[BinaryIO, mmap.mmap]:
    with contextlib.ExitStack() as undo:
        try:
            file = undo.enter_context(path.open("rb"))
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes <= offset:
                raise TruncatedError(
                    f"{path} has {nbytes} bytes: no stream starts at {offset}", offset=0
                )
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ChannelError(f"{path}: {error.strerror or error}") from error
        undo.pop_all()
        return file, mapping
