# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bitmaps of 2**24 bits, the pages of 64 GiB.

Lists are taken in pieces that stay in the cache. take() clears what it lists; the peers do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mig import _core

from .pages import DEFAULT, OTHERS, PAGE, Array, aligned
from .peers import Code

_BITS = 1 << 24
_SMOKE_BITS = 1 << 18
#: entries of a list: 128 KiB
_LIST = 1 << 14


@pytest.fixture(scope="module")
def nbits(smoke: bool) -> int:
    return _SMOKE_BITS if smoke else _BITS


def _words(nbits: int, percent: float, seed: int = 2) -> Array:
    """Random bits, page-aligned, as 64-bit words."""
    bits = np.random.default_rng(seed).random(nbits, dtype=np.float32) < percent / 100
    words = aligned(-(-nbits // 8 // PAGE)).reshape(-1).view(np.uint64)
    words.view(np.uint8)[:] = np.packbits(bits, bitorder="little")
    return words


def _bitmap(words: Array, family: str) -> _core.Bitmap:
    bitmap = _core.Bitmap(len(words) * 64, kernels=_core.kernels(family))
    np.asarray(bitmap)[:] = words
    return bitmap


def _bytes(code: Code, words: Array) -> dict[str, Callable[[], object]]:
    """Reading and copying a bitmap."""
    npages = words.nbytes // PAGE
    common = (words, np.arange(npages, dtype=np.uint64), npages, PAGE)
    return {
        "read": code.bind("each_read", *common),
        "memcpy": code.bind("each_copy", aligned(npages), *common),
    }


@pytest.mark.benchmark(group="Bitmap to indexes")
@pytest.mark.parametrize("percent", [0, 0.01, 1, 10, 50, 100])
def test_take(measure: Any, code: Code, nbits: int, percent: float) -> None:
    words = _words(nbits, percent)
    bitmaps = {family: _bitmap(words, family) for family in (DEFAULT, *OTHERS)}
    out = np.empty(_LIST, dtype=np.uint64)
    nset = int(np.bitwise_count(words).sum())

    def take(family: str) -> Callable[[], None]:
        bitmap = bitmaps[family]

        def run() -> None:
            start = 0
            while (n := bitmap.take(start, out)) == _LIST:
                start = int(out[n - 1]) + 1

        return run

    def restore(who: str) -> None:
        np.asarray(bitmaps.get(who, bitmaps[DEFAULT]))[:] = words

    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("next_set"):
        peers[peer.name] = code.bind("each_bit", peer["next_set"], words, nbits, out, _LIST)
        assert peers[peer.name]() == nset
    peers |= {family: take(family) for family in OTHERS}
    measure(
        take(DEFAULT),
        peers,
        prepare=restore,
        count=nset or 1,
        unit="set bit" if nset else "bitmap",
    )


@pytest.mark.benchmark(group="Bitmap to runs")
@pytest.mark.parametrize("percent", [0.01, 1, 10, 50])
def test_runs(measure: Any, code: Code, nbits: int, percent: float) -> None:
    words = _words(nbits, percent)
    out = np.empty(_LIST, dtype=np.uint64)

    def runs(family: str) -> Callable[[], int]:
        bitmap = _bitmap(words, family)

        def run() -> int:
            start = found = 0
            while True:
                part = bitmap.runs(start, max_runs=_LIST // 2)
                found += len(part)
                if len(part) < _LIST // 2:
                    return found
                start = int(part[-1, 1])

        return run

    mine = runs(DEFAULT)
    count = mine()
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("next_set", "next_clear"):
        both = peer["next_set"], peer["next_clear"]
        peers[peer.name] = code.bind("each_run", *both, words, nbits, out, _LIST)
        assert peers[peer.name]() == count
    peers["mig in C"] = code.bind("mig_each_run", code.kernels(DEFAULT), words, nbits, out, _LIST)
    assert peers["mig in C"]() == count
    peers |= {family: runs(family) for family in OTHERS}
    measure(mine, peers, count=count, unit="run")


@pytest.mark.benchmark(group="Whole bitmaps")
def test_count(measure: Any, code: Code, nbits: int) -> None:
    words = _words(nbits, 50)
    bitmaps = {family: _bitmap(words, family) for family in (DEFAULT, *OTHERS)}
    peers = _bytes(code, words)
    peers[code.plain.name] = code.bind("plain_count", words, len(words))
    peers |= {family: bitmaps[family].count for family in OTHERS}
    measure(bitmaps[DEFAULT].count, peers, nbytes=words.nbytes, unit="bitmap")


@pytest.mark.benchmark(group="Whole bitmaps")
@pytest.mark.parametrize("percent", [0.01, 1, 50])
def test_merge(measure: Any, code: Code, nbits: int, percent: float) -> None:
    """A sync of the dirty bitmap: merge, and count what is new."""
    words, source = _words(nbits, percent), _words(nbits, percent, seed=3)
    bitmaps = {family: _bitmap(words, family) for family in (DEFAULT, *OTHERS)}
    sources = _bitmap(source, DEFAULT)
    plain = words.copy()

    def merge(family: str) -> Callable[[], object]:
        return lambda: bitmaps[family].merge(sources)

    def restore(who: str) -> None:
        if who == code.plain.name:
            plain[:] = words
        elif who in ("mig", *OTHERS):
            np.asarray(bitmaps[DEFAULT if who == "mig" else who])[:] = words

    peers = _bytes(code, source)
    peers[code.plain.name] = code.bind("plain_merge", plain, source, len(words))
    peers |= {family: merge(family) for family in OTHERS}
    measure(merge(DEFAULT), peers, prepare=restore, nbytes=words.nbytes, unit="bitmap")
