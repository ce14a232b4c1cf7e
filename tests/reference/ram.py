"""Records of the `ram` section, byte by byte."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from reference import xbzrle

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE, XBZRLE, COMPRESS = (
    *(0x02, 0x04, 0x08, 0x10, 0x20),
    *(0x40, 0x100),
)


@dataclass(frozen=True)
class Delta:
    """The XBZRLE encoding of a page."""

    encoding: bytes


@dataclass(frozen=True)
class Packed:
    """A page as a zlib stream."""

    stream: bytes


@dataclass(frozen=True)
class Record:
    """A page of a block: its bytes, the byte that it is filled with, or a difference."""

    block: bytes
    page: int
    contents: bytes | int | Delta | Packed

    def expand(self, page_size: int, old: bytes | None = None) -> bytes:
        """What the page holds then; ``old``: what it held before, None for nothing."""
        if isinstance(self.contents, int):
            return bytes([self.contents]) * page_size
        if isinstance(self.contents, Delta):
            page = bytearray(page_size if old is None else old)
            xbzrle.decode(self.contents.encoding, page)
            return bytes(page)
        if isinstance(self.contents, Packed):
            return zlib.decompress(self.contents.stream)
        return self.contents


def be64(value: int) -> bytes:
    out = bytearray()
    for shift in (56, 48, 40, 32, 24, 16, 8, 0):
        out.append((value >> shift) & 0xFF)
    return bytes(out)


def encode_record(record: Record, page_size: int, current: bytes | None) -> bytes:
    """One record; ``current`` is the block that the stream is in."""
    contents = record.contents
    kind = {int: ZERO, Delta: XBZRLE, Packed: COMPRESS}.get(type(contents), PAGE)
    word = record.page * page_size + kind
    if record.block == current:
        out = be64(word + CONTINUE)
    else:
        out = be64(word) + bytes([len(record.block)]) + record.block
    if isinstance(contents, int):
        return out + bytes([contents])
    if isinstance(contents, Delta):
        length = len(contents.encoding)
        return out + bytes([1, length >> 8, length & 0xFF]) + contents.encoding
    if isinstance(contents, Packed):
        return out + be64(len(contents.stream))[4:] + contents.stream
    assert len(contents) == page_size
    return out + contents


def encode(records: list[Record], page_size: int, current: bytes | None = None) -> bytes:
    out = b""
    for record in records:
        out += encode_record(record, page_size, current)
        current = record.block
    return out


def eos() -> bytes:
    return be64(EOS)


def block_list(blocks: dict[str, int], addresses: dict[str, int] | None = None) -> bytes:
    """The MEM_SIZE record of blocks given as {name: bytes}; {name: address} where there are."""
    out = be64(sum(blocks.values()) + MEM_SIZE)
    for name, nbytes in blocks.items():
        out += bytes([len(name)]) + name.encode() + be64(nbytes)
        out += b"" if addresses is None else be64(addresses[name])
    return out


@dataclass(frozen=True)
class Incomplete:
    """A record that is not all there: this many bytes of it are wanted to go on."""

    need: int


@dataclass(frozen=True)
class End:
    """End of the payload at this offset."""

    offset: int


def parse_record(
    data: bytes, at: int, page_size: int, current: bytes | None
) -> tuple[Record, int] | Incomplete | End:
    """The record at offset ``at`` and the offset behind it."""
    left = len(data) - at
    if left < 8:
        return Incomplete(8)
    word = 0
    for byte in data[at : at + 8]:
        word = word * 256 + byte
    flags = word % page_size
    if flags == EOS:
        return End(at + 8)
    head, block = 8, current
    if not flags & CONTINUE:
        if left < 9:
            return Incomplete(9)
        head = 9 + data[at + 8]
        if left < head:
            return Incomplete(head)
        block = data[at + 9 : at + head]
    assert block is not None
    kind = flags & ~CONTINUE
    assert kind in (ZERO, PAGE, XBZRLE, COMPRESS), hex(word)
    if kind == XBZRLE:
        if left < head + 3:
            return Incomplete(head + 3)
        assert data[at + head] == 1
        head, body = head + 3, data[at + head + 1] * 256 + data[at + head + 2]
        if left < head + body:
            return Incomplete(head + body)
        delta = Delta(data[at + head : at + head + body])
        return Record(block, word // page_size, delta), at + head + body
    if kind == COMPRESS:
        if left < head + 4:
            return Incomplete(head + 4)
        head, body = head + 4, int.from_bytes(data[at + head : at + head + 4], "big")
        if left < head + body:
            return Incomplete(head + body)
        return Record(
            block, word // page_size, Packed(data[at + head : at + head + body])
        ), at + head + body
    body = page_size if kind == PAGE else 1
    if left < head + body:
        return Incomplete(head + body)
    contents = data[at + head : at + head + body]
    page = word // page_size
    if kind == ZERO:
        return Record(block, page, contents[0]), at + head + body
    return Record(block, page, contents), at + head + body


def parse(
    data: bytes, page_size: int, current: bytes | None = None
) -> tuple[list[Record], Incomplete | End]:
    """All records up to the first that is incomplete, or the end of the payload."""
    records, at = [], 0
    while True:
        found = parse_record(data, at, page_size, current)
        if isinstance(found, Incomplete | End):
            return records, found
        record, at = found
        current = record.block
        records.append(record)
