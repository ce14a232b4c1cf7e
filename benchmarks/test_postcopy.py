# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that run first and get their memory later.

test_first_tick: a guest was kept in a file; how long after the connection a fresh QEMU lets it
tick. MIG_BENCH_RESTORE_MIB names the sizes (1024,4096,8192; 64 in smoke mode). Twice the largest
one is needed on disk, and once in memory beside the QEMU; files are read into the page cache before
each round.

test_ten_restores: ten at the same time, of MIG_BENCH_TEN_MIB (256; 24 in smoke mode).

test_fault_latency: how long whoever touches a page waits for it, while MIG_BENCH_FAULT_MIB (512; 48
in smoke mode) of others come in the background, slowly or as fast as may be. In QEMU the guest
measures it, under an emulator; in mig a thread. Every touch that took longer than one of memory
that is there counts.

All with the QEMU that MIG_QEMU_10 names, or the one that is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mig.options import OUTGOING_CAPABILITIES, Capability
from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

from .migrations import (
    Peer,
    QemuSource,
    Settings,
    idle_guest,
    qemu_name,
)
from .restores import (
    MAPPED,
    POSTCOPY,
    Kept,
    Waiting,
    keep,
    read_into_cache,
    record_order,
    restoring,
    start_command,
)

pytestmark = pytest.mark.timeout(3600)

SMOKE = bool(os.environ.get("MIG_BENCH_SMOKE"))
#: milliseconds between two ticks: what the first one may come late for no fault of anybody's
_TICK_MS = 4
_SIZES = os.environ.get("MIG_BENCH_RESTORE_MIB") or ("64" if SMOKE else "1024,4096,8192")
_TEN_MIB = int(os.environ.get("MIG_BENCH_TEN_MIB") or (24 if SMOKE else 256))
_FAULT_MIB = int(os.environ.get("MIG_BENCH_FAULT_MIB") or (48 if SMOKE else 512))
#: mig, when an earlier restore has noted which pages the guest wants first
_ORDERED = "mig, order recorded"
#: seconds that pages are touched in a round, and from one touch to the next
_TOUCHING = 0.5 if SMOKE else 3.0
_PAUSE = 0.0005
#: microseconds: a touch of memory that is there takes less; the emulated guest leaves out its own
_SLOW = 5.0
#: bytes a second in the background: hardly any, and no limit
_BACKGROUND = {"slow": 4 << 20, "full": 0}


@pytest.fixture(scope="module")
def binary() -> QemuBinary:
    root = os.environ.get("MIG_QEMU_10")
    return QemuBinary.unpacked(Path(root)) if root else QemuBinary.installed()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where files go: on disk, seen through the page cache."""
    yield tmp_path
    for file in tmp_path.iterdir():
        if file.is_file():
            file.unlink()


def ticking(mib: int, folder: Path, **options: Any) -> GuestSpec:
    """Return a guest that ticks often, and has so much memory that does not compress."""
    spec = idle_guest(mib, folder)
    given = {"mode": "idle", "tick_ms": _TICK_MS, **options}
    return GuestSpec(**{**vars(spec), **given})


# ---- the first tick --------------------------------------------------------------------------


class Rounds:
    """Restores of one kept guest, one after the other; each ends when the next one is prepared."""

    def __init__(
        self, binary: QemuBinary, spec: GuestSpec, folder: Path, kept: Kept, *, count: int = 1
    ) -> None:
        self._binary, self._spec, self._folder, self._kept = binary, spec, folder, kept
        self._count = count
        self._stack = contextlib.ExitStack()
        self._peer: Peer | None = None
        self._waiting: Waiting | None = None
        #: seconds to the first tick of each guest, of each round, by name
        self.ticks: dict[str, list[list[float]]] = defaultdict(list)
        #: seconds until all guests had all of their memory
        self.whole: dict[str, list[float]] = defaultdict(list)

    def prepare(self, name: str) -> None:
        self.close()
        kept = self._kept
        mapped = name.endswith("mapped-ram")
        chosen, other = (kept.mapped, kept.stream) if mapped else (kept.stream, kept.mapped)
        assert chosen is not None
        by_mig = name.startswith("mig")
        settings = POSTCOPY if by_mig else MAPPED if mapped else Settings()
        self._waiting = Waiting(self._binary, self._spec, self._folder, settings, self._count)
        self._stack.callback(self._waiting.close)
        with contextlib.closing(Peer("warm", self._count * self._spec.memory_mib)) as warm:
            warm.order()
            warm.answer()
        # last: so much memory may have cost the page cache the file
        read_into_cache(chosen, other)
        if by_mig:
            self._waiting.listen()
        if name in ("mig", _ORDERED):
            order = name == _ORDERED
            self._peer = restoring(kept.stream, self._waiting.uris, Settings(), order=order)
            self._stack.callback(self._peer.close)

    def run(self, name: str, *, whole: bool = False) -> None:
        assert self._waiting is not None
        start = time.perf_counter()
        if name in ("mig", _ORDERED):
            assert self._peer is not None
            self._peer.order()
        elif name == "mig send":
            command = start_command(self._kept.stream, self._waiting.uris[0])
            self._stack.callback(_end, command)
        else:
            file = self._kept.mapped if name.endswith("mapped-ram") else self._kept.stream
            assert file is not None
            self._waiting.load(file)
        self.ticks[name].append([at - start for at in self._waiting.wait_first_ticks()])
        if whole:
            self._waiting.wait_completed()
            self.whole[name].append(time.perf_counter() - start)

    def close(self) -> None:
        self._stack.close()
        self._peer = self._waiting = None


def _end(command: subprocess.Popen[bytes]) -> None:
    command.kill()
    command.wait()


@pytest.mark.parametrize("mib", [int(size) for size in _SIZES.split(",")])
def test_first_tick(compare: Any, rounds: int, binary: QemuBinary, folder: Path, mib: int) -> None:
    """mig, its image open, without and with a recorded order; `mig send`, which opens it; QEMU."""
    spec = ticking(mib, folder)
    maps = binary.version >= (9, 0, 0)
    if binary.version < (8, 2, 0):
        pytest.skip("this QEMU does not load from file:")
    kept = keep(binary, spec, folder, mapped=maps)
    name = qemu_name(binary)
    record_order(binary, spec, folder, kept.stream)
    peers = [_ORDERED, "mig send", f"{name} file:", *([f"{name} mapped-ram"] if maps else [])]
    restores = Rounds(binary, spec, folder, kept)
    try:
        compare(
            lambda: restores.run("mig"),
            {peer: lambda peer=peer: restores.run(peer) for peer in peers},
            rounds=rounds,
            prepare=restores.prepare,
        )
    finally:
        restores.close()
    compare.info["first tick"] = True
    compare.info["memory"] = mib << 20
    compare.info["tick"] = _TICK_MS / 1000
    compare.info["worst"] = max(at for ats in restores.ticks["mig"] for at in ats)


def test_ten_restores(compare: Any, rounds: int, binary: QemuBinary, folder: Path) -> None:
    """One process of mig for all ten, beside ten QEMUs that load the same file."""
    spec = ticking(_TEN_MIB, folder)
    if binary.version < (8, 2, 0):
        pytest.skip("this QEMU does not load from file:")
    kept = keep(binary, spec, folder, mapped=False)
    peer = f"{qemu_name(binary)} file:"
    restores = Rounds(binary, spec, folder, kept, count=10)
    try:
        compare(
            lambda: restores.run("mig", whole=True),
            {peer: lambda: restores.run(peer, whole=True)},
            rounds=rounds,
            prepare=restores.prepare,
        )
    finally:
        restores.close()
    compare.info["restores"] = 10
    compare.info["memory"] = _TEN_MIB << 20
    for name, ticks in restores.ticks.items():
        compare.info[f"first {name}"] = statistics.median(map(min, ticks))
        compare.info[f"middle {name}"] = statistics.median(map(statistics.median, ticks))
        compare.info[f"last {name}"] = statistics.median(map(max, ticks))
        compare.info[f"whole {name}"] = statistics.median(restores.whole[name])


# ---- latency of faults -----------------------------------------------------------------------


class Faults:
    """Postcopies between any two ends, in which somebody touches pages at random."""

    def __init__(
        self,
        binary: QemuBinary,
        running: Qemu,
        folder: Path,
        stream: Path,
        settings: Settings,
    ) -> None:
        self._binary, self._running, self._folder = binary, running, folder
        self._stream = stream
        self._settings = settings
        self._library = folder / "touch.so"
        source = Path(__file__).with_name("touch.c")
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        subprocess.run(["cc", *flags, str(source), "-o", str(self._library)], check=True)
        self._stack = contextlib.ExitStack()
        self._source: QemuSource | None = None
        self._peer: Peer | None = None
        self._destination: Peer | Waiting | None = None
        #: microseconds of touches that waited, by name
        self.waits: dict[str, list[float]] = defaultdict(list)
        #: p50 and p99 as mig's own fault thread has them (seconds)
        self.seen: dict[str, list[list[float]]] = defaultdict(list)

    def prepare(self, name: str) -> None:
        """Set both ends up; ``name`` is SOURCE to DESTINATION."""
        self.close()
        source, destination = (part.startswith("mig") for part in name.split(" to "))
        uri = f"unix:{self._folder / 'faults'}"
        (self._folder / "faults").unlink(missing_ok=True)
        if destination:
            touch = {"library": str(self._library), "seconds": _TOUCHING, "pause": _PAUSE}
            options = self._settings.to_json(return_path=False)
            self._destination = Peer("touched", uri, options, self._stream, json.dumps(touch))
        else:
            waiting = Waiting(self._binary, self._running.spec, self._folder, self._settings)
            waiting.uris[0] = uri
            waiting.listen()
            self._destination = waiting
        self._stack.callback(self._destination.close)
        self._uri = uri
        if source:
            options = Settings(
                tuple(c for c in self._settings.capabilities if c != "postcopy-ram"),
                self._settings.parameters,
            )
            self._peer = restoring(self._stream, [uri], options)
            self._stack.callback(self._peer.close)
        else:
            self._source = QemuSource(self._running)
            # almost nothing goes before the switch
            held = {**self._settings.parameters, "max-bandwidth": 1 << 20}
            self._source.settings = Settings(self._settings.capabilities, held)
            self._source.prepare(uri)

    def run(self, name: str) -> None:
        if self._peer is not None:
            self._peer.order()
        else:
            self._running.migrate(self._uri)
            self._running.wait_migration(until=("active",))
            self._running.command("migrate-start-postcopy")
        if isinstance(self._destination, Waiting):
            self._watch(name, self._destination)
        else:
            self._hear(name)

    def _watch(self, name: str, waiting: Waiting) -> None:
        waiting.wait_first_ticks()
        time.sleep(_TOUCHING)
        self.waits[name] += waiting.qemus[0].slow_touches()
        self._let_end()

    def _hear(self, name: str) -> None:
        assert isinstance(self._destination, Peer)
        time.sleep(_TOUCHING)
        self._let_end()
        said = self._destination.answer()
        self.waits[name] += [took for took in said["touches"] if took >= _SLOW]
        self.seen[name].append(said["seen"])

    def _let_end(self) -> None:
        """Let the rest of the memory go: a QEMU is still needed, a destination of mig's reports."""
        if self._peer is not None:
            # one without a limit may have ended
            if self._settings.parameters["max-postcopy-bandwidth"]:
                self._peer.order()
        else:
            self._running.set_parameters({"max-postcopy-bandwidth": 0})
            self._running.wait_migration(300)

    def close(self) -> None:
        self._stack.close()
        self._source = self._peer = self._destination = None


@pytest.fixture(scope="module")
def touched(
    binary: QemuBinary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Qemu, Path, Path]]:
    """A running guest that touches pages, the folder it is in, and the same guest in a file."""
    folder = tmp_path_factory.mktemp("faults")
    spec = ticking(_FAULT_MIB, folder, mode="touch", tick_ms=20, touch_us=int(_PAUSE * 1e6))
    with Qemu(binary, spec, folder, name="source") as qemu:
        qemu.wait_ready(1200)
        kept = keep(binary, spec, folder, mapped=False, running=qemu)
        yield qemu, folder, kept.stream


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("background", _BACKGROUND)
def test_fault_latency(
    compare: Any,
    rounds: int,
    binary: QemuBinary,
    touched: tuple[Qemu, Path, Path],
    preempt: bool,
    background: str,
) -> None:
    """Both ends mig's, both QEMU's, and one of each."""
    if preempt and Capability.POSTCOPY_PREEMPT not in OUTGOING_CAPABILITIES:
        pytest.skip("mig's source has no postcopy-preempt")
    running, folder, stream = touched
    capabilities = ("postcopy-ram", *(["postcopy-preempt"] if preempt else []))
    settings = Settings(capabilities, {"max-postcopy-bandwidth": _BACKGROUND[background]})
    faults = Faults(binary, running, folder, stream, settings)
    qemu = qemu_name(binary)
    names = {"mig": "mig to mig"}
    names |= {name: name for name in (f"{qemu} to QEMU", "mig to QEMU", "QEMU to mig")}
    run: Callable[[str], Callable[[], None]] = lambda name: lambda: faults.run(name)  # noqa: E731
    try:
        compare(
            run("mig to mig"),
            {name: run(name) for name in names if name != "mig"},
            rounds=rounds,
            prepare=lambda name: faults.prepare(names[name]),
        )
    finally:
        faults.close()
    compare.info["faults"] = background
    compare.info["preempt"] = preempt
    compare.info["memory"] = _FAULT_MIB << 20
    for name, waits in faults.waits.items():
        who = "mig" if name == "mig to mig" else name
        p50, p99 = np.percentile(waits or [0.0], [50, 99])
        compare.info[f"waits {who}"] = len(waits)
        compare.info[f"p50 {who}"] = p50 / 1e6
        compare.info[f"p99 {who}"] = p99 / 1e6
    for name, seen in faults.seen.items():
        who = "mig" if name == "mig to mig" else name
        for label, column in (("seen p50", 0), ("seen p99", 1)):
            compare.info[f"{label} {who}"] = statistics.median(pair[column] or 0.0 for pair in seen)
