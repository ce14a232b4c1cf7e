"""Guests that run while they are migrated, and what a look at clean memory costs the engine.

Source and destination are two processes of one machine, whose clock both read; the threads of the
guest, of the migration and of the kernel share the machine's processors.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mig
from mig.dirty import DirtyLog
from mig.ram.search import PageSearch

from .conftest import SMOKE
from .migrations import MigDestination, MigGuest, Stage

_PAGE = 4096
#: what both QEMU and mig aim for unless told otherwise (ms)
_LIMIT = 300


@pytest.fixture
def mib(smoke: bool) -> int:
    return 64 if smoke else 2048


@pytest.fixture
def stage(fast_folder: Path, mib: int) -> Iterator[Stage]:
    stage = Stage(fast_folder, mib)
    yield stage
    stage.clear()


@pytest.mark.parametrize("rate_mib", [0, 200] if SMOKE else [0, 50, 200, 800])
@pytest.mark.parametrize("log", ["tracked", "marked"])
def test_downtime(
    benchmark: Any, rounds: int, stage: Stage, mib: int, rate_mib: int, log: str
) -> None:
    """A guest that dirties so much a second; rate 0: one whose threads only tick."""
    gaps: list[float] = []
    rates: list[float] = []
    ends: list[MigDestination] = []
    # one page a second where it is to be idle
    source = MigGuest(mib, rate=(rate_mib << 20) or _PAGE, log=log)

    def make_destination() -> MigDestination:
        ends.append(MigDestination("host", stage.uri, mib))
        return ends[-1]

    def collect() -> None:
        if ends:
            rates.append(stage.run().throughput)
            gaps.append(ends.pop().said["gap"])

    def prepare() -> None:
        collect()
        stage.prepare(source, make_destination)

    try:
        benchmark.pedantic(stage.migrate, setup=prepare, rounds=rounds)
        collect()
    finally:
        stage.clear()
        source.end()
    benchmark.extra_info.update(
        downtime=statistics.median(gaps),
        worst=max(gaps),
        limit=_LIMIT / 1000,
        rate=rate_mib << 20,
        log=log,
        memory=mib << 20,
        throughput=statistics.median(rates),
    )


@pytest.mark.benchmark(group="An iteration over memory that is clean, most of it never touched")
@pytest.mark.parametrize("mib", [256] if SMOKE else [256, 512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("log", ["marked", "tracked"])
def test_iteration(measure: Any, mib: int, log: str) -> None:
    """Take over the log, find that nothing is dirty; memory that is hardly touched.

    `kernels`: merging a bitmap of that size, and looking for the first set bit.
    """
    npages = (mib << 20) // _PAGE
    memory = mig.GuestMemory()
    memory.add("ram", mib << 20)
    guest = mig.MemoryGuest("bench", memory)
    chosen: DirtyLog = (
        mig.WriteTracker(memory) if log == "tracked" else mig.SharedDirtyLog({"ram": npages})
    )
    chosen.start()
    search = PageSearch(guest.source_blocks(), chosen)
    while search.next_batch():
        pass
    dirty, found = mig.Bitmap(npages), mig.Bitmap(npages)

    def iteration() -> None:
        search.sync()
        assert search.next_batch() is None

    def kernels() -> None:
        dirty.merge(found)
        dirty.next_set()

    peers: dict[str, Callable[[], object]] = {"kernels": kernels}
    try:
        measure(iteration, peers, count=mib / 1024, unit="GiB")
    finally:
        chosen.stop()
        memory.close()
