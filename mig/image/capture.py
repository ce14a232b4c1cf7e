"""Capture: a destination that keeps the VM in a file, whatever the file's format."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from uuid import UUID

from mig import _core
from mig.errors import MismatchError
from mig.image.newfile import NewFile
from mig.postcopy.commands import Advise
from mig.postcopy.times import PostcopyTimes
from mig.records import (
    BlockInfo,
    BlockList,
    Command,
    Configuration,
    FileHeader,
    SectionHeader,
    encode_continuation,
    encode_footer,
)
from mig.savevm.devices import DeviceState
from mig.savevm.vmdesc import DeviceDescription, encode_description
from mig.wire import (
    DEFAULT_PAGE_BITS,
    RAM_IDSTR,
    RAM_VERSION,
    CommandType,
    RamFlag,
    SectionType,
)

#: what ends the payload of a section of RAM
EOS = int(RamFlag.EOS).to_bytes(8, "big")


class Capture(ABC):
    """Writes what is received into ``path``; satisfies DestinationGuest.

    fsync:     have the file on stable storage before the source is told that all is well
    direct_io: write around the page cache where the file system can (QEMU's parameter direct-io):
               half the work and no memory of the host's, but at the pace of the disk

    No guest memory is held, so the VM may be larger than this host. The file holds every page once,
    however often the source sent it; it appears, complete, in commit(), or not at all.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, fsync: bool = False, direct_io: bool = True
    ) -> None:
        self._file = NewFile(path, fsync=fsync)
        self.path = self._file.path
        self._direct_io = direct_io
        self._configuration: Configuration | None = None
        self._blocks = BlockList()
        self._section_id = 1
        self._footers = True
        self._switchover_start = False
        # of a source that may go into postcopy: by block, the pages that are there
        self._received: dict[str, _core.Bitmap] | None = None
        self._page_size = 1 << DEFAULT_PAGE_BITS
        self._postcopy = False
        self._state: DeviceState | None = None

    # ---- what a format does -----------------------------------------------------------------

    @property
    @abstractmethod
    def _has_pages(self) -> bool:
        """Whether there is a place for pages already."""

    @abstractmethod
    def _open_pages(self, parser: _core.RamParser) -> None:
        """Have a place for the pages of the parser's blocks, if there is none yet."""

    @abstractmethod
    def _put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Write a burst of pages."""

    @abstractmethod
    def _serve_lanes(self, receiver: _core.MultifdReceiver) -> None:
        """Have channels put pages there."""

    @abstractmethod
    def _write_end(self, state: DeviceState) -> None:
        """Write all that there is besides pages, and what was not written yet."""

    # ---- what the loader says ---------------------------------------------------------------

    def configure(self, configuration: Configuration | None) -> None:
        """Keep the configuration."""
        self._configuration = configuration

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """Keep the block list."""
        # sizes of host pages are only for streams that go into postcopy
        kept = (dataclasses.replace(block, host_page_size=None) for block in blocks)
        self._blocks, self._page_size = BlockList(tuple(kept)), page_size
        if self._received is not None:
            self._received = {b.idstr: _core.Bitmap(b.npages(page_size)) for b in blocks}

    def ram_started(self, section_id: int, footers: bool) -> None:
        """Keep the id; the file's own sections will look like the source's."""
        if self._has_pages and (section_id, footers) != (self._section_id, self._footers):
            raise MismatchError("the setup section has pages in it: such a stream cannot be kept")
        self._section_id, self._footers = section_id, footers

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Write a burst of pages."""
        if parser.npages:
            with self._file.naming():
                self._open_pages(parser)
                self._put(parser, data, start)
            if self._received is not None:
                idstr = self._blocks.blocks[parser.current].idstr
                _core.mark_received(parser, self._received[idstr])

    @property
    def uuid(self) -> UUID | None:
        """None: any machine can be captured."""
        return None

    def open_lanes(
        self, receiver: _core.MultifdReceiver, parser: _core.RamParser, section_id: int
    ) -> None:
        """Have the channels put pages into the file."""
        self._section_id = section_id
        with self._file.naming():
            self._prepare(parser)
            self._serve_lanes(receiver)

    def switchover_started(self) -> None:
        """Keep the command for the file."""
        self._switchover_start = True

    def load_devices(self, state: DeviceState) -> None:
        """Write the end of the file: zero pages, the end of RAM, the devices.

        In postcopy that has to wait until all pages are there.
        """
        if self._postcopy:
            self._state = state
        else:
            self._finish(state)

    def _finish(self, state: DeviceState) -> None:
        with self._file.naming():
            self._prepare(self._any_parser())
            self._write_end(state)

    def _prepare(self, parser: _core.RamParser) -> None:
        """Have a place for pages before one comes, or when none did."""
        try:
            self._open_pages(parser)
        except MemoryError as error:
            raise MismatchError(
                f"no memory to note the pages of {self._blocks.total} bytes of RAM"
            ) from error

    # ---- postcopy: no guest runs here, so the source sends all in its own order ---------------

    def postcopy_probe(self) -> str | None:
        """Return None: a file can always be written."""
        return None

    def postcopy_advise(self, advise: Advise) -> None:
        """Take note of what comes from now on; any size of host page will do."""
        self._received = {}

    def postcopy_discard(self, idstr: str, start: int, nbytes: int) -> None:
        """Hold these pages for missing; their places in the file are kept for them."""
        assert self._received is not None
        self._received[idstr].clear(start // self._page_size, nbytes // self._page_size)

    def postcopy_listen(self, requests: _core.PageRequests) -> None:
        """Be ready for two connections that bring pages."""
        self._postcopy = True
        with self._file.naming():
            self._prepare(self._any_parser())

    def postcopy_run(self) -> None:
        """Nothing runs."""

    def postcopy_server(self) -> None:
        """Return None: pages come by put()."""

    def postcopy_received(self, idstr: str) -> _core.Bitmap:
        """Return which pages of a block the file has."""
        assert self._received is not None
        return self._received[idstr]

    def postcopy_ask_again(self) -> None:
        """Nothing was asked for."""

    def postcopy_times(self) -> PostcopyTimes:
        """Return none: nobody waits."""
        return PostcopyTimes()

    def postcopy_end(self) -> None:
        """Write the end of the file, if there is all of it.

        A package has no description, yet a QEMU that loads the file with a return path would wait
        for one: the footers tell what stands in it.
        """
        state = self._state
        if state is None:
            return
        if state.sections is not None:
            devices = [
                DeviceDescription(s.idstr, s.instance_id, s.version_id, len(s.payload))
                for s in state.sections
            ]
            text = encode_description(devices, self._page_size)
            state = dataclasses.replace(state, raw=state.raw + text)
        self._finish(state)

    def postcopy_abandon(self) -> None:
        """Nothing runs, and nobody waits."""

    # ---- pieces -----------------------------------------------------------------------------

    def _footer(self) -> bytes:
        return encode_footer(self._section_id) if self._footers else b""

    def _head(self, configuration: Configuration | None) -> bytes:
        """What stands before the block list."""
        head = [FileHeader().encode()]
        if configuration is not None:
            head.append(configuration.encode())
        ram = SectionHeader(self._section_id, RAM_IDSTR, 0, RAM_VERSION)
        head.append(ram.encode(SectionType.START))
        return b"".join(head)

    def _tail(self, state: DeviceState) -> bytes:
        """What stands behind the last section of RAM that has a payload, its EOS included."""
        tail = [EOS, self._footer()]
        if self._switchover_start:
            tail.append(Command(CommandType.SWITCHOVER_START).encode())
        tail += [encode_continuation(SectionType.END, self._section_id), EOS, self._footer()]
        tail.append(state.raw)
        return b"".join(tail)

    def _any_parser(self) -> _core.RamParser:
        page_size = self._page_size
        blocks = [(b.idstr.encode(), b.npages(page_size)) for b in self._blocks.blocks]
        return _core.RamParser(blocks, page_size)

    @property
    def _direct_fd(self) -> int:
        return self._file.direct_fd if self._direct_io else -1

    # ---- ends -------------------------------------------------------------------------------

    def commit(self) -> None:
        """Give the file its name, replacing an older one."""
        self._file.commit()
        self.close()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.abort()
        self.close()

    def __del__(self) -> None:
        # of a capture that no migration ever used
        if hasattr(self, "_file"):
            self.abort()

    def close(self) -> None:
        """Release the descriptor."""
        self._file.close()
