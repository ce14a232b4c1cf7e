"""StreamCapture: a destination that keeps the VM in a file, as an ordinary migration stream."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

from mig import _core
from mig.errors import ChannelError, MismatchError
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

_EOS = int(RamFlag.EOS).to_bytes(8, "big")


class StreamCapture:
    """Writes what is received into ``path``; satisfies DestinationGuest.

    fsync:     have the file on stable storage before the source is told that all is well
    direct_io: write around the page cache where the file system can (QEMU's parameter direct-io):
               half the work and no memory of the host's, but at the pace of the disk; pages that
               the source sends again cost a read of their surroundings

    The file holds every page once, however often the source sent it: a page that comes again is
    rewritten in its place. No guest memory is held, so the VM may be larger than this host. The
    file appears, complete, in commit(), or not at all.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, fsync: bool = False, direct_io: bool = True
    ) -> None:
        self.path = Path(path)
        self._fsync = fsync
        self._direct_io = direct_io
        self._direct_fd = -1
        try:
            regular = stat.S_ISREG(self.path.stat().st_mode)
        except FileNotFoundError:
            regular = True
        except OSError as error:
            raise ChannelError(f"{self.path}: {error.strerror}") from error
        if not regular:
            raise ChannelError(f"{self.path} exists and is not a regular file")
        self._partial: Path | None = None
        self._fd = self._open()
        self._configuration: Configuration | None = None
        self._blocks = BlockList()
        self._section_id = 1
        self._footers = True
        self._switchover_start = False
        self._log: _core.PageLog | None = None
        # of a source that may go into postcopy: by block, the pages that are there
        self._received: dict[str, _core.Bitmap] | None = None
        self._page_size = 1 << DEFAULT_PAGE_BITS
        self._postcopy = False
        self._state: DeviceState | None = None

    def _open(self) -> int:
        """A file without a name where the file system can, else one that abort() removes."""
        folder = self.path.parent
        try:
            with contextlib.suppress(OSError, AttributeError):
                return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self._partial = self._beside()
            return os.open(self._partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ChannelError(f"{self.path}: {error.strerror}") from error

    def _beside(self) -> Path:
        # the name of the file itself may be as long as a name can be
        return self.path.with_name(f".mig-{secrets.token_hex(8)}.partial")

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
        if self._log is not None and (section_id, footers) != (self._section_id, self._footers):
            raise MismatchError("the setup section has pages in it: such a stream cannot be kept")
        self._section_id, self._footers = section_id, footers

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Write a burst of pages."""
        if parser.npages:
            with self._naming_file():
                self._open_log(parser).put(data, start, parser)
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
        """Have the channels put pages into the file, one at a time."""
        self._section_id = section_id
        with self._naming_file():
            receiver.to_log(self._open_log(parser))

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
            self._write_end(state)

    def _write_end(self, state: DeviceState) -> None:
        tail = [_EOS, self._footer()]
        if self._switchover_start:
            tail.append(Command(CommandType.SWITCHOVER_START).encode())
        tail += [encode_continuation(SectionType.END, self._section_id), _EOS, self._footer()]
        tail.append(state.raw)
        with self._naming_file():
            log = self._open_log(_core.RamParser([], self._page_size))
            if self._postcopy and self._received is not None:
                for number, received in enumerate(self._received.values()):
                    _core.blank_missing(log, number, received)
            log.put_zeros()
            log.append(b"".join(tail))
            log.finish()

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
        with self._naming_file():
            self._open_log(self._any_parser())

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
        self._write_end(state)

    def postcopy_abandon(self) -> None:
        """Nothing runs, and nobody waits."""

    @contextlib.contextmanager
    def _naming_file(self) -> Iterator[None]:
        try:
            yield
        except ChannelError as error:
            raise ChannelError(f"{self.path}: {error}") from error

    # ---- pieces -----------------------------------------------------------------------------

    def _footer(self) -> bytes:
        return encode_footer(self._section_id) if self._footers else b""

    def _any_parser(self) -> _core.RamParser:
        page_size = self._page_size
        blocks = [(b.idstr.encode(), b.npages(page_size)) for b in self._blocks.blocks]
        return _core.RamParser(blocks, page_size)

    def _open_log(self, parser: _core.RamParser) -> _core.PageLog:
        """Everything up to the first page, then the log of pages."""
        if self._log is None:
            head = [FileHeader().encode()]
            if self._configuration is not None:
                head.append(self._configuration.encode())
            ram = SectionHeader(self._section_id, RAM_IDSTR, 0, RAM_VERSION)
            head += [ram.encode(SectionType.START), self._blocks.encode(), _EOS, self._footer()]
            head.append(encode_continuation(SectionType.PART, self._section_id))
            if self._direct_io:
                # not every file system can
                with contextlib.suppress(OSError):
                    flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
                    self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", flags)
            self._log = _core.PageLog(self._fd, parser, direct_fd=self._direct_fd)
            self._log.append(b"".join(head))
        return self._log

    # ---- ends -------------------------------------------------------------------------------

    def commit(self) -> None:
        """Give the file its name, replacing an older one."""
        try:
            if self._fsync:
                os.fsync(self._fd)
            os.fchmod(self._fd, 0o666 & ~_umask())
            if self._partial is None:
                self._partial = self._give_name()
            self._partial.replace(self.path)
            self._partial = None
            if self._fsync:
                _fsync_folder(self.path.parent)
        except OSError as error:
            raise ChannelError(f"{self.path}: {error.strerror}") from error
        self.close()

    def _give_name(self) -> Path:
        """Link the nameless file beside its place: linkat() itself would not replace a file."""
        partial = self._beside()
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # only with a directory descriptor does Python follow the link in /proc
            source = f"/proc/self/fd/{self._fd}"
            os.link(source, partial.name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)
        return partial

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._partial is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink()
            self._partial = None
        self.close()

    def __del__(self) -> None:
        # of a capture that no migration ever used
        if hasattr(self, "_fd"):
            self.abort()

    def close(self) -> None:
        """Release the descriptor."""
        self._log = None
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    with Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
