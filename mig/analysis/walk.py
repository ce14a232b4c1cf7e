"""A walk over a whole stream, which notes everything and goes on behind what is wrong."""

from __future__ import annotations

from typing import Final

from mig.analysis.commands import arguments_of
from mig.analysis.ends import Lengths, Scanner, TooWrongError, find_description
from mig.analysis.ram import RamWalk
from mig.analysis.report import (
    MAX_COMMANDS,
    Analysis,
    CommandItem,
    Finding,
    SectionItem,
    Severity,
)
from mig.errors import StreamError
from mig.mapped import MappedFile
from mig.options.capability import Capability
from mig.records import Command, Configuration, FileHeader, SectionHeader
from mig.savevm.devices import DeviceSection
from mig.savevm.fields import Device, decode_device, decode_state
from mig.savevm.layout import MachineLayout
from mig.savevm.vmdesc import DescriptionError
from mig.stream.reader import StreamReader
from mig.wire import (
    DEFAULT_PAGE_BITS,
    MAX_DESCRIPTION,
    MAX_DEVICE_STATE,
    MAX_PACKAGE,
    RAM_IDSTR,
    RAM_VERSION,
    CommandType,
    SectionType,
)

#: sections that a stream can have; more would only fill memory
MAX_SECTIONS: Final = 100_000


class _Stop(Exception):  # noqa: N818 - nothing is wrong that is not noted already
    """There is nothing to go on with."""


class StreamWalk:
    """Walks over one stream into an `Analysis`.

    reader: of the stream, in memory (a mapped file) or unpacked as it is read
    file:   where the stream is in its file, None when that is packed
    """

    def __init__(
        self, reader: StreamReader, analysis: Analysis, file: MappedFile | None = None
    ) -> None:
        self._reader = reader
        self._scanner = Scanner(reader)
        self._out = analysis
        self._file = file
        self._in_memory = reader.source is None
        self._lengths: Lengths | None = None
        # offset of the EOF in front of the description, where that was found at the end
        self._end_of_devices: int | None = None
        self._page_size = 1 << DEFAULT_PAGE_BITS
        self._capabilities: tuple[str, ...] = ()
        self._host_pages = False
        self._ram: RamWalk | None = None
        self._ram_ended = False
        self._footers: bool | None = None
        self._sections: dict[int, SectionItem] = {}
        self._package_end: int | None = None

    def run(self) -> None:
        """Walk to the end, or as far as it goes. Raises only what the reading itself does."""
        try:
            self._find_description()
            self._start()
            while self._item():
                pass
            self._behind_eof()
        except _Stop:
            pass
        except StreamError as error:
            self._found(error)
        out = self._out
        out.page_size = self._page_size
        out.nbytes = self._reader.offset
        if self._ram is not None:
            out.ram = self._ram.summary()

    # ---- findings ---------------------------------------------------------------------------

    def _found(self, error: StreamError, severity: Severity = Severity.ERROR) -> None:
        self._out.add(Finding(severity, error.message, error.offset, error.section, error.block))

    def _warn(self, message: str, offset: int | None, section: str | None = None) -> None:
        self._out.add(Finding(Severity.WARNING, message, offset, section))

    # ---- start ------------------------------------------------------------------------------

    def _find_description(self) -> None:
        """It stands at the end, and says how long devices are that come before RAM, too."""
        if not self._in_memory:
            return
        start, end = self._reader.window
        found = find_description(memoryview(self._reader.buffer)[start:end])
        if found is not None:
            self._end_of_devices = self._reader.offset + found[0]
            self._take_description(found[1], self._end_of_devices + 1)

    def _take_description(self, text: bytes, offset: int) -> None:
        self._out.description_nbytes = len(text)
        try:
            self._lengths = Lengths(text)
        except DescriptionError as error:
            self._out.add(Finding(Severity.ERROR, str(error), offset, "description"))

    def _start(self) -> None:
        reader = self._reader
        FileHeader.read(reader)
        if reader.peek() != SectionType.CONFIGURATION:
            return
        at = reader.offset
        reader.u8("the configuration section")
        try:
            self._take_configuration(Configuration.read(reader), at + 1)
        except StreamError as error:
            self._found(error)
            self._resume_at(self._scanner.ram_start(at))

    def _take_configuration(self, configuration: Configuration, offset: int) -> None:
        self._out.configuration = configuration
        self._capabilities = configuration.capabilities or ()
        if configuration.page_bits is not None:
            self._page_size = configuration.page_size
        if Capability.MAPPED_RAM in self._capabilities:
            self._out.format = "mapped-ram"
            if self._file is None:
                raise StreamError("a stream with mapped-ram has to be a file itself", offset=0)
        described = self._layout.configuration
        if described is not None:
            payload = configuration.encode()[1:]
            try:
                self._out.configuration_state = decode_state(
                    described, payload, section="configuration", offset=offset
                )
            except StreamError as error:
                self._found(error)

    @property
    def _layout(self) -> MachineLayout:
        return MachineLayout(()) if self._lengths is None else self._lengths.layout

    # ---- items ------------------------------------------------------------------------------

    def _item(self) -> bool:
        """Go over one section or command; False behind EOF."""
        reader = self._reader
        reader.section = None
        at = reader.offset
        if self._package_end is not None and at >= self._package_end:
            if at > self._package_end:
                text = f"the package ends at {self._package_end:#x}, inside of what stands here"
                self._found(StreamError(text, offset=at))
            self._package_end = None
        try:
            return self._one_item(at)
        except TooWrongError:
            raise
        except StreamError as error:
            # also where the stream seems to end: a length that is wrong leads there
            self._found(error)
            self._resume(at)
            return True

    def _one_item(self, at: int) -> bool:
        kind = self._reader.u8("the stream, before its end")
        if kind in (SectionType.START, SectionType.FULL):
            self._begin_section(at, SectionType(kind))
        elif kind in (SectionType.PART, SectionType.END):
            self._continue_section(at, SectionType(kind))
        elif kind == SectionType.COMMAND:
            self._command(at)
        elif kind == SectionType.EOF:
            return False
        else:
            known = kind in set(SectionType)
            what = f"{SectionType(kind).name} in the wrong place" if known else "unknown"
            raise self._reader.error(f"section type {kind:#04x} is {what}", offset=at)
        return True

    def _begin_section(self, at: int, kind: SectionType) -> None:
        header = SectionHeader.read(self._reader)
        if header.section_id in self._sections:
            raise self._reader.error(
                f"section {header.section_id} is started twice, first at "
                f"{self._sections[header.section_id].offset:#x}",
                offset=at,
            )
        if len(self._sections) == MAX_SECTIONS:
            raise StreamError("too many sections", offset=at)
        item = SectionItem(
            kind.name.lower(),
            header.section_id,
            header.idstr,
            header.instance_id,
            header.version_id,
            at,
            packaged=self._package_end is not None,
        )
        self._out.sections.append(item)
        self._sections[header.section_id] = item
        if header.idstr == RAM_IDSTR and kind == SectionType.START:
            self._start_ram(item)
        else:
            self._opaque(item)
        item.nbytes = self._reader.offset - at

    def _start_ram(self, item: SectionItem) -> None:
        if self._ram is not None:
            raise self._reader.error("RAM is started twice", offset=item.offset)
        if item.version_id != RAM_VERSION:
            self._found(self._reader.error(f"RAM of version {item.version_id}", offset=item.offset))
        mapped_ram = self._file if Capability.MAPPED_RAM in self._capabilities else None
        self._ram = RamWalk(
            self._reader,
            self._page_size,
            self._out.add,
            mapped=self._file is not None,
            addresses=Capability.X_IGNORE_SHARED in self._capabilities,
            host_pages=self._host_pages,
            mapped_ram=mapped_ram,
        )
        self._ram_payload(item)

    def _ram_payload(self, item: SectionItem) -> None:
        assert self._ram is not None
        self._ram.parts += 1
        self._ram.walk_payload()
        self._footer(item)

    def _continue_section(self, at: int, kind: SectionType) -> None:
        reader = self._reader
        section_id = reader.u32("a section header")
        item = self._sections.get(section_id)
        if item is None:
            raise reader.error(f"section {section_id} was never started", offset=at)
        reader.section = item.idstr
        if item.kind == "full":
            raise reader.error(f"section {section_id} has no parts", offset=at)
        item.parts += 1
        if item.idstr != RAM_IDSTR:
            self._opaque(item)
        else:
            if self._ram_ended:
                self._found(reader.error("RAM goes on behind its end", offset=at))
            self._ram_payload(item)
            self._ram_ended = self._ram_ended or kind == SectionType.END
        item.nbytes += reader.offset - at
        if self._ram_ended and not self._in_memory:
            self._unpack_rest()

    def _footer(self, item: SectionItem) -> None:
        reader = self._reader
        at = reader.offset
        found = reader.peek() == SectionType.FOOTER
        if self._footers is None:
            self._footers = found
        if found != self._footers:
            self._found(reader.error(f"footer of section {item.section_id} is missing", offset=at))
        if found:
            reader.u8("a footer")
            section_id = reader.u32("a footer")
            if section_id != item.section_id:
                text = f"footer of section {section_id} where {item.section_id} ends"
                self._found(reader.error(text, offset=at))

    # ---- devices ----------------------------------------------------------------------------

    def _opaque(self, item: SectionItem) -> None:
        """A payload that only its device, or a description, understands."""
        reader = self._reader
        begin = reader.offset
        described = item.kind == "full"
        length = self._described_length(item, begin) if described else None
        if length is None:
            length = self._length_by_footer(item, begin)
        payload = reader.read(length, "the payload of a section")
        self._footer(item)
        if not described:
            return
        section = DeviceSection(
            item.section_id,
            item.idstr,
            item.instance_id,
            item.version_id,
            payload,
            begin - DeviceSection(0, item.idstr, 0, 0, b"", 0).payload_offset,
        )
        try:
            item.device = decode_device(section, self._layout)
        except StreamError as error:
            self._found(error)
            item.device = Device(section, None)

    def _described_length(self, item: SectionItem, begin: int) -> int | None:
        """As the description has it, if a footer stands where it says."""
        length = None if self._lengths is None else self._lengths.of(item.idstr, item.instance_id)
        if length is None:
            if self._lengths is not None:
                self._warn("device is not in the description", item.offset, item.idstr)
            return None
        tail = self._scanner.bytes_at(begin + length, 5)
        if self._footers is False or tail == self._footer_bytes(item):
            return length
        self._found(
            StreamError(
                f"footer of section {item.section_id} is missing after {length} bytes of payload",
                offset=begin + length,
                section=item.idstr,
            )
        )
        return None

    @staticmethod
    def _footer_bytes(item: SectionItem) -> bytes:
        return bytes([SectionType.FOOTER]) + item.section_id.to_bytes(4, "big")

    def _length_by_footer(self, item: SectionItem, begin: int) -> int:
        """Nothing says it: up to a footer of its own behind which something can follow."""
        limit = self._package_end
        if limit is None:
            limit = begin + MAX_DEVICE_STATE
        found = None
        if self._footers is not False:
            end = self._scanner.footer_of(item.section_id, begin, self._sections, limit)
            found = None if end is None else end - begin
        if found is None:
            raise StreamError(
                "nothing tells where this section ends", offset=begin, section=item.idstr
            )
        return found

    # ---- commands ---------------------------------------------------------------------------

    def _command(self, at: int) -> None:
        reader, out = self._reader, self._out
        command = Command.read(reader)
        out.ncommands += 1
        packaged = self._package_end is not None
        try:
            arguments = arguments_of(command)
        except ValueError as error:
            self._found(StreamError(str(error), offset=at))
            arguments = {"data": command.data.hex()}
        if len(out.commands) < MAX_COMMANDS:
            out.commands.append(CommandItem(command.type.name, at, arguments, packaged))
        if command.type == CommandType.POSTCOPY_ADVISE and command.data:
            self._host_pages = True
        elif command.type == CommandType.PACKAGED:
            if packaged or command.value > MAX_PACKAGE:
                raise StreamError(f"package of {command.value} bytes in the wrong place", offset=at)
            reader.need(command.value, "the package")
            self._package_end = reader.offset + command.value

    # ---- going on ---------------------------------------------------------------------------

    def _resume(self, at: int) -> None:
        """Go on behind what is wrong with the item at an offset."""
        reader, scanner = self._reader, self._scanner
        item = self._out.sections[-1] if self._out.sections else None
        if self._ram is None and item is None:
            self._resume_at(scanner.ram_start(max(at, reader.offset)))
            return
        candidates = [item] if item is not None else []
        candidates += [s for s in self._sections.values() if s.idstr == RAM_IDSTR and s is not item]
        if not self._footers:
            # nothing marks where a section ends, except for EOF and description
            self._resume_at(self._end_of_devices)
            return
        nearest = None
        for section in candidates:
            found = scanner.footer_of(section.section_id, reader.offset, self._sections, nearest)
            nearest = nearest if found is None else found
        self._resume_at(self._end_of_devices if nearest is None else nearest + 5)

    def _resume_at(self, offset: int | None) -> None:
        reader = self._reader
        if offset is None or offset < reader.offset:
            raise _Stop
        nbytes = offset - reader.offset
        self._warn(f"{nbytes} bytes could not be understood", reader.offset)
        if self._ram is not None:
            self._ram.lose_block()
        reader.advance(nbytes)

    def _unpack_rest(self) -> None:
        """What is behind RAM of a packed stream: small enough to be had in memory."""
        reader = self._reader
        offset = reader.offset
        # the buffer becomes as long as what is asked for
        while reader.fill(2 * reader.available + 1):
            if reader.available > MAX_DEVICE_STATE:
                raise StreamError("device state is past the limit", offset=offset)
        rest = StreamReader(data=reader.take(MAX_DEVICE_STATE))
        rest.went_past(offset)
        self._reader, self._scanner, self._in_memory = rest, Scanner(rest), True
        if self._ram is not None:
            self._ram.move_to(rest, mapped=False)
        self._find_description()

    # ---- end --------------------------------------------------------------------------------

    def _behind_eof(self) -> None:
        reader, out = self._reader, self._out
        if not self._ram_ended:
            self._found(StreamError("the stream ends before RAM does", offset=reader.offset - 1))
        if reader.peek() == SectionType.VMDESCRIPTION:
            at = reader.offset
            reader.u8("the description")
            length = reader.u32("the description")
            if length > MAX_DESCRIPTION:
                raise StreamError(f"description of {length} bytes", offset=at)
            text = reader.read(length, "the description")
            if self._lengths is None:
                self._take_late_description(text, at)
        out.complete = True
        out.nbytes = reader.offset
        if reader.fill(1):
            self._warn("more bytes follow the end of the stream", reader.offset)

    def _take_late_description(self, text: bytes, at: int) -> None:
        """It does not end the file: the devices have been cut by their footers."""
        self._take_description(text, at)
        for item in self._out.sections:
            if item.device is not None:
                try:
                    item.device = decode_device(item.device.section, self._layout)
                except StreamError as error:
                    self._found(error)
