# SPDX-License-Identifier: LGPL-2.1-or-later
"""The XBZRLE page cache: the whole step of a sender, from DRAM, and the cache alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mig import _core

from .pages import BATCH, CHANGES, DEFAULT, OTHERS, PAGE, aligned, changed, random_pages
from .peers import CACHE, Code

#: pages of guest memory, in each of its two states: 128 MiB
_GUEST = 32768
#: pages of a cache: 64 MiB, as it is by default
_CACHE = 16384
_SMOKE = 256


@pytest.fixture(autouse=True)
def _caches(code: Code) -> Iterator[None]:
    """Each test has its own."""
    yield
    code.close_caches()


def _in_turn(calls: list[Callable[[], int]]) -> Callable[[], int]:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


@pytest.mark.benchmark(group="XBZRLE, whole step of a sender, DRAM")
@pytest.mark.parametrize("change", list(CHANGES))
def test_send(measure: Any, code: Code, smoke: bool, change: str) -> None:
    """Look up, compare, encode, update the cache, all pages hits.

    Everyone has a cache of his own and sees memory change to and fro. Rounds of a plain encoder
    are long, so there are few.
    """
    npages = _SMOKE if smoke else _GUEST
    old = random_pages(npages)
    states = (changed(old, change), old)
    index = np.arange(npages, dtype=np.uint64)

    def mine(family: str) -> Callable[[], None]:
        cache = _core.XbzrleCache(npages * PAGE, PAGE, kernels=_core.kernels(family))
        cache.insert_pages(old, index, 0)
        batches = [index[i : i + BATCH] for i in range(0, npages, BATCH)]
        out = aligned(BATCH).reshape(-1)
        memory = itertools.cycle([_core.Pages(state, PAGE) for state in states])
        generation = itertools.count(1)

        def run() -> None:
            pages, now = next(memory), next(generation)
            for batch in batches:
                cache.encode(pages, batch, now, out)

        return run

    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("encode", *CACHE):
        cache = code.cache(peer, npages, PAGE)
        code.call("each_insert", cache, old, 0, index, npages, PAGE, 0)
        out = aligned(BATCH + 1)
        rest = (index, npages, BATCH, PAGE, 1, out)
        calls = [code.bind("each_send", cache, peer["encode"], state, *rest) for state in states]
        peers[peer.name] = _in_turn(calls)
    peers |= {family: mine(family) for family in OTHERS if family in ("avx2", "scalar", "neon")}
    measure(mine(DEFAULT), peers, rounds=2 if smoke else 7, count=npages, unit="page")


@pytest.fixture(scope="module")
def npages(smoke: bool) -> int:
    return _SMOKE if smoke else _CACHE


@pytest.mark.benchmark(group="XBZRLE page cache")
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_lookup(measure: Any, code: Code, npages: int, order: str) -> None:
    """A page that is there; the package has no face for a batch, so this is csrc/ in a C loop."""
    pages = random_pages(npages)
    index = np.arange(npages, dtype=np.uint64)
    wanted = index if order == "ascending" else np.random.default_rng(4).permutation(index)
    wanted = np.tile(wanted, 8)
    mine = code.mig_cache(npages, PAGE)
    code.call("mig_each_insert", mine, pages, index, npages, PAGE, 0)
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers(*CACHE):
        cache = code.cache(peer, npages, PAGE)
        code.call("each_insert", cache, pages, 0, index, npages, PAGE, 0)
        peers[peer.name] = code.bind("each_lookup", cache, wanted, len(wanted), PAGE, 1)
        assert peers[peer.name]() == len(wanted)
    target = code.bind("mig_each_lookup", mine, wanted, len(wanted), PAGE, 1)
    assert target() == len(wanted)
    measure(target, peers, count=len(wanted), unit="page")


@pytest.mark.benchmark(group="XBZRLE page cache")
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_insert(measure: Any, code: Code, npages: int, order: str) -> None:
    """Every page replaces another."""
    pages = random_pages(npages)
    index = np.arange(npages, dtype=np.uint64)
    if order == "random":
        index = np.random.default_rng(4).permutation(index)
    cache = _core.XbzrleCache(npages * PAGE, PAGE)
    source = _core.Pages(pages, PAGE)
    turns = itertools.count()

    def insert() -> None:
        turn = next(turns)
        done = cache.insert_pages(source, index, 2 * turn, address=turn * npages * PAGE)
        assert done == npages

    def peer_insert(peer_cache: object) -> Callable[[], None]:
        peer_turns = itertools.count()

        def run() -> None:
            turn = next(peer_turns)
            address = turn * npages * PAGE
            where = (address, index, npages, PAGE, 2 * turn)
            assert code.call("each_insert", peer_cache, pages, *where) == npages

        return run

    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers(*CACHE):
        peers[peer.name] = peer_insert(code.cache(peer, npages, PAGE))
    numbers = index.copy()
    peers["memcpy"] = code.bind("each_copy", aligned(npages), pages, numbers, npages, PAGE)
    measure(insert, peers, count=npages, unit="page")
