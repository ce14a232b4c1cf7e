"""Bitmaps: every family of kernels against the scalar one and against lists of bools."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import bitmap as oracle

from mig import _core
from mig._core import Bitmap

LENGTHS = [0, 1, 63, 64, 65]
QUICK = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def bit_lists(draw: st.DrawFn, max_size: int = 400) -> oracle.Bits:
    """Lists of any density: single bits are rare, so are all but single bits."""
    length = draw(st.one_of(st.sampled_from([*LENGTHS, 127, 128, 129]), st.integers(0, max_size)))
    density = draw(st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]))
    rng = random.Random(draw(st.integers(0, 2**32)))
    return [rng.random() < density for _ in range(length)]


@st.composite
def ranges(draw: st.DrawFn, length: int) -> tuple[int, int]:
    first = draw(st.integers(0, length))
    return first, draw(st.integers(0, length - first))


def make(bits: oracle.Bits) -> Bitmap:
    """Through the exported words, so that set() is not tested by itself."""
    bitmap = Bitmap(len(bits))
    np.asarray(bitmap)[:] = np.array(oracle.words(bits), dtype=np.uint64)
    return bitmap


def words_of(bitmap: Bitmap) -> list[int]:
    return [int(word) for word in np.asarray(bitmap)]


# ---- kernels ---------------------------------------------------------------------------------


@QUICK
@given(bits=bit_lists(3000))
def test_popcount_counts_set_bits(kernels, bits):
    assert make(bits).popcount(kernels) == sum(bits)


@pytest.mark.parametrize("nwords", range(40))
def test_popcount_of_every_number_of_words(kernels, nwords):
    rng = random.Random(nwords)
    words = [rng.getrandbits(64) for _ in range(nwords)]
    bitmap = Bitmap(nwords * 64)
    np.asarray(bitmap)[:] = np.array(words, dtype=np.uint64)
    assert bitmap.popcount(kernels) == sum(word.bit_count() for word in words)


@QUICK
@given(data=st.data())
def test_merge_ors_and_counts_what_is_new(kernels, data):
    into = data.draw(bit_lists(3000))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    source = [rng.random() < 0.4 for _ in into]
    bitmap, other = make(into), make(source)
    fresh = bitmap.merge(other, kernels=kernels)
    assert fresh == oracle.merge(into, source)
    assert words_of(bitmap) == oracle.words(into)
    assert words_of(other) == oracle.words(source)


@pytest.mark.parametrize("nwords", range(40))
def test_merge_of_every_number_of_words(kernels, nwords):
    rng = random.Random(nwords)
    a = [rng.getrandbits(64) for _ in range(nwords)]
    b = [rng.getrandbits(64) for _ in range(nwords)]
    into, source = Bitmap(nwords * 64), Bitmap(nwords * 64)
    np.asarray(into)[:] = np.array(a, dtype=np.uint64)
    np.asarray(source)[:] = np.array(b, dtype=np.uint64)
    fresh = into.merge(source, kernels=kernels)
    assert words_of(into) == [x | y for x, y in zip(a, b, strict=True)]
    assert fresh == sum((y & ~x).bit_count() for x, y in zip(a, b, strict=True))


def test_merge_without_a_name_uses_the_default_family():
    a, b = make([True, False, False]), make([True, True, False])
    assert a.merge(b) == 1
    assert words_of(a) == [0b011]


def test_merge_and_drain_refuse_another_length():
    with pytest.raises(ValueError, match="64 and 65"):
        Bitmap(64).merge(Bitmap(65))
    with pytest.raises(ValueError, match="64 and 65"):
        Bitmap(64).drain(Bitmap(65))


# ---- one bitmap ------------------------------------------------------------------------------


@QUICK
@given(data=st.data(), bits=bit_lists())
def test_set_sets_the_range_and_nothing_else(data, bits):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap = make(bits)
    bitmap.set(first, nbits)
    oracle.set_range(bits, first, nbits)
    assert words_of(bitmap) == oracle.words(bits)


@QUICK
@given(data=st.data(), bits=bit_lists())
def test_clear_clears_the_range_and_nothing_else(data, bits):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap = make(bits)
    bitmap.clear(first, nbits)
    oracle.clear_range(bits, first, nbits)
    assert words_of(bitmap) == oracle.words(bits)


def test_every_range_of_a_bitmap_over_three_words():
    for first in range(0, 131, 5):
        for nbits in range(131 - first):
            bits = [False] * 130
            bitmap = Bitmap(130)
            bitmap.set(first, nbits)
            oracle.set_range(bits, first, nbits)
            assert words_of(bitmap) == oracle.words(bits), (first, nbits)
            assert bitmap.count() == nbits
            full = Bitmap(130, fill=True)
            full.clear(first, nbits)
            assert full.count() == 130 - nbits
            assert full.merge(bitmap) == nbits


@QUICK
@given(data=st.data(), bits=bit_lists(1500))
def test_count_counts_the_range(data, bits):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap = make(bits)
    assert bitmap.count(first, nbits) == oracle.count(bits, first, nbits)
    assert bitmap.count(first) == oracle.count(bits, first, len(bits) - first)
    assert bitmap.count() == sum(bits)


@QUICK
@given(bits=bit_lists(200))
def test_next_set_and_next_clear_from_everywhere(bits):
    bitmap = make(bits)
    for start in range(len(bits) + 3):
        assert bitmap.next_set(start) == oracle.next_equal(bits, start, True)
        assert bitmap.next_clear(start) == oracle.next_equal(bits, start, False)


def test_next_clear_does_not_see_the_padding_of_the_last_word():
    for length in LENGTHS:
        assert Bitmap(length, fill=True).next_clear() == length
        assert Bitmap(length).next_set() == length


def test_bits_past_the_length_do_not_count_and_are_not_found():
    bitmap = Bitmap(65)
    np.asarray(bitmap)[:] = 0
    np.asarray(bitmap)[1] = 0xFFFF_FFFF_FFFF_FFFE
    out = np.empty(10, dtype=np.uint64)
    assert bitmap.count() == 0
    assert bitmap.next_set() == 65
    assert bitmap.take(0, out) == 0


@QUICK
@given(data=st.data(), bits=bit_lists())
def test_take_moves_bits_out(data, bits):
    start = data.draw(st.integers(0, len(bits) + 2))
    most = data.draw(st.integers(0, 100))
    bitmap, out = make(bits), np.zeros(most, dtype=np.uint64)
    n = bitmap.take(start, out)
    assert [int(i) for i in out[:n]] == oracle.take(bits, start, most)
    assert words_of(bitmap) == oracle.words(bits)
    assert not out[n:].any()


@QUICK
@given(bits=bit_lists(), most=st.integers(1, 70))
def test_taking_until_nothing_is_left_gives_every_bit_once(bits, most):
    bitmap, out, taken, start = make(bits), np.zeros(most, dtype=np.uint64), [], 0
    while n := bitmap.take(start, out):
        taken += [int(i) for i in out[:n]]
        start = taken[-1] + 1
    assert taken == [i for i, bit in enumerate(bits) if bit]
    assert bitmap.count() == 0


@QUICK
@given(data=st.data())
def test_drain_moves_all_bits(data):
    into = data.draw(bit_lists())
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    source = [rng.random() < 0.3 for _ in into]
    bitmap, other = make(into), make(source)
    assert bitmap.drain(other) == oracle.drain(into, source)
    assert words_of(bitmap) == oracle.words(into)
    assert words_of(other) == oracle.words(source)


@QUICK
@given(bits=bit_lists())
def test_set_atomic_sets_one_bit_and_says_whether_it_was_clear(bits):
    bitmap = make(bits)
    for i, was in enumerate(list(bits)):
        assert bitmap.set_atomic(i) == (not was)
        assert bitmap[i]
        assert bitmap.set_atomic(i) is False
        bits[i] = True
    assert words_of(bitmap) == oracle.words(bits)


def test_concurrent_set_atomic_and_drain_lose_no_bit():
    log, dirty, found = Bitmap(4096), Bitmap(4096), set()
    done = threading.Event()

    def mark(residue: int) -> None:
        for i in range(residue, 4096, 4):
            log.set_atomic(i)

    def collect() -> None:
        while not done.is_set():
            dirty.drain(log)

    collector = threading.Thread(target=collect)
    markers = [threading.Thread(target=mark, args=(r,)) for r in range(4)]
    for thread in (collector, *markers):
        thread.start()
    for thread in markers:
        thread.join()
    done.set()
    collector.join()
    dirty.drain(log)
    found = {i for i in range(4096) if dirty[i]}
    assert found == set(range(4096))
    assert log.count() == 0


# ---- ranges that cannot be -------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_ranges_past_the_end_are_refused(length):
    bitmap = Bitmap(length)
    for call in (bitmap.set, bitmap.clear, bitmap.count):
        call(length, 0)
        for first, nbits in ((length, 1), (0, length + 1), (length + 1, 0), (1, 2**64 - 1)):
            with pytest.raises(IndexError):
                call(first, nbits)
    with pytest.raises(IndexError):
        bitmap[length]
    with pytest.raises(IndexError):
        bitmap.set_atomic(length)
    with pytest.raises(IndexError):
        bitmap.count(length + 1)
    assert bitmap.count() == 0


def test_negative_numbers_are_refused():
    for call in (lambda: Bitmap(-1), lambda: Bitmap(64)[-1], lambda: Bitmap(64).set(-1)):
        with pytest.raises((OverflowError, IndexError, ValueError)):
            call()


def test_a_bitmap_of_more_bits_than_there_are_addresses_is_refused():
    for nbits in (2**64 - 1, 2**64 - 63, 2**62):
        with pytest.raises((MemoryError, OverflowError, ValueError)):
            Bitmap(nbits)


# ---- the buffer ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fill", [False, True])
def test_numpy_sees_the_words(length, fill):
    bitmap = Bitmap(length, fill=fill)
    words = np.asarray(bitmap)
    assert words.dtype == np.uint64
    assert words.shape == ((length + 63) // 64,)
    assert len(bitmap) == bitmap.nbits == length
    assert [int(w) for w in words] == oracle.words([fill] * length)
    assert bitmap.count() == (length if fill else 0)
    if length:
        words[0] ^= np.uint64(1)
        assert bitmap[0] != fill


def test_memoryview_says_what_the_words_are():
    view = memoryview(Bitmap(65, fill=True))
    assert (view.format, view.itemsize, view.ndim, view.shape) == ("Q", 8, 1, (2,))
    assert not view.readonly
    assert view.tolist() == [2**64 - 1, 1]
    assert bytes(view) == b"\xff" * 8 + b"\x01" + bytes(7)


def test_the_words_outlive_the_name_of_the_bitmap():
    words = np.asarray(Bitmap(128, fill=True))
    assert int(words[0]) == int(words[1]) == 2**64 - 1


def test_iterating_gives_the_bits():
    assert list(make([True, False, True])) == [True, False, True]
    assert list(Bitmap(0)) == []


def test_the_default_family_is_the_one_bitmaps_count_with():
    assert Bitmap(1000, fill=True).count() == Bitmap(1000, fill=True).popcount(_core.KERNELS)
