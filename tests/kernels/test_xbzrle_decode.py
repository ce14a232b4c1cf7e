"""XBZRLE decoder: every family against the oracle, on encodings and on what is none."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import xbzrle

from mig import _core
from mig.errors import KernelError, XbzrleError

GUARD = 0xA5
QUICK = settings(max_examples=150, deadline=None)
EDGES = [1, 2, 3, 4, 6, 7, 8, 15, 16, 17, 32, 33, 63, 64, 65, 66, 127, 128, 129, 300]

NOISE = np.random.default_rng(1).integers(0, 256, _core.MAX_XBZRLE_PAGE, dtype=np.uint8)


def usable() -> Iterable[_core.Kernels]:
    for name in _core.kernel_names():
        with contextlib.suppress(KernelError):
            yield _core.kernels(name)


@pytest.fixture(scope="module", params=list(usable()), ids=lambda kernels: kernels.name)
def family(request) -> _core.Kernels:
    return request.param


def reason(error: XbzrleError) -> str:
    """Which of the oracle's reasons a message gives."""
    return {
        "encoding ends within a run": xbzrle.TRUNCATED,
        "run of no bytes, or of a length that takes more than two bytes": xbzrle.LENGTH,
        "run goes past the end of the page": xbzrle.PAST_PAGE,
    }[str(error)]


def outcome(family: _core.Kernels, src: bytes, page: np.ndarray | bytearray) -> int | str:
    try:
        return _core.xbzrle_decode(src, page, kernels=family)
    except XbzrleError as error:
        return reason(error)


def expected_outcome(src: bytes, page: bytearray) -> int | str:
    try:
        return xbzrle.decode(src, page)
    except xbzrle.RefusedError as error:
        return str(error)


def check(family: _core.Kernels, src: bytes, nbytes: int, shift: int = 0) -> int | str:
    """The oracle's result and page; nothing around the page changes, whatever the result."""
    before = NOISE[:nbytes].tobytes()
    model = bytearray(before)
    expected = expected_outcome(src, model)
    array = np.full(nbytes + 256, GUARD, dtype=np.uint8)
    start = 64 + shift % 64
    page = array[start : start + nbytes]
    page[:] = NOISE[:nbytes]
    # the encoding is not aligned either
    behind = memoryview(b"\1" * (shift % 7) + src + b"\1" * 200)[shift % 7 :][: len(src)]
    label = (family.name, nbytes, src.hex())
    assert outcome(family, behind, page) == expected, label
    if isinstance(expected, int):
        assert page.tobytes() == model, label
    assert (array[:start] == GUARD).all(), label
    assert (array[start + nbytes :] == GUARD).all(), label
    return expected


def stream(runs: list[tuple[int, int]], seed: int = 0) -> bytes:
    """An encoding with these runs of unchanged and changed bytes."""
    rng = np.random.default_rng(seed)
    return b"".join(
        xbzrle.put_length(unchanged) + xbzrle.put_length(changed) + rng.bytes(changed)
        for unchanged, changed in runs
    )


# ---- what is an encoding -------------------------------------------------------------------------


@QUICK
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 600), st.sampled_from([0, 0.02, 0.2, 0.5, 0.8, 1])),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 1000),
)
def test_encodings_of_pages_of_any_density_come_back(family, parts, seed):
    rng = np.random.default_rng(seed)
    changed = np.concatenate([rng.random(nbytes) < density for nbytes, density in parts])
    old = NOISE[: len(changed)]
    new = np.where(changed, ~old, old)
    encoding = xbzrle.full_encoding(old.tobytes(), new.tobytes())
    page = old.copy()
    end = _core.xbzrle_decode(encoding, page, kernels=family)
    assert page.tobytes() == new.tobytes()
    assert end == (int(np.flatnonzero(changed)[-1]) + 1 if changed.any() else 0)
    check(family, encoding, len(old), seed)


@pytest.mark.parametrize("nbytes", [64, 1000, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("percent", [0.1, 2, 25, 50, 90])
def test_what_a_family_encodes_it_decodes(family, nbytes, percent):
    rng = np.random.default_rng(nbytes)
    old = NOISE[:nbytes]
    new = np.where(rng.random(nbytes) < percent / 100, ~old, old)
    out = np.empty(3 * nbytes, dtype=np.uint8)
    length = _core.xbzrle_encode(old, new, out, kernels=family)
    page = old.copy()
    _core.xbzrle_decode(out[:length], page, kernels=family)
    assert page.tobytes() == new.tobytes()


@QUICK
@given(
    runs=st.lists(
        st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)), min_size=1, max_size=40
    ),
    rest=st.sampled_from([0, 1, 63, 64, 65, 500]),
    seed=st.integers(0, 1000),
)
def test_runs_around_the_steps_of_the_loops(family, runs, rest, seed):
    src = stream(runs, seed)
    nbytes = sum(unchanged + changed for unchanged, changed in runs)
    assert check(family, src, nbytes + rest, seed) == nbytes


@pytest.mark.parametrize("changed", range(1, 131))
def test_runs_of_every_length_away_from_both_ends(family, changed):
    for unchanged in (1, 5, 63, 64, 65):
        src = stream([(0, 1)] + [(unchanged, changed)] * 20, changed)
        nbytes = 1 + 20 * (unchanged + changed)
        assert check(family, src, nbytes + 200, changed) == nbytes


@pytest.mark.parametrize("length", [127, 128, 255, 256, 4095, 4096, 16382, 16383])
def test_long_runs(family, length):
    for runs in ([(0, length)], [(length, 1)], [(length, length)], [(3, 2), (length, length)]):
        nbytes = sum(map(sum, runs))
        assert check(family, stream(runs), nbytes, length) == nbytes
        assert check(family, stream(runs), nbytes - 1, length) == xbzrle.PAST_PAGE


def test_a_page_of_65536_bytes_is_filled_to_its_end(family):
    assert check(family, stream([(0, 16383), (1, 16383), (1, 16383), (1, 16384 - 4)]), 65536)
    runs = [(1, 1)] * 32768
    assert check(family, stream(runs), 65536) == 65536
    assert check(family, stream([*runs, (1, 1)]), 65536) == xbzrle.PAST_PAGE


def test_an_empty_encoding_changes_nothing(family):
    for nbytes in (0, 1, 64, 65536):
        assert check(family, b"", nbytes) == 0


# ---- each rule -----------------------------------------------------------------------------------


def test_no_unchanged_bytes_only_at_the_start(family):
    for zero in (b"\x00", b"\x80\x00"):
        assert check(family, zero + b"\x01A", 64) == 1
        assert check(family, b"\x01\x01A" + zero + b"\x01B", 64) == xbzrle.LENGTH


def test_no_changed_bytes_never(family):
    for zero in (b"\x00\x00", b"\x80\x00"):
        assert check(family, b"\x01" + zero, 64) == xbzrle.LENGTH
        assert check(family, b"\x00" + zero, 64) == xbzrle.LENGTH
        assert check(family, b"\x01\x01A\x01" + zero, 64) == xbzrle.LENGTH


def test_lengths_may_take_a_byte_more_than_they_need(family):
    assert check(family, b"\x81\x00\x81\x00A", 64) == 2
    assert check(family, b"\x80\x00\x82\x00AB\xff\x00\x01C", 200) == 130


def test_lengths_of_three_bytes_are_refused(family):
    for second in (0x80, 0x81, 0xFF):
        for src in (
            bytes([0x81, second, 0, 1, 65]),
            bytes([0x01, 0x81, second, 0, 65]),
            bytes([0x01, 0x01, 65, 0xFF, second, 1, 1, 65]),
        ):
            assert check(family, src, 4096) == xbzrle.LENGTH


def test_an_encoding_that_ends_within_a_run_is_refused(family):
    whole = stream([(3, 5), (200, 200), (1, 1)])
    # length of the encoding up to each changed run's end, and where in the page that is
    complete = {0: 0, 2 + 5: 8, 7 + 4 + 200: 408}
    for nsrc in range(len(whole)):
        expected = complete.get(nsrc, xbzrle.TRUNCATED)
        assert check(family, whole[:nsrc], 4096, nsrc) == expected, nsrc


def test_an_unchanged_run_at_the_end_or_a_stray_byte_is_refused(family):
    for tail in (b"\x01", b"\x80", b"\x00", b"\x81\x00", b"\x05\x01"):
        assert check(family, b"\x01\x01A" + tail, 64) == xbzrle.TRUNCATED


def test_runs_past_the_page_are_refused(family):
    for nbytes in (0, 1, 10, 64, 127, 128, 4096):
        fits = stream([(0, nbytes - 1)]) if nbytes > 1 else b""
        start = max(nbytes - 1, 0)
        for runs in ([(nbytes - start + 1, 1)], [(1, nbytes - start)], [(1, 16383)]):
            assert check(family, fits + stream(runs), nbytes) == xbzrle.PAST_PAGE
    # the page's end is told before the encoding's
    assert check(family, b"\x01\x7fA", 64) == xbzrle.PAST_PAGE
    assert check(family, b"\x01\x7fA", 128) == xbzrle.TRUNCATED


@cache
def short_strings(nbytes: int) -> list[tuple[bytes, int | str, bytes]]:
    """Strings of up to five bytes, and what the oracle makes of them."""
    found = []
    for length in range(6):
        for values in itertools.product([0, 1, 2, 0x7F, 0x80, 0x81, 0xFF], repeat=length):
            page = bytearray(NOISE[:nbytes])
            found.append((bytes(values), expected_outcome(bytes(values), page), bytes(page)))
    return found


@pytest.mark.parametrize("nbytes", [0, 1, 2, 3, 127, 256])
def test_every_short_string_of_bytes_that_matter(family, nbytes):
    before = NOISE[:nbytes].tobytes()
    for src, expected, after in short_strings(nbytes):
        page = bytearray(before)
        assert outcome(family, src, page) == expected, src.hex()
        if isinstance(expected, int):
            assert page == after, src.hex()


@pytest.mark.parametrize("nbytes", [1000, 1004, 4096])
def test_every_short_string_behind_and_before_many_runs(family, nbytes):
    # 200 bytes of encoding on both sides: what is between them is away from both ends
    lead, tail = stream([(2, 3)] * 50), stream([(3, 4)] * 40)
    for length in range(4):
        for values in itertools.product(
            [0, 1, 2, 0x40, 0x41, 0x7F, 0x80, 0x81, 0xFF], repeat=length
        ):
            check(family, lead + bytes(values) + tail, nbytes)


# ---- garbage -------------------------------------------------------------------------------------


@QUICK
@given(src=st.binary(max_size=400), nbytes=st.sampled_from([0, 1, 64, 100, 1000, 65536]))
def test_garbage(family, src, nbytes):
    check(family, src, nbytes, len(src))


@QUICK
@given(
    values=st.lists(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 0x40, 0x80, 0x81]), max_size=400),
    nbytes=st.sampled_from([64, 300, 1000]),
)
def test_garbage_of_small_numbers(family, values, nbytes):
    check(family, bytes(values), nbytes, len(values))


@QUICK
@given(
    runs=st.lists(
        st.tuples(st.sampled_from(EDGES[:14]), st.sampled_from(EDGES[:14])),
        min_size=1,
        max_size=60,
    ),
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 70),
    less=st.integers(-70, 130),
)
def test_encodings_that_were_damaged(family, runs, changes, cut, less):
    src = bytearray(stream(runs, 1))
    for at, value in changes:
        src[at % len(src)] = value
    nbytes = sum(map(sum, runs)) - less
    check(family, bytes(src), max(nbytes, 0), less)
    check(family, bytes(src[: max(len(src) - cut, 0)]), max(nbytes, 0), cut)


@QUICK
@given(seed=st.integers(0, 10000), nbytes=st.sampled_from([500, 4096, 10000]))
def test_long_damaged_encodings(family, seed, nbytes):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, size=(nbytes // 40, 2))
    src = bytearray(stream(sizes.tolist(), seed))
    at = int(rng.integers(len(src)))
    src[at] = int(rng.choice([0, 1, 0x40, 0x41, 0x7F, 0x80, 0xFF]))
    check(family, bytes(src), nbytes, seed)


# ---- the buffers ---------------------------------------------------------------------------------


def test_bytes_of_no_changed_run_stay(family):
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 66, size=(60, 2)).tolist()
    page = NOISE[:4096].copy()
    _core.xbzrle_decode(stream(sizes), page, kernels=family)
    at = 0
    for unchanged, changed in sizes:
        assert (page[at : at + unchanged] == NOISE[at : at + unchanged]).all()
        at += unchanged + changed
    assert (page[at:] == NOISE[at:4096]).all()


@pytest.fixture
def fenced() -> Callable[[bytes], np.ndarray]:
    """Puts bytes right before memory whose use ends the process."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def place(data: bytes) -> np.ndarray:
        inside = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
        array = np.frombuffer(mmap.mmap(-1, inside + mmap.PAGESIZE), dtype=np.uint8)
        assert mprotect(array.ctypes.data + inside, mmap.PAGESIZE, 0) == 0
        array[inside - len(data) : inside] = np.frombuffer(data, dtype=np.uint8)
        return array[inside - len(data) : inside]

    return place


def test_nothing_behind_the_encoding_and_the_page_is_touched(family, fenced):
    for runs in (
        [(0, 1)],
        [(1, 1)] * 200,
        [(3, 17)] * 40,
        [(2, 60)] * 9,
        [(64, 64)] * 9,
        [(1, 65)] * 9,
        [(200, 300)] * 3,
    ):
        src = stream(runs)
        nbytes = sum(map(sum, runs))
        for cut in range(min(len(src), 140)):
            for less in (0, 1, 70):
                page = bytes(max(nbytes - less, 0))
                model = bytearray(page)
                expected = expected_outcome(src[: len(src) - cut], model)
                place = fenced(page)
                assert outcome(family, fenced(src[: len(src) - cut]), place) == expected
                if isinstance(expected, int):
                    assert place.tobytes() == model


def test_buffers_that_cannot_be_used_are_refused(family):
    with pytest.raises(BufferError):
        _core.xbzrle_decode(b"", bytes(64), kernels=family)
    with pytest.raises(ValueError, match="65536 at most"):
        _core.xbzrle_decode(b"", bytearray(65537), kernels=family)
    with pytest.raises(TypeError):
        _core.xbzrle_decode(None, bytearray(64), kernels=family)


# ---- pages after pages ---------------------------------------------------------------------------


@QUICK
@given(
    page_size=st.sampled_from([64, 128, 512]),
    kinds=st.lists(st.sampled_from(["same", "overflow", "sparse", "dense"]), max_size=20),
    more=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_decode_pages_lays_each_over_its_page(family, page_size, kinds, more, seed):
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 256, ((len(kinds) + more), page_size), dtype=np.uint8)
    expected = pages.copy()
    encodings, lengths = b"", []
    for i, kind in enumerate(kinds):
        if kind in ("same", "overflow"):
            lengths.append({"same": 0, "overflow": -1}[kind])
            continue
        changed = rng.random(page_size) < {"sparse": 0.02, "dense": 0.7}[kind]
        changed[0] = True
        expected[i] = np.where(changed, ~pages[i], pages[i])
        encoding = xbzrle.full_encoding(pages[i].tobytes(), expected[i].tobytes())
        lengths.append(len(encoding))
        encodings += encoding
    used = _core.xbzrle_decode_pages(
        encodings + b"more",
        np.array(lengths, dtype=np.int32),
        _core.Pages(pages, page_size, writable=True),
        kernels=family,
    )
    assert used == len(encodings)
    assert pages.tobytes() == expected.tobytes()


def test_decode_pages_stops_at_what_is_no_encoding(family):
    one = b"\x00\x01A"
    for encodings, lengths, why in [
        (one, [3, 3], xbzrle.TRUNCATED),
        (one + one[:2], [3, 3], xbzrle.TRUNCATED),
        (b"", [1], xbzrle.TRUNCATED),
        (one + b"\x00\x00A", [3, 3], xbzrle.LENGTH),
        (one + b"\x40\x01A", [3, 3], xbzrle.PAST_PAGE),
        (one, [2**31 - 1, -(2**31)], xbzrle.TRUNCATED),
    ]:
        array = np.full(5 * 64, GUARD, dtype=np.uint8)
        pages = _core.Pages(array[64:256], 64, writable=True)
        with pytest.raises(XbzrleError) as caught:
            _core.xbzrle_decode_pages(
                encodings, np.array(lengths, dtype=np.int32), pages, kernels=family
            )
        assert reason(caught.value) == why
        assert (array[:64] == GUARD).all()
        assert (array[128:] == GUARD).all()
        pages.release()  # nothing is still in use


def test_decode_pages_refuses_pages_that_do_not_fit(family):
    two = np.array([0, 0], dtype=np.int32)
    where = np.array([64, 64], dtype=np.int64)
    for pages in (
        _core.Pages(bytearray(64), 64, writable=True),
        _core.Pages(bytearray(128), 64),
        _core.Pages(bytearray(128), 64, where=where, writable=True),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            _core.xbzrle_decode_pages(b"", two, pages, kernels=family)
    with pytest.raises(ValueError, match="65536 at most"):
        _core.xbzrle_decode_pages(
            b"", two, _core.Pages(bytearray(1 << 18), 1 << 17, writable=True), kernels=family
        )
