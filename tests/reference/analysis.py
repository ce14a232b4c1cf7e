"""A slow walk over whole streams, one record at a time: what `mig.analyze` should count."""

from __future__ import annotations

from collections import Counter

from reference import ram
from reference.ram import Delta, End, Packed


def count_records(payloads: list[bytes], page_size: int) -> dict[bytes, Counter[str]]:
    """Per block: records by kind, repeated ones, and pages by what they are in the end."""
    counts: dict[bytes, Counter[str]] = {}
    last: dict[tuple[bytes, int], str] = {}
    current = None
    for payload in payloads:
        at = 0
        while True:
            found = ram.parse_record(payload, at, page_size, current)
            if isinstance(found, End):
                assert found.offset == len(payload)
                break
            assert isinstance(found, tuple)
            record, behind = found
            current = record.block
            mine = counts.setdefault(record.block, Counter())
            mine["record_nbytes"] += behind - at
            mine[kind_of(record)] += 1
            if record.contents != 0 and isinstance(record.contents, int):
                mine["filled"] += 1
            key = (record.block, record.page)
            mine["repeated"] += key in last
            last[key] = "zero_pages" if record.contents == 0 else "data_pages"
            at = behind
    for (block, _), kind in last.items():
        counts[block][kind] += 1
    return counts


def kind_of(record: ram.Record) -> str:
    if isinstance(record.contents, int):
        return "zero"
    if isinstance(record.contents, Delta):
        return "xbzrle"
    return "compressed" if isinstance(record.contents, Packed) else "normal"


def walk_stream(data: bytes, page_size: int = 4096) -> Counter[str]:
    """Kinds of all RAM records of a precopy stream, from its first byte to the end of RAM."""
    out: Counter[str] = Counter()
    at, current = 8, None
    while True:
        kind = data[at]
        if kind == 7:
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "big")
        elif kind == 8:
            at += 5 + int.from_bytes(data[at + 3 : at + 5], "big")
        elif kind == 1:
            at = skip_block_list(data, at + 1 + 4 + 1 + len("ram") + 8, page_size)
            assert data[at : at + 8] == ram.eos()
            at += 8
        else:
            assert kind in (2, 3), (hex(at), kind)
            kinds, at, current = walk_ram(data, at + 5, page_size, current)
            out += kinds
        if kind in (1, 2, 3):
            assert data[at] == 0x7E
            at += 5
        if kind == 3:
            return out


def skip_block_list(data: bytes, at: int, page_size: int) -> int:
    word = int.from_bytes(data[at : at + 8], "big")
    assert word % page_size == ram.MEM_SIZE
    left, at = word - ram.MEM_SIZE, at + 8
    while left:
        at += 1 + data[at]
        left -= int.from_bytes(data[at : at + 8], "big")
        at += 8
    return at


def walk_ram(
    data: bytes, at: int, page_size: int, current: bytes | None = None
) -> tuple[Counter[str], int, bytes | None]:
    """Kinds of the records of one payload, where it ends, and the block it ends in."""
    out: Counter[str] = Counter()
    while True:
        found = ram.parse_record(data, at, page_size, current)
        if isinstance(found, End):
            return out, found.offset, current
        assert isinstance(found, tuple)
        record, at = found
        current = record.block
        out[kind_of(record)] += 1
