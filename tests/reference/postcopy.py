"""A source that goes into postcopy, by hand: what it writes, and what it hears."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

from reference import ram, stream

PAGE = 4096
RAM_ID = 2

OPEN_RETURN_PATH, PING, ADVISE, LISTEN, RUN, DISCARD, PACKAGED = 1, 2, 3, 4, 5, 6, 7
RESUME, RECV_BITMAP = 9, 10
SHUT, PONG, REQ_PAGES_ID, REQ_PAGES, BITMAP, RESUME_ACK = 1, 2, 3, 4, 5, 6


def ping(value: int) -> bytes:
    return stream.command(PING, struct.pack(">I", value))


def advise(summary: int = PAGE, target: int = PAGE) -> bytes:
    return stream.command(ADVISE, struct.pack(">QQ", summary, target))


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def discard(idstr: str, *ranges: tuple[int, int]) -> bytes:
    pairs = b"".join(struct.pack(">QQ", *pair) for pair in ranges)
    return stream.command(DISCARD, b"\0" + name(idstr) + b"\0" + pairs)


def start(blocks: dict[str, int], host_pages: dict[str, int] | None = None) -> bytes:
    """The setup section, with sizes of host pages for the blocks that have their own."""
    out = ram.be64(sum(blocks.values()) + ram.MEM_SIZE)
    for idstr, nbytes in blocks.items():
        out += name(idstr) + ram.be64(nbytes)
        if host_pages and idstr in host_pages:
            out += ram.be64(host_pages[idstr])
    section = stream.section(1, RAM_ID, "ram", 0, 4)
    return section + out + ram.eos() + stream.footer(RAM_ID)


def pages(records: list[ram.Record], kind: int = 2) -> bytes:
    """A PART (2) or END (3) section."""
    return stream.ram_more(kind, RAM_ID, ram.encode(records, PAGE)) + stream.footer(RAM_ID)


def package(devices: list[stream.Device], last_ping: bytes | None = None) -> bytes:
    blob = stream.command(LISTEN) + b"".join(device.encode() for device in devices)
    blob += ping(3) if last_ping is None else last_ping
    return packaged(blob + stream.command(RUN))


def packaged(blob: bytes) -> bytes:
    return stream.command(PACKAGED, struct.pack(">I", len(blob))) + blob


def head(blocks: dict[str, int], machine: str = "box", **options) -> bytes:
    """Everything up to the first page."""
    out = stream.header() + stream.configuration(machine)
    out += stream.command(OPEN_RETURN_PATH) + ping(1) + advise(**options.pop("advised", {}))
    return out + start(blocks, **options)


END = pages([], 3) + b"\0"


@dataclass
class Source:
    """One connection; what was heard on its return path is in the order of arrival."""

    sock: socket.socket
    raw: bytearray = field(default_factory=bytearray)
    last_block: str = ""

    @classmethod
    def connect(cls, uri: str) -> Source:
        kind, _, rest = uri.partition(":")
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            sock = socket.create_connection((host, int(port)))
        sock.settimeout(10)
        return cls(sock)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _exactly(self, nbytes: int) -> bytes:
        while len(self.raw) < nbytes:
            got = self.sock.recv(1 << 16)
            if not got:
                raise EOFError(bytes(self.raw))
            self.raw += got
        out = bytes(self.raw[:nbytes])
        del self.raw[:nbytes]
        return out

    def hear(self) -> tuple[int, bytes]:
        """Return type and data of the next message."""
        kind, length = struct.unpack(">HH", self._exactly(4))
        return kind, self._exactly(length)

    def expect(self, kind: int, value: int) -> None:
        assert self.hear() == (kind, struct.pack(">I", value))

    def request(self) -> tuple[str, int, int]:
        """Return block, start and length of the next message, which asks for pages."""
        kind, data = self.hear()
        assert kind in (REQ_PAGES, REQ_PAGES_ID), (kind, data)
        start, length = struct.unpack_from(">QI", data)
        if kind == REQ_PAGES_ID:
            self.last_block = data[13:].decode()
        return self.last_block, start, length

    def bitmap(self, idstr: str) -> list[int]:
        """Ask for what was received of a block; return the pages."""
        self.send(stream.command(RECV_BITMAP, name(idstr)))
        assert self.hear() == (BITMAP, name(idstr))
        (nbytes,) = struct.unpack(">Q", self._exactly(8))
        assert nbytes % 8 == 0
        bits = self._exactly(nbytes)
        assert self._exactly(8) == bytes.fromhex("0123456789abcdef")
        return [i for i in range(nbytes * 8) if bits[i // 8] >> (i % 8) & 1]

    def close(self) -> None:
        self.sock.close()
