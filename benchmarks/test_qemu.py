# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole migrations of a QEMU guest: mig at one end, or both, beside QEMU at both ends.

The guest has MIG_BENCH_MIB MiB (2048; 64 in smoke mode) of memory that does not compress, and is
idle. Every migration goes over a unix socket with a return path and without a bandwidth limit,
between two processes of one machine. The time is that from the start to the source's `completed`,
which comes after the destination has confirmed; `total` is the source's own figure for it
(QEMU's total-time).

The image that mig sends and the file that it keeps are on tmpfs, or where MIG_BENCH_DIR says; a
file on `disk` is in the folder for temporary files, written around the page cache.
MIG_QEMU_10 names an unpacked QEMU 10.0; without it the installed QEMU is both peer and partner.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

from .migrations import (
    Destination,
    Ends,
    MigDestination,
    MigImage,
    QemuDestination,
    QemuSource,
    Stage,
    compare_migrations,
    idle_guest,
    qemu_name,
)

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def mib(smoke: bool) -> int:
    return int(os.environ.get("MIG_BENCH_MIB") or (64 if smoke else 2048))


@pytest.fixture(scope="module")
def need_mib(mib: int) -> int:
    """The image and a capture."""
    return 2 * (mib + 256)


@pytest.fixture(scope="module")
def binary() -> QemuBinary:
    root = os.environ.get("MIG_QEMU_10")
    return QemuBinary.unpacked(Path(root)) if root else QemuBinary.installed()


@pytest.fixture(scope="module")
def spec(mib: int, tmp_path_factory: pytest.TempPathFactory) -> GuestSpec:
    return idle_guest(mib, tmp_path_factory.mktemp("guest"))


@pytest.fixture(scope="module")
def running(binary: QemuBinary, spec: GuestSpec, fast_folder: Path) -> Iterator[QemuSource]:
    """The guest in the QEMU that is the source."""
    with Qemu(binary, spec, fast_folder, name="source") as qemu:
        qemu.wait_ready(600)
        yield QemuSource(qemu)


@pytest.fixture(scope="module")
def stage(fast_folder: Path, mib: int) -> Iterator[Stage]:
    stage = Stage(fast_folder, mib)
    yield stage
    stage.clear()


@pytest.fixture(scope="module")
def image(stage: Stage, fast_folder: Path, running: QemuSource) -> Path:
    """The guest, captured once by mig: what mig sends."""
    image = fast_folder / "image"
    stage.prepare(running, lambda: MigDestination("capture", stage.uri, image))
    stage.migrate()
    stage.run()
    return image


#: makes a destination of a kind
MakeDestination = Callable[[str], Callable[[], Destination]]


@pytest.fixture(scope="module")
def to(
    stage: Stage,
    binary: QemuBinary,
    spec: GuestSpec,
    fast_folder: Path,
    image: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeDestination:
    """Destinations by kind: 'qemu', 'memory', and files on 'tmpfs' and 'disk'."""
    files = {"tmpfs": fast_folder / "kept", "disk": tmp_path_factory.mktemp("disk") / "kept"}

    def make(kind: str) -> Destination:
        if kind == "qemu":
            return QemuDestination(binary, spec, fast_folder, stage.uri)
        if kind == "memory":
            return MigDestination("memory", stage.uri, image)
        return MigDestination("capture", stage.uri, files[kind], kept=files[kind])

    return lambda kind: lambda: make(kind)


@pytest.mark.parametrize("file", ["disk", "tmpfs"])
def test_receive(
    compare: Any,
    stage: Stage,
    mib: int,
    rounds: int,
    fast_folder_type: str,
    running: QemuSource,
    binary: QemuBinary,
    to: MakeDestination,
    file: str,
) -> None:
    """QEMU to mig, into a file on disk or in memory; beside QEMU to QEMU."""
    ends: Ends = {"mig": (running, to(file)), qemu_name(binary): (running, to("qemu"))}
    folder = "disk" if file == "disk" else fast_folder_type
    compare_migrations(compare, stage, ends, mib=mib, rounds=rounds, file=folder)


def test_send(
    compare: Any,
    stage: Stage,
    mib: int,
    rounds: int,
    fast_folder_type: str,
    running: QemuSource,
    binary: QemuBinary,
    image: Path,
    to: MakeDestination,
) -> None:
    """mig to QEMU, from a file in memory; beside QEMU to QEMU."""
    ends: Ends = {"mig": (MigImage(image), to("qemu")), qemu_name(binary): (running, to("qemu"))}
    folder = fast_folder_type
    compare_migrations(compare, stage, ends, mib=mib, rounds=rounds, file=folder)


@pytest.mark.parametrize("destination", ["disk", "memory"])
def test_both_ends(
    compare: Any,
    stage: Stage,
    mib: int,
    rounds: int,
    fast_folder_type: str,
    running: QemuSource,
    binary: QemuBinary,
    image: Path,
    to: MakeDestination,
    destination: str,
) -> None:
    """mig to mig; beside QEMU to QEMU."""
    ends: Ends = {
        "mig": (MigImage(image), to(destination)),
        qemu_name(binary): (running, to("qemu")),
    }
    folder = fast_folder_type
    compare_migrations(compare, stage, ends, mib=mib, rounds=rounds, file=folder)
