"""Packets of multifd, field by field, and the compressed streams they carry."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import zstandard

MAGIC, VERSION = 0x11223344, 1
SYNC, ZLIB, ZSTD, DEVICE_STATE = 1, 2, 4, 64
DATA = 512 << 10
HEADER = 320

CODEC_FLAG = {"none": 0, "zlib": ZLIB, "zstd": ZSTD}


def max_pages(page_size: int) -> int:
    return max(1, DATA // page_size)


def init(channel: int, uuid: bytes = bytes(16), *, magic: int = MAGIC, version: int = 1) -> bytes:
    return struct.pack(">II16sB39x", magic, version, uuid, channel)


@dataclass
class Packet:
    """A packet and its data; what is None follows from the other fields."""

    block: bytes = b""
    normal: list[int] = field(default_factory=list)  # offsets
    zero: list[int] = field(default_factory=list)
    flags: int = 0
    number: int = 0
    data: bytes = b""
    page_size: int = 4096
    magic: int = MAGIC
    version: int = VERSION
    pages_alloc: int | None = None
    nnormal: int | None = None
    nzero: int | None = None
    next_size: int | None = None

    def encode(self) -> bytes:
        def given(value: int | None, otherwise: int) -> int:
            return otherwise if value is None else value

        out = struct.pack(
            ">IIIIIIQI",
            self.magic,
            self.version,
            self.flags,
            given(self.pages_alloc, max_pages(self.page_size)),
            given(self.nnormal, len(self.normal)),
            given(self.next_size, len(self.data)),
            self.number,
            given(self.nzero, len(self.zero)),
        )
        out += bytes(64 - len(out))
        out += self.block + bytes(256 - len(self.block))
        offsets = self.normal + self.zero
        offsets += [0] * (max_pages(self.page_size) - len(offsets))
        for offset in offsets:
            out += struct.pack(">Q", offset)
        return out + self.data


def sync(page_size: int = 4096, **fields: object) -> bytes:
    return Packet(flags=SYNC, page_size=page_size, **fields).encode()  # type: ignore[arg-type]


@dataclass
class Channel:
    """What one channel has said: its introduction and its packets."""

    number: int
    uuid: bytes
    packets: list[Packet]


def decode(data: bytes, page_size: int = 4096) -> Channel:
    """Take a channel apart, which must be in order and complete."""
    magic, version, uuid, number = struct.unpack_from(">II16sB", data)
    assert (magic, version) == (MAGIC, VERSION)
    assert data[25:64] == bytes(39)
    at, packets = 64, []
    nbytes = HEADER + 8 * max_pages(page_size)
    while at < len(data):
        head = data[at : at + nbytes]
        assert len(head) == nbytes, "it ends inside a packet"
        magic, version, flags, alloc, nnormal, next_size, count, nzero = struct.unpack_from(
            ">IIIIIIQI", head
        )
        assert (magic, version, alloc) == (MAGIC, VERSION, max_pages(page_size))
        assert head[36:64] == bytes(28)
        block, _, rest = head[64:320].partition(b"\0")
        assert not rest.strip(b"\0")
        offsets = list(struct.unpack_from(f">{max_pages(page_size)}Q", head, HEADER))
        assert not any(offsets[nnormal + nzero :])
        body = data[at + nbytes : at + nbytes + next_size]
        assert len(body) == next_size, "it ends inside the data of a packet"
        packets.append(
            Packet(
                block,
                offsets[:nnormal],
                offsets[nnormal : nnormal + nzero],
                flags,
                count,
                body,
                page_size,
            )
        )
        at += nbytes + next_size
    return Channel(number, uuid, packets)


class Encoder:
    """The codec's stream of one channel; every packet's data end with a flush."""

    def __init__(self, compression: str, level: int = 1) -> None:
        self._flush = None
        if compression == "zlib":
            stream = zlib.compressobj(level)
            self._put, self._flush = stream.compress, lambda: stream.flush(zlib.Z_SYNC_FLUSH)
        elif compression == "zstd":
            zstd = zstandard.ZstdCompressor(level=level).compressobj()
            self._put = zstd.compress
            self._flush = lambda: zstd.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    def encode(self, data: bytes) -> bytes:
        return data if self._flush is None else self._put(data) + self._flush()


class Decoder:
    """The other end of it."""

    def __init__(self, compression: str) -> None:
        self._stream = {
            "none": lambda: None,
            "zlib": zlib.decompressobj,
            "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
        }[compression]()

    def decode(self, data: bytes) -> bytes:
        return data if self._stream is None else self._stream.decompress(data)


def pages_of(channel: Channel, compression: str) -> list[list[tuple[bytes, int, bytes]]]:
    """(block, offset, contents) of the pages, by the number of SYNCs before them."""
    decoder, out = Decoder(compression), [[]]
    for packet in channel.packets:
        size = packet.page_size
        if packet.normal:
            assert packet.flags & ~SYNC == CODEC_FLAG[compression]
            plain = decoder.decode(packet.data)
            assert len(plain) == size * len(packet.normal)
            for i, offset in enumerate(packet.normal):
                out[-1].append((packet.block, offset, plain[i * size : (i + 1) * size]))
        else:
            assert not packet.data
        for offset in packet.zero:
            out[-1].append((packet.block, offset, bytes(size)))
        if packet.flags & SYNC:
            out.append([])
    return out
