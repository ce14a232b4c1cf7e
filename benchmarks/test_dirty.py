# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one sync of the tracked memory of this process costs, 1 GiB of it.

`userfaultfd` is the fallback, whose writers pay instead: a bitmap and its protection. `pagemap`
is the read of /proc/self/pagemap with which soft-dirty bits come (the kernel need not have them
for that; clearing them is not charged). `merge` is the bitmap's part alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mig import Bitmap, GuestMemory, WriteTracker, _core

from .pages import PAGE, Array, aligned

pytestmark = pytest.mark.benchmark(group="Dirty log: a sync")

_PAGES = 1 << 18
_SMOKE_PAGES = 1 << 11
_SOFT_DIRTY = np.uint64(1 << 55)


class _Tracked:
    """Memory that is full of data, and its tracker."""

    def __init__(self, npages: int, method: str) -> None:
        self.pages = aligned(npages)
        self.pages[:] = 1
        self.memory = GuestMemory(PAGE)
        self.memory.add("a", self.pages.nbytes, self.pages.reshape(-1))
        self.tracker = WriteTracker(self.memory, method=method)
        self.tracker.start()
        self.dirty = Bitmap(npages)

    def write(self, index: Array) -> None:
        self.pages[index, 0] += 1
        self.dirty.clear(0, len(self.pages))

    def sync(self) -> int:
        return self.tracker.sync("a", self.dirty)


def _works(method: str) -> bool:
    try:
        _core.probe_write_log(method)
    except OSError:
        return False
    return True


@pytest.fixture
def tracked(smoke: bool) -> Iterator[dict[str, _Tracked]]:
    """Memory by method."""
    npages = _SMOKE_PAGES if smoke else _PAGES
    every = {m: _Tracked(npages, m) for m in ("pagemap-scan", "userfaultfd") if _works(m)}
    if "pagemap-scan" not in every:
        pytest.skip("PAGEMAP_SCAN with userfaultfd does not work here")
    yield every
    for each in every.values():
        each.tracker.stop()


def _read_pagemap(file: int, pages: Array) -> Callable[[], Array]:
    entries = np.empty(len(pages), dtype=np.uint64)
    at = pages.ctypes.data // PAGE * 8

    def read() -> Array:
        assert os.preadv(file, [entries], at) == entries.nbytes
        return np.packbits(entries & _SOFT_DIRTY != 0, bitorder="little")

    return read


@pytest.mark.parametrize("percent", ["clean, huge pages", 0, 1, 100])
def test_sync(
    measure: Any, tracked: dict[str, _Tracked], percent: float | str, smoke: bool
) -> None:
    mine = tracked["pagemap-scan"]
    npages = len(mine.pages)
    share = 0 if isinstance(percent, str) else percent / 100
    chosen = np.flatnonzero(np.random.default_rng(6).random(npages) < share)
    if not isinstance(percent, str):
        # a write to each page splits all huge pages
        for each in tracked.values():
            each.write(np.arange(npages))
            each.sync()
    bits, merged = Bitmap(npages), Bitmap(npages)
    for page in chosen:
        bits.set(int(page))

    def prepare(who: str) -> None:
        each = tracked.get("pagemap-scan" if who == "mig" else who)
        if each is not None:
            each.write(chosen)
        merged.clear(0, npages)

    file = os.open(Path("/proc/self/pagemap"), os.O_RDONLY)
    try:
        peers: dict[str, Callable[[], object]] = {
            "pagemap": _read_pagemap(file, mine.pages),
            "merge": lambda: merged.merge(bits),
        }
        if "userfaultfd" in tracked:
            peers["userfaultfd"] = tracked["userfaultfd"].sync
        measure(mine.sync, peers, prepare=prepare, unit="sync", rounds=2 if smoke else 7)
    finally:
        os.close(file)
    assert mine.dirty.indexes().tolist() == chosen.tolist()
