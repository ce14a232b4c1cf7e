# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one call from Python costs on top of the kernel: batches of 1,024 pages that need little.

`mig in C` is the same work by csrc/ without Python, so the difference is what the call takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mig import _core, xbzrle, zero

from .pages import BATCH, DEFAULT, L1_PAGES, PAGE, Array, random_pages
from .peers import Code

pytestmark = pytest.mark.benchmark(group="One Python call of 1,024 pages")

#: calls of a round, and rounds: the difference is small
_CALLS = 100
_ROUNDS = 101
#: bytes of a page of which next to nothing is to be done
_SMALL = 64


def _small() -> Array:
    return random_pages(BATCH * _SMALL // PAGE)


@pytest.fixture
def rounds(smoke: bool) -> int:
    return 2 if smoke else _ROUNDS


def _compare(
    measure: Any, rounds: int, target: Callable[[], object], in_c: Callable[[], object]
) -> None:
    def times(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(_CALLS):
                work()

        return run

    measure(
        times(target), {"mig in C": times(in_c)}, rounds=rounds, count=BATCH * _CALLS, unit="page"
    )


def test_zero_pages(measure: Any, code: Code, rounds: int) -> None:
    """Pages that are not zero, in the first level."""
    pages = random_pages(L1_PAGES)
    index = np.resize(np.arange(L1_PAGES, dtype=np.uint64), BATCH)
    found = np.empty(BATCH // 64, dtype=np.uint64)
    _compare(
        measure,
        rounds,
        lambda: zero.zero_pages(pages, PAGE, index),
        code.bind("mig_each_zero", code.kernels(DEFAULT), pages, index, BATCH, PAGE, found),
    )


def test_cache_encode(measure: Any, code: Code, rounds: int) -> None:
    """Pages of 64 bytes that have not changed."""
    pages = _small()
    index = np.arange(BATCH, dtype=np.uint64)
    cache = _core.XbzrleCache(BATCH * _SMALL, _SMALL)
    cache.insert_pages(pages, index, 0)
    in_c = code.mig_cache(BATCH, _SMALL)
    code.call("mig_each_insert", in_c, pages, index, BATCH, _SMALL, 0)
    out = np.empty(_SMALL, dtype=np.uint8)
    results = np.empty(BATCH, dtype=np.int32)
    common = (pages, index, BATCH, _SMALL, 0, out, len(out), results)
    _compare(
        measure,
        rounds,
        lambda: cache.encode(pages, index, 0, out),
        code.bind("mig_each_send", code.kernels(DEFAULT), in_c, *common),
    )
    code.close_caches()


def test_encode_pages(measure: Any, code: Code, rounds: int) -> None:
    """Pages of 64 bytes that have not changed."""
    old = _small()
    new = old.copy()
    out = np.empty(BATCH * _SMALL, dtype=np.uint8)
    _compare(
        measure,
        rounds,
        lambda: xbzrle.encode_pages(old, new, _SMALL),
        code.bind("mig_each_encode", code.kernels(DEFAULT), old, new, BATCH, _SMALL, out, 1),
    )
