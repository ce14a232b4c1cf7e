"""What is on the wire, as frozen dataclasses: read from a `StreamReader`, encoded to bytes.

Octet diagrams: docs/wire.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from mig import wire
from mig.errors import StreamError
from mig.mapped import MappedFile, MappedRamHeader, Regions
from mig.stream.reader import StreamReader
from mig.wire import CommandType, RamFlag, ReturnType, SectionType


def counted(text: str | bytes) -> bytes:
    """Return a counted string: one length byte, then the bytes; ValueError past 255."""
    raw = text.encode("ascii") if isinstance(text, str) else text
    if len(raw) > 255:
        raise ValueError(f"counted string of {len(raw)} bytes")
    return bytes([len(raw)]) + raw


# ---- the start of a stream -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileHeader:
    """be32 magic "QEVM", be32 version."""

    version: int = wire.FILE_VERSION

    def encode(self) -> bytes:
        """Return the eight bytes."""
        return struct.pack(">II", wire.FILE_MAGIC, self.version)

    @classmethod
    def read(cls, reader: StreamReader) -> FileHeader:
        """Read and check; StreamError when it is not a stream of version 3."""
        at = reader.offset
        magic = reader.u32("the file header")
        if magic == wire.MULTIFD_MAGIC:
            raise StreamError("this is a multifd channel, not a migration stream", offset=at)
        if magic != wire.FILE_MAGIC:
            raise StreamError(f"not a migration stream: magic {magic:#010x}", offset=at)
        version = reader.u32("the file header")
        if version == wire.FILE_VERSION_COMPAT:
            raise StreamError(
                "stream of version 2, which QEMU has long stopped writing", offset=at + 4
            )
        if version != wire.FILE_VERSION:
            raise StreamError(f"unknown stream version {version}", offset=at + 4)
        return cls(version)


@dataclass(frozen=True, slots=True)
class Configuration:
    """The configuration section: type 0x07, be32 length, machine type name, subsections.

    machine:      resolved machine type, such as ``pc-i440fx-7.2``
    page_bits:    log2 of the target page size, None when the target has only one
    capabilities: those that both sides must agree about, None when the subsection is absent
    uuid:         of the machine, with capability validate-uuid
    """

    machine: str
    page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: UUID | None = None

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        return 1 << (wire.DEFAULT_PAGE_BITS if self.page_bits is None else self.page_bits)

    def encode(self) -> bytes:
        """Return type byte, length, name and subsections, in QEMU's order."""
        name = self.machine.encode("ascii")
        if not 0 < len(name) <= wire.MAX_MACHINE_NAME or not self.machine.isprintable():
            raise ValueError(f"{self.machine!r} cannot be the name of a machine type")
        out = [struct.pack(">BI", SectionType.CONFIGURATION, len(name)), name]
        if self.page_bits is not None:
            body = struct.pack(">I", self.page_bits)
            out.append(self._subsection(wire.SUBSECTION_PAGE_BITS, body))
        if self.capabilities is not None:
            names = b"".join(counted(name) for name in self.capabilities)
            body = struct.pack(">I", len(self.capabilities)) + names
            out.append(self._subsection(wire.SUBSECTION_CAPABILITIES, body))
        if self.uuid is not None:
            out.append(self._subsection(wire.SUBSECTION_UUID, self.uuid.bytes))
        return b"".join(out)

    @staticmethod
    def _subsection(name: str, body: bytes) -> bytes:
        head = struct.pack(">B", SectionType.SUBSECTION) + counted(name)
        return head + struct.pack(">I", wire.SUBSECTION_VERSION) + body

    @classmethod
    def read(cls, reader: StreamReader) -> Configuration:
        """Read what follows the type byte."""
        what = "the configuration section"
        reader.section = "configuration"
        at = reader.offset
        length = reader.u32(what)
        if not 0 < length <= wire.MAX_MACHINE_NAME:
            raise reader.error(f"machine type name of {length} bytes", offset=at)
        machine = reader.as_text(reader.read(length, what), "machine type", at + 4)
        page_bits, capabilities, uuid = None, None, None
        while reader.peek() == SectionType.SUBSECTION:
            at = reader.offset
            reader.u8(what)
            name = reader.text("name of a subsection")
            version = reader.u32(what)
            if version != wire.SUBSECTION_VERSION:
                raise reader.error(f"subsection '{name}' of version {version}", offset=at)
            if name == wire.SUBSECTION_PAGE_BITS:
                page_bits = reader.u32(what)
                if not wire.MIN_PAGE_BITS <= page_bits <= wire.MAX_PAGE_BITS:
                    raise reader.error(f"target page of 2^{page_bits} bytes", offset=at)
            elif name == wire.SUBSECTION_CAPABILITIES:
                capabilities = cls._read_capabilities(reader)
            elif name == wire.SUBSECTION_UUID:
                uuid = UUID(bytes=reader.read(16, what))
            else:
                raise reader.error(f"unknown subsection '{name}'", offset=at)
        reader.section = None
        return cls(machine, page_bits, capabilities, uuid)

    @staticmethod
    def _read_capabilities(reader: StreamReader) -> tuple[str, ...]:
        at = reader.offset
        count = reader.u32("the capabilities")
        if count > wire.MAX_CAPABILITIES:
            raise reader.error(f"{count} capabilities", offset=at)
        return tuple(reader.text("capability") for _ in range(count))


# ---- sections and commands -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """Header of a START or FULL section, without its type byte.

    be32 section_id, counted idstr, be32 instance_id, be32 version_id
    """

    section_id: int
    idstr: str
    instance_id: int
    version_id: int

    def encode(self, kind: SectionType) -> bytes:
        """Return type byte and header."""
        return (
            struct.pack(">BI", kind, self.section_id)
            + counted(self.idstr)
            + struct.pack(">II", self.instance_id, self.version_id)
        )

    @classmethod
    def read(cls, reader: StreamReader) -> SectionHeader:
        """Read what follows the type byte."""
        section_id = reader.u32("a section header")
        idstr = reader.text("idstr of a section")
        reader.section = idstr
        return cls(section_id, idstr, *(reader.u32("a section header") for _ in range(2)))


def encode_continuation(kind: SectionType, section_id: int) -> bytes:
    """Return the header of a PART or END section."""
    return struct.pack(">BI", kind, section_id)


def encode_footer(section_id: int) -> bytes:
    """Return the footer of a section."""
    return struct.pack(">BI", SectionType.FOOTER, section_id)


@dataclass(frozen=True, slots=True)
class Command:
    """Type 0x08, be16 command, be16 length, data."""

    type: CommandType
    data: bytes = b""

    def encode(self) -> bytes:
        """Return type byte, header and data."""
        return struct.pack(">BHH", SectionType.COMMAND, self.type, len(self.data)) + self.data

    @classmethod
    def ping(cls, value: int) -> Command:
        """Return a PING, which is answered by a PONG of the same value."""
        return cls(CommandType.PING, struct.pack(">I", value))

    @classmethod
    def postcopy_advise(cls, page_sizes: int, page_size: int) -> Command:
        """Return what announces postcopy.

        page_sizes: of all blocks' host pages, or-ed; page_size: of the target; all in bytes
        """
        return cls(CommandType.POSTCOPY_ADVISE, struct.pack(">QQ", page_sizes, page_size))

    @classmethod
    def discard(cls, idstr: str, ranges: Sequence[tuple[int, int]]) -> Command:
        """Return what has parts of a block dropped: (offset, length) in bytes, 12 at most."""
        head = bytes([wire.DISCARD_VERSION]) + counted(idstr) + b"\0"
        body = b"".join(struct.pack(">QQ", start, length) for start, length in ranges)
        return cls(CommandType.POSTCOPY_RAM_DISCARD, head + body)

    @classmethod
    def packaged(cls, nbytes: int) -> Command:
        """Return what announces ``nbytes`` bytes of nested stream, which follow it."""
        return cls(CommandType.PACKAGED, struct.pack(">I", nbytes))

    @classmethod
    def recv_bitmap(cls, idstr: str) -> Command:
        """Return what asks for the bitmap of the pages of a block that were received."""
        return cls(CommandType.RECV_BITMAP, counted(idstr))

    @property
    def value(self) -> int:
        """The be32 that PING and PACKAGED carry."""
        value: int = struct.unpack(">I", self.data)[0]
        return value

    @classmethod
    def read(cls, reader: StreamReader) -> Command:
        """Read what follows the type byte; StreamError on an unknown command or length."""
        at = reader.offset
        number, length = reader.u16("a command"), reader.u16("a command")
        try:
            kind = CommandType(number)
        except ValueError:
            raise reader.error(f"unknown command {number}", offset=at) from None
        fixed = wire.COMMAND_LENGTH[kind]
        if fixed is not None and length != fixed:
            raise reader.error(f"command {kind.name} of {length} bytes, not {fixed}", offset=at)
        return cls(kind, reader.read(length, "a command"))


# ---- the return path -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReturnMessage:
    """be16 type, be16 length, data: a message on the return path."""

    type: ReturnType
    data: bytes = b""

    def encode(self) -> bytes:
        """Return header and data."""
        return struct.pack(">HH", self.type, len(self.data)) + self.data

    @classmethod
    def shut(cls, error: int) -> ReturnMessage:
        """Return the last message of a destination; ``error`` 0 says that all is loaded."""
        return cls(ReturnType.SHUT, struct.pack(">I", error))

    @classmethod
    def pong(cls, value: int) -> ReturnMessage:
        """Return the answer to PING ``value``."""
        return cls(ReturnType.PONG, struct.pack(">I", value))

    @property
    def pages(self) -> tuple[str | None, int, int]:
        """What REQ_PAGES_ID and REQ_PAGES ask for: block (None: as before), offset and length.

        ValueError when there is no name where one is announced.
        """
        if len(self.data) < 12:
            raise ValueError(f"only {len(self.data)} bytes")
        start, length = struct.unpack_from(">QI", self.data)
        if self.type == ReturnType.REQ_PAGES:
            return None, start, length
        return self._name(12), start, length

    @property
    def block(self) -> str:
        """The block whose RECV_BITMAP follows; ValueError when none is named."""
        return self._name(0)

    def _name(self, at: int) -> str:
        name = self.data[at + 1 :]
        if len(self.data) <= at or len(name) != self.data[at] or not name:
            raise ValueError(f"{self.type.name} does not name a block")
        return name.decode("ascii")

    @property
    def value(self) -> int:
        """The be32 that SHUT, PONG and RESUME_ACK carry."""
        value: int = struct.unpack(">I", self.data)[0]
        return value

    @classmethod
    def read(cls, reader: StreamReader) -> ReturnMessage:
        """Read one message; StreamError on an unknown type or a wrong length."""
        at = reader.offset
        number, length = reader.u16("a return message"), reader.u16("a return message")
        try:
            kind = ReturnType(number)
        except ValueError:
            raise reader.error(f"unknown return-path message {number}", offset=at) from None
        fixed = wire.RETURN_LENGTH[kind]
        if (fixed is not None and length != fixed) or length > wire.MAX_RETURN_MESSAGE:
            raise reader.error(f"return-path message {kind.name} of {length} bytes", offset=at)
        return cls(kind, reader.read(length, "a return message"))


# ---- RAM -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One entry of the block list.

    counted idstr, be64 used_length (bytes), [be64 host_page_size], [be64 address], [header of
    mapped-ram]

    host_page_size: bytes of the pages it is made of where these are not the host's, in a stream
             with postcopy-ram; else None
    address: where it stands in guest-physical memory, in a stream with x-ignore-shared; None in
             any other
    mapped:  where its pages are, in a file with mapped-ram; else None
    """

    idstr: str
    used_length: int
    address: int | None = None
    host_page_size: int | None = None
    mapped: MappedRamHeader | None = None

    def npages(self, page_size: int) -> int:
        """Return the number of target pages."""
        return self.used_length // page_size

    def encode(self) -> bytes:
        """Return the entry."""
        more = [x for x in (self.host_page_size, self.address) if x is not None]
        entry = counted(self.idstr) + struct.pack(f">{1 + len(more)}Q", self.used_length, *more)
        return entry if self.mapped is None else entry + self.mapped.encode()

    @classmethod
    def read(
        cls, reader: StreamReader, page_size: int, *, addresses: bool, host_pages: bool
    ) -> BlockInfo:
        """Read one entry, with what ``addresses`` and ``host_pages`` say may be there.

        A header of mapped-ram is left to the BlockList, which knows what else is in the file.
        """
        idstr = reader.text("name of a RAM block")
        used_length = reader.u64("the block list")
        host_page_size = cls._read_host_page_size(reader, page_size) if host_pages else None
        address = reader.u64("the block list") if addresses else None
        return cls(idstr, used_length, address, host_page_size)

    @staticmethod
    def _read_host_page_size(reader: StreamReader, page_size: int) -> int | None:
        """The page size, if one follows: its first byte is 0, as no name's is.

        The word of a RAM record may begin so, too, but always has flags in its low bits.
        """
        reader.need(8, "the block list")
        start, _ = reader.window
        value: int = struct.unpack_from(">Q", reader.buffer, start)[0]
        if value >> 56 or value % page_size or value & (value - 1) or not value:
            return None
        return reader.u64("the block list")


@dataclass(frozen=True, slots=True)
class BlockList:
    """The MEM_SIZE record: be64 total | MEM_SIZE, then blocks until the total is used up."""

    blocks: tuple[BlockInfo, ...] = field(default_factory=tuple)

    @property
    def total(self) -> int:
        """Sum of the blocks' lengths in bytes."""
        return sum(block.used_length for block in self.blocks)

    @property
    def _word(self) -> bytes:
        return struct.pack(">Q", self.total | RamFlag.MEM_SIZE)

    def encode(self) -> bytes:
        """Return word and list."""
        return self._word + b"".join(block.encode() for block in self.blocks)

    def laid_out(self, at: int, page_size: int) -> BlockList:
        """Return this list with headers of mapped-ram, as QEMU places them.

        at: offset of the file where the word is
        """
        blocks = []
        at += len(self._word)
        for block in self.blocks:
            at += len(replace(block, mapped=None).encode())
            mapped = MappedRamHeader.lay_out(at, block.used_length, page_size)
            blocks.append(replace(block, mapped=mapped))
            at = mapped.regions(block.used_length)[1][1]
        return BlockList(tuple(blocks))

    def pieces(self, at: int) -> tuple[list[tuple[int, bytes]], int]:
        """Return what `encode` does of a list that is laid out, in pieces with their places.

        Those are offsets of the file; the last result is where the stream goes on.
        """
        pieces, piece = [], self._word
        for block in self.blocks:
            assert block.mapped is not None
            pieces.append((at, piece + block.encode()))
            at, piece = block.mapped.regions(block.used_length)[1][1], b""
        if piece:
            pieces.append((at, piece))
            at += len(piece)
        return pieces, at

    @classmethod
    def read(
        cls,
        reader: StreamReader,
        total: int,
        page_size: int,
        *,
        addresses: bool = False,
        host_pages: bool = False,
        mapped: MappedFile | None = None,
    ) -> BlockList:
        """Read the list that follows a MEM_SIZE word of ``total`` bytes.

        addresses: whether it is one with addresses (capability x-ignore-shared)
        host_pages: whether blocks may name the size of their pages (capability postcopy-ram)
        mapped: the file it is in, when that is one with mapped-ram
        """
        at = reader.offset
        if total > wire.MAX_RAM_BYTES:
            raise reader.error(f"{total} bytes of RAM are past the limit", offset=at)
        blocks: dict[str, BlockInfo] = {}
        regions = None if mapped is None else Regions(reader, mapped)
        left = total
        while left:
            at = reader.offset
            block = BlockInfo.read(reader, page_size, addresses=addresses, host_pages=host_pages)
            if len(blocks) == wire.MAX_RAM_BLOCKS:
                raise reader.error("too many RAM blocks", offset=at)
            if block.idstr in blocks:
                raise reader.error(f"RAM block '{block.idstr}' is listed twice", offset=at)
            if block.used_length > left or block.used_length % page_size:
                raise reader.error(
                    f"RAM block '{block.idstr}' of {block.used_length} bytes "
                    f"(pages of {page_size}, {left} bytes of the total left)",
                    offset=at,
                )
            if regions is not None:
                header = regions.read(
                    block.idstr, block.used_length, page_size, may_be_left_out=addresses
                )
                block = replace(block, mapped=header)
            blocks[block.idstr] = block
            left -= block.used_length
        if regions is not None:
            regions.check_overlaps()
        return cls(tuple(blocks.values()))


# ---- multifd ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MultifdInit:
    """What introduces a channel of multifd: be32 magic, be32 1, uuid, u8 channel, 39 zero bytes.

    uuid: 16 bytes, all zero for a machine without one
    """

    channel: int
    uuid: bytes

    @classmethod
    def read(cls, reader: StreamReader) -> MultifdInit:
        """Read all of it; StreamError when it is something else."""
        what = "the start of a multifd channel"
        at = reader.offset
        magic, version = reader.u32(what), reader.u32(what)
        if magic != wire.MULTIFD_MAGIC or version != wire.MULTIFD_VERSION:
            raise reader.error(f"multifd channel of magic {magic:#x}, version {version}", offset=at)
        uuid, channel = reader.read(16, what), reader.u8(what)
        reader.read(wire.MULTIFD_INIT - 25, what)
        return cls(channel, uuid)
