"""Loading a main stream: header, configuration, sections and commands, devices, in that order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, runtime_checkable

from mig.errors import IdleTimeoutError, MismatchError, StreamError, UnsupportedError
from mig.multifd.dialect import dialect_of
from mig.options.capability import CAPABILITIES, Capability
from mig.ram.load import MappedPages, PageLanes, PageSink, RamLoader
from mig.records import Command, Configuration, FileHeader, SectionHeader
from mig.savevm.devices import DeviceState, DeviceTail
from mig.stats import RamCounters
from mig.stream.reader import StreamReader
from mig.wire import (
    DEFAULT_PAGE_BITS,
    MAX_DEVICE_STATE,
    RAM_IDSTR,
    RAM_VERSION,
    CommandType,
    SectionType,
)

#: A source with a return path holds the connection when it has said all. A stream without a
#: description is taken as ended when nothing follows a proper end for so long (seconds).
END_SILENCE: Final = 2.0

_COMMAND_CAPABILITY: Final = {
    CommandType.POSTCOPY_ADVISE: "postcopy-ram",
    CommandType.POSTCOPY_LISTEN: "postcopy-ram",
    CommandType.POSTCOPY_RUN: "postcopy-ram",
    CommandType.POSTCOPY_RAM_DISCARD: "postcopy-ram",
    CommandType.PACKAGED: "postcopy-ram",
    CommandType.POSTCOPY_RESUME: "postcopy-ram",
    CommandType.RECV_BITMAP: "postcopy-ram",
    CommandType.ENABLE_COLO: "x-colo",
}
_SECTION_CAPABILITY: Final = {"dirty-bitmap": "dirty-bitmaps", "block": "block"}
_ON: Final = {True: "on", False: "off"}


class LoadTarget(PageSink, Protocol):
    """What a stream is loaded into."""

    def configure(self, configuration: Configuration | None) -> None:
        """Take the configuration, None when the stream has none; MismatchError to refuse."""

    def ram_started(self, section_id: int, footers: bool) -> None:
        """SECTION_START of `ram` has ended: its id, and whether sections have footers."""

    def switchover_started(self) -> None:
        """The source has sent SWITCHOVER_START: its guest stands still."""

    def load_devices(self, state: DeviceState) -> None:
        """Take the device state; MismatchError to refuse."""


@runtime_checkable
class EarlyTarget(Protocol):
    """What a LoadTarget has besides if it takes devices that were saved before memory."""

    def load_early_device(self, header: SectionHeader, reader: StreamReader) -> None:
        """Take the payload of a section, which the reader stands at; StreamError to refuse."""


class StreamLoader:
    """Reads one main stream into a target.

    on_command: told of every OPEN_RETURN_PATH and PING
    page_size:  target page size where the stream does not name it
    decompress_threads: how many inflate compressed pages
    lanes:      channels that bring pages beside the stream
    capabilities: those that are on here; None: take the stream as it is
    mapped:     loads the pages of a stream with mapped-ram, where one can be

    Matches qemu_loadvm_state(); unlike QEMU it takes the device state as a whole.
    """

    def __init__(
        self,
        reader: StreamReader,
        target: LoadTarget,
        *,
        on_command: Callable[[Command], None],
        counters: RamCounters | None = None,
        page_size: int = 1 << DEFAULT_PAGE_BITS,
        decompress_threads: int = 2,
        lanes: PageLanes | None = None,
        capabilities: Collection[Capability] | None = (),
        mapped: MappedPages | None = None,
    ) -> None:
        self._mapped = mapped
        self._is_mapped = Capability.MAPPED_RAM in (capabilities or ())
        self._lanes = lanes
        self._dialect = dialect_of(None)
        self._reader = reader
        self._target = target
        self._on_command = on_command
        self._page_size = page_size
        self._counters = counters or RamCounters()
        self._decompress_threads = decompress_threads
        self._capabilities = capabilities
        # whether blocks may name the size of their pages
        self._host_pages = False
        # what the stream is read with when it does not say
        self._ignore_shared = Capability.X_IGNORE_SHARED in (capabilities or ())
        self._ram: RamLoader | None = None
        self._ram_id = -1
        self._ram_ended = False
        self._ram_continued = False
        # whether sections end with footers, None until the first one has ended
        self._footers: bool | None = None

    def run(self) -> None:
        """Read the whole stream; raises StreamError, ChannelError or CancelledError."""
        self._load_start()
        while not self._ram_ended:
            self._load_item()
        self._load_devices()

    @staticmethod
    @contextmanager
    def _located(at: int, section: str | None) -> Iterator[None]:
        """The target knows what does not fit it, but not where in the stream that stands."""
        try:
            yield
        except MismatchError as error:
            if error.offset is not None:
                raise
            raise MismatchError(
                error.message, offset=at, section=error.section or section, block=error.block
            ) from error

    # ---- start ------------------------------------------------------------------------------

    def _load_start(self) -> None:
        reader = self._reader
        FileHeader.read(reader)
        configuration, at = None, reader.offset
        if reader.peek() == SectionType.CONFIGURATION:
            reader.u8("the configuration section")
            configuration = Configuration.read(reader)
            if configuration.page_bits is not None:
                self._page_size = configuration.page_size
            self._dialect = dialect_of(configuration.machine)
            with self._located(at, "configuration"):
                self._agree(configuration.capabilities or (), at)
        with self._located(at, "configuration"):
            self._target.configure(configuration)

    def _agree(self, theirs: tuple[str, ...], at: int) -> None:
        """Capabilities that change the stream must be the same here.

        Matches configuration_validate_capabilities(), which looks at no others.
        """
        for name in theirs:
            if name not in CAPABILITIES:
                raise StreamError(
                    f"Received unknown capability {name}", offset=at, section="configuration"
                )
        if Capability.MAPPED_RAM in theirs and self._mapped is None:
            raise UnsupportedError(
                "the stream needs mapped-ram",
                capability=Capability.MAPPED_RAM,
                offset=at,
                section="configuration",
            )
        if self._is_mapped and Capability.MAPPED_RAM not in theirs:
            raise MismatchError(
                f"Capability {Capability.MAPPED_RAM} is on, but received capability is off"
            )
        self._is_mapped = Capability.MAPPED_RAM in theirs
        received = Capability.X_IGNORE_SHARED in theirs
        if self._capabilities is not None and received != self._ignore_shared:
            raise MismatchError(
                f"Capability {Capability.X_IGNORE_SHARED} is {_ON[self._ignore_shared]}, "
                f"but received capability is {_ON[received]}"
            )
        self._ignore_shared = received

    # ---- sections and commands up to the end of RAM -----------------------------------------

    def _load_item(self) -> None:
        reader = self._reader
        reader.section = None
        at = reader.offset
        if self._ram_continued and reader.peek() == SectionType.FULL:
            # a background snapshot of QEMU has no SECTION_END: its first device ends RAM
            self._ram_ended = True
            if self._is_mapped:
                raise self._without_bitmaps(at)
            return
        kind = reader.u8("the stream, before the end of RAM")
        if kind == SectionType.START:
            self._start_section(at)
        elif kind in (SectionType.PART, SectionType.END):
            self._continue_section(at, SectionType(kind))
        elif kind == SectionType.COMMAND:
            self._command(at)
        elif kind == SectionType.FULL:
            self._early_device(at)
        elif kind == SectionType.EOF:
            raise reader.error("stream ends before the end of RAM", offset=at)
        else:
            known = kind in set(SectionType)
            what = f"{SectionType(kind).name} in the wrong place" if known else "unknown"
            raise reader.error(f"section type {kind:#04x} is {what}", offset=at)

    def _start_section(self, at: int) -> None:
        reader = self._reader
        header = SectionHeader.read(reader)
        if header.idstr != RAM_IDSTR:
            raise UnsupportedError(
                f"section '{header.idstr}' is not known",
                capability=_SECTION_CAPABILITY.get(header.idstr),
                offset=at,
                section=header.idstr,
            )
        if self._ram is not None:
            raise reader.error("RAM is started twice", offset=at)
        if header.version_id != RAM_VERSION:
            raise reader.error(f"RAM of version {header.version_id}", offset=at)
        self._ram = RamLoader(
            reader,
            self._target,
            self._page_size,
            self._counters,
            decompress_threads=self._decompress_threads,
            section_id=header.section_id,
            lanes=self._lanes,
            sync_every_section=self._dialect.sync_every_section,
            addresses=self._ignore_shared,
            host_pages=self._host_pages,
            mapped=self._mapped if self._is_mapped else None,
        )
        self._ram_id = header.section_id
        self._ram.load_payload()
        self._footer(self._ram_id)
        with self._located(at, header.idstr):
            self._target.ram_started(header.section_id, bool(self._footers))

    def _early_device(self, at: int) -> None:
        header = SectionHeader.read(self._reader)
        if not isinstance(self._target, EarlyTarget):
            raise UnsupportedError(
                f"device '{header.idstr}' was saved before RAM: its length is not known",
                offset=at,
                section=header.idstr,
            )
        with self._located(at, header.idstr):
            self._target.load_early_device(header, self._reader)
        self._footer(header.section_id)

    def _without_bitmaps(self, at: int) -> UnsupportedError:
        self._reader.u8("a section")
        return UnsupportedError(
            "a background snapshot, for which QEMU writes no bitmaps: nobody knows which pages are "
            "in the file",
            capability=Capability.BACKGROUND_SNAPSHOT,
            offset=at,
            section=SectionHeader.read(self._reader).idstr,
        )

    def _continue_section(self, at: int, kind: SectionType) -> None:
        section_id = self._reader.u32("a section header")
        if self._ram is None or section_id != self._ram_id:
            raise self._reader.error(f"section {section_id} was never started", offset=at)
        self._reader.section = RAM_IDSTR
        self._ram.load_payload()
        self._footer(self._ram_id)
        self._ram_continued = True
        self._ram_ended = kind == SectionType.END
        if self._ram_ended and self._lanes is not None:
            self._lanes.finish()

    def _footer(self, expected: int) -> None:
        reader = self._reader
        at = reader.offset
        reader.need(1, "what follows a section")
        found = reader.peek() == SectionType.FOOTER
        if self._footers is None:
            self._footers = found
        if found != self._footers:
            raise reader.error(f"footer of section {expected} is missing", offset=at)
        if found:
            reader.u8("a footer")
            section_id = reader.u32("a footer")
            if section_id != expected:
                raise reader.error(
                    f"footer of section {section_id} where {expected} ends", offset=at
                )

    def _command(self, at: int) -> None:
        self._obey(Command.read(self._reader), at)

    def _obey(self, command: Command, at: int) -> None:
        """Do what a command says, which stands at ``at``."""
        if command.type == CommandType.SWITCHOVER_START:
            self._target.switchover_started()
        elif command.type in _COMMAND_CAPABILITY:
            raise UnsupportedError(
                f"command {command.type.name} is not supported",
                capability=_COMMAND_CAPABILITY[command.type],
                offset=at,
            )
        else:
            self._on_command(command)

    # ---- devices ----------------------------------------------------------------------------

    def _load_devices(self) -> None:
        reader = self._reader
        reader.section = None
        at = reader.offset
        tail = DeviceTail(at, footers=bool(self._footers))
        state = tail.feed(reader.take(MAX_DEVICE_STATE))
        while state is None:
            state = tail.feed(reader.take(MAX_DEVICE_STATE)) if self._more(tail) else tail.finish()
        with self._located(at, None):
            self._target.load_devices(state)

    def _more(self, tail: DeviceTail) -> bool:
        """Wait for more device state; False at the end of the stream."""
        source = self._reader.source
        if source is None or not tail.ends_here():
            return self._reader.fill(1)
        patience, source.timeout = source.timeout, END_SILENCE
        try:
            return self._reader.fill(1)
        except IdleTimeoutError:
            return False
        finally:
            source.timeout = patience
