# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that writes all the time, saved to a file while it runs and, in turn, while it stands.

Its threads, the snapshot's two and the kernel share the machine's processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mig
from mig.dirty.track import refusal

#: seconds in which the guest is watched while nothing else happens
_WINDOW = 0.5


@pytest.fixture
def mib(smoke: bool) -> int:
    return 64 if smoke else 1024


@pytest.fixture(scope="module")
def need_mib() -> int:
    """One file of all memory."""
    return 1200


@pytest.fixture(autouse=True)
def _works() -> None:
    why = refusal("userfaultfd")
    if why is not None:
        pytest.skip(why)


@pytest.fixture
def guest(mib: int, rate_mib: int) -> Iterator[mig.ProcessGuest]:
    with mig.ProcessGuest(mib << 20, rate=rate_mib << 20) as guest:
        guest.start()
        yield guest


def _save(guest: mig.ProcessGuest, path: Path, *capabilities: str) -> mig.OutgoingMigration:
    out = mig.OutgoingMigration(
        guest, capabilities=capabilities, parameters={"max-bandwidth": 0, "direct-io": False}
    )
    out.start(f"file:{path}")
    out.wait()
    return out


class _Written:
    """How many bytes the guest dirties in a second."""

    def __init__(self, guest: mig.ProcessGuest) -> None:
        self._guest = guest
        self._before = guest.counters().bytes_written, time.monotonic()

    def rate(self) -> float:
        nbytes, began = self._before
        return (self._guest.counters().bytes_written - nbytes) / (time.monotonic() - began)


@pytest.mark.parametrize("rate_mib", [50, 400, 0])
def test_snapshot(
    benchmark: Any,
    rounds: int,
    fast_folder: Path,
    fast_folder_type: str,
    guest: mig.ProcessGuest,
    mib: int,
    rate_mib: int,
) -> None:
    """rate 0: as fast as its thread can."""
    path = fast_folder / "vm"
    said: dict[str, list[float]] = {
        name: [] for name in ("pause", "faults", "during", "alone", "stand still", "setup")
    }

    def prepare() -> None:
        # the memory of the file is there for both
        began = time.monotonic()
        guest.stop()
        _save(guest, path)
        guest.resume()
        said["stand still"].append(time.monotonic() - began)
        written = _Written(guest)
        time.sleep(_WINDOW)
        said["alone"].append(written.rate())

    def snapshot() -> None:
        written = _Written(guest)
        stats = _save(guest, path, "background-snapshot").query()
        said["during"].append(written.rate())
        assert stats.snapshot is not None
        assert stats.snapshot.pause is not None
        assert stats.setup_time is not None
        said["setup"].append(stats.setup_time)
        said["pause"].append(stats.snapshot.pause)
        said["faults"].append(stats.snapshot.faults)

    prepare()
    benchmark.pedantic(snapshot, setup=prepare, rounds=rounds)
    assert guest.verify().ok
    middle = {name: statistics.median(values) for name, values in said.items()}
    benchmark.extra_info.update(
        snapshot=middle,
        longest_pause=max(said["pause"]),
        rate=rate_mib << 20,
        memory=mib << 20,
    )
    benchmark.extra_info["file system"] = fast_folder_type
