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


def walk_ram(data: bytes, at: int, page_size: int) -> Counter[str]:
    """Kinds of the records of one payload, up to its EOS; nothing else is looked at."""
    out: Counter[str] = Counter()
    current: bytes | None = None
    while True:
        found = ram.parse_record(data, at, page_size, current)
        if isinstance(found, End):
            return out
        assert isinstance(found, tuple)
        record, at = found
        current = record.block
        out[kind_of(record)] += 1
