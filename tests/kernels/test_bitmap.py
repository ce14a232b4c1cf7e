"""Bitmaps: every family of kernels against lists of bools, and large ones against numpy."""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
import shutil
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import bitmap as oracle

from mig._core import Bitmap, Kernels

ROOT = Path(__file__).parents[2]
ONES = 2**64 - 1
LENGTHS = [0, 1, 63, 64, 65]
#: around a word, a group of 8 words and a step of 32 words, alone and after one another
BORDERS = [1, 63, 64, 65, 127, 128, 129, 511, 512, 513, 575, 576, 577, 1087, 1088, 1089]
BORDERS += [2047, 2048, 2049, 2111, 2112, 2113, 2559, 2560, 2561, 2624, 2625, 4159, 4160, 4161]
QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def bit_lists(draw: st.DrawFn, max_size: int = 700) -> oracle.Bits:
    """Lists of any density: single bits, all but single bits, and runs of any length."""
    length = draw(st.one_of(st.sampled_from([*LENGTHS, 127, 128, 129]), st.integers(0, max_size)))
    if length <= 70 and draw(st.booleans()):
        return draw(st.lists(st.booleans(), min_size=length, max_size=length))
    rng = random.Random(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]))
    most = draw(st.sampled_from([1, 1, 5, 70, 600]))
    bits: oracle.Bits = []
    while len(bits) < length:
        bits += [rng.random() < density] * rng.randint(1, most)
    return bits[:length]


@st.composite
def pairs(draw: st.DrawFn, max_size: int = 700) -> tuple[oracle.Bits, oracle.Bits]:
    """Two lists of one length."""
    one = draw(bit_lists(max_size))
    rng = random.Random(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    return one, [rng.random() < density for _ in one]


@st.composite
def ranges(draw: st.DrawFn, length: int) -> tuple[int, int]:
    first = draw(st.integers(0, length))
    return first, draw(st.integers(0, length - first))


def fill(bitmap: Bitmap, words: Iterable[int], past: bool = False) -> Bitmap:
    """Through the exported words, so that set() is not tested by itself.

    past: set the bits of the last word that are past the size
    """
    view = np.asarray(bitmap)
    view[:] = words
    if past and bitmap.nbits % 64:
        view[-1] |= np.uint64(ONES << bitmap.nbits % 64 & ONES)
    return bitmap


def make(bits: oracle.Bits, kernels: Kernels | None = None, past: bool = False) -> Bitmap:
    words = np.array(oracle.words(bits), dtype=np.uint64)
    return fill(Bitmap(len(bits), kernels=kernels), words, past)


def make_large(flags: oracle.Flags, kernels: Kernels, past: bool = True) -> Bitmap:
    return fill(Bitmap(len(flags), kernels=kernels), oracle.all_words(flags), past)


def bits_of(bitmap: Bitmap) -> oracle.Bits:
    """Out of the exported words, up to the size."""
    octets = np.asarray(bitmap).astype("<u8").view(np.uint8)
    return [bool(bit) for bit in np.unpackbits(octets, bitorder="little")[: bitmap.nbits]]


def flags_of(bitmap: Bitmap) -> oracle.Flags:
    octets = np.asarray(bitmap).astype("<u8").view(np.uint8)
    return np.unpackbits(octets, bitorder="little")[: bitmap.nbits].astype(bool)


def at_every_alignment(nbits: int, kernels: Kernels) -> list[Bitmap]:
    """Empty bitmaps whose words begin at different places of a cache line: groups are aligned."""
    found: dict[int, Bitmap] = {}
    kept = []
    rng = random.Random(nbits)
    for _ in range(200):
        # what lies between two bitmaps moves the second
        kept += [Bitmap(64 * rng.randint(1, 40)), Bitmap(nbits, kernels=kernels)]
        found.setdefault(np.asarray(kept[-1]).ctypes.data % 64, kept[-1])
        if len(found) == 4:
            break
    return list(found.values())


def taken(bitmap: Bitmap, start: int, most: int) -> list[int]:
    out = np.zeros(most, dtype=np.uint64)
    return out[: bitmap.take(start, out)].tolist()


# ---- every bitmap of a few bits --------------------------------------------------------------


@functools.cache
def small_bitmaps() -> tuple[tuple[bool, ...], ...]:
    """All bitmaps of up to ten bits."""
    return tuple(
        bits for length in range(11) for bits in itertools.product((False, True), repeat=length)
    )


@functools.cache
def small_answers(
    bits: tuple[bool, ...], start: int
) -> tuple[list[int], list[list[int]], int, int]:
    listed = list(bits)
    return (
        oracle.indexes(listed, start),
        oracle.runs(listed, start),
        oracle.next_equal(listed, start, True),
        oracle.next_equal(listed, start, False),
    )


@pytest.mark.parametrize("past", [False, True])
def test_every_bitmap_of_up_to_ten_bits_is_listed_from_every_start(kernels, past):
    out = np.zeros(10, dtype=np.uint64)
    for bits in small_bitmaps():
        bitmap = make(list(bits), kernels, past)
        words = np.asarray(bitmap).copy()
        for start in range(len(bits) + 2):
            indexes, runs, next_set, next_clear = small_answers(bits, start)
            assert bitmap.indexes(start).tolist() == indexes, (bits, start)
            assert bitmap.runs(start).tolist() == runs, (bits, start)
            assert bitmap.next_set(start) == next_set, (bits, start)
            assert bitmap.next_clear(start) == next_clear, (bits, start)
            if start <= len(bits):
                assert bitmap.count(start) == len(indexes), (bits, start)
            n = bitmap.take(start, out)
            assert out[:n].tolist() == indexes, (bits, start)
            assert bitmap.indexes().tolist() == oracle.indexes(list(bits[:start]))
            np.asarray(bitmap)[:] = words


def test_every_bitmap_of_up_to_seven_bits_is_listed_up_to_every_limit(kernels):
    for bits in small_bitmaps():
        if len(bits) > 7:
            break
        bitmap = make(list(bits), kernels, past=True)
        for start, limit in itertools.product(range(len(bits) + 1), range(len(bits) + 2)):
            indexes, runs, *_ = small_answers(bits, start)
            case = (bits, start, limit)
            assert bitmap.indexes(start, limit).tolist() == indexes[:limit], case
            assert bitmap.runs(start, limit).tolist() == runs[:limit], case
            cut = oracle.runs(list(bits), start, budget=limit)
            assert bitmap.runs(start, max_bits=limit).tolist() == cut, case
            assert bitmap.runs(start, 1, limit).tolist() == cut[:1], case
            left = list(bits)
            other = bitmap.copy()
            assert taken(other, start, limit) == oracle.take(left, start, limit), case
            assert bits_of(other) == left, case


@pytest.mark.parametrize("past", [False, True])
def test_every_range_of_every_bitmap_of_up_to_six_bits(kernels, past):
    for bits in small_bitmaps():
        if len(bits) > 6:
            break
        bitmap = make(list(bits), kernels, past)
        for first in range(len(bits) + 1):
            for nbits in range(len(bits) - first + 1):
                case = (bits, first, nbits)
                assert bitmap.count(first, nbits) == oracle.count(list(bits), first, nbits), case
                for change, atomic, expect in (
                    (Bitmap.set, Bitmap.set_atomic, oracle.set_range),
                    (Bitmap.clear, Bitmap.clear_atomic, oracle.clear_range),
                ):
                    wanted = list(bits)
                    changed = expect(wanted, first, nbits)
                    one, other = bitmap.copy(), bitmap.copy()
                    assert change(one, first, nbits) is None
                    assert bits_of(one) == wanted, case
                    assert atomic(other, first, nbits) == changed, case
                    assert bits_of(other) == wanted, case


@pytest.mark.parametrize("past", [False, True])
def test_every_two_bitmaps_of_up_to_five_bits_combine(kernels, past):
    for length in range(6):
        bitmaps = list(itertools.product((False, True), repeat=length))
        for a, b in itertools.product(bitmaps, bitmaps):
            check_combinations(list(a), list(b), kernels, past)


@pytest.mark.parametrize("past", [False, True])
def test_every_bitmap_of_up_to_ten_bits_as_a_whole(kernels, past):
    for bits in small_bitmaps():
        bitmap = make(list(bits), kernels, past)
        wire = oracle.wire(list(bits))
        assert bitmap.to_wire() == wire
        assert bitmap == Bitmap.from_wire(len(bits), wire)
        assert bitmap.count() == sum(bits)
        assert [bitmap[i] for i in range(len(bits))] == list(bits)
        turned = bitmap.copy()
        turned.complement()
        assert bits_of(turned) == [not bit for bit in bits]
        assert (bitmap == turned) == (not bits)
        for group in (1, 2, 4, 8, 16):
            filled, wanted = bitmap.copy(), list(bits)
            filled.fill_groups(group)
            oracle.fill_groups(wanted, group)
            assert bits_of(filled) == wanted, (bits, group)


def check_combinations(a: oracle.Bits, b: oracle.Bits, kernels: Kernels, past: bool) -> None:
    for operation, expect in (
        (Bitmap.__iand__, oracle.intersect),
        (Bitmap.__ior__, oracle.merge),
        (Bitmap.__isub__, oracle.subtract),
        (Bitmap.merge, oracle.merge),
    ):
        into, source, wanted = make(a, kernels, past), make(b, kernels, past), list(a)
        result, fresh = operation(into, source), expect(wanted, b)
        assert bits_of(into) == wanted, (a, b, operation)
        assert bits_of(source) == b, (a, b, operation)
        assert into.count() == sum(wanted)
        assert result == fresh if operation is Bitmap.merge else result is into


# ---- ranges ----------------------------------------------------------------------------------


@QUICK
@given(data=st.data(), bits=bit_lists(), past=st.booleans())
def test_set_sets_the_range_and_nothing_else(kernels, data, bits, past):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap = make(bits, kernels, past)
    bitmap.set(first, nbits)
    oracle.set_range(bits, first, nbits)
    assert bits_of(bitmap) == bits


@QUICK
@given(data=st.data(), bits=bit_lists(), past=st.booleans())
def test_clear_clears_the_range_and_nothing_else(kernels, data, bits, past):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap = make(bits, kernels, past)
    bitmap.clear(first, nbits)
    oracle.clear_range(bits, first, nbits)
    assert bits_of(bitmap) == bits


@QUICK
@given(data=st.data(), bits=bit_lists(), past=st.booleans())
def test_the_atomic_forms_change_the_range_and_say_how_much_they_changed(kernels, data, bits, past):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap, wanted = make(bits, kernels, past), list(bits)
    assert bitmap.set_atomic(first, nbits) == oracle.set_range(wanted, first, nbits)
    assert bits_of(bitmap) == wanted
    assert bitmap.set_atomic(first, nbits) == 0
    first, nbits = data.draw(ranges(len(bits)))
    assert bitmap.clear_atomic(first, nbits) == oracle.clear_range(wanted, first, nbits)
    assert bits_of(bitmap) == wanted
    assert bitmap.clear_atomic(first, nbits) == 0


def test_without_a_length_the_range_is_one_bit():
    bitmap = Bitmap(100)
    bitmap.set(70)
    assert bitmap.indexes().tolist() == [70]
    assert (bitmap.set_atomic(71), bitmap.set_atomic(71)) == (1, 0)
    bitmap.clear(70)
    assert bitmap.indexes().tolist() == [71]
    assert (bitmap.clear_atomic(71), bitmap.clear_atomic(71)) == (1, 0)


def test_every_range_of_a_bitmap_over_three_words(kernels):
    for first in range(131):
        for nbits in range(131 - first):
            bitmap = Bitmap(130, kernels=kernels)
            bitmap.set(first, nbits)
            wanted = ((1 << nbits) - 1) << first
            assert int.from_bytes(bitmap.to_wire(), "little") == wanted, (first, nbits)
            full = Bitmap(130, fill=True, kernels=kernels)
            assert full.count(first, nbits) == bitmap.count() == nbits
            full.clear(first, nbits)
            assert int.from_bytes(full.to_wire(), "little") == (1 << 130) - 1 - wanted
            assert full.merge(bitmap) == nbits
            assert full.clear_atomic(first, nbits) == nbits
            assert bitmap.set_atomic(0, 130) == 130 - nbits


@QUICK
@given(data=st.data(), bits=bit_lists(3000), past=st.booleans())
def test_count_counts_the_range(kernels, data, bits, past):
    first, nbits = data.draw(ranges(len(bits)))
    bitmap = make(bits, kernels, past)
    assert bitmap.count(first, nbits) == oracle.count(bits, first, nbits)
    assert bitmap.count(first) == oracle.count(bits, first, len(bits) - first)
    assert bitmap.count(nbits=nbits) == oracle.count(bits, 0, nbits)
    assert bitmap.count() == sum(bits)


@QUICK
@given(bits=bit_lists(300), past=st.booleans())
def test_next_set_and_next_clear_from_everywhere(kernels, bits, past):
    bitmap = make(bits, kernels, past)
    for start in range(len(bits) + 3):
        assert bitmap.next_set(start) == oracle.next_equal(bits, start, True)
        assert bitmap.next_clear(start) == oracle.next_equal(bits, start, False)
    assert bitmap.next_set(ONES) == bitmap.next_clear(ONES) == len(bits)


def test_next_clear_does_not_see_the_padding_of_the_last_word():
    for length in LENGTHS:
        assert Bitmap(length, fill=True).next_clear() == length
        assert Bitmap(length).next_set() == length


# ---- bits past the size ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 65, 100, 511, 513, 2049, 2111, 5000])
def test_bits_past_the_size_are_seen_by_nobody(kernels, length):
    def empty() -> Bitmap:
        return make([False] * length, kernels, past=True)

    assert empty().count() == empty().count(0, length) == 0
    assert empty().next_set() == length
    assert empty().indexes().tolist() == []
    assert empty().indexes(length - 1).tolist() == []
    assert empty().runs().tolist() == []
    assert taken(empty(), 0, 100) == []
    assert empty() == Bitmap(length)
    assert not any(empty().to_wire())
    assert Bitmap(length, fill=True, kernels=kernels) == make([True] * length, kernels, past=True)
    assert empty().set_atomic(0, length) == length
    assert empty().clear_atomic(0, length) == 0
    for group in (1, 2, 64, 128, 4096):
        bitmap = empty()
        bitmap.fill_groups(group)
        assert bitmap.count() == 0, group
    into = Bitmap(length, kernels=kernels)
    assert into.merge(empty()) == 0
    into |= empty()
    assert into.count() == 0
    assert not any(into.to_wire())


@pytest.mark.parametrize("length", [1, 63, 65, 100, 513, 2049])
def test_drain_does_not_count_bits_past_the_size(kernels, length):
    source = make([False] * length, kernels, past=True)
    into = Bitmap(length, kernels=kernels)
    source.set(0)
    assert into.drain(source) == 1
    assert into.indexes().tolist() == [0]
    assert source.count() == 0


@pytest.mark.parametrize("length", [1, 63, 65, 100, 513, 2049])
def test_a_run_that_reaches_the_end_ends_there_whatever_is_past_the_size(kernels, length):
    for past in (False, True):
        bitmap = make([False] * (length - 1) + [True], kernels, past)
        assert bitmap.runs().tolist() == [[length - 1, length]]
        assert bitmap.runs(max_bits=5).tolist() == [[length - 1, length]]
        full = make([True] * length, kernels, past)
        assert full.runs().tolist() == [[0, length]]
        assert full.indexes().tolist() == list(range(length))


# ---- lists -----------------------------------------------------------------------------------


@QUICK
@given(data=st.data(), bits=bit_lists(3000), past=st.booleans())
def test_indexes_runs_and_take_agree_with_the_oracle(kernels, data, bits, past):
    start = data.draw(st.integers(0, len(bits) + 2))
    most = data.draw(st.one_of(st.integers(0, 100), st.integers(0, 1500)))
    budget = data.draw(st.one_of(st.integers(0, 100), st.integers(0, 1500)))
    bitmap = make(bits, kernels, past)
    indexes = bitmap.indexes(start)
    assert (indexes.dtype, indexes.ndim) == (np.uint64, 1)
    assert indexes.tolist() == oracle.indexes(bits, start)
    assert bitmap.indexes(start, most).tolist() == oracle.indexes(bits, start, most)
    runs = bitmap.runs(start)
    assert (runs.dtype, runs.ndim, runs.shape[1]) == (np.uint64, 2, 2)
    assert runs.tolist() == oracle.runs(bits, start)
    assert bitmap.runs(start, most).tolist() == oracle.runs(bits, start, most)
    assert bitmap.runs(start, max_bits=budget).tolist() == oracle.runs(bits, start, None, budget)
    assert bitmap.runs(start, most, budget).tolist() == oracle.runs(bits, start, most, budget)
    assert bits_of(bitmap) == bits
    assert taken(bitmap, start, most) == oracle.take(bits, start, most)
    assert bits_of(bitmap) == bits


@QUICK
@given(bits=bit_lists(1500), most=st.one_of(st.integers(1, 70), st.integers(1, 1000)))
def test_taking_until_nothing_is_left_gives_every_bit_once(kernels, bits, most):
    bitmap, found, start = make(bits, kernels, past=True), [], 0
    while some := taken(bitmap, start, most):
        found += some
        start = found[-1] + 1
    assert found == oracle.indexes(bits)
    assert bitmap.count() == 0


@QUICK
@given(bits=bit_lists(1500), budget=st.one_of(st.integers(1, 70), st.integers(1, 1000)))
def test_runs_in_pieces_of_a_budget_give_every_bit_once(kernels, bits, budget):
    bitmap, found, start = make(bits, kernels, past=True), [], 0
    while len(runs := bitmap.runs(start, max_bits=budget)):
        assert int((runs[:, 1] - runs[:, 0]).sum()) <= budget
        found += [bit for first, end in runs.tolist() for bit in range(first, end)]
        start = found[-1] + 1
    assert found == oracle.indexes(bits)


def patterns(length: int) -> dict[str, oracle.Flags]:
    rng = np.random.default_rng(length)
    everywhere = np.arange(length)
    some = {
        str(density): rng.random(length) < density for density in (0, 0.0001, 0.01, 0.1, 0.5, 1)
    }
    some["all but few"] = rng.random(length) >= 0.003
    some["alternating"] = everywhere % 2 == 0
    some["alternating words"] = everywhere // 64 % 2 == 0
    some["alternating groups"] = everywhere // 512 % 2 == 1
    some["across words"] = (everywhere + 3) % 64 < 7
    some["across groups"] = (everywhere + 30) % 512 < 80
    some["long runs"] = np.repeat(rng.random(length // 90 + 1) < 0.5, 90)[:length]
    some["last bit"] = everywhere == length - 1
    some["one step on"] = everywhere == min(2048 + 64, length - 1)
    return some


#: two that end within a group and within a step, and one of many steps
LISTED = [*BORDERS, 3000, 10_000]


@pytest.mark.parametrize("length", LISTED)
def test_every_density_from_every_kind_of_start_up_to_every_kind_of_limit(kernels, length):
    starts = sorted({0, 1, 63, 64, 500, 513, length // 2, length - 1, length, length + 1})
    for name, flags in patterns(length).items():
        bitmap = make_large(flags, kernels)
        for start in starts:
            after = flags.copy()
            after[:start] = False
            indexes, runs = oracle.all_indexes(after), oracle.all_runs(after)
            total = len(indexes)
            case = (name, start)
            assert np.array_equal(bitmap.indexes(start), indexes), case
            assert np.array_equal(bitmap.runs(start), runs), case
            if start <= length:
                assert bitmap.count(start) == total, case
            for limit in sorted({0, 1, 2, 63, 64, 65, 511, 512, 513, 577, total - 1, total + 1}):
                if not 0 <= limit <= total + 1:
                    continue
                case = (name, start, limit)
                assert np.array_equal(bitmap.indexes(start, limit), indexes[:limit]), case
                assert np.array_equal(bitmap.runs(start, limit), runs[:limit]), case
                cut = oracle.cut_runs(runs, limit)
                assert np.array_equal(bitmap.runs(start, max_bits=limit), cut), case
                other = bitmap.copy()
                out = np.zeros(limit, dtype=np.uint64)
                n = other.take(start, out)
                assert np.array_equal(out[:n], indexes[:limit]), case
                left = flags.copy()
                left[indexes[:limit].astype(np.int64)] = False
                assert np.array_equal(flags_of(other), left), case


@pytest.mark.parametrize("density", [0, 0.0001, 0.01, 0.1, 0.5, 1])
def test_a_large_bitmap_of_every_density(kernels, density):
    rng = np.random.default_rng(7)
    flags = rng.random(1_000_037) < density
    bitmap = make_large(flags, kernels)
    indexes = oracle.all_indexes(flags)
    assert bitmap.count() == len(indexes)
    assert np.array_equal(bitmap.indexes(), indexes)
    assert np.array_equal(bitmap.runs(), oracle.all_runs(flags))
    out = np.zeros(len(indexes) + 1, dtype=np.uint64)
    assert bitmap.take(0, out) == len(indexes)
    assert np.array_equal(out[:-1], indexes)
    assert bitmap.count() == 0


@pytest.mark.parametrize("nset", range(65))
def test_words_of_every_number_of_set_bits_are_listed(kernels, nset):
    """Alone at every place of a group, and side by side."""
    rng = np.random.default_rng(nset)
    length = 64 * 61
    for bitmap in at_every_alignment(length, kernels):
        words = np.zeros(61, dtype=np.uint64)
        for w in range(61):
            chosen = rng.permutation(64)[:nset]
            words[w] = sum(1 << int(bit) for bit in chosen)
        for keep in (range(61), range(0, 61, 9), range(3, 61, 9)):
            kept = np.zeros(61, dtype=np.uint64)
            kept[list(keep)] = words[list(keep)]
            flags = flags_of(fill(bitmap, kept))
            indexes = oracle.all_indexes(flags)
            assert len(indexes) == nset * len(keep)
            assert np.array_equal(bitmap.indexes(), indexes)
            assert np.array_equal(bitmap.runs(), oracle.all_runs(flags))
            for most in {1, 64, 513, max(len(indexes) - 1, 1), len(indexes) + 1}:
                fill(bitmap, kept)
                out = np.zeros(most, dtype=np.uint64)
                n = bitmap.take(0, out)
                assert np.array_equal(out[:n], indexes[:most])
                assert bitmap.count() == len(indexes) - n
                assert np.array_equal(bitmap.indexes(), indexes[n:])


def word_classes() -> list[int]:
    """Single bits, runs from each end, holes, and words of few and of many bits."""
    words = {0, ONES, 0x5555_5555_5555_5555, 0xAAAA_AAAA_AAAA_AAAA, 0x0101_0101_0101_0101}
    for bit in range(64):
        words |= {1 << bit, ONES ^ (1 << bit), (1 << bit) - 1, ONES ^ ((1 << bit) - 1)}
    rng = random.Random(64)
    for nset in range(65):
        words |= {sum(1 << bit for bit in rng.sample(range(64), nset)) for _ in range(3)}
    return sorted(words)


@pytest.mark.parametrize("past", [False, True])
def test_every_kind_of_word_alone_is_listed_from_every_start(kernels, past):
    for word in word_classes():
        flags = np.unpackbits(np.array([word], dtype="<u8").view(np.uint8), bitorder="little")
        for nbits in (64, 61):
            bitmap = Bitmap(nbits, kernels=kernels)
            fill(bitmap, [word & (1 << nbits) - 1], past)
            # every start for some of the words, some starts for all of them
            starts = range(nbits + 1) if word % 7 == 0 else range(word % 13, nbits + 1, 13)
            for start in starts:
                after = flags[:nbits].astype(bool)
                after[:start] = False
                assert np.array_equal(bitmap.indexes(start), oracle.all_indexes(after))
                assert np.array_equal(bitmap.runs(start), oracle.all_runs(after))
                other = bitmap.copy()
                assert taken(other, start, 64) == np.flatnonzero(after).tolist()
                assert other.count(start) == 0
                assert other.count(0, start) == bitmap.count(0, start)


def test_every_run_and_every_hole_of_two_words(kernels):
    for first, end in itertools.combinations(range(129), 2):
        bitmap = Bitmap(128, kernels=kernels)
        fill(bitmap, [word(first, end, 0), word(first, end, 1)])
        assert bitmap.runs().tolist() == [[first, end]]
        assert bitmap.indexes().tolist() == list(range(first, end))
        assert bitmap.count() == end - first
        assert (bitmap.next_set(), bitmap.next_clear(first)) == (first, end)
        middle = (first + end) // 2
        assert bitmap.runs(middle).tolist() == [[middle, end]]
        assert bitmap.runs(max_bits=1).tolist() == [[first, first + 1]]
        bitmap.complement()
        hole = [[a, b] for a, b in ((0, first), (end, 128)) if a < b]
        assert bitmap.runs().tolist() == hole
        assert bitmap.indexes().tolist() == [*range(first), *range(end, 128)]
        assert taken(bitmap, 0, 128) == [*range(first), *range(end, 128)]


def word(first: int, end: int, number: int) -> int:
    return (((1 << end) - (1 << first)) >> 64 * number) & ONES


@pytest.mark.parametrize("border", [64 * w for w in (1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 40, 48)])
def test_every_run_that_crosses_a_word_within_a_long_bitmap(kernels, border):
    """Words begin at every alignment, so every border is one of groups for some of them."""
    everywhere = [1, 2, 31, 62, 63, 64]
    for bitmap in at_every_alignment(64 * 52, kernels):
        for before, behind in itertools.product(range(65), everywhere):
            for first, end in {
                (border - before, border + behind),
                (border - behind, border + before),
            }:
                np.asarray(bitmap)[:] = 0
                bitmap.set(first, end - first)
                assert bitmap.runs().tolist() == [[first, end]]
                rest = [[max(first, border - 1), end]] if end >= border else []
                assert bitmap.runs(border - 1).tolist() == rest
                assert len(bitmap.indexes()) == end - first
                out = np.zeros(128, dtype=np.uint64)
                assert bitmap.take(0, out) == end - first
                assert out[: end - first].tolist() == list(range(first, end))
                assert bitmap.count() == 0


@pytest.mark.parametrize("length", [64, 512, 2048, 2112, 3000])
def test_runs_of_every_length_in_a_full_bitmap_are_cut_by_the_budget(kernels, length):
    bitmap = Bitmap(length, fill=True, kernels=kernels)
    for start in {0, 1, 63, 64, length // 2, length - 1}:
        for budget in {0, 1, 63, 64, 65, 512, 513, length - start, length - start + 1, ONES}:
            end = min(length, start + budget)
            wanted = [[start, end]] if start < end else []
            assert bitmap.runs(start, max_bits=budget).tolist() == wanted
            assert bitmap.runs(start, 1, budget).tolist() == wanted
            assert bitmap.runs(start, 0, budget).tolist() == []


def test_a_budget_that_is_used_up_by_whole_runs_begins_no_other(kernels):
    bitmap = make([i % 4 < 2 for i in range(200)], kernels)
    assert bitmap.runs(max_bits=4).tolist() == [[0, 2], [4, 6]]
    assert bitmap.runs(max_bits=5).tolist() == [[0, 2], [4, 6], [8, 9]]
    assert bitmap.runs(1, max_bits=3).tolist() == [[1, 2], [4, 6]]


def test_lists_of_starts_past_the_end_are_empty(kernels):
    for length in LENGTHS:
        bitmap = Bitmap(length, fill=True, kernels=kernels)
        for start in (length, length + 1, length + 64, ONES):
            assert bitmap.indexes(start).shape == (0,)
            assert bitmap.runs(start).shape == (0, 2)
            assert taken(bitmap, start, 5) == []
        assert bitmap.count() == length


def test_take_writes_nothing_behind_the_end_of_out(kernels):
    for most in (1, 2, 8, 63, 64, 65, 100, 511, 512, 513, 600):
        bitmap = Bitmap(6000, fill=True, kernels=kernels)
        memory = np.full(most + 160, 77, dtype=np.uint64)
        assert bitmap.take(3, memory[80 : 80 + most]) == most
        assert memory[80 : 80 + most].tolist() == list(range(3, 3 + most))
        assert (memory[:80] == 77).all()
        assert (memory[80 + most :] == 77).all()


def test_take_needs_room_in_64_bit_words():
    bitmap = Bitmap(64, fill=True)
    with pytest.raises(ValueError, match="mismatch"):
        bitmap.take(0, np.zeros(4, dtype=np.uint32))
    with pytest.raises(ValueError, match="contiguous"):
        bitmap.take(0, np.zeros(8, dtype=np.uint64)[::2])
    readonly = np.zeros(4, dtype=np.uint64)
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        bitmap.take(0, readonly)
    assert bitmap.count() == 64


# ---- whole bitmaps ---------------------------------------------------------------------------


@QUICK
@given(both=pairs(3000), past=st.booleans())
def test_bitwise_operations_and_merge_agree_with_the_oracle(kernels, both, past):
    check_combinations(*both, kernels, past)


@QUICK
@given(both=pairs(), past=st.booleans())
def test_other_families_combine_with_each_other(kernels, both, past):
    a, b = both
    into, other = make(a, kernels, past), make(b, None, past)
    assert into.merge(other) == oracle.merge(a, b)
    assert bits_of(into) == a
    assert (into == other) == (a == b)


@pytest.mark.parametrize("nwords", range(70))
def test_count_merge_and_bitwise_operations_of_every_number_of_words(kernels, nwords):
    rng = np.random.default_rng(nwords)
    for length in {nwords * 64, max(nwords * 64 - 5, 0)}:
        a, b = rng.random(length) < 0.5, rng.random(length) < 0.5
        source = make_large(b, kernels)
        assert source.count() == b.sum()
        assert source.count(length // 3) == b[length // 3 :].sum()
        into = make_large(a, kernels)
        assert into.merge(source) == (b & ~a).sum()
        assert np.array_equal(flags_of(into), a | b)
        for operation, wanted in (
            (Bitmap.__ior__, a | b),
            (Bitmap.__iand__, a & b),
            (Bitmap.__isub__, a & ~b),
        ):
            into = make_large(a, kernels)
            operation(into, source)
            assert np.array_equal(flags_of(into), wanted)
        into = make_large(a, kernels)
        into.complement()
        assert np.array_equal(flags_of(into), ~a)
        assert into.count() == length - a.sum()
        assert np.array_equal(flags_of(source), b)


def test_bitwise_operations_change_the_bitmap_in_place():
    bitmap = same = make([True, True, False, False])
    other = make([True, False, True, False])
    bitmap &= other
    assert bits_of(same) == [True, False, False, False]
    bitmap |= other
    assert bits_of(same) == [True, False, True, False]
    bitmap -= make([True, True, False, False])
    assert bits_of(same) == [False, False, True, False]
    assert bitmap is same


@pytest.mark.parametrize("length", [65, 600, 3000])
def test_a_bitmap_combined_with_itself(kernels, length):
    bits = [i % 3 == 0 for i in range(length)]
    bitmap = make(bits, kernels, past=True)
    bitmap &= bitmap
    bitmap |= bitmap
    assert bitmap.merge(bitmap) == 0
    assert bits_of(bitmap) == bits
    bitmap -= bitmap
    assert bitmap.count() == 0


def test_two_bitmaps_of_different_sizes_do_not_combine(kernels):
    one, other = Bitmap(64, fill=True, kernels=kernels), Bitmap(65, kernels=kernels)
    for operation in (
        *(Bitmap.__iand__, Bitmap.__ior__, Bitmap.__isub__, Bitmap.merge, Bitmap.drain),
    ):
        with pytest.raises(ValueError, match="64 and 65"):
            operation(one, other)
    assert (one.count(), other.count()) == (64, 0)


def test_a_bitmap_combines_with_bitmaps_only():
    bitmap = Bitmap(64)
    for other in (None, 0, bytes(8)):
        for operation in (Bitmap.merge, Bitmap.drain):
            with pytest.raises(TypeError):
                operation(bitmap, other)
        with pytest.raises(TypeError):
            bitmap |= other
        assert bitmap != other


@QUICK
@given(both=pairs(200), past=st.booleans())
def test_bitmaps_are_equal_when_their_bits_are(kernels, both, past):
    a, b = both
    assert make(a, kernels, past) == make(a)
    assert (make(a, kernels, past) == make(b)) == (a == b)
    assert (make(a, kernels, past) != make(b)) == (a != b)
    assert make(a, kernels) != make([*a, False])


def test_bitmaps_have_no_hash():
    with pytest.raises(TypeError):
        hash(Bitmap(1))


@QUICK
@given(bits=bit_lists(300), past=st.booleans())
def test_a_copy_has_the_same_bits_and_goes_its_own_way(kernels, bits, past):
    bitmap = make(bits, kernels, past)
    copy = bitmap.copy()
    assert bits_of(copy) == bits
    assert copy == bitmap
    copy.complement()
    assert bits_of(bitmap) == bits
    assert copy.count() == len(bits) - sum(bits)


@QUICK
@given(both=pairs(), past=st.booleans())
def test_drain_moves_all_bits(kernels, both, past):
    into, source = both
    bitmap, other = make(into, kernels, past), make(source, kernels, past)
    assert bitmap.drain(other) == oracle.drain(into, source)
    assert bits_of(bitmap) == into
    assert bits_of(other) == source


# ---- groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1 << bits for bits in range(13)])
def test_fill_groups_fills_every_group_that_has_a_bit(kernels, group):
    rng = np.random.default_rng(group)
    for length in [*LENGTHS, *BORDERS, group - 1, group, group + 1, 3 * group + 7, 20_000]:
        for density in (0, 0.5 / group, 0.01, 0.5, 1):
            flags = rng.random(length) < density
            bitmap = make_large(flags, kernels)
            bitmap.fill_groups(group)
            assert np.array_equal(flags_of(bitmap), oracle.all_groups(flags, group))
            assert bitmap.count() == oracle.all_groups(flags, group).sum()


@QUICK
@given(bits=bit_lists(), group=st.sampled_from([1 << bits for bits in range(11)]))
def test_fill_groups_agrees_with_the_oracle(kernels, bits, group):
    bitmap = make(bits, kernels, past=True)
    bitmap.fill_groups(group)
    oracle.fill_groups(bits, group)
    assert bits_of(bitmap) == bits


@pytest.mark.parametrize("group", [1 << bits for bits in range(9)])
def test_one_bit_anywhere_fills_its_group_and_no_other(kernels, group):
    for bit in range(300):
        bitmap = Bitmap(300, kernels=kernels)
        bitmap.set(bit)
        bitmap.fill_groups(group)
        first = bit // group * group
        assert bitmap.runs().tolist() == [[first, min(first + group, 300)]]


@pytest.mark.parametrize("bits", range(13, 64))
def test_a_group_may_be_larger_than_the_bitmap(bits):
    bitmap = Bitmap(5000)
    bitmap.set(4999)
    bitmap.fill_groups(1 << bits)
    assert bitmap.count() == 5000


@pytest.mark.parametrize("group", [0, 3, 5, 6, 7, 63, 65, 96, 4095, ONES])
def test_groups_that_are_no_power_of_two_are_refused(group):
    bitmap = Bitmap(100)
    bitmap.set(50)
    with pytest.raises(ValueError, match="power of two"):
        bitmap.fill_groups(group)
    assert bitmap.count() == 1


# ---- the form on the wire --------------------------------------------------------------------


@QUICK
@given(bits=bit_lists(), past=st.booleans())
def test_the_wire_form_is_little_endian_words_and_comes_back(kernels, bits, past):
    data = make(bits, kernels, past).to_wire()
    assert data == oracle.wire(bits)
    assert len(data) % 8 == 0
    for form in (bytes, bytearray, memoryview, lambda b: np.frombuffer(b, dtype=np.uint8)):
        assert bits_of(Bitmap.from_wire(len(bits), form(data))) == bits


def test_the_wire_form_of_bitmaps_one_knows():
    bitmap = Bitmap(65)
    bitmap.set(0)
    bitmap.set(9)
    bitmap.set(64)
    assert bitmap.to_wire() == b"\x01\x02\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"
    assert Bitmap(0).to_wire() == b""


@pytest.mark.parametrize("length", [1, 63, 65, 100])
def test_padding_on_the_wire_is_ignored(length):
    nbytes = (length + 63) // 64 * 8
    bitmap = Bitmap.from_wire(length, b"\xff" * nbytes)
    assert bitmap.count() == length
    assert bitmap == Bitmap(length, fill=True)
    assert int(np.asarray(bitmap)[-1]) == ONES >> -length % 64


@pytest.mark.parametrize("length", LENGTHS)
def test_a_wire_form_of_another_length_is_refused(length):
    right = (length + 63) // 64 * 8
    for nbytes in {0, 1, right - 8, right - 1, right + 1, right + 8} - {right}:
        if nbytes >= 0:
            with pytest.raises(ValueError, match=f"{nbytes} bytes for {length} bits"):
                Bitmap.from_wire(length, bytes(nbytes))


# ---- concurrent users ------------------------------------------------------------------------


def run_threads(*calls: functools.partial[None]) -> None:
    failed = []

    def run(call: functools.partial[None]) -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_concurrent_set_atomic_and_drain_lose_no_bit(kernels):
    log, dirty = Bitmap(4096, kernels=kernels), Bitmap(4096, kernels=kernels)
    marked, drained = [0] * 4, []
    at_work = threading.Event()

    def mark(residue: int) -> None:
        for i in range(residue * 3, 4090, 12):
            marked[residue] += log.set_atomic(i, 3)
            at_work.set()

    def collect() -> None:
        at_work.wait()
        for _ in range(300):
            drained.append(dirty.drain(log))

    run_threads(functools.partial(collect), *(functools.partial(mark, r) for r in range(4)))
    drained.append(dirty.drain(log))
    wanted = {bit for r in range(4) for i in range(r * 3, 4090, 12) for bit in range(i, i + 3)}
    assert set(dirty.indexes().tolist()) == wanted
    assert sum(drained) == sum(marked) == len(wanted)
    assert log.count() == 0


def test_every_bit_is_set_and_cleared_by_exactly_one_of_many_threads(kernels):
    bitmap = Bitmap(3000, kernels=kernels)
    changed = []

    def change(operation: str, nbits: int) -> None:
        total = sum(
            getattr(bitmap, operation)(first, min(nbits, 3000 - first))
            for first in range(0, 3000, nbits)
        )
        changed.append(total)

    for operation, left in (("set_atomic", 3000), ("clear_atomic", 0)):
        changed.clear()
        run_threads(*(functools.partial(change, operation, n) for n in (1, 3, 63, 64, 65, 1000)))
        assert sum(changed) == 3000
        assert bitmap.count() == left


#: what several threads run at a time; a loop of calls from Python would hardly overlap
UNLOCKED = """
#include "mig.h"

uint64_t change(uint64_t *words, uint64_t nbits, uint64_t first, uint64_t step, uint64_t each,
                bool set)
{
    uint64_t changed = 0;

    for (uint64_t i = first; i < nbits; i += step) {
        uint64_t n = nbits - i < each ? nbits - i : each;

        changed += set ? mig_bitmap_set_atomic(words, i, n) : mig_bitmap_clear_atomic(words, i, n);
    }
    return changed;
}
"""


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C functions without the GIL, which keeps the methods of a Bitmap from overlapping."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    assert compiler, "neither gcc nor clang: apt-get install gcc"
    folder = tmp_path_factory.mktemp("unlocked")
    (folder / "unlocked.c").write_text(UNLOCKED)
    library = folder / "unlocked.so"
    flags = ["-shared", "-fPIC", "-O2", "-std=gnu11", "-D_GNU_SOURCE", f"-I{ROOT / 'csrc'}"]
    sources = [str(folder / "unlocked.c"), str(ROOT / "csrc/bitmap.c")]
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.change.argtypes = [ctypes.c_void_p, *[ctypes.c_uint64] * 4, ctypes.c_bool]
    loaded.change.restype = ctypes.c_uint64
    loaded.mig_bitmap_drain.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    loaded.mig_bitmap_drain.restype = ctypes.c_uint64
    return loaded


@pytest.mark.parametrize("each", [1, 5, 64, 100])
def test_nothing_is_lost_or_counted_twice_when_threads_really_overlap(unlocked, each):
    nbits = 64 * 5000 + 37
    words = np.asarray(Bitmap(nbits))
    changed = []

    def change(first: int, step: int, to: bool) -> None:
        address = words.ctypes.data
        changed.append(unlocked.change(address, nbits, first, step, each, to))

    for _ in range(5):
        for to in (True, False):
            # all of them do the same, and two halve the work
            changed.clear()
            run_threads(*(functools.partial(change, 0, each, to) for _ in range(3)))
            assert sum(changed) == nbits
            assert np.unpackbits(words.view(np.uint8)).sum() == nbits * to
        for to in (True, False):
            changed.clear()
            run_threads(*(functools.partial(change, i * each, 2 * each, to) for i in (0, 1)))
            assert sum(changed) == nbits
            assert np.unpackbits(words.view(np.uint8)).sum() == nbits * to


def test_a_drain_beside_writers_that_really_overlap_loses_nothing(unlocked):
    nbits = 64 * 5000
    source, into = np.asarray(Bitmap(nbits)), np.asarray(Bitmap(nbits))
    drained, marked = [], []

    def mark(first: int) -> None:
        marked.append(unlocked.change(source.ctypes.data, nbits, first, 3, 1, True))

    def collect() -> None:
        args = (into.ctypes.data, source.ctypes.data, nbits)
        drained.append(unlocked.mig_bitmap_drain(*args))

    def go_on() -> None:
        while len(marked) < 3:
            collect()

    for _ in range(10):
        drained.clear()
        marked.clear()
        into[:] = 0
        run_threads(functools.partial(go_on), *(functools.partial(mark, i) for i in range(3)))
        collect()
        assert sum(drained) == sum(marked) == nbits
        assert (into == ONES).all()
        assert not source.any()


# ---- ranges that cannot be -------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_ranges_past_the_end_are_refused(length):
    bitmap = Bitmap(length)
    for call in (
        *(bitmap.set, bitmap.clear, bitmap.count, bitmap.set_atomic, bitmap.clear_atomic),
    ):
        call(length, 0)
        for first, nbits in ((length, 1), (0, length + 1), (length + 1, 0), (1, ONES)):
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
    bitmap, out = Bitmap(64, fill=True), np.zeros(4, dtype=np.uint64)
    for call in (
        lambda: Bitmap(-1),
        lambda: bitmap[-1],
        lambda: bitmap.set(-1),
        lambda: bitmap.set(0, -1),
        lambda: bitmap.clear(-1),
        lambda: bitmap.count(-1),
        lambda: bitmap.count(0, -1),
        lambda: bitmap.next_set(-1),
        lambda: bitmap.next_clear(-1),
        lambda: bitmap.set_atomic(-1),
        lambda: bitmap.clear_atomic(0, -1),
        lambda: bitmap.take(-1, out),
        lambda: bitmap.indexes(-1),
        lambda: bitmap.indexes(0, -1),
        lambda: bitmap.runs(-1),
        lambda: bitmap.runs(0, -1),
        lambda: bitmap.runs(0, None, -1),
        lambda: bitmap.fill_groups(-1),
        lambda: Bitmap.from_wire(-1, b""),
    ):
        with pytest.raises((OverflowError, IndexError, ValueError)):
            call()
    assert bitmap.count() == 64


def test_a_bitmap_of_more_bits_than_there_are_addresses_is_refused():
    for nbits in (2**64 - 1, 2**64 - 63, 2**62):
        with pytest.raises((MemoryError, OverflowError, ValueError)):
            Bitmap(nbits)


# ---- the buffer ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("full", [False, True])
def test_numpy_sees_the_words_without_a_copy(length, full):
    bitmap = Bitmap(length, fill=full)
    words = np.asarray(bitmap)
    assert words.dtype == np.uint64
    assert words.shape == ((length + 63) // 64,)
    assert words.flags.writeable
    assert len(bitmap) == bitmap.nbits == length
    assert words.tolist() == oracle.words([full] * length)
    assert bitmap.count() == (length if full else 0)
    if length:
        words[0] ^= np.uint64(1)
        assert bitmap[0] != full
        bitmap.clear(0, length)
        assert not words.any()
        assert np.asarray(bitmap).ctypes.data == words.ctypes.data


def test_memoryview_says_what_the_words_are():
    view = memoryview(Bitmap(65, fill=True))
    assert (view.format, view.itemsize, view.ndim, view.shape) == ("Q", 8, 1, (2,))
    assert (view.nbytes, view.strides, view.contiguous) == (16, (8,), True)
    assert not view.readonly
    assert view.tolist() == [ONES, 1]
    assert bytes(view) == b"\xff" * 8 + b"\x01" + bytes(7)


def test_a_memoryview_writes_into_the_bitmap():
    bitmap = Bitmap(128)
    with memoryview(bitmap) as view:
        view[1] = 5
        assert view.cast("B")[8] == 5
    assert bitmap.indexes().tolist() == [64, 66]
    assert bytes(memoryview(Bitmap(0))) == b""


def test_the_words_outlive_the_name_of_the_bitmap():
    words = np.asarray(Bitmap(128, fill=True))
    assert int(words[0]) == int(words[1]) == ONES


def test_iterating_gives_the_bits():
    assert list(make([True, False, True])) == [True, False, True]
    assert list(Bitmap(0)) == []


def test_repr_says_how_many_bits_are_set(kernels):
    assert repr(Bitmap(100, fill=True, kernels=kernels)) == "<Bitmap of 100 bits, 100 set>"


# ---- the oracles for large bitmaps -----------------------------------------------------------


@QUICK
@given(bits=bit_lists(), group=st.sampled_from([1, 2, 64, 128]), budget=st.integers(0, 800))
def test_the_oracles_for_large_bitmaps_agree_with_those_for_small_ones(bits, group, budget):
    flags = np.array(bits, dtype=bool)
    runs = oracle.all_runs(flags)
    assert oracle.all_indexes(flags).tolist() == oracle.indexes(bits)
    assert runs.tolist() == oracle.runs(bits)
    assert oracle.cut_runs(runs, budget).tolist() == oracle.runs(bits, budget=budget)
    assert oracle.all_words(flags).tolist() == oracle.words(bits)
    filled = list(bits)
    oracle.fill_groups(filled, group)
    assert oracle.all_groups(flags, group).tolist() == filled


def test_a_bitmap_cannot_be_drained_into_itself():
    bitmap = Bitmap(10, fill=True)
    with pytest.raises(ValueError, match="itself"):
        bitmap.drain(bitmap)
    assert bitmap.count() == 10
