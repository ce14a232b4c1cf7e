"""The data of an adaptive packet, and what a whole migration by such packets makes of memory."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import zstandard

from reference import multifd, xbzrle
from reference.multifd import Channel, Packet

RAW, DELTA, ZSTD = range(3)
NAMES = ("raw", "delta", "zstd")
FLAG = 0x1F << 1

Pages = list[tuple[int, bytes]]  # method; contents, of a DELTA page its encoding


def encode(pages: Pages, coder: multifd.Encoder | None = None) -> bytes:
    """The data of a packet; coder: the channel's, a fresh one when it is None."""
    coder = coder or multifd.Encoder("zstd")
    deltas = [body for method, body in pages if method == DELTA]
    out = bytes(method for method, _ in pages)
    out += b"".join(struct.pack(">H", len(body)) for body in deltas) + b"".join(deltas)
    plain = b"".join(body for method, body in pages if method == ZSTD)
    if plain:
        coded = coder.encode(plain)
        out += struct.pack(">I", len(coded)) + coded
    return out + b"".join(body for method, body in pages if method == RAW)


def decode(packet: Packet, zstd: object) -> Pages:
    """The other way round; zstd: decompressobj of the channel."""
    data, n, size = packet.data, len(packet.normal), packet.page_size
    methods, at = data[:n], n
    assert len(methods) == n
    assert set(methods) <= {RAW, DELTA, ZSTD}
    ndelta = methods.count(DELTA)
    lengths = struct.unpack_from(f">{ndelta}H", data, at)
    at += 2 * ndelta
    deltas = []
    for length in lengths:
        assert 0 < length < size
        deltas.append(data[at : at + length])
        at += length
    plain = b""
    if nzstd := methods.count(ZSTD):
        (nbytes,) = struct.unpack_from(">I", data, at)
        plain = zstd.decompress(data[at + 4 : at + 4 + nbytes])  # type: ignore[attr-defined]
        assert len(plain) == nzstd * size
        at += 4 + nbytes
    raw = data[at:]
    assert len(raw) == methods.count(RAW) * size
    bodies = {
        RAW: iter([raw[i : i + size] for i in range(0, len(raw), size)]),
        DELTA: iter(deltas),
        ZSTD: iter([plain[i : i + size] for i in range(0, len(plain), size)]),
    }
    return [(method, next(bodies[method])) for method in methods]


@dataclass
class Model:
    """Memory that starts as zeros, and what has been done to it."""

    memory: dict[bytes, bytearray]
    page_size: int
    methods: Counter[str] = field(default_factory=Counter)

    def _put(self, block: bytes, offset: int, method: int, body: bytes) -> None:
        page = self.memory[block][offset : offset + self.page_size]
        if method == DELTA:
            xbzrle.decode(body, page)
        else:
            page[:] = body
        self.memory[block][offset : offset + self.page_size] = page

    def run(
        self, channels: list[Channel], mains: list[Iterable[tuple[bytes, int]]]
    ) -> None:
        """Lay down all of it; mains: zero pages of the main stream, by SYNCs before them.

        Between two SYNCs no page may come twice: nobody could say which is the newer.
        """
        zstd = {c.number: zstandard.ZstdDecompressor().decompressobj() for c in channels}
        runs: list[list[tuple[int, Packet]]] = [[] for _ in mains]
        for channel in channels:
            at = 0
            for packet in channel.packets:
                runs[at].append((channel.number, packet))
                at += packet.flags & multifd.SYNC
            assert at == len(mains) - 1
        for packets, zeros in zip(runs, mains, strict=True):
            seen: set[tuple[bytes, int]] = set()
            todo = [(block, offset, RAW, bytes(self.page_size)) for block, offset in zeros]
            self.methods["main"] += len(todo)
            for number, packet in packets:
                if packet.flags & ~multifd.SYNC:
                    assert packet.flags == FLAG
                pages = decode(packet, zstd[number]) if packet.normal else []
                for offset, (method, body) in zip(packet.normal, pages, strict=True):
                    self.methods[NAMES[method]] += 1
                    todo.append((packet.block, offset, method, body))
                for offset in packet.zero:
                    self.methods["zero"] += 1
                    todo.append((packet.block, offset, RAW, bytes(self.page_size)))
            for block, offset, method, body in todo:
                assert (block, offset) not in seen, "twice between two SYNCs"
                seen.add((block, offset))
                self._put(block, offset, method, body)
