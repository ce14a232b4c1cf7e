# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all benchmarks share: smoke mode, and comparing with a peer in the same run."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mig import _core

from .peers import Code, given_libraries

SMOKE = bool(os.environ.get("MIG_BENCH_SMOKE"))
_SHM = Path("/dev/shm")

#: the name of the benchmark itself among the peers it is compared with
MIG = "mig"


class Comparison:
    """Runs one benchmark with its peers, a round of each in turn (A B C A B C ...).

    Machines drift: only what was measured next to each other can be compared. The benchmark's own
    rounds are pytest-benchmark's; those of the peers run in its untimed setup. `extra_info` gets
    the median seconds of every peer and `ratio NAME`: how many times as long the peer takes, so
    that above 1 means mig is faster.
    """

    def __init__(self, benchmark: Any, lines: list[str]) -> None:
        self._benchmark = benchmark
        self._lines = lines

    @property
    def info(self) -> dict[str, Any]:
        """What the results say of this benchmark beside its times."""
        info: dict[str, Any] = self._benchmark.extra_info
        return info

    def __call__(
        self,
        target: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        *,
        rounds: int,
        prepare: Callable[[str], object] = lambda _: None,
        warmup: int = 0,
        nbytes: int = 0,
        count: float = 1,
        unit: str = "",
    ) -> None:
        """Measure `target` against the peers.

        prepare: runs before every round of everyone, untimed, with the name of who is next
        warmup:  rounds of everyone before those that count
        nbytes:  bytes that one round stands for, 0 where a rate says nothing
        count:   how many of `unit` a round does, or which part of one
        """
        times: dict[str, list[float]] = {name: [] for name in peers}

        def run_peers() -> None:
            for name, peer in peers.items():
                prepare(name)
                start = time.perf_counter()
                peer()
                times[name].append(time.perf_counter() - start)
            prepare(MIG)

        self._benchmark.pedantic(
            target, setup=run_peers, rounds=rounds, iterations=1, warmup_rounds=warmup
        )
        mine = statistics.median(self._benchmark.stats.stats.data)
        self.info.update(nbytes=nbytes, count=count, unit=unit)
        time_of_one = f"{1e9 * mine / count:.2f} ns a {unit}" if unit else f"{1e3 * mine:.3f} ms"
        line = f"{self._benchmark.name:44} {time_of_one:>22}"
        if nbytes:
            line += f" {nbytes / mine / 1e9:7.2f} GB/s"
        for name, seconds in times.items():
            median = statistics.median(seconds[warmup:])
            self.info[f"seconds {name}"] = median
            self.info[f"ratio {name}"] = median / mine
            line += f"   {name}: x{median / mine:.2f}"
        self._lines.append(line)


#: measures one kernel: target, peers, and what one round stands for
Measure = Callable[..., None]

_LINES: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the list of what to print at the end."""
    config.stash[_LINES] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the comparisons."""
    if config.stash[_LINES]:
        terminalreporter.section("medians; xN: how many times as long the peer takes")
        for line in config.stash[_LINES]:
            terminalreporter.write_line(line)


@pytest.fixture
def compare(benchmark: Any, pytestconfig: pytest.Config) -> Comparison:
    """The benchmark of this test, measured against peers."""
    return Comparison(benchmark, pytestconfig.stash[_LINES])


@pytest.fixture
def measure(compare: Comparison) -> Measure:
    """`compare` with as many rounds as a kernel needs, unless a test says otherwise."""
    return functools.partial(compare, rounds=2 if SMOKE else 15, warmup=1)


@pytest.fixture(scope="session")
def smoke() -> bool:
    """Whether this is a quick run that only shows that the benchmarks work."""
    return SMOKE


@pytest.fixture(scope="session")
def rounds() -> int:
    """How many times a whole migration is run: MIG_BENCH_ROUNDS, else 5, once in smoke mode."""
    return int(os.environ.get("MIG_BENCH_ROUNDS") or (1 if SMOKE else 5))


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Code:
    """The peers' C code, compiled."""
    return Code(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="session")
def need_mib() -> int:
    """MiB that files in `fast_folder` may take; modules that need more override it."""
    return 1024


@pytest.fixture(scope="module")
def fast_folder(need_mib: int) -> Iterator[Path]:
    """A folder for files: in $MIG_BENCH_DIR, else in memory where /dev/shm is large enough."""
    named = os.environ.get("MIG_BENCH_DIR")
    parent = Path(named) if named else _SHM
    free = shutil.disk_usage(parent).free >> 20 if parent.is_dir() else 0
    if not named and free < need_mib:
        parent = Path(tempfile.gettempdir())
        print(
            f"\n{_SHM} has {free} MiB free, {need_mib} are needed: files go to {parent}, "
            "and their figures are those of its file system"
        )
    with tempfile.TemporaryDirectory(prefix="mig-bench-", dir=parent) as name:
        yield Path(name)


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[0])]
    return max(inside, key=lambda mount: len(mount[0]), default=["", "?"])[1]


@pytest.fixture(scope="module")
def fast_folder_type(fast_folder: Path) -> str:
    """The type of file system that `fast_folder` is on."""
    return _file_system(fast_folder)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Name the machine in the results, for report.py."""
    machine_info["mig"] = {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "kernels": _core.KERNELS.name,
        "smoke": SMOKE,
        **given_libraries(),
    }
    machine_info.pop("node", None)
