"""Zero pages: every family of kernels against the scalar one and against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import zeropage

from mig import _core

SCALAR = _core.kernels("scalar")
QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Guarded:
    """Zeros at any alignment, with bytes before and after that are not zero."""

    def __init__(self) -> None:
        self._array = np.full(8192, 0xFF, dtype=np.uint8)
        self._base = -self._array.ctypes.data % 64 + 64

    def zeros(self, alignment: int, nbytes: int) -> np.ndarray:
        self._array[:] = 0xFF
        start = self._base + alignment
        view = self._array[start : start + nbytes]
        view[:] = 0
        return view


@pytest.fixture
def guarded() -> Guarded:
    return Guarded()


def alignments_for(nbytes: int) -> list[int]:
    return sorted({0, 1, 7, 8, 31, 32, 33, 63, nbytes * 7 % 64, nbytes * 29 % 64})


@pytest.mark.parametrize("lengths", [range(i, i + 101) for i in range(0, 600, 101)])
def test_zeros_of_every_length_and_alignment_are_zero(kernels, guarded, lengths):
    for nbytes in lengths:
        for alignment in alignments_for(nbytes):
            assert kernels.is_zero(guarded.zeros(alignment, nbytes)), (nbytes, alignment)


def test_every_alignment_is_zero_at_lengths_around_the_steps_of_the_loops(kernels, guarded):
    for nbytes in (0, 1, 63, 64, 255, 256, 257, 511, 512, 513, 600, 1024, 4096):
        for alignment in range(64):
            assert kernels.is_zero(guarded.zeros(alignment, nbytes)), (nbytes, alignment)


def test_one_byte_anywhere_makes_every_length_not_zero(kernels, guarded):
    for nbytes in range(1, 601):
        for alignment in (0, nbytes * 13 % 64):
            view = guarded.zeros(alignment, nbytes)
            for at in {0, 1, nbytes // 4, nbytes // 3, nbytes // 2, nbytes - 2, nbytes - 1}:
                if 0 <= at < nbytes:
                    view[at] = 1
                    assert not kernels.is_zero(view), (nbytes, alignment, at)
                    assert not SCALAR.is_zero(view)
                    view[at] = 0


@pytest.mark.parametrize("nbytes", [65, 257, 513, 600])
def test_one_byte_at_every_position_of_odd_lengths_is_seen(kernels, guarded, nbytes):
    view = guarded.zeros(3, nbytes)
    for at in range(nbytes):
        view[at] = 0x80
        assert not kernels.is_zero(view), at
        view[at] = 0


@pytest.mark.parametrize("value", [1, 0x80])
def test_one_byte_at_every_position_of_a_page_is_seen(kernels, guarded, value):
    page = guarded.zeros(0, 4096)
    for at in range(4096):
        page[at] = value
        assert not kernels.is_zero(page), at
        page[at] = 0
    assert kernels.is_zero(page)


@QUICK
@given(
    data=st.one_of(
        st.binary(max_size=1500),
        st.builds(
            lambda n, where, value: bytes(n * where // 100) + value + bytes(n - n * where // 100),
            st.integers(0, 3000),
            st.integers(0, 100),
            st.binary(max_size=2),
        ),
    )
)
def test_is_zero_agrees_with_the_oracle(kernels, data):
    assert kernels.is_zero(data) == SCALAR.is_zero(data) == zeropage.is_zero(data)


def test_is_zero_refuses_what_is_not_contiguous(kernels):
    with pytest.raises(BufferError):
        kernels.is_zero(memoryview(bytes(64))[::2])


def zero_list(bitmap: _core.Bitmap) -> list[bool]:
    return [bitmap[i] for i in range(len(bitmap))]


@QUICK
@given(data=st.data(), page_size=st.sampled_from([64, 128, 512, 1024]))
def test_zero_pages_agrees_with_the_oracle(kernels, data, page_size):
    shapes = [bytes(page_size), bytes(page_size - 1) + b"\1", b"\1" + bytes(page_size - 1)]
    pages = data.draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=20))
    index = data.draw(st.lists(st.integers(0, len(pages) - 1), max_size=150))
    zero, nzero = kernels.zero_pages(
        _core.Pages(b"".join(pages), page_size), np.array(index, dtype=np.uint64)
    )
    expected = zeropage.zero_pages(pages, index)
    assert zero_list(zero) == expected
    assert nzero == sum(expected) == zero.count()


@QUICK
@given(data=st.data())
def test_zero_pages_of_a_file_looks_where_the_pages_are(kernels, data):
    page_size, lead = 64, 24
    shapes = [bytes(page_size), bytes(page_size - 1) + b"\1"]
    stored = data.draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=8))
    file = b"\xff" * lead + b"".join(stored)
    places = data.draw(st.lists(st.integers(-2, len(stored) - 1), min_size=1, max_size=30))
    # -2 and -1 stand for pages without storage: never sent, known to be zero
    where = [
        _core.PAGE_NONE if p == -2 else _core.PAGE_ZERO if p == -1 else lead + p * page_size
        for p in places
    ]
    pages = _core.Pages(file, page_size, where=np.array(where, dtype=np.int64))
    index = data.draw(st.lists(st.integers(0, len(where) - 1), max_size=40))
    zero, nzero = kernels.zero_pages(pages, np.array(index, dtype=np.uint64))
    expected = zeropage.zero_pages([stored[p] if p >= 0 else None for p in places], index)
    assert zero_list(zero) == expected
    assert nzero == sum(expected)


def test_zero_pages_of_nothing_is_nothing(kernels):
    zero, nzero = kernels.zero_pages(_core.Pages(bytes(64), 64), np.empty(0, dtype=np.uint64))
    assert (len(zero), nzero) == (0, 0)


@pytest.mark.parametrize("index", [[2], [0, 1, 2], [2**64 - 1]])
def test_zero_pages_refuses_an_index_past_the_block(kernels, index):
    with pytest.raises(IndexError):
        kernels.zero_pages(_core.Pages(bytes(128), 64), np.array(index, dtype=np.uint64))


def test_zero_pages_of_a_released_block_reads_nothing(kernels):
    pages = _core.Pages(bytes(128), 64)
    pages.release()
    with pytest.raises(IndexError):
        kernels.zero_pages(pages, np.array([0], dtype=np.uint64))
