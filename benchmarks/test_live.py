"""Guests that run while they are migrated, and what a look at clean memory costs the engine.

Source and destination are in one process, so the guest's clock is one clock; the threads of the
guest, of the two migrations and of the kernel share the machine's processors.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mig
from mig.dirty import DirtyLog
from mig.guest import ProcessGuest
from mig.ram.search import PageSearch

_PAGE = 4096
#: what both QEMU and mig aim for unless told otherwise (ms)
_LIMIT = 300


@pytest.mark.parametrize("rate_mib", [0, 50, 200])
@pytest.mark.parametrize("log", ["tracked", "marked"])
def test_downtime(benchmark: Any, smoke: bool, fast_folder: Path, rate_mib: int, log: str) -> None:
    """A guest that dirties so much a second; rate 0: one whose threads only tick."""
    nbytes = 64 << 20 if smoke else 2 << 30
    gaps: list[float] = []
    rates: list[float] = []
    ends: list[ProcessGuest] = []
    dirty: Any = mig.WriteTracker if log == "tracked" else "marked"

    def prepare() -> tuple[tuple[mig.OutgoingMigration, str], dict[str, Any]]:
        close()
        # one page a second where it is to be idle
        source = ProcessGuest(nbytes, rate=(rate_mib << 20) or _PAGE, working_set=0.25, dirty=dirty)
        target = ProcessGuest(nbytes)
        ends.extend((source, target))
        for block in target.memory:
            block.populate()
        source.start()
        incoming = mig.IncomingMigration(target)
        incoming.listen(f"unix:{fast_folder}/live")
        outgoing = mig.OutgoingMigration(
            source,
            capabilities={"return-path"},
            parameters={"max-bandwidth": 0, "downtime-limit": _LIMIT},
        )
        return (outgoing, incoming.uri or ""), {}

    def migrate(outgoing: mig.OutgoingMigration, uri: str) -> None:
        outgoing.start(uri)
        outgoing.wait()
        _, target = ends
        target.resume()
        rates.append(outgoing.query().throughput or 0)

    def close() -> None:
        if ends:
            source, target = ends
            report = target.verify()
            assert report.ok
            gaps.append(report.switchover_gap or 0)
            source.close()
            target.close()
            ends.clear()

    benchmark.pedantic(migrate, setup=prepare, rounds=1 if smoke else 7)
    close()
    benchmark.extra_info.update(
        downtime=statistics.median(gaps),
        worst=max(gaps),
        limit=_LIMIT / 1000,
        rate=rate_mib << 20,
        log=log,
        memory=nbytes,
        throughput=statistics.median(rates),
    )


@pytest.mark.benchmark(group="An iteration over memory that is clean")
@pytest.mark.parametrize("mib", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("log", ["marked", "tracked"])
def test_iteration(measure: Any, smoke: bool, mib: int, log: str) -> None:
    """Take over the log, find that nothing is dirty; memory that is hardly touched.

    `kernels`: merging a bitmap of that size, and looking for the first set bit.
    """
    mib = min(mib, 256) if smoke else mib
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
        measure(iteration, peers, count=max(1, mib // 1024), unit="GiB" if mib >= 1024 else "block")
    finally:
        chosen.stop()
        memory.close()
