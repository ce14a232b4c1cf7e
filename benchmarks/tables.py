# SPDX-License-Identifier: LGPL-2.1-or-later
"""What sections of the page of results are made of: rows of benchmarks, cells, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

#: what a benchmark noted (its extra_info), with its name, group, median and rounds; where a table
#: has several rows of one benchmark, also whom a row is about (`who`)
Row = dict[str, Any]
#: what a table has in each column, by its heading
Columns = dict[str, Callable[[Row], str]]


def rows_of(result: dict[str, Any]) -> list[Row]:
    """Return what the benchmarks of one file of pytest-benchmark's noted."""
    return [
        {
            **b["extra_info"],
            "name": b["name"].removeprefix("test_"),
            "group": b["group"] or "Others",
            "median": b["stats"]["median"],
            "rounds": b["stats"]["rounds"],
        }
        for b in result["benchmarks"]
    ]


def peers(row: Row) -> list[str]:
    """Return whom a benchmark compares mig with."""
    return [key.removeprefix("seconds ") for key in row if key.startswith("seconds ")]


def all_peers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(peer for row in rows for peer in peers(row)))


def by(key: str, rows: list[Row]) -> dict[Any, list[Row]]:
    """Sort benchmarks by what they note."""
    values = dict.fromkeys(row[key] for row in rows)
    return {value: [row for row in rows if row[key] == value] for value in values}


def everyone(rows: list[Row]) -> list[Row]:
    """Return a row for mig and for each peer of each benchmark."""
    return [{**r, "who": who} for r in rows for who in ("mig", *peers(r))]


def opening(title: str, text: str) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield text
    yield ""


def table(columns: Columns, rows: Iterable[Row]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|---:" * (len(columns) - 1) + "|"
    for row in rows:
        yield f"| {' | '.join(cell(row) for cell in columns.values())} |"


def duration(seconds: float | None) -> str:
    """Three digits and a unit; nothing where there was nothing to measure."""
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def in_giga(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def in_mib(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB"


def version(peer: str) -> str:
    return peer.removeprefix("QEMU ")


def _seconds(peer: str) -> Callable[[Row], str]:
    return lambda r: duration(r.get(f"seconds {peer}"))


def ratio(peer: str, form: str) -> Callable[[Row], str]:
    return lambda r: form.format(r[f"ratio {peer}"]) if f"ratio {peer}" in r else ""


def times_and_ratios(rows: list[Row]) -> Columns:
    """Return columns of what each peer takes, then of how many times as long as mig that is."""
    names = all_peers(rows)
    times = {peer: _seconds(peer) for peer in names}
    return times | {f"{peer} x": ratio(peer, "**{:.1f}**") for peer in names}
