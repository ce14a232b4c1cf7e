"""What the commands of postcopy carry, and the bitmaps of its recovery. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mig import _core
from mig.errors import StreamError
from mig.records import Command, ReturnMessage, counted
from mig.savevm.devices import DeviceState, cut_by_footers, footer_walk
from mig.stream.reader import StreamReader
from mig.wire import DISCARD_VERSION, RECV_BITMAP_END, CommandType, ReturnType, SectionType

_RANGE = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Advise:
    """POSTCOPY_ADVISE: be64 page_sizes, be64 target_page.

    page_sizes:  every size of host page that a block of the source has, or-ed together
    target_page: bytes
    """

    page_sizes: int
    target_page: int

    def encode(self) -> bytes:
        """Return the command."""
        data = struct.pack(">QQ", self.page_sizes, self.target_page)
        return Command(CommandType.POSTCOPY_ADVISE, data).encode()

    @classmethod
    def parse(cls, data: bytes) -> Advise | None:
        """Return what the data of the command say, None when RAM is not meant; ValueError."""
        if not data:
            return None
        if len(data) != 16:
            raise ValueError(f"CMD_POSTCOPY_ADVISE invalid length ({len(data)})")
        return cls(*struct.unpack(">QQ", data))


@dataclass(frozen=True, slots=True)
class Discard:
    """POSTCOPY_RAM_DISCARD: u8 version, counted idstr, u8 0, pairs of be64 start, be64 length.

    ranges: (start, length) in bytes: what was sent of it before is not valid any more
    """

    idstr: str
    ranges: tuple[tuple[int, int], ...]

    def encode(self) -> bytes:
        """Return the command."""
        ranges = b"".join(_RANGE.pack(*pair) for pair in self.ranges)
        data = bytes([DISCARD_VERSION]) + counted(self.idstr) + b"\0" + ranges
        return Command(CommandType.POSTCOPY_RAM_DISCARD, data).encode()

    @classmethod
    def parse(cls, data: bytes) -> Discard:
        """Return what the data of the command say; ValueError in QEMU's words."""
        what = "CMD_POSTCOPY_RAM_DISCARD"
        if len(data) < 3:
            raise ValueError(f"{what} invalid length ({len(data)})")
        if data[0] != DISCARD_VERSION:
            raise ValueError(f"{what} invalid version ({data[0]})")
        name, rest = data[2 : 2 + data[1]], data[2 + data[1] :]
        if not name or not name.isascii() or not name.decode().isprintable():
            raise ValueError(f"{what} Failed to read RAMBlock ID")
        if not rest or rest[0]:
            raise ValueError(f"{what} missing nil ({rest[0] if rest else -1})")
        if len(rest) % _RANGE.size != 1:
            raise ValueError(f"{what} invalid length ({len(data)})")
        return cls(name.decode(), tuple(_RANGE.iter_unpack(rest[1:])))


def idstr_of(command: Command) -> str:
    """Return the block that RECV_BITMAP asks about; ValueError."""
    data = command.data
    name = data[1:]
    if not name or data[0] != len(name) or not name.isascii() or not name.decode().isprintable():
        raise ValueError(f"CMD_RECV_BITMAP invalid length ({len(data)})")
    return name.decode()


def encode_received(idstr: str, received: _core.Bitmap) -> bytes:
    """Return the answer to RECV_BITMAP: the message, then outside of it size, bitmap, end mark."""
    bits = received.to_wire()
    message = ReturnMessage(ReturnType.RECV_BITMAP, counted(idstr)).encode()
    return message + struct.pack(">Q", len(bits)) + bits + struct.pack(">Q", RECV_BITMAP_END)


def encode_request(start: int, nbytes: int, idstr: str | None) -> bytes:
    """Return the request of nbytes bytes at ``start`` of a block; None: that of the last one."""
    where = struct.pack(">QI", start, nbytes)
    if idstr is None:
        return ReturnMessage(ReturnType.REQ_PAGES, where).encode()
    return ReturnMessage(ReturnType.REQ_PAGES_ID, where + counted(idstr)).encode()


# ---- the package -----------------------------------------------------------------------------

_RUN = Command(CommandType.POSTCOPY_RUN).encode()
_PING = Command.ping(0).encode()
#: behind the devices of a package; QEMU sends one
_MOST_PINGS = 8


@dataclass(frozen=True, slots=True)
class Package:
    """What PACKAGED carries: LISTEN, the device sections, PINGs, RUN.

    state: the devices and an EOF, as after RAM in a stream without a description
    pings: values, to be answered when the devices are loaded
    """

    state: DeviceState
    pings: tuple[int, ...]

    @classmethod
    def parse(cls, blob: bytes, offset: int, *, footers: bool) -> Package:
        """Take the blob, which stands at ``offset`` of its stream, apart; StreamError."""
        reader = StreamReader(data=blob)
        end = len(blob) - len(_RUN)
        # a guest may have no devices
        before = _leading_commands(reader, offset, end if blob.endswith(_RUN) else len(blob))
        if CommandType.POSTCOPY_LISTEN not in [command.type for command in before]:
            raise StreamError("package without POSTCOPY_LISTEN", offset=offset)
        start = reader.offset
        if end < start or blob[end:] != _RUN:
            raise StreamError("package does not end with POSTCOPY_RUN", offset=offset)
        pings = [command.value for command in before if command.type == CommandType.PING]
        after: list[int] = []
        while not _is_devices(blob[start:end], footers=footers):
            ping = end - len(_PING)
            is_ping = ping >= start and blob[ping : ping + len(_PING) - 4] == _PING[:-4]
            if not is_ping or len(after) == _MOST_PINGS:
                raise StreamError("package holds no whole device sections", offset=offset + start)
            after.insert(0, int.from_bytes(blob[end - 4 : end], "big"))
            end = ping
        raw = blob[start:end] + bytes([SectionType.EOF])
        sections = cut_by_footers(raw) if footers else None
        return cls(DeviceState(offset + start, raw, sections, b""), (*pings, *after))


def _leading_commands(reader: StreamReader, offset: int, end: int) -> list[Command]:
    out = []
    while reader.offset < end and reader.peek() == SectionType.COMMAND:
        at = offset + reader.offset
        reader.u8("a command")
        command = Command.read(reader)
        if command.type not in (CommandType.POSTCOPY_LISTEN, CommandType.PING):
            raise StreamError(f"command {command.type.name} before the devices", offset=at)
        out.append(command)
    return out


def _is_devices(raw: bytes, *, footers: bool) -> bool:
    if not raw:
        return True
    if not footers:
        # nothing but the command tells where the last one ends
        return raw[-len(_PING) : -4] != _PING[:-4]
    return footer_walk(raw + bytes([SectionType.EOF])) == len(raw) + 1
