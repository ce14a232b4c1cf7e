# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sections of the page of results: which benchmarks are in which, what its text and tables are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tables import (
    Columns,
    Row,
    all_peers,
    by,
    duration,
    everyone,
    in_giga,
    in_mib,
    opening,
    peers,
    ratio,
    table,
    times_and_ratios,
    version,
)

_ENDS = ("source", "destination")
#: the peer that is mig's own C without Python
_IN_C = "mig in C"


# ---- migrations ------------------------------------------------------------------------------


def _mine(row: Row, figure: str) -> Any:
    return row[f"{figure} {row['who']}"]


def _theirs(row: Row, figure: str) -> Any:
    return row[f"{figure} {row['beside']}"]


def _beside(rows: list[Row]) -> list[Row]:
    """Return a row for each benchmark and peer of it."""
    return [{**r, "who": "mig", "beside": peer} for r in rows for peer in peers(r)]


def _cpu(row: Row, who: str, end: str) -> str:
    """Seconds for each GiB."""
    per_gib = 1024 / row["mib"]
    user, system = (row[f"cpu {who} {end} {mode}"] * per_gib for mode in ("user", "system"))
    return f"{user:.2f} + {system:.2f}"


def _elsewhere(row: Row, who: str) -> str:
    """Processor seconds of neither end while the migration ran."""
    modes = ("user", "system")
    ends = sum(row[f"cpu {who} {end} {mode}"] for end in _ENDS for mode in modes)
    return f"{max(0.0, row[f'cpu {who} machine'] - ends):.2f}"


#: who used the processors, in migrations of `who` beside those of `beside`
_PROCESSORS: Columns = {
    "CPU source, mig": lambda r: _cpu(r, r["who"], "source"),
    "CPU source, QEMU": lambda r: _cpu(r, r["beside"], "source"),
    "CPU destination, mig": lambda r: _cpu(r, r["who"], "destination"),
    "CPU destination, QEMU": lambda r: _cpu(r, r["beside"], "destination"),
    "others' CPU, mig / QEMU": lambda r: (
        f"{_elsewhere(r, r['who'])} / {_elsewhere(r, r['beside'])}"
    ),
}
_MIGRATIONS: Columns = {
    "migration": lambda r: f"`{r['name']}`",
    "QEMU": lambda r: version(r["beside"]),
    "MiB": lambda r: f"{r['mib']}",
    "file on": lambda r: r["folder"],
    "with mig": lambda r: duration(_mine(r, "total")),
    "QEMU alone": lambda r: duration(_theirs(r, "total")),
    "total x": lambda r: f"**{_theirs(r, 'ratio total'):.2f}**",
    "GB/s, mig": lambda r: in_giga(_mine(r, "throughput")),
    "GB/s, QEMU": lambda r: in_giga(_theirs(r, "throughput")),
    "throughput x": lambda r: f"**{_theirs(r, 'ratio throughput'):.2f}**",
    **_PROCESSORS,
}
_FIGURES = (
    "A factor (x) above 1: mig is faster; throughput counts bytes of stream, which differ where "
    "the guests' zero pages do. CPU: seconds for each GiB, user + system. Others' CPU: seconds "
    "that the machine was busy with neither end while the migration ran (with the host's steal); "
    "where it is not small the times are disturbed."
)


def _migrations(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Migrations",
        "Median total-time of the source, mig at one end (`receive`, `send`) or at both, beside "
        "QEMU at both ends in turn with it; both processes on this machine, over a unix socket "
        f"with a return path. They move a QEMU guest that mig has captured. {_FIGURES}",
    )
    yield from table(_MIGRATIONS, _beside(rows))


def _idle(rows: list[Row]) -> Iterator[str]:
    for mib, some in by("mib", rows).items():
        yield from opening(
            f"An idle guest ({mib / 1024:g} GiB)",
            "Median total-time of the source of a running guest that does nothing, mig's between "
            "two mig's, beside QEMU's between two QEMUs in turn with it; both processes on this "
            f"machine, over a unix socket with a return path. {_FIGURES}",
        )
        yield from table(_MIGRATIONS, _beside(some))


def _leg(row: Row) -> str:
    disk = f" ({in_giga(row['disk'])} GB/s)" if row["who"] == "into file" else ""
    return f"{row['legs'][row['who']]}{disk}"


def _legs(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Channels and codecs",
        "As above, with a number of multifd channels (2 where a codec is named; then memory "
        "compresses by half) or none. `mig to mig` moves mig's own running guest, the others a "
        "QEMU guest; each is beside QEMU to QEMU with the same settings in the same rounds. "
        "GB/s counts the guest's memory, not the bytes that a codec leaves of it. `file` is on "
        "disk, as `mig receive` has it, beside what goes into a file there by itself, written "
        "around the page cache; `nowhere` reads the same stream and keeps nothing.",
    )
    columns: Columns = {
        "settings": lambda r: f"{r['settings']}, {r['transport']}",
        "from, to": _leg,
        "QEMU": lambda r: version(r["beside"]),
        "MiB": lambda r: f"{r['mib']}",
        "with mig": lambda r: duration(_mine(r, "total")),
        "QEMU alone": lambda r: duration(_theirs(r, "total")),
        "total x": lambda r: f"**{_theirs(r, 'total') / _mine(r, 'total'):.2f}**",
        "GB/s, mig": lambda r: in_giga(r["mib"] * 2**20 / _mine(r, "total")),
        "GB/s, QEMU": lambda r: in_giga(r["mib"] * 2**20 / _theirs(r, "total")),
        **_PROCESSORS,
    }
    yield from table(columns, ({**r, "who": who} for r in rows for who in r["legs"]))


def _limits(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Rate limit",
        "What an idle guest's migration puts into unix sockets in each whole second while "
        "max-bandwidth holds it back, as the reader counts it: how far that is from the cap. With "
        "multifd it is the sum over the main connection and all channels. All "
        "seconds begin in a pause between two bursts. A second in which others took the "
        "processors is short of its bytes. mig is measured in turn with each QEMU.",
    )
    columns: Columns = {
        "cap": lambda r: f"{r['cap'] / 1e6:g} MB/s",
        "channels": lambda r: f"{r['channels'] or '-'}",
        "source": lambda r: r["who"] if r["who"] != "mig" else f"mig, beside {peers(r)[0]}",
        "seconds within 2 %": lambda r: f"{_mine(r, 'kept')} of {_mine(r, 'windows')}",
        "off by, median": lambda r: f"{100 * _mine(r, 'off'):+.2f} %",
        "worst": lambda r: f"**{100 * _mine(r, 'worst'):+.2f} %**",
    }
    yield from table(columns, everyone(rows))


def _live(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Running guests",
        "Threads that write a quarter of the memory at a rate, and check what they wrote, moved "
        "between two processes over a unix socket. Downtime is the longest time between two ticks "
        "of the guest around the switchover, its median and the worst of the rounds; the limit is "
        "what the migration was told to aim for. tracked: the kernel notes writes; marked: the "
        "guest does.",
    )
    columns: Columns = {
        "dirtied": lambda r: f"{in_mib(r['rate'])}/s",
        "log": lambda r: r["log"],
        "memory": lambda r: in_mib(r["memory"]),
        "total time": lambda r: duration(r["median"]),
        "throughput": lambda r: f"{in_giga(r['throughput'])} GB/s",
        "downtime": lambda r: duration(r["downtime"]),
        "worst": lambda r: duration(r["worst"]),
        "limit": lambda r: duration(r["limit"]),
        "downtime / limit": lambda r: f"**{r['downtime'] / r['limit']:.2f}**",
        "worst / limit": lambda r: f"{r['worst'] / r['limit']:.2f}",
    }
    yield from table(columns, rows)


def _convergence(rows: list[Row]) -> Iterator[str]:
    row = rows[-1]
    yield from opening(
        "Convergence",
        f"A guest of {in_mib(row['memory'])} that dirties {in_mib(row['rate'])}/s, one "
        "word in every 512 bytes of a page, in a quarter of its memory, over a link of "
        f"{row['limit'] * 8 / 1e9:g} Gbit/s (max-bandwidth). After {row['patience']:.0f} s "
        "any downtime is allowed: such a round has not converged.",
    )
    plain = next(iter(row["sets"].values()))
    columns: Columns = {
        "pages go": lambda r: r["set"],
        "converged": lambda r: f"{r['converged']} of {row['rounds']}",
        "total time": lambda r: duration(r["total"]),
        "on the wire": lambda r: f"{in_giga(r['nbytes'])} GB",
        "x fewer bytes": lambda r: f"**{plain['nbytes'] / r['nbytes']:.2f}**",
        "passes": lambda r: f"{r['passes']:.0f}",
        "downtime": lambda r: duration(r["downtime"]),
    }
    yield from table(columns, ({**one, "set": name} for name, one in row["sets"].items()))


# ---- files -----------------------------------------------------------------------------------


def _snapshots(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Background snapshots",
        "A guest of this process whose thread writes random pages of all its memory, saved to a "
        "file (capability background-snapshot). Beside each round it is stopped, saved to the same "
        "file, and resumed: `stopped and saved`. Written: what it dirties in a second while it is "
        "left alone, and while it is saved; faults: its writes that had to wait for the copy of "
        "their page. Pause: how long it stands still, the median and the worst of the rounds; "
        "setup: until memory is sent.",
    )
    columns: Columns = {
        "writes": lambda r: f"{in_mib(r['rate'])}/s" if r["rate"] else "no limit",
        "file on": lambda r: r["file system"],
        "memory": lambda r: in_mib(r["memory"]),
        "total time": lambda r: duration(r["median"]),
        "setup": lambda r: duration(r["snapshot"]["setup"]),
        "faults": lambda r: f"{r['snapshot']['faults']:.0f}",
        "written alone": lambda r: f"{r['snapshot']['alone'] / 1e6:.0f} MB/s",
        "written meanwhile": lambda r: f"{r['snapshot']['during'] / 1e6:.0f} MB/s",
        "meanwhile / alone": lambda r: (
            f"**{r['snapshot']['during'] / r['snapshot']['alone']:.2f}**"
        ),
        "pause": lambda r: duration(r["snapshot"]["pause"]),
        "worst": lambda r: duration(r["longest_pause"]),
        "stopped and saved": lambda r: duration(r["snapshot"]["stand still"]),
        "x shorter": lambda r: f"**{r['snapshot']['stand still'] / r['snapshot']['pause']:.0f}**",
    }
    yield from table(columns, rows)


def _captured(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Captured files",
        "What `mig analyze`, `check`, `diff` and `convert` do, in this process, on files in the "
        "page cache: streams of one block of memory, of pages that are not zero, of zero pages, or "
        "of both in turn. GB/s counts the guest's memory. `QEMU's script` is its "
        "scripts/analyze-migration.py; beside `diff` it goes over both files, beside `convert` it "
        "extracts the memory (-x). `Python` is a loop that does the least that each record needs, "
        "`walk` the loop in C on a stream in memory; `cmp` and `cp` are the programs, their start "
        "included. `check` is against a target's dump without devices. A factor (x) above 1: mig "
        "is faster.",
    )
    columns: Columns = {
        "what": lambda r: f"`{r['command']}`",
        "file of": lambda r: r["holds"],
        "on": lambda r: r["file system"],
        "memory": lambda r: in_mib(r["nbytes"]),
        "mig": lambda r: duration(r["median"]),
        "GB/s": lambda r: f"{r['nbytes'] / r['median'] / 1e9:.3g}",
        **times_and_ratios(rows),
    }
    yield from table(columns, rows)


# ---- postcopy --------------------------------------------------------------------------------


def _first_ticks(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "The first tick of a guest that was kept",
        "A fresh QEMU waits; how long after the connection (with `file:` and mapped-ram after QMP "
        "migrate-incoming, with `mig send` after the start of the command, which also opens the "
        "file) its guest says that it ticks, which it does every "
        f"{duration(rows[0]['tick'])}. The memory does not compress; the files "
        "are in the page cache. A factor (x) above 1: mig is faster.",
    )
    columns: Columns = {
        "memory": lambda r: in_mib(r["memory"]),
        "mig": lambda r: duration(r["median"]),
        "worst": lambda r: duration(r["worst"]),
        **times_and_ratios(rows),
    }
    yield from table(columns, rows)


def _many(rows: list[Row]) -> Iterator[str]:
    for count, (*_, row) in by("restores", rows).items():
        yield from opening(
            f"{count} restores at the same time",
            f"Guests of {in_mib(row['memory'])} from one file; medians over the rounds. One "
            "process of mig serves all; each QEMU loads the file for itself. Whole: until all "
            "guests had all of their memory.",
        )
        columns: Columns = {
            "": lambda r: r["who"],
            "first tick: first guest": lambda r: duration(_mine(r, "first")),
            "middle": lambda r: duration(_mine(r, "middle")),
            "last": lambda r: duration(_mine(r, "last")),
            "whole": lambda r: duration(_mine(r, "whole")),
        }
        yield from table(columns, everyone([row]))


def _latencies(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Pages that are waited for",
        "How long a touch of a page takes that is not there yet, at random, every 0.5 ms, while "
        "the others come in the background: slow (max-postcopy-bandwidth 4 MiB/s) or full (no "
        "limit). A QEMU guest measures it itself, under the emulator; in mig a thread does, and "
        "`seen` is what mig's fault thread has. A QEMU with a limit on bandwidth sends what was "
        "asked for at the end of a slice of 100 ms.",
    )
    columns: Columns = {
        "from, to": lambda r: "mig to mig" if r["who"] == "mig" else r["who"],
        "background": lambda r: r["faults"],
        "preempt": lambda r: "yes" if r["preempt"] else "no",
        "touches": lambda r: f"{_mine(r, 'waits')}",
        "p50": lambda r: duration(_mine(r, "p50")),
        "p99": lambda r: duration(_mine(r, "p99")),
        "seen p50": lambda r: duration(r.get(f"seen p50 {r['who']}")),
        "seen p99": lambda r: duration(r.get(f"seen p99 {r['who']}")),
        "p50 x": lambda r: f"**{_mine(r, 'p50') / r['p50 mig']:.2f}**",
        "p99 x": lambda r: f"**{_mine(r, 'p99') / r['p99 mig']:.2f}**",
    }
    yield from table(columns, everyone(rows))


# ---- kernels ---------------------------------------------------------------------------------


def _throughput(row: Row) -> str:
    return f"{row['nbytes'] / row['median'] / 1e9:.3g}" if row["nbytes"] else ""


def _excess(row: Row) -> str:
    return f"{1e9 * (row['median'] - row[f'seconds {_IN_C}']) / row['count']:.2f} ns"


def _kernels(rows: list[Row]) -> Iterator[str]:
    yield from opening(
        "Kernels",
        "Pages of 4 KiB; medians. A column x says how many times as long that peer takes for the "
        "same work in the same run: above 1, mig is faster. GB/s counts the bytes that a kernel "
        "stands for (pages or bitmap words), read or not. `read` is a C loop that ORs all of these "
        "bytes, `memcpy` copies them. `plain C` is what a peer does, a page or a bit at a time, "
        "written for this (benchmarks/peers.c). Columns named after a family are mig's own "
        "kernels for that instruction set; `mig in C` is the default family's without Python.",
    )
    for number, (group, some) in enumerate(by("group", rows).items()):
        if number:
            yield ""
        yield f"### {group}"
        yield ""
        columns: Columns = {
            "": lambda r: f"`{r['name']}`",
            "time": lambda r: f"{duration(r['median'] / r['count'])} a {r['unit']}",
        }
        if any(r["nbytes"] for r in some):
            columns["GB/s"] = _throughput
        names = all_peers(some)
        columns |= {f"{peer} x": ratio(peer, "{:.2f}") for peer in names}
        if _IN_C in names:
            columns["Python's share"] = _excess
        yield from table(columns, some)


# ---- all of them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Sections of one kind.

    title: of a section; `#` stands for a number
    lines: write the sections with these benchmarks
    names: how many columns, from the left, say what was measured: rows that agree in these are
           of the same measurement, done again; 0: all rows are one measurement
    """

    title: str
    lines: Callable[[list[Row]], Iterator[str]]
    names: int


#: in the order in which they are on the page, by what their benchmarks note and others do not
PARTS = {
    "migration": Part("Migrations", _migrations, 2),
    "idle": Part("An idle guest (# GiB)", _idle, 2),
    "legs": Part("Channels and codecs", _legs, 3),
    "cap": Part("Rate limit", _limits, 3),
    "downtime": Part("Running guests", _live, 2),
    "sets": Part("Convergence", _convergence, 0),
    "snapshot": Part("Background snapshots", _snapshots, 2),
    "command": Part("Captured files", _captured, 3),
    "first tick": Part("The first tick of a guest that was kept", _first_ticks, 1),
    "restores": Part("# restores at the same time", _many, 0),
    "faults": Part("Pages that are waited for", _latencies, 3),
    "kernel": Part("Kernels", _kernels, 1),
}


def part_of(row: Row) -> str:
    """Return which of PARTS a benchmark belongs to."""
    if "mib" in row and "legs" not in row:
        return "idle" if row["name"].startswith("idle_guest") else "migration"
    return next((note for note in PARTS if note in row), "kernel")


def versions(rows: list[Row]) -> set[str]:
    """Return the QEMUs, with their versions, that are in the comparisons."""
    named = {
        peer
        for row in rows
        if part_of(row) != "kernel"
        for peer in [*peers(row), row.get("beside", "")]
    }
    words = (name.split() for name in named)
    return {f"QEMU {name[1]}" for name in words if name[:1] == ["QEMU"] and "." in name[1]}
