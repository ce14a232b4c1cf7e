# SPDX-License-Identifier: LGPL-2.1-or-later
"""XBZRLE of pages that stay in the second level of cache: as many pairs as a quarter of it.

Each page has changes of its own. So few of them can still be learned by the branch predictor,
which is kind to everyone who branches on them; more would not stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mig import _core

from .pages import CHANGES, DEFAULT, HOT_PAIRS, OTHERS, PAGE, Array, aligned, changed, random_pages
from .peers import Code

#: how often a round goes over the pages
_TIMES = 100
_SMOKE_TIMES = 2
_VECTORS = [name for name in ("avx2", "sse2", "neon") if name in (DEFAULT, *OTHERS)]


@pytest.fixture(scope="module")
def old() -> Array:
    return random_pages(HOT_PAIRS)


@pytest.fixture(scope="module")
def times(smoke: bool) -> int:
    return _SMOKE_TIMES if smoke else _TIMES


def _encoder(old: Array, new: Array, family: str, times: int) -> Callable[[], None]:
    before, after = _core.Pages(old, PAGE), _core.Pages(new, PAGE)
    kernels = _core.kernels(family)
    out = aligned(len(new)).reshape(-1)
    lengths = np.empty(len(new), dtype=np.int32)

    def run() -> None:
        for _ in range(times):
            _core.xbzrle_encode_pages(before, after, out, lengths, kernels=kernels)

    return run


def _peer(code: Code, encode: int, old: Array, new: Array, times: int) -> Callable[[], int]:
    # some peers write a little past what they may
    out = aligned(len(new) + 1)
    return code.bind("each_encode", encode, old, new, len(new), PAGE, out, times)


@pytest.mark.benchmark(group="XBZRLE encode, hot")
@pytest.mark.parametrize("change", CHANGES)
def test_encode(measure: Any, code: Code, old: Array, times: int, change: str) -> None:
    """Through the package, a call for all pairs; `in C`: the same kernel without Python."""
    new = changed(old, change)
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("encode"):
        peers[peer.name] = _peer(code, peer["encode"], old, new, times)
    out = aligned(len(new))
    peers["mig in C"] = code.bind(
        "mig_each_encode", code.kernels(DEFAULT), old, new, len(new), PAGE, out, times
    )
    peers |= {family: _encoder(old, new, family, times) for family in OTHERS}
    measure(_encoder(old, new, DEFAULT, times), peers, count=len(new) * times, unit="page")


@pytest.mark.benchmark(group="XBZRLE encode, hot: a family beside scalar encoders")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", _VECTORS)
def test_encode_with(
    measure: Any, code: Code, old: Array, times: int, family: str, change: str
) -> None:
    new = changed(old, change)
    peers: dict[str, Callable[[], object]] = {
        peer.name: _peer(code, peer["encode"], old, new, times)
        for peer in code.scalar_peers("encode")
    }
    peers["scalar"] = _encoder(old, new, "scalar", times)
    measure(_encoder(old, new, family, times), peers, count=len(new) * times, unit="page")


def _encodings(old: Array, new: Array) -> tuple[Array, Array]:
    """All encodings, also those that are longer than a page, and their lengths."""
    out = np.empty(2 * PAGE, dtype=np.uint8)
    parts = []
    for before, after in zip(old, new, strict=True):
        length = _core.xbzrle_encode(before, after, out)
        parts.append(out[:length].copy())
    return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int32)


@pytest.mark.benchmark(group="XBZRLE decode, hot")
@pytest.mark.parametrize("change", ["1 byte", "8 words", "1 line", "10%", "50%"])
def test_decode(measure: Any, code: Code, old: Array, times: int, change: str) -> None:
    """Those of 50% are a little longer than a page: a sender would not send them."""
    encodings, lengths = _encodings(old, changed(old, change))
    page_bytes = old.copy()
    pages = _core.Pages(page_bytes, PAGE, writable=True)

    def decoder(family: str) -> Callable[[], None]:
        kernels = _core.kernels(family)

        def run() -> None:
            for _ in range(times):
                _core.xbzrle_decode_pages(encodings, lengths, pages, kernels=kernels)

        return run

    common = (encodings, lengths, page_bytes, len(old), PAGE, times)
    peers: dict[str, Callable[[], object]] = {}
    for peer in code.peers("decode"):
        peers[peer.name] = code.bind("each_decode", peer["decode"], *common)
        assert peers[peer.name]() == len(encodings)
    peers["mig in C"] = code.bind("mig_each_decode", code.kernels(DEFAULT), *common)
    peers |= {family: decoder(family) for family in OTHERS}
    measure(decoder(DEFAULT), peers, count=len(old) * times, unit="page")
