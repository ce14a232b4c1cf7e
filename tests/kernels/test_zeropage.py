"""Zero pages: every family of kernels against the scalar one and against the oracle."""

from __future__ import annotations

import ctypes
import mmap
import random
import threading

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
ALIGNMENTS = range(65)
PAGE_SIZES = [1 << bits for bits in range(6, 22)]


class Guarded:
    """Zeros at any alignment, with bytes before and after that are not zero."""

    def __init__(self, most: int) -> None:
        self._array = np.full(most + 256, 0xFF, dtype=np.uint8)
        self._base = -self._array.ctypes.data % 64 + 64
        self._memory = memoryview(self._array)
        self._used = slice(0, 0)

    def zeros(self, alignment: int, nbytes: int) -> memoryview:
        self._array[self._used] = 0xFF
        start = self._base + alignment
        self._used = slice(start, start + nbytes)
        self._array[self._used] = 0
        return self._memory[self._used]


@pytest.fixture
def guarded() -> Guarded:
    return Guarded(8192)


# ---- is_zero ---------------------------------------------------------------------------------


def test_zeros_of_every_length_and_alignment_are_zero(kernels, guarded):
    for nbytes in range(601):
        for alignment in ALIGNMENTS:
            assert kernels.is_zero(guarded.zeros(alignment, nbytes)), (nbytes, alignment)


def test_zeros_of_larger_lengths_around_the_steps_of_the_loops_are_zero(kernels, guarded):
    for around in (768, 1024, 2048, 4096, 8000):
        for nbytes in (around - 65, around - 1, around, around + 1, around + 16, around + 33):
            for alignment in ALIGNMENTS:
                assert kernels.is_zero(guarded.zeros(alignment, nbytes)), (nbytes, alignment)


def test_one_byte_at_every_position_of_every_length_is_seen(kernels, guarded):
    for nbytes in range(1, 601):
        alignment = nbytes * 13 % 65
        view = guarded.zeros(alignment, nbytes)
        for at in range(nbytes):
            view[at] = 1
            assert not kernels.is_zero(view), (nbytes, alignment, at)
            view[at] = 0
        assert kernels.is_zero(view)


@pytest.mark.parametrize("nbytes", [255, 256, 257, 300, 513])
def test_one_byte_at_every_position_of_every_alignment_is_seen(kernels, guarded, nbytes):
    for alignment in ALIGNMENTS:
        view = guarded.zeros(alignment, nbytes)
        for at in range(nbytes):
            view[at] = 0x80
            assert not kernels.is_zero(view), (alignment, at)
            view[at] = 0


def test_every_value_of_a_byte_but_zero_is_seen(kernels, guarded):
    for nbytes in (1, 63, 300, 4096):
        view = guarded.zeros(5, nbytes)
        for at in {0, nbytes // 3, nbytes - 1}:
            for value in range(256):
                view[at] = value
                assert kernels.is_zero(view) == (value == 0), (nbytes, at, value)
            view[at] = 0


@pytest.mark.parametrize("value", [1, 0x80])
def test_one_byte_at_every_position_of_a_page_is_seen(kernels, guarded, value):
    page = guarded.zeros(0, 4096)
    for at in range(4096):
        page[at] = value
        assert not kernels.is_zero(page), at
        page[at] = 0
    assert kernels.is_zero(page)


@pytest.mark.parametrize("page_size", PAGE_SIZES[7:])
def test_one_byte_anywhere_in_a_large_page_is_seen(kernels, page_size):
    page = Guarded(page_size).zeros(0, page_size)
    rng = random.Random(page_size)
    places = {0, page_size // 2, page_size - 1, *(rng.randrange(page_size) for _ in range(50))}
    places |= {step * 256 + rng.randrange(256) for step in range(min(page_size // 256, 64))}
    for at in places:
        page[at] = 1
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


def test_is_zero_lets_go_of_the_buffer(kernels):
    data = bytearray(1000)
    assert kernels.is_zero(data)
    data.extend(b"more")
    assert not kernels.is_zero(data)
    data.clear()
    assert kernels.is_zero(data)


@pytest.fixture
def fenced() -> np.ndarray:
    """A page of zeros between two pages that must not be read: that ends the process."""
    size = mmap.PAGESIZE
    area = np.frombuffer(mmap.mmap(-1, 3 * size), dtype=np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in (0, 2):
        assert protect(area.ctypes.data + page * size, size, 0) == 0
    return area[size : 2 * size]


def test_nothing_before_or_behind_the_bytes_is_read(kernels, fenced):
    size = len(fenced)
    for nbytes in range(601):
        assert kernels.is_zero(fenced[:nbytes])
        assert kernels.is_zero(fenced[size - nbytes :])
    assert kernels.is_zero(fenced)
    for page_size in PAGE_SIZES:
        if page_size <= size:
            zero, nzero = kernels.zero_pages(_core.Pages(fenced, page_size))
            assert zero.count() == nzero == size // page_size


# ---- zero_pages ------------------------------------------------------------------------------


def zero_list(bitmap: _core.Bitmap) -> list[bool]:
    return [bitmap[i] for i in range(len(bitmap))]


@QUICK
@given(data=st.data(), page_size=st.sampled_from([64, 128, 512, 1024]))
def test_zero_pages_agrees_with_the_oracle(kernels, data, page_size):
    late = bytes(page_size - 1) + b"\1"
    middle = bytes(page_size // 3) + b"\1" + bytes(page_size - page_size // 3 - 1)
    shapes = [bytes(page_size), late, middle, b"\1" + bytes(page_size - 1)]
    chosen = data.draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=150))
    index = data.draw(st.lists(st.integers(0, len(chosen) - 1), max_size=150))
    # bytes begin wherever they like
    lead = data.draw(st.integers(0, 64))
    pages = _core.Pages(memoryview(bytes(lead) + b"".join(chosen))[lead:], page_size)
    for numbers, wanted in (
        (np.array(index, dtype=np.uint64), index),
        (None, range(len(chosen))),
    ):
        zero, nzero = kernels.zero_pages(pages, numbers)
        expected = zeropage.zero_pages(chosen, wanted)
        assert zero_list(zero) == expected
        assert nzero == sum(expected) == zero.count()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_of_every_size_with_one_byte_in_each_place_of_a_page(kernels, page_size):
    places = sorted({0, 1, 31, 63, page_size // 2, page_size - 64, page_size - 1})
    npages = 2 * len(places) + 1
    data = np.zeros((npages, page_size), dtype=np.uint8)
    for page, at in enumerate(places):
        data[2 * page + 1, at] = 1
    pages = _core.Pages(data, page_size)
    zero, nzero = kernels.zero_pages(pages)
    assert zero.indexes().tolist() == list(range(0, npages, 2))
    assert (nzero, len(zero)) == (len(places) + 1, npages)
    backwards = np.arange(npages, dtype=np.uint64)[::-1].copy()
    zero, nzero = kernels.zero_pages(pages, backwards)
    assert zero.indexes().tolist() == list(range(0, npages, 2))
    assert nzero == len(places) + 1


@pytest.mark.parametrize("npages", [1, 2, 15, 16, 17, 18, 63, 64, 65, 127, 128, 129, 1000])
def test_every_number_of_pages_around_the_words_and_the_fetching_ahead(kernels, npages):
    rng = np.random.default_rng(npages)
    data = np.zeros((npages, 64), dtype=np.uint8)
    used = rng.random(npages) < 0.5
    data[used, rng.integers(0, 64, npages)[used]] = 1
    zero, nzero = kernels.zero_pages(_core.Pages(data, 64))
    assert zero.indexes().tolist() == np.flatnonzero(~used).tolist()
    assert nzero == (~used).sum()
    index = rng.integers(0, npages, 3 * npages).astype(np.uint64)
    zero, nzero = kernels.zero_pages(_core.Pages(data, 64), index)
    wanted = ~used[index.astype(np.int64)]
    assert zero.indexes().tolist() == np.flatnonzero(wanted).tolist()
    assert nzero == wanted.sum()


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
    looked_at = [stored[p] if p >= 0 else None for p in places]
    for numbers, wanted in (
        (np.array(index, dtype=np.uint64), index),
        (None, range(len(places))),
    ):
        zero, nzero = kernels.zero_pages(pages, numbers)
        expected = zeropage.zero_pages(looked_at, wanted)
        assert zero_list(zero) == expected
        assert nzero == sum(expected)


def test_zero_pages_of_nothing_is_nothing(kernels):
    for nothing in (
        kernels.zero_pages(_core.Pages(bytes(64), 64), np.empty(0, dtype=np.uint64)),
        kernels.zero_pages(_core.Pages(b"", 64)),
    ):
        zero, nzero = nothing
        assert (len(zero), nzero) == (0, 0)


@pytest.mark.parametrize("index", [[2], [0, 1, 2], [2, 0], [2**64 - 1]])
def test_zero_pages_refuses_an_index_past_the_block(kernels, index):
    with pytest.raises(IndexError):
        kernels.zero_pages(_core.Pages(bytes(128), 64), np.array(index, dtype=np.uint64))


def test_zero_pages_of_a_released_block_reads_nothing(kernels):
    pages = _core.Pages(bytes(128), 64)
    pages.release()
    with pytest.raises(IndexError):
        kernels.zero_pages(pages, np.array([0], dtype=np.uint64))
    zero, nzero = kernels.zero_pages(pages)
    assert (len(zero), nzero) == (0, 0)


def test_zero_pages_lets_go_of_the_block(kernels):
    pages = _core.Pages(bytes(128), 64)
    kernels.zero_pages(pages)
    with pytest.raises(IndexError):
        kernels.zero_pages(pages, np.array([2], dtype=np.uint64))
    pages.release()
    assert pages.npages == 0


def test_a_page_that_somebody_is_writing_does_no_harm_to_the_others(kernels):
    page_size, busy = 1 << 18, 5
    data = np.zeros((16, page_size), dtype=np.uint8)
    data[3::4, page_size // 3] = 1
    pages = _core.Pages(data, page_size)
    wanted = [page for page in range(16) if page % 4 != 3 and page != busy]
    stop, writing = threading.Event(), threading.Event()

    def write() -> None:
        value = 0
        while not stop.is_set():
            # numpy gives the GIL away for as long as it writes
            data[busy] = value
            value = (value + 1) % 3
            writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        writing.wait()
        for _ in range(30):
            zero, nzero = kernels.zero_pages(pages)
            assert [page for page in zero.indexes().tolist() if page != busy] == wanted
            assert nzero == zero.count() == len(wanted) + zero[busy]
    finally:
        stop.set()
        writer.join()
    data[busy] = 0
    assert kernels.zero_pages(pages)[0][busy]
