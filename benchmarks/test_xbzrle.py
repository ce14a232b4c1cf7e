# SPDX-License-Identifier: LGPL-2.1-or-later
"""XBZRLE of pages that stay in a cache, in loops of C; test_calls.py has what Python adds.

Each page has changes of its own. Few pages' changes can be learned by the branch predictor, which
is kind to everyone who branches on them; more would not stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mig import _core

from .pages import (
    CHANGES,
    DEFAULT,
    L1_PAIRS,
    L2_PAIRS,
    OTHERS,
    PAGE,
    Array,
    aligned,
    changed,
    random_pages,
)
from .peers import Code

#: pages of a round
_ROUND = 6400
_SMOKE_ROUND = 128
_VECTORS = [name for name in ("avx2", "sse2", "neon") if name in (DEFAULT, *OTHERS)]


class _Pairs:
    """Old and new pages, and calls that go over them until a round is full."""

    def __init__(self, code: Code, npairs: int, change: str, smoke: bool) -> None:
        self._code = code
        self.old = random_pages(npairs)
        self.new = changed(self.old, change)
        self.times = (_SMOKE_ROUND if smoke else _ROUND) // npairs

    @property
    def count(self) -> int:
        return len(self.old) * self.times

    def encoder(self, encode: int, loop: str = "each_encode") -> Callable[[], int]:
        # some peers write a little past what they may
        out = aligned(len(self.new) + 1)
        rest = (self.old, self.new, len(self.old), PAGE, out, self.times)
        return self._code.bind(loop, encode, *rest)

    def mig(self, family: str) -> Callable[[], int]:
        return self.encoder(self._code.kernels(family), "mig_each_encode")


def _compare_encoders(measure: Any, code: Code, pairs: _Pairs) -> None:
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("encode"):
        peers[peer.name] = pairs.encoder(peer["encode"])
    peers |= {family: pairs.mig(family) for family in OTHERS}
    measure(pairs.mig(DEFAULT), peers, count=pairs.count, unit="page")


@pytest.mark.benchmark(group="XBZRLE encode, pages in the second level of cache")
@pytest.mark.parametrize("change", CHANGES)
def test_encode(measure: Any, code: Code, smoke: bool, change: str) -> None:
    _compare_encoders(measure, code, _Pairs(code, L2_PAIRS, change, smoke))


@pytest.mark.benchmark(group="XBZRLE encode, pages in the first level of cache")
@pytest.mark.parametrize("change", CHANGES)
def test_encode_l1(measure: Any, code: Code, smoke: bool, change: str) -> None:
    _compare_encoders(measure, code, _Pairs(code, L1_PAIRS, change, smoke))


@pytest.mark.benchmark(group="XBZRLE encode, second level: a family beside scalar encoders")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", _VECTORS)
def test_encode_with(measure: Any, code: Code, smoke: bool, family: str, change: str) -> None:
    pairs = _Pairs(code, L2_PAIRS, change, smoke)
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.scalar_peers("encode"):
        peers[peer.name] = pairs.encoder(peer["encode"])
    peers["scalar"] = pairs.mig("scalar")
    measure(pairs.mig(family), peers, count=pairs.count, unit="page")


def _encodings(old: Array, new: Array) -> tuple[Array, Array]:
    """All encodings, also those that are longer than a page, and their lengths."""
    out = np.empty(2 * PAGE, dtype=np.uint8)
    parts = []
    for before, after in zip(old, new, strict=True):
        length = _core.xbzrle_encode(before, after, out)
        parts.append(out[:length].copy())
    return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int32)


@pytest.mark.benchmark(group="XBZRLE decode, pages in the second level of cache")
@pytest.mark.parametrize("change", ["1 byte", "8 words", "1 line", "10%", "50%"])
def test_decode(measure: Any, code: Code, smoke: bool, change: str) -> None:
    """Those of 50% are a little longer than a page: a sender would not send them."""
    pairs = _Pairs(code, L2_PAIRS, change, smoke)
    encodings, lengths = _encodings(pairs.old, pairs.new)
    rest = (encodings, lengths, pairs.old.copy(), len(pairs.old), PAGE, pairs.times)
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("decode"):
        peers[peer.name] = code.bind("each_decode", peer["decode"], *rest)
        assert peers[peer.name]() == len(encodings)

    def mig(family: str) -> Callable[[], int]:
        return code.bind("mig_each_decode", code.kernels(family), *rest)

    peers |= {family: mig(family) for family in OTHERS}
    measure(mig(DEFAULT), peers, count=pairs.count, unit="page")
