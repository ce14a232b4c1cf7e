# SPDX-License-Identifier: LGPL-2.1-or-later
"""Zero pages: one call looks at many, from each level of memory.

Where pages fit a cache, a list of page numbers that goes over them again and again makes a call
long; so it does for the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mig import _core

from .pages import (
    DEFAULT,
    L1_PAGES,
    L2_PAGES,
    L3_PAGES,
    OTHERS,
    PAGE,
    Array,
    aligned,
    free_mib,
    random_pages,
)
from .peers import Code

pytestmark = pytest.mark.benchmark(group="Zero pages")

_COLD = 65536
_LARGE = 262144
_SMOKE = 256
#: numbers in a list that goes over fewer pages than that, and calls of a round then
_LIST = 4096
_CALLS = 50
_LEVELS = {"L1": L1_PAGES, "L2": L2_PAGES, "L3": L3_PAGES, "DRAM": _COLD, "1 GiB": _LARGE}


def _contents(npages: int, contents: str) -> Array:
    """Pages that are zero, random, zero up to a little past their middle, or half of them zero."""
    if contents == "zero":
        return aligned(npages)
    pages = random_pages(npages)
    if contents == "late":
        # neither the places that are looked at first nor the end tell
        pages[:, : PAGE // 2 + 8] = 0
        pages[:, PAGE * 3 // 4 :] = 0
    elif contents == "mixed":
        pages[np.random.default_rng(5).random(npages) < 0.5] = 0
    return pages


def _repeat(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def _compare(measure: Any, code: Code, pages: Array, calls: int = 1, *, copy: bool = True) -> None:
    npages = len(pages)
    index = np.tile(np.arange(npages, dtype=np.uint64), max(1, _LIST // npages))
    looked_at = _core.Pages(pages, PAGE)

    def find(family: str) -> Callable[[], object]:
        kernels = _core.kernels(family)
        return lambda: kernels.zero_pages(looked_at, index)

    common = (pages, index, len(index), PAGE)
    peers: dict[str, Callable[[], object]] = {"read": code.bind("each_read", *common)}
    if copy:
        peers["memcpy"] = code.bind("each_copy", aligned(npages), *common)
    for peer in code.peers("is_zero"):
        peers[peer.name] = code.bind("each_zero", peer["is_zero"], *common)
    found = np.empty(-(-len(index) // 64), dtype=np.uint64)
    peers["mig in C"] = code.bind("mig_each_zero", code.kernels(DEFAULT), *common, found)
    peers |= {family: find(family) for family in OTHERS}
    count = len(index) * calls
    measure(
        _repeat(find(DEFAULT), calls),
        {name: _repeat(peer, calls) for name, peer in peers.items()},
        nbytes=count * PAGE,
        count=count,
        unit="page",
    )


@pytest.mark.parametrize("place", _LEVELS)
def test_zero_pages(measure: Any, code: Code, smoke: bool, place: str) -> None:
    """Pages that are zero: all bytes are read."""
    npages = _LEVELS[place]
    if not smoke and free_mib() < 3 * npages * PAGE >> 20:
        pytest.skip(f"{npages * PAGE >> 20} MiB are not free")
    calls = 1 if smoke or npages > _LIST else _CALLS
    npages = min(npages, _SMOKE) if smoke else npages
    _compare(measure, code, aligned(npages), calls, copy=npages < _LARGE)


@pytest.mark.parametrize("contents", ["random", "late", "mixed"])
def test_other_pages(measure: Any, code: Code, smoke: bool, contents: str) -> None:
    """Pages from DRAM that are random, zero up to the middle, or of which half are zero."""
    _compare(measure, code, _contents(_SMOKE if smoke else _COLD, contents))
