# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole migrations with and without multifd: mig at one end, or both, beside QEMU at both ends.

The guest has MIG_BENCH_MIB MiB (4096; 32 in smoke mode) of memory and is idle; what is measured
with a codec is a guest whose memory compresses by half. `mig_to_mig` moves mig's own running guest,
the others a QEMU guest that mig has captured on tmpfs (or where MIG_BENCH_DIR says). Both ends, and
QEMU's beside them, have the same settings. The peers are the installed QEMU and, where MIG_QEMU_10
names it, an unpacked QEMU 10.0.

A guest that comes from QEMU goes into a file on disk, as with `mig receive`; into memory; and
nowhere, which says how fast its stream can be read. The disk alone is measured beside the file.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

from .conftest import SMOKE
from .migrations import (
    PLAIN,
    Ends,
    MigDestination,
    MigGuest,
    MigImage,
    QemuDestination,
    QemuSource,
    Settings,
    Stage,
    compare_migrations,
    disk_rate,
    idle_guest,
    multifd,
    qemu_name,
)

pytestmark = pytest.mark.timeout(7200)

Pattern = Literal["random", "compressible"]

_INSTALLED = "installed"
_QEMU_10 = os.environ.get("MIG_QEMU_10")
#: one page a second: the threads of an idle guest tick
_IDLE = 4096
_SETTINGS = {
    "plain": PLAIN,
    "multifd 2": multifd(2),
    "multifd 4": multifd(4),
    "zlib 1": multifd(2, "zlib", multifd_zlib_level=1),
    "zstd 1": multifd(2, "zstd", multifd_zstd_level=1),
}
#: QEMU's first takes longer: its emulator has never logged writes before
_WARMUP = 0 if SMOKE else 1
#: what a quick run does: what goes in no other benchmark
_SMOKE = [("multifd 2", "tcp"), ("zstd 1", "unix")]
#: what the guest's memory is like, how it goes, and over what
_CASES = [
    ("random", "plain", "unix"),
    ("random", "multifd 2", "unix"),
    ("random", "multifd 4", "unix"),
    ("random", "plain", "tcp"),
    ("random", "multifd 2", "tcp"),
    ("compressible", "zlib 1", "unix"),
    ("compressible", "zstd 1", "unix"),
]
if SMOKE:
    _CASES = [case for case in _CASES if case[1:] in _SMOKE]
with_cases = pytest.mark.parametrize(
    ("pattern", "named", "transport"), _CASES, indirect=["pattern"], scope="module"
)


@pytest.fixture(scope="module")
def mib(smoke: bool) -> int:
    return int(os.environ.get("MIG_BENCH_MIB") or (32 if smoke else 4096))


@pytest.fixture(scope="module")
def need_mib(mib: int) -> int:
    """The image."""
    return mib + 512


@pytest.fixture(scope="module", params=[_INSTALLED, *(["10.0"] if _QEMU_10 else [])])
def binary(request: pytest.FixtureRequest) -> QemuBinary:
    if request.param == _INSTALLED:
        return QemuBinary.installed()
    return QemuBinary.unpacked(Path(_QEMU_10 or ""))


@pytest.fixture(scope="module")
def pattern(request: pytest.FixtureRequest) -> Pattern:
    """What the guest's memory is like."""
    pattern: Pattern = request.param
    return pattern


@pytest.fixture(scope="module")
def spec(mib: int, pattern: Pattern, tmp_path_factory: pytest.TempPathFactory) -> GuestSpec:
    return idle_guest(mib, tmp_path_factory.mktemp("guest"), pattern)


@pytest.fixture(scope="module")
def theirs(binary: QemuBinary, spec: GuestSpec, fast_folder: Path) -> Iterator[QemuSource]:
    """The guest in QEMU."""
    with Qemu(binary, spec, fast_folder, name="source") as qemu:
        qemu.wait_ready(1200)
        yield QemuSource(qemu)


@pytest.fixture
def settings(named: str) -> Settings:
    return _SETTINGS[named]


@pytest.fixture
def stage(fast_folder: Path, mib: int, transport: str) -> Iterator[Stage]:
    stage = Stage(fast_folder, mib, transport)
    yield stage
    stage.clear()


# These two are made anew for each test: they do not fit into memory together.


@pytest.fixture
def mine(mib: int, pattern: Pattern, settings: Settings) -> Iterator[MigGuest]:
    """The guest of mig."""
    guest = MigGuest(mib, rate=_IDLE, log="tracked", fill=pattern)
    guest.settings = settings
    yield guest
    guest.end()


@pytest.fixture
def image(stage: Stage, fast_folder: Path, theirs: QemuSource) -> Iterator[Path]:
    """The guest in QEMU, captured once by mig: what mig sends."""
    image = fast_folder / "image"
    theirs.settings = PLAIN
    stage.prepare(theirs, lambda: MigDestination("capture", stage.uri, image))
    stage.migrate()
    stage.run()
    yield image
    image.unlink()


@with_cases
def test_mig_to_mig(
    compare: Any,
    rounds: int,
    stage: Stage,
    settings: Settings,
    mine: MigGuest,
    theirs: QemuSource,
    binary: QemuBinary,
    spec: GuestSpec,
    fast_folder: Path,
    mib: int,
    named: str,
    transport: str,
) -> None:
    """mig to mig, beside QEMU to QEMU."""
    theirs.settings = settings
    name = qemu_name(binary)
    ends: Ends = {
        "mig": (mine, lambda: MigDestination("host", stage.uri, mib, settings=settings)),
        name: (theirs, lambda: QemuDestination(binary, spec, fast_folder, stage.uri, settings)),
    }
    compare_migrations(compare, stage, ends, mib=mib, rounds=rounds, warmup=_WARMUP)
    legs = {"mig": "mig to mig"}
    compare.info.update(legs=legs, beside=name, settings=named, transport=transport)


@with_cases
def test_mig_and_qemu(
    compare: Any,
    rounds: int,
    stage: Stage,
    settings: Settings,
    theirs: QemuSource,
    image: Path,
    binary: QemuBinary,
    spec: GuestSpec,
    fast_folder: Path,
    tmp_path: Path,
    mib: int,
    named: str,
    transport: str,
) -> None:
    """mig to QEMU, and QEMU to mig, beside QEMU to QEMU."""
    theirs.settings = settings
    name, file = qemu_name(binary), tmp_path / "kept"
    disk: list[float] = []

    def to_qemu() -> QemuDestination:
        return QemuDestination(binary, spec, fast_folder, stage.uri, settings)

    def to_mig(role: str, *arguments: object, kept: Path | None = None) -> MigDestination:
        return MigDestination(role, stage.uri, *arguments, settings=settings, kept=kept)

    def to_file(form: str) -> MigDestination:
        # at once before: disks, too, drift
        disk.append(disk_rate(tmp_path / "raw", mib << 20))
        return to_mig("capture", file, form, kept=file)

    ends: Ends = {
        "mig": (MigImage(image, settings), to_qemu),
        name: (theirs, to_qemu),
        "into file": (theirs, lambda: to_file("mapped-ram")),
        "into stream": (theirs, lambda: to_file("stream")),
        "into memory": (theirs, lambda: to_mig("memory", image)),
        "nowhere": (theirs, lambda: to_mig("drop")),
    }
    compare_migrations(compare, stage, ends, mib=mib, rounds=rounds, warmup=_WARMUP)
    legs = {
        "mig": "mig to QEMU",
        "into file": "QEMU to mig, mapped-ram file",
        "into stream": "QEMU to mig, stream in a file",
        "into memory": "QEMU to mig, memory",
        "nowhere": "QEMU to mig, nowhere",
    }
    compare.info.update(legs=legs, beside=name, settings=named, transport=transport)
    compare.info["disk"] = statistics.median(disk)
