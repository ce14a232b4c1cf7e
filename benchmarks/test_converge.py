# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that changes a few words of many pages, over a link that is slower than it is.

It dirties 200 MiB/s, one word in every 512 bytes of a page, in a quarter of its MIG_BENCH_MIB MiB
(4096; 64 in smoke mode); max-bandwidth holds the migration to 1 Gbit/s, less than is dirtied. What
has not converged after some time is ended with whatever downtime it takes.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mig.options import INCOMING_CAPABILITIES, OUTGOING_CAPABILITIES

from .migrations import PLAIN, MigDestination, MigGuest, Settings, Stage

pytestmark = pytest.mark.timeout(7200)

_CAP = 125_000_000
_RATE = 200 << 20
#: seconds after which it has not converged, per MiB of the guest and besides
_PATIENCE = 1 / 64, 20
_CACHE = "xbzrle-cache-size"


def _sets(mib: int) -> dict[str, Settings]:
    """What is compared, by name; a cache holds all that the guest writes.

    A set that mig cannot do (yet) is left out of the comparison.
    """
    cache = {_CACHE: (mib << 20) // 2}
    adaptive = {_CACHE: cache[_CACHE], "multifd-compression": "adaptive", "multifd-channels": 2}
    sets = {
        "plain": PLAIN,
        "xbzrle": Settings(("xbzrle",), cache),
        "adaptive": Settings(("multifd", "return-path"), adaptive),
    }
    known = OUTGOING_CAPABILITIES & INCOMING_CAPABILITIES
    return {name: some for name, some in sets.items() if known.issuperset(some.capabilities)}


@pytest.fixture(scope="module")
def mib(smoke: bool) -> int:
    return int(os.environ.get("MIG_BENCH_MIB") or (64 if smoke else 4096))


@pytest.fixture(scope="module")
def need_mib() -> int:
    """Nothing but sockets."""
    return 16


@pytest.fixture
def stage(fast_folder: Path, mib: int) -> Iterator[Stage]:
    stage = Stage(fast_folder, mib)
    yield stage
    stage.clear()


@pytest.fixture
def guest(mib: int, smoke: bool) -> Iterator[MigGuest]:
    guest = MigGuest(mib, rate=_RATE, log="tracked", pattern="words")
    guest.patience = 2 if smoke else _PATIENCE[0] * mib + _PATIENCE[1]
    yield guest
    guest.end()


def test_converge(compare: Any, rounds: int, stage: Stage, guest: MigGuest, mib: int) -> None:
    """Bytes and time until the guest runs elsewhere."""
    sets = {
        name: Settings(some.capabilities, {**some.parameters, "max-bandwidth": _CAP})
        for name, some in _sets(mib).items()
    }
    said: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first, *others = sets
    waiting: list[str] = []

    def collect() -> None:
        if waiting:
            stage.run()
            said[waiting.pop()].append(guest.said)

    def prepare(name: str) -> None:
        collect()
        name = name if name in sets else first
        guest.settings = sets[name]
        stage.prepare(guest, lambda: MigDestination("host", stage.uri, mib, settings=sets[name]))
        waiting.append(name)

    compare(stage.migrate, dict.fromkeys(others, stage.migrate), rounds=rounds, prepare=prepare)
    collect()
    figures = {
        name: {
            "total": statistics.median(one["seconds"] for one in some),
            "nbytes": statistics.median(one["nbytes"] for one in some),
            "downtime": statistics.median(one["downtime"] for one in some),
            "passes": statistics.median(one["passes"] for one in some),
            "converged": sum(not one["forced"] for one in some),
        }
        for name, some in ((name, said[name]) for name in sets)
    }
    compare.info.update(
        sets=figures, memory=mib << 20, limit=_CAP, rate=_RATE, patience=guest.patience
    )
