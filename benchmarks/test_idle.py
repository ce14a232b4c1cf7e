# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running guest that does nothing: mig's, beside QEMU's of the same size.

Both guests have MIG_BENCH_MIB MiB (4096; 64 in smoke mode) of memory that does not compress, and
log writes to it while they are migrated (mig: by the kernel's write tracking). The peers are the
installed QEMU and, where MIG_QEMU_10 names it, an unpacked QEMU 10.0.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

from .conftest import SMOKE
from .migrations import (
    PLAIN,
    Ends,
    MigDestination,
    MigGuest,
    Peer,
    QemuDestination,
    QemuSource,
    Settings,
    Stage,
    compare_migrations,
    idle_guest,
    multifd,
    qemu_name,
)

pytestmark = pytest.mark.timeout(3600)

_INSTALLED = "installed"
_QEMU_10 = os.environ.get("MIG_QEMU_10")
#: one page a second: the threads of an idle guest tick
_IDLE = 4096
#: how far from max-bandwidth what is sent in a second may be
_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def mib(smoke: bool) -> int:
    return int(os.environ.get("MIG_BENCH_MIB") or (64 if smoke else 4096))


@pytest.fixture(scope="module")
def need_mib() -> int:
    """Nothing but sockets and consoles."""
    return 16


@pytest.fixture(scope="module")
def spec(mib: int, tmp_path_factory: pytest.TempPathFactory) -> GuestSpec:
    return idle_guest(mib, tmp_path_factory.mktemp("guest"))


@pytest.fixture(scope="module", params=[_INSTALLED, *(["10.0"] if _QEMU_10 else [])])
def binary(request: pytest.FixtureRequest) -> QemuBinary:
    if request.param == _INSTALLED:
        return QemuBinary.installed()
    return QemuBinary.unpacked(Path(_QEMU_10 or ""))


@pytest.fixture(scope="module")
def theirs(binary: QemuBinary, spec: GuestSpec, fast_folder: Path) -> Iterator[QemuSource]:
    """The guest in QEMU."""
    with Qemu(binary, spec, fast_folder, name="source") as qemu:
        qemu.wait_ready(1200)
        yield QemuSource(qemu)


@pytest.fixture(scope="module")
def mine(mib: int) -> Iterator[MigGuest]:
    """The guest of mig."""
    guest = MigGuest(mib, rate=_IDLE, log="tracked")
    yield guest
    guest.end()


@pytest.fixture
def stage(fast_folder: Path, mib: int) -> Iterator[Stage]:
    stage = Stage(fast_folder, mib)
    yield stage
    stage.clear()


def test_idle_guest(
    compare: Any,
    rounds: int,
    stage: Stage,
    mine: MigGuest,
    theirs: QemuSource,
    binary: QemuBinary,
    spec: GuestSpec,
    fast_folder: Path,
    mib: int,
) -> None:
    """mig to mig, beside QEMU to QEMU."""
    ends: Ends = {
        "mig": (mine, lambda: MigDestination("host", stage.uri, mib)),
        qemu_name(binary): (
            theirs,
            lambda: QemuDestination(binary, spec, fast_folder, stage.uri),
        ),
    }
    # QEMU's first takes longer: its emulator has never logged writes before
    compare_migrations(compare, stage, ends, mib=mib, rounds=rounds, warmup=1)


_LIMITS = [(50, 0), (500, 0), (1000, 0), (50, 4), (500, 4)]


@pytest.mark.parametrize(("megabytes", "channels"), [(50, 0), (50, 4)] if SMOKE else _LIMITS)
def test_rate_limit(
    compare: Any,
    smoke: bool,
    rounds: int,
    stage: Stage,
    mine: MigGuest,
    theirs: QemuSource,
    binary: QemuBinary,
    mib: int,
    megabytes: int,
    channels: int,
) -> None:
    """What arrives in each second, over all connections, against max-bandwidth.

    channels: of multifd; 0: there is only the main one
    """
    cap = megabytes * 1_000_000 // (20 if smoke else 1)
    # the half second is for the start, before the first whole one
    seconds = min(1 if smoke else 5, int((mib << 20) / cap - 0.5))
    sources: dict[str, MigGuest | QemuSource] = {"mig": mine, qemu_name(binary): theirs}
    rates: dict[str, list[float]] = defaultdict(list)
    settings = multifd(channels) if channels else PLAIN
    limited = Settings(settings.capabilities, {**settings.parameters, "max-bandwidth": cap})
    with contextlib.ExitStack() as sinks:
        current: list[Peer] = []

        def prepare(name: str) -> None:
            sinks.close()
            stage.clear()
            current[:] = [Peer("sink", stage.uri, seconds)]
            sinks.callback(current[0].close)
            sources[name].prepare(stage.uri)
            sources[name].settings = limited

        def run(name: str) -> None:
            sources[name].stream(stage.uri)
            rates[name] += current[0].answer()["rates"]

        compare(
            lambda: run("mig"),
            {name: lambda name=name: run(name) for name in sources if name != "mig"},
            rounds=rounds,
            prepare=prepare,
        )
    for source in sources.values():
        source.settings = PLAIN
    compare.info["cap"] = cap
    compare.info["channels"] = channels
    for name, some in rates.items():
        off = [rate / cap - 1 for rate in some]
        compare.info[f"off {name}"] = statistics.median(off)
        compare.info[f"worst {name}"] = max(off, key=abs)
        compare.info[f"windows {name}"] = len(off)
        compare.info[f"kept {name}"] = sum(abs(part) <= _TOLERANCE for part in off)
