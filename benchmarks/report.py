# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns results of pytest-benchmark into a page of tables.

python benchmarks/report.py RESULTS.json [MORE.json ...] > benchmarks/RESULTS.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_COMMAND = (
    "MIG_QEMU_10=ROOT pytest benchmarks --benchmark-json=bench.json && "
    "python benchmarks/report.py bench.json > benchmarks/RESULTS.md"
)
_ENDS = ("source", "destination")
#: the peer that is mig's own C without Python
_IN_C = "mig in C"

Benchmark = dict[str, Any]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    names = list(head)
    yield "| " + " | ".join(names) + " |"
    yield "|---" + "|---:" * (len(names) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _opening(title: str, text: str) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield text
    yield ""


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _having(key: str, benchmarks: list[Benchmark]) -> list[Benchmark]:
    return [b for b in benchmarks if key in b["extra_info"]]


def _peers(benchmark: Benchmark) -> list[str]:
    return [
        key.removeprefix("seconds ")
        for key in benchmark["extra_info"]
        if key.startswith("seconds ")
    ]


def _live(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Running guests",
        "Threads that write a quarter of the memory at a rate, and check what they wrote, moved "
        "between two processes over a unix socket. Downtime is the longest time between two ticks "
        "of the guest around the switchover, its median and the worst of the rounds; the limit is "
        "what the migration was told to aim for. tracked: the kernel notes writes; marked: the "
        "guest does.",
    )
    head = ["dirtied", "log", "memory", "total time", "throughput", "downtime", "worst", "limit"]
    head += ["downtime / limit", "worst / limit"]
    rows = []
    for b in benchmarks:
        info = b["extra_info"]
        rows.append(
            [
                f"{info['rate'] >> 20} MiB/s",
                info["log"],
                f"{info['memory'] >> 20} MiB",
                _time(b["stats"]["median"]),
                f"{info['throughput'] / 1e9:.2f} GB/s",
                _time(info["downtime"]),
                _time(info["worst"]),
                _time(info["limit"]),
                f"**{info['downtime'] / info['limit']:.2f}**",
                f"{info['worst'] / info['limit']:.2f}",
            ]
        )
    yield from _table(head, rows)


def _snapshots(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Background snapshots",
        "A guest of this process whose thread writes random pages of all its memory, saved to a "
        "file in memory (capability background-snapshot). Beside each round it is stopped, saved "
        "to the same file, and resumed: the last column. Written: what it dirties in a second "
        "while it is left alone, and while it is saved; faults: its writes that had to wait for "
        "the copy of their page.",
    )
    rows = []
    for b in benchmarks:
        info = b["extra_info"]
        said = info["snapshot"]
        rows.append(
            [
                f"{info['rate'] >> 20} MiB/s" if info["rate"] else "no limit",
                f"{info['memory'] >> 20} MiB",
                _time(b["stats"]["median"]),
                f"{said['faults']:.0f}",
                f"{said['alone'] / 1e6:.0f} MB/s",
                f"{said['during'] / 1e6:.0f} MB/s",
                f"**{said['during'] / said['alone']:.2f}**",
                _time(said["pause"]),
                _time(info["longest_pause"]),
                _time(said["stand still"]),
                f"**{said['stand still'] / said['pause']:.0f}**",
            ]
        )
    head = ["writes", "memory", "total time", "faults", "written alone", "written meanwhile"]
    head += ["meanwhile / alone", "pause", "worst", "stopped and saved", "x shorter"]
    yield from _table(head, rows)


def _leg_row(info: dict[str, Any], name: str, leg: str) -> Iterator[str]:
    beside = info["beside"]
    yield f"{info['settings']}, {info['transport']}"
    yield f"{leg} ({info['disk'] / 1e9:.2f} GB/s)" if name == "into file" else leg
    yield beside.removeprefix("QEMU ")
    yield f"{info['mib']}"
    for who in (name, beside):
        yield _time(info[f"total {who}"])
    yield f"**{info[f'total {beside}'] / info[f'total {name}']:.2f}**"
    for who in (name, beside):
        yield f"{info['mib'] * 2**20 / info[f'total {who}'] / 1e9:.2f}"
    for end in _ENDS:
        for who in (name, beside):
            yield _cpu(info, who, end)
    yield f"{_elsewhere(info, name):.2f} / {_elsewhere(info, beside):.2f}"


def _legs(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Channels and codecs",
        "As above, with a number of multifd channels (2 where a codec is named; then memory "
        "compresses by half) or none. `mig to mig` moves mig's own running guest, the others a "
        "QEMU guest; each is beside QEMU to QEMU with the same settings in the same rounds. "
        "GB/s counts the guest's memory, not the bytes that a codec leaves of it. `file` is on "
        "disk, as `mig receive` has it, beside what goes into a file there by itself, written "
        "around the page cache; `nowhere` reads the same stream and keeps nothing.",
    )
    head = ["settings", "from, to", "QEMU", "MiB", "with mig", "QEMU alone", "total x"]
    head += ["GB/s, mig", "GB/s, QEMU"]
    head += [f"CPU {end}, {who}" for end in _ENDS for who in ("mig", "QEMU")]
    head.append("others' CPU, mig / QEMU")
    infos = [b["extra_info"] for b in benchmarks]
    rows = (_leg_row(info, *leg) for info in infos for leg in info["legs"].items())
    yield from _table(head, rows)


def _convergence(benchmarks: list[Benchmark]) -> Iterator[str]:
    for b in benchmarks:
        info = b["extra_info"]
        yield from _opening(
            "Convergence",
            f"A guest of {info['memory'] >> 20} MiB that dirties {info['rate'] >> 20} MiB/s, one "
            "word in every 512 bytes of a page, in a quarter of its memory, over a link of "
            f"{info['limit'] * 8 / 1e9:g} Gbit/s (max-bandwidth). After {info['patience']:.0f} s "
            "any downtime is allowed: such a round has not converged.",
        )
        rows = []
        plain = next(iter(info["sets"].values()))
        for name, one in info["sets"].items():
            rows.append(
                [
                    name,
                    f"{one['converged']} of {b['stats']['rounds']}",
                    _time(one["total"]),
                    f"{one['nbytes'] / 1e9:.2f} GB",
                    f"**{plain['nbytes'] / one['nbytes']:.2f}**",
                    f"{one['passes']:.0f}",
                    _time(one["downtime"]),
                ]
            )
        head = ["pages go", "converged", "total time", "on the wire", "x fewer bytes", "passes"]
        yield from _table([*head, "downtime"], rows)


def _rates(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Rate limit",
        "What an idle guest's migration puts into unix sockets in each whole second while "
        "max-bandwidth holds it back, as the reader counts it: how far that is from the cap. With "
        "multifd it is the sum over the main connection and all channels. All "
        "seconds begin in a pause between two bursts. A second in which others took the "
        "processors is short of its bytes. mig is measured in turn with each QEMU.",
    )
    rows = []
    for b in benchmarks:
        info = b["extra_info"]
        for who in ("mig", *_peers(b)):
            rows.append(
                [
                    f"{info['cap'] / 1e6:g} MB/s",
                    f"{info['channels'] or '-'}",
                    who if who != "mig" else f"mig, beside {_peers(b)[0]}",
                    f"{info[f'kept {who}']} of {info[f'windows {who}']}",
                    f"{100 * info[f'off {who}']:+.2f} %",
                    f"**{100 * info[f'worst {who}']:+.2f} %**",
                ]
            )
    head = ["cap", "channels", "source", "seconds within 2 %", "off by, median", "worst"]
    yield from _table(head, rows)


def _first_ticks(benchmarks: list[Benchmark]) -> Iterator[str]:
    peers = list(dict.fromkeys(peer for b in benchmarks for peer in _peers(b)))
    yield from _opening(
        "The first tick of a guest that was kept",
        "A fresh QEMU waits; how long after the connection (with `file:` and mapped-ram after QMP "
        "migrate-incoming, with `mig send` after the start of the command, which also opens the "
        "file) its guest says that it ticks, which it does every "
        f"{_time(benchmarks[0]['extra_info']['tick'])}. The memory does not compress; the files "
        "are in the page cache. A factor (x) above 1: mig is faster.",
    )
    rows = []
    for b in benchmarks:
        info = b["extra_info"]
        row = [f"{info['memory'] >> 20} MiB", _time(b["stats"]["median"]), _time(info["worst"])]
        for peer in peers:
            row.append(_time(info[f"seconds {peer}"]) if f"seconds {peer}" in info else "")
        for peer in peers:
            row.append(f"**{info[f'ratio {peer}']:.1f}**" if f"ratio {peer}" in info else "")
        rows.append(row)
    head = ["memory", "mig", "worst", *peers, *(f"{peer} x" for peer in peers)]
    yield from _table(head, rows)


def _many(benchmarks: list[Benchmark]) -> Iterator[str]:
    for b in benchmarks:
        info = b["extra_info"]
        yield from _opening(
            f"{info['restores']} restores at the same time",
            f"Guests of {info['memory'] >> 20} MiB from one file; medians over the rounds. One "
            "process of mig serves all; each QEMU loads the file for itself. Whole: until all "
            "guests had all of their memory.",
        )
        figures = ("first", "middle", "last", "whole")
        names = ["mig", *_peers(b)]
        rows = [[name, *(_time(info[f"{what} {name}"]) for what in figures)] for name in names]
        yield from _table(["", "first tick: first guest", "middle", "last", "whole"], rows)


def _latencies(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Pages that are waited for",
        "How long a touch of a page takes that is not there yet, at random, every 0.5 ms, while "
        "the others come in the background: slow (max-postcopy-bandwidth 4 MiB/s) or full (no "
        "limit). A QEMU guest measures it itself, under the emulator; in mig a thread does, and "
        "`seen` is what mig's fault thread has. A QEMU with a limit on bandwidth sends what was "
        "asked for at the end of a slice of 100 ms.",
    )
    rows = []
    for b in benchmarks:
        info = b["extra_info"]
        for name in ("mig", *_peers(b)):
            seen = [info.get(f"seen {share} {name}") for share in ("p50", "p99")]
            rows.append(
                [
                    "mig to mig" if name == "mig" else name,
                    info["faults"],
                    "yes" if info["preempt"] else "no",
                    f"{info[f'waits {name}']}",
                    _time(info[f"p50 {name}"]),
                    _time(info[f"p99 {name}"]),
                    *("" if value is None else _time(value) for value in seen),
                    f"**{info[f'p50 {name}'] / info['p50 mig']:.2f}**",
                    f"**{info[f'p99 {name}'] / info['p99 mig']:.2f}**",
                ]
            )
    head = ["from, to", "background", "preempt", "touches", "p50", "p99"]
    yield from _table([*head, "seen p50", "seen p99", "p50 x", "p99 x"], rows)


def _kernel_row(benchmark: Benchmark, rates: bool, peers: list[str]) -> Iterator[str]:
    info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
    yield f"`{benchmark['name'].removeprefix('test_')}`"
    yield f"{_time(seconds / info['count'])} a {info['unit']}"
    if rates:
        yield f"{info['nbytes'] / seconds / 1e9:.3g}" if info["nbytes"] else ""
    for peer in peers:
        ratio = info.get(f"ratio {peer}")
        yield "" if ratio is None else f"{ratio:.2f}"
    if _IN_C in peers:
        excess = (seconds - info[f"seconds {_IN_C}"]) / info["count"]
        yield f"{1e9 * excess:.2f} ns"


def _kernel_table(group: str, benchmarks: list[Benchmark]) -> Iterator[str]:
    peers = list(dict.fromkeys(peer for b in benchmarks for peer in _peers(b)))
    rates = any(b["extra_info"]["nbytes"] for b in benchmarks)
    head = ["", "time", *(["GB/s"] if rates else []), *(f"{peer} x" for peer in peers)]
    if _IN_C in peers:
        head.append("Python's share")
    yield f"### {group}"
    yield ""
    yield from _table(head, (_kernel_row(b, rates, peers) for b in benchmarks))


def _kernels(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Kernels",
        "Pages of 4 KiB; medians. A column x says how many times as long that peer takes for the "
        "same work in the same run: above 1, mig is faster. GB/s counts the bytes that a kernel "
        "stands for (pages or bitmap words), read or not. `read` is a C loop that ORs all of these "
        "bytes, `memcpy` copies them. `plain C` is what a peer does, a page or a bit at a time, "
        "written for this (benchmarks/peers.c). Columns named after a family are mig's own "
        "kernels for that instruction set; `mig in C` is the default family's without Python.",
    )
    groups = dict.fromkeys(b["group"] or "Others" for b in benchmarks)
    for number, group in enumerate(groups):
        if number:
            yield ""
        yield from _kernel_table(
            group, [b for b in benchmarks if (b["group"] or "Others") == group]
        )


def _libraries(machine: dict[str, Any]) -> Iterator[str]:
    """Say which libraries the kernels were measured beside."""
    given = [machine[key] for key in ("library", "scalar") if key in machine]
    named = " and ".join(f"`{name}`" for name in given) or "none (plain C only)"
    yield f"- libraries that the kernels are measured beside: {named}"


def _cpu(info: dict[str, Any], who: str, end: str) -> str:
    per_gib = 1024 / info["mib"]
    user, system = (info[f"cpu {who} {end} {mode}"] * per_gib for mode in ("user", "system"))
    return f"{user:.2f} + {system:.2f}"


def _elsewhere(info: dict[str, Any], who: str) -> float:
    """Processor seconds of neither end while the migration ran."""
    modes = ("user", "system")
    ends = sum(info[f"cpu {who} {end} {mode}"] for end in _ENDS for mode in modes)
    return max(0.0, float(info[f"cpu {who} machine"] - ends))


def _migration_row(benchmark: Benchmark, peer: str) -> Iterator[str]:
    info = benchmark["extra_info"]
    yield f"`{benchmark['name'].removeprefix('test_')}`"
    yield peer.removeprefix("QEMU ")
    yield f"{info['mib']}"
    yield info["folder"]
    yield _time(info["total mig"])
    yield _time(info[f"total {peer}"])
    yield f"**{info[f'ratio total {peer}']:.2f}**"
    yield f"{info['throughput mig'] / 1e9:.2f}"
    yield f"{info[f'throughput {peer}'] / 1e9:.2f}"
    yield f"**{info[f'ratio throughput {peer}']:.2f}**"
    for end in _ENDS:
        yield _cpu(info, "mig", end)
        yield _cpu(info, peer, end)
    yield f"{_elsewhere(info, 'mig'):.2f} / {_elsewhere(info, peer):.2f}"


def _migrations(benchmarks: list[Benchmark]) -> Iterator[str]:
    yield from _opening(
        "Migrations",
        "Median total-time of the source, mig at one end (`receive`, `send`) or at both, beside "
        "QEMU at both ends in turn with it; both processes on this machine, over a unix socket "
        "with a return path. `idle_guest` is a running guest that does nothing, mig's between two "
        "mig's and QEMU's between two QEMUs; the others move a QEMU guest that mig has captured. "
        "A factor (x) above 1: mig is faster; throughput counts bytes of stream, which differ "
        "where the guests' zero pages do. CPU: seconds for each GiB, user + system. Others' CPU: "
        "seconds that the machine was busy with neither end while the migration ran (with the "
        "host's steal); where it is not small the times are disturbed.",
    )
    head = ["migration", "QEMU", "MiB", "file on", "with mig", "QEMU alone", "total x"]
    head += ["GB/s, mig", "GB/s, QEMU", "throughput x"]
    head += [f"CPU {end}, {who}" for end in _ENDS for who in ("mig", "QEMU")]
    head.append("others' CPU, mig / QEMU")
    yield from _table(head, (_migration_row(b, peer) for b in benchmarks for peer in _peers(b)))


def report(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page."""
    machine = results[0]["machine_info"]["mig"]
    benchmarks = [benchmark for result in results for benchmark in result["benchmarks"]]
    legs = _having("legs", benchmarks)
    migrations = [b for b in _having("mib", benchmarks) if b not in legs]
    convergence = _having("sets", benchmarks)
    rates = _having("cap", benchmarks)
    live = _having("downtime", benchmarks)
    snapshots = _having("snapshot", benchmarks)
    ticks = _having("first tick", benchmarks)
    many = _having("restores", benchmarks)
    faults = _having("faults", benchmarks)
    others = migrations + legs + rates + live + convergence + snapshots + ticks + many + faults
    kernels = [b for b in benchmarks if b not in others]
    versions = {peer for b in migrations + rates for peer in _peers(b)}
    versions |= {" ".join(p.split()[:2]) for b in ticks for p in _peers(b) if p.startswith("QEMU")}
    versions |= {b["extra_info"]["beside"] for b in legs}
    yield "# Benchmarks"
    yield ""
    yield f"Regenerate: `{_COMMAND}`"
    yield ""
    yield f"- {machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}"
    if versions:
        yield f"- {', '.join(sorted(versions))}"
    yield f"- {results[0]['datetime'][:10]}; machines drift: only ratios within a run mean anything"
    if kernels:
        yield f"- the kernels that mig chooses here: `{machine['kernels']}`"
        yield from _libraries(machine)
    if machine["smoke"]:
        yield "- **smoke run: too short to mean anything**"
    parts = (
        (_migrations, migrations),
        (_legs, legs),
        (_rates, rates),
        (_live, live),
        (_convergence, convergence),
        (_snapshots, snapshots),
        (_first_ticks, ticks),
        (_many, many),
        (_latencies, faults),
        (_kernels, kernels),
    )
    for part, chosen in parts:
        if chosen:
            yield ""
            yield from part(chosen)


def main(*names: str) -> None:
    if not names:
        sys.exit(__doc__)
    print("\n".join(report([json.loads(Path(name).read_text()) for name in names])))


if __name__ == "__main__":
    main(*sys.argv[1:])
