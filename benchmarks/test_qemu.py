# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole migrations of a QEMU guest: mig at one end, or both, beside QEMU at both ends.

The guest has MIG_BENCH_MIB MiB (2048; 128 in smoke mode) of memory that does not compress, and is
idle. Every migration goes over a unix socket with a return path and without a bandwidth limit,
between two processes of one machine. The time is that from the start to the source's `completed`,
which comes after the destination has confirmed; `total` is the source's own figure for it
(QEMU's total-time).

The image that mig sends and the file that it keeps are on tmpfs, or where MIG_BENCH_DIR says; a
file on `disk` is in the folder for temporary files, written around the page cache.
MIG_QEMU_10 names an unpacked QEMU 10.0; without it the installed QEMU is both peer and partner.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import pytest

from mig.selftest.initramfs import write_initramfs
from mig.selftest.kernel import find_kernel
from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

pytestmark = pytest.mark.timeout(3600)

_PEER = Path(__file__).with_name("peer.py")
_POLL_INTERVAL = 0.005
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Processor seconds of one process."""

    user: float
    system: float


@dataclass(frozen=True)
class Run:
    """One migration: the source's own time, and what both processes used.

    machine: processor seconds of the whole machine meanwhile: what is beyond the two processes
             was somebody else, and disturbed
    """

    total: float
    source: Usage
    destination: Usage
    machine: float


class Source(Protocol):
    """Can migrate its guest, again and again."""

    def prepare(self, uri: str) -> None:
        """Get ready for one migration."""

    def migrate(self, uri: str) -> None:
        """Migrate; returns when the source is done."""

    def result(self) -> tuple[float, Usage]:
        """Return the source's own time for it, and what it used."""

    def close(self) -> None:
        """End what belongs to the last migration."""


class Destination(Protocol):
    """Takes one guest."""

    def result(self) -> Usage:
        """Wait for the end; return what it used."""

    def close(self) -> None:
        """Release everything."""


# ---- processes of mig ------------------------------------------------------------------------


class Peer:
    """A process that runs peer.py."""

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_PEER), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._expect("ready")

    def _expect(self, what: str) -> str:
        line = self._out.readline()
        if not line.startswith(what):
            raise RuntimeError(
                f"{self._process.args!r} said {line!r}, ended {self._process.poll()}"
            )
        return line

    def go(self) -> None:
        """Let it begin."""
        self._in.write("\n")
        self._in.flush()

    def result(self) -> tuple[float, Usage]:
        """Wait for what it has to say."""
        said = json.loads(self._expect("{"))
        return said["seconds"], Usage(said["user"], said["system"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()


class MigSource:
    """Sends the image."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._peer: Peer | None = None
        self._result = (0.0, Usage(0, 0))

    def prepare(self, uri: str) -> None:
        self._peer = Peer("send", uri, self._image)

    def migrate(self, uri: str) -> None:
        assert self._peer is not None
        self._peer.go()
        self._result = self._peer.result()

    def result(self) -> tuple[float, Usage]:
        return self._result

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


class MigDestination:
    """Keeps the guest in a file (`capture`) or in memory."""

    def __init__(self, role: str, uri: str, file: Path) -> None:
        self._peer = Peer(role, uri, file)

    def result(self) -> Usage:
        return self._peer.result()[1]

    def close(self) -> None:
        self._peer.close()


# ---- processes of QEMU -----------------------------------------------------------------------


def _usage(qemu: Qemu) -> Usage:
    stat = Path(f"/proc/{qemu._process.pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return Usage(int(fields[11]) / _TICKS, int(fields[12]) / _TICKS)


def _machine_usage() -> float:
    """Processor seconds that all processors of the machine have been busy."""
    user, nice, system, _idle, _iowait, *rest = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + sum(rest)) / _TICKS


def _since(before: Usage, after: Usage) -> Usage:
    return Usage(after.user - before.user, after.system - before.system)


def _configure(qemu: Qemu) -> None:
    qemu.set_capabilities({"return-path": True})
    qemu.set_parameters({"max-bandwidth": 0})


class QemuSource:
    """A running guest that goes on after each migration, as if it had failed."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self._before = Usage(0, 0)
        self._after = Usage(0, 0)
        _configure(qemu)

    def prepare(self, uri: str) -> None:
        if self._qemu.status() != "running":
            self._qemu.command("cont")
            self._qemu.wait_status("running")
        self._before = _usage(self._qemu)

    def migrate(self, uri: str) -> None:
        self._qemu.migrate(uri)
        while (status := self._qemu.query_migrate()["status"]) != "completed":
            if status in ("failed", "cancelled"):
                raise RuntimeError(f"migration {status}: {self._qemu.stderr}")
            time.sleep(_POLL_INTERVAL)
        self._after = _usage(self._qemu)

    def result(self) -> tuple[float, Usage]:
        total = self._qemu.wait_migration()["total-time"] / 1000
        return total, _since(self._before, self._after)

    def close(self) -> None:
        """Nothing: the guest stays for the next one."""


class QemuDestination:
    """A fresh QEMU that waits for the guest."""

    def __init__(self, binary: QemuBinary, spec: GuestSpec, folder: Path, uri: str) -> None:
        self._qemu = Qemu(binary, spec, folder, name="destination", incoming="defer")
        _configure(self._qemu)
        self._qemu.migrate_incoming(uri)
        self._before = _usage(self._qemu)

    def result(self) -> Usage:
        self._qemu.wait_migration()
        return _since(self._before, _usage(self._qemu))

    def close(self) -> None:
        self._qemu.close()


# ---- the stage -------------------------------------------------------------------------------


class Stage:
    """Everything that a migration between any two ends needs.

    mib: memory of the guest
    """

    def __init__(
        self, binary: QemuBinary, spec: GuestSpec, folder: Path, disk: Path, mib: int
    ) -> None:
        self._binary, self._spec, self._folder = binary, spec, folder
        self._kept = {"capture": folder / "kept", "disk": disk / "kept"}
        self.version = ".".join(map(str, binary.version))
        self._warm_mib = mib + mib // 8 + 64
        self.uri = f"unix:{folder / 'socket'}"
        self.image = folder / "image"
        self.runs: dict[str, list[Run]] = defaultdict(list)
        self._busy = 0.0
        self._source: Source | None = None
        self._destination: Destination | None = None

    def _destination_of(self, kind: str) -> Destination:
        if kind == "qemu":
            return QemuDestination(self._binary, self._spec, self._folder, self.uri)
        if kind == "memory":
            return MigDestination("memory", self.uri, self.image)
        return MigDestination("capture", self.uri, self._kept[kind])

    def clear(self) -> None:
        """End the last migration's processes, and free what it took."""
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._destination is not None:
            self._destination.close()
            self._destination = None
        for leftover in (*self._kept.values(), self._folder / "socket"):
            leftover.unlink(missing_ok=True)

    def prepare(self, source: Source, destination: str) -> None:
        """Set the ends up; then have the host back the memory that the destination will take."""
        self.clear()
        self._source = source
        self._destination = self._destination_of(destination)
        source.prepare(self.uri)
        with contextlib.closing(Peer("warm", self._warm_mib)) as warm:
            warm.go()
            warm.result()

    def migrate(self) -> None:
        """Run the migration that was prepared."""
        assert self._source is not None
        before = _machine_usage()
        self._source.migrate(self.uri)
        self._busy = _machine_usage() - before

    def note(self, name: str) -> None:
        """Collect the figures of the migration that has run."""
        assert self._source is not None
        assert self._destination is not None
        total, used = self._source.result()
        self.runs[name].append(Run(total, used, self._destination.result(), self._busy))


@dataclass(frozen=True)
class Plan:
    """Sizes of this run."""

    mib: int
    rounds: int


@pytest.fixture(scope="module")
def plan(smoke: bool) -> Plan:
    mib = int(os.environ.get("MIG_BENCH_MIB") or (128 if smoke else 2048))
    return Plan(mib, 1 if smoke else 5)


@pytest.fixture(scope="module")
def need_mib(plan: Plan) -> int:
    """The image and a capture."""
    return 2 * (plan.mib + 256)


@pytest.fixture(scope="module")
def binary() -> QemuBinary:
    root = os.environ.get("MIG_QEMU_10")
    return QemuBinary.unpacked(Path(root)) if root else QemuBinary.installed()


@pytest.fixture(scope="module")
def spec(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> GuestSpec:
    initrd = write_initramfs(tmp_path_factory.mktemp("guest") / "initrd")
    memory = plan.mib + plan.mib // 16 + 96
    return GuestSpec(find_kernel(), initrd, memory_mib=memory, fill_mib=plan.mib, mode="idle")


@pytest.fixture(scope="module")
def running(binary: QemuBinary, spec: GuestSpec, fast_folder: Path) -> Iterator[QemuSource]:
    """The guest in the QEMU that is the source."""
    with Qemu(binary, spec, fast_folder, name="source") as qemu:
        qemu.wait_ready(600)
        yield QemuSource(qemu)


@pytest.fixture(scope="module")
def stage(
    binary: QemuBinary,
    spec: GuestSpec,
    fast_folder: Path,
    running: QemuSource,
    plan: Plan,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    """The stage, with the guest captured once by mig: the image that mig sends."""
    disk = tmp_path_factory.mktemp("disk")
    stage = Stage(binary, spec, fast_folder, disk, plan.mib)
    destination = MigDestination("capture", stage.uri, stage.image)
    try:
        running.prepare(stage.uri)
        running.migrate(stage.uri)
        destination.result()
        yield stage
    finally:
        destination.close()
        stage.clear()


#: source and kind of destination of each migration that is compared
Ends = Mapping[str, tuple[Source, str]]


def _median(runs: list[Run], of: Callable[[Run], float]) -> float:
    return statistics.median(map(of, runs))


def _migrations(
    compare: Any,
    stage: Stage,
    plan: Plan,
    folder_type: str,
    ends: Ends,
) -> None:
    """Compare the migration called mig with the other ones."""
    stage.runs.clear()
    waiting: list[str] = []

    def collect() -> None:
        if waiting:
            stage.note(waiting.pop())

    def prepare(name: str) -> None:
        collect()
        stage.prepare(*ends[name])
        waiting.append(name)

    compare(
        stage.migrate,
        {name: stage.migrate for name in ends if name != "mig"},
        rounds=plan.rounds,
        prepare=prepare,
        nbytes=plan.mib << 20,
    )
    collect()
    mine = _median(stage.runs["mig"], lambda run: run.total)
    for name, runs in stage.runs.items():
        total = _median(runs, lambda run: run.total)
        compare.info[f"total {name}"] = total
        if name != "mig":
            compare.info[f"ratio total {name}"] = total / mine
        compare.info[f"cpu {name} machine"] = _median(runs, attrgetter("machine"))
        for end in ("source", "destination"):
            for mode in ("user", "system"):
                used = attrgetter(f"{end}.{mode}")
                compare.info[f"cpu {name} {end} {mode}"] = _median(runs, used)
    compare.info["mib"] = plan.mib
    compare.info["qemu"] = stage.version
    compare.info["folder"] = folder_type


@pytest.mark.parametrize("file", ["disk", "tmpfs"])
def test_receive(
    compare: Any, stage: Stage, plan: Plan, fast_folder_type: str, running: QemuSource, file: str
) -> None:
    """QEMU to mig, into a file on disk or in memory; beside QEMU to QEMU."""
    kind = "disk" if file == "disk" else "capture"
    ends: Ends = {"mig": (running, kind), "qemu": (running, "qemu")}
    folder_type = "disk" if file == "disk" else fast_folder_type
    _migrations(compare, stage, plan, folder_type, ends)


def test_send(
    compare: Any, stage: Stage, plan: Plan, fast_folder_type: str, running: QemuSource
) -> None:
    """mig to QEMU, from a file in memory; beside QEMU to QEMU."""
    ends: Ends = {"mig": (MigSource(stage.image), "qemu"), "qemu": (running, "qemu")}
    _migrations(compare, stage, plan, fast_folder_type, ends)


@pytest.mark.parametrize("destination", ["disk", "memory"])
def test_both_ends(
    compare: Any,
    stage: Stage,
    plan: Plan,
    fast_folder_type: str,
    running: QemuSource,
    destination: str,
) -> None:
    """mig to mig; beside QEMU to QEMU."""
    ends: Ends = {"mig": (MigSource(stage.image), destination), "qemu": (running, "qemu")}
    _migrations(compare, stage, plan, fast_folder_type, ends)
