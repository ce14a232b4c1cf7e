"""XBZRLE encoder: every family of kernels gives the oracle's bytes, which are QEMU's."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import xbzrle

from mig import _core
from mig.errors import KernelError

OVERFLOW = -1
GUARD = 0xA5
#: lengths at which a length takes another byte, a loop another step or a copy another form
EDGES = [1, 2, 6, 7, 8, 31, 32, 33, 38, 39, 63, 64, 65, 126, 127, 128, 129, 255, 256, 257]
LONG_EDGES = [4095, 4096, 4097, 8191, 16382, 16383, 16384]
QUICK = settings(max_examples=100, deadline=None)

RNG = np.random.default_rng(1)
NOISE = RNG.integers(0, 256, _core.MAX_XBZRLE_PAGE, dtype=np.uint8)
#: what changes a byte: never 0
CHANGE = RNG.integers(1, 256, _core.MAX_XBZRLE_PAGE, dtype=np.uint8)


def usable() -> Iterable[_core.Kernels]:
    for name in _core.kernel_names():
        with contextlib.suppress(KernelError):
            yield _core.kernels(name)


@pytest.fixture(scope="module", params=list(usable()), ids=lambda kernels: kernels.name)
def family(request) -> _core.Kernels:
    return request.param


def pair(changed: np.ndarray) -> tuple[bytes, bytes]:
    """Pages that differ exactly where `changed` says."""
    old = NOISE[: len(changed)]
    return old.tobytes(), np.where(changed, old ^ CHANGE[: len(changed)], old).tobytes()


def runs(lengths: list[int], *, changed: bool) -> np.ndarray:
    """Runs of unchanged and changed bytes in turn."""
    flags = [changed ^ bool(i % 2) for i in range(len(lengths))]
    return np.repeat(np.array(flags, dtype=bool), lengths)[: _core.MAX_XBZRLE_PAGE]


def limits(old: bytes, new: bytes) -> set[int]:
    """Room for an encoding: around its length, and around the page's."""
    full = xbzrle.full_encoding(old, new)
    length = len(new) if full is None else len(full)
    near = {length + i for i in range(-3, 4)} | {0, 1, 2, length // 2, len(new), len(new) + 100}
    return {n for n in near if n >= 0}


class Buffers:
    """Pages and output at any alignment, with bytes around them that must not change."""

    def __init__(self) -> None:
        size = 2 * _core.MAX_XBZRLE_PAGE
        self._arrays = [np.full(size, GUARD, dtype=np.uint8) for _ in range(3)]

    def check(self, family: _core.Kernels, old: bytes, new: bytes, room: int, shift: int) -> None:
        expected = xbzrle.encode(old, new, room)
        for call in (_core.xbzrle_encode, _core.xbzrle_update):
            label = (family.name, call.__name__, len(old), room, shift)
            # not the same alignment for any two of them
            starts = [64 + shift % 64, 64 + shift * 7 % 61, 64 + shift * 5 % 59]
            views = []
            for array, start, nbytes in zip(
                self._arrays, starts, (len(old), len(new), room), strict=True
            ):
                array[: start + nbytes + 128] = GUARD
                views.append(array[start : start + nbytes])
            a, b, out = views
            a[:] = np.frombuffer(old, dtype=np.uint8)
            b[:] = np.frombuffer(new, dtype=np.uint8)
            length = call(a, b, out, kernels=family)
            if expected is None:
                assert length == OVERFLOW, label
            else:
                assert out[: max(length, 0)].tobytes() == expected, label
                assert length == len(expected), label
            assert b.tobytes() == new, label
            assert a.tobytes() == (new if call is _core.xbzrle_update else old), label
            for array, start, view in zip(self._arrays, starts, views, strict=True):
                end = start + len(view)
                assert (array[:start] == GUARD).all(), label
                assert (array[end : end + 128] == GUARD).all(), label


BUFFERS = Buffers()


@cache
def sixteen_byte_pages(lead: int, page_size: int) -> tuple[np.ndarray, bytes, list[int]]:
    """Pages of zeros with each of the 65536 patterns of 16 bytes at `lead`; their encodings."""
    patterns = np.arange(1 << 16, dtype=np.uint32)[:, None] >> np.arange(16, dtype=np.uint32) & 1
    new = np.zeros((1 << 16, page_size), dtype=np.uint8)
    new[:, lead : lead + 16] = patterns * np.arange(1, 17)
    old = bytes(page_size)
    encodings = [xbzrle.encode(old, page.tobytes(), page_size) for page in new]
    lengths = [OVERFLOW if e is None else len(e) for e in encodings]
    return new, b"".join(e or b"" for e in encodings), lengths


@pytest.mark.parametrize(("lead", "page_size"), [(0, 64), (24, 64), (48, 64), (120, 256)])
def test_every_pattern_of_sixteen_bytes_within_a_page(family, lead, page_size):
    new, expected, lengths = sixteen_byte_pages(lead, page_size)
    old = np.zeros_like(new)
    out = np.empty(new.size, dtype=np.uint8)
    found = np.empty(len(new), dtype=np.int32)
    done, used = _core.xbzrle_encode_pages(
        _core.Pages(old, page_size), _core.Pages(new, page_size), out, found, kernels=family
    )
    assert done == len(new)
    assert found.tolist() == lengths
    assert out[:used].tobytes() == expected


@cache
def every_page_of_sixteen_bytes(room: int) -> list[bytes | None]:
    pages, _, _ = sixteen_byte_pages(0, 64)
    return [xbzrle.encode(bytes(16), page[:16].tobytes(), room) for page in pages]


@pytest.mark.parametrize("room", [9, 16, 24])
def test_every_page_of_sixteen_bytes(family, room):
    pages, _, _ = sixteen_byte_pages(0, 64)
    old, out = bytes(16), bytearray(room)
    for page, expected in zip(pages, every_page_of_sixteen_bytes(room), strict=True):
        new = page[:16].tobytes()
        length = _core.xbzrle_encode(old, new, out, kernels=family)
        found = None if length == OVERFLOW else bytes(out[:length])
        assert found == expected, (new.hex(), room)


def test_every_page_of_sixteen_bytes_becomes_the_old_one(family):
    pages, _, _ = sixteen_byte_pages(0, 64)
    out = bytearray(16)
    for page, expected in zip(pages, every_page_of_sixteen_bytes(16), strict=True):
        old, new = bytearray(16), page[:16].tobytes()
        length = _core.xbzrle_update(old, new, out, kernels=family)
        assert (None if length == OVERFLOW else bytes(out[:length])) == expected, new.hex()
        assert old == new


def test_every_room_for_every_pattern_of_eight_bytes(family):
    for bits in range(256):
        old, new = pair(np.array([bits >> i & 1 for i in range(8)], dtype=bool))
        full = xbzrle.full_encoding(old, new)
        for room in range(20):
            out = bytearray(room)
            length = _core.xbzrle_encode(old, new, out, kernels=family)
            overflows = len(full) > room or (old[-1] == new[-1] and len(full) + 2 > room)
            assert length == (OVERFLOW if overflows else len(full)), (bits, room)


@pytest.mark.parametrize("nbytes", [1, 2, 15, 16, 17, 63, 64, 65, 128, 200])
def test_every_room_for_small_pages(family, nbytes):
    rng = np.random.default_rng(nbytes)
    for density in (0.02, 0.1, 0.5, 0.9, 1):
        changed = rng.random(nbytes) < density
        for last in (False, True):
            changed[-1] = last
            old, new = pair(changed)
            for room in range(len(xbzrle.full_encoding(old, new)) + 4):
                BUFFERS.check(family, old, new, room, room)


@pytest.mark.parametrize("lengths", [range(i, i + 76) for i in range(1, 302, 76)])
def test_every_length_of_a_page(family, lengths):
    for nbytes in lengths:
        rng = np.random.default_rng(nbytes)
        for density in (0, 0.03, 0.3, 1):
            old, new = pair(rng.random(nbytes) < density)
            length = len(xbzrle.full_encoding(old, new))
            for room in {length + nbytes % 4 - 2, length + 2, length + 200}:
                BUFFERS.check(family, old, new, max(room, 0), nbytes)


@pytest.mark.parametrize("nbytes", [512, 1000, 4096, 8192, 16384, 65535, 65536])
def test_large_pages_of_every_density(family, nbytes):
    rng = np.random.default_rng(nbytes)
    for percent in (0, 0.01, 0.1, 1, 3, 10, 25, 40, 50, 60, 75, 90, 97, 99, 99.9, 100):
        changed = rng.random(nbytes) < percent / 100
        old, new = pair(changed)
        for room in limits(old, new) if nbytes <= 8192 else (nbytes, 2 * nbytes - 200):
            BUFFERS.check(family, old, new, room, round(percent * 10))


@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 8, 16, 31, 64, 65])
def test_pages_that_alternate(family, period):
    for first in range(min(period, 4)):
        for width in {1, period // 2, period - 1}:
            changed = np.arange(4096) % period - first
            old, new = pair((changed >= 0) & (changed < width))
            for room in limits(old, new):
                BUFFERS.check(family, old, new, room, period)


@pytest.mark.parametrize("nbytes", [64, 100, 256, 320, 4096, 4160])
def test_one_run_at_the_start_or_the_end_of_a_page(family, nbytes):
    for length in [n for n in (*EDGES, 4095, 4096) if n <= nbytes]:
        for start in {0, 1, nbytes - length - 1, nbytes - length}:
            if start >= 0:
                changed = np.zeros(nbytes, dtype=bool)
                changed[start : start + length] = True
                old, new = pair(changed)
                for room in limits(old, new):
                    BUFFERS.check(family, old, new, room, length)


def test_one_changed_byte_at_every_place_of_a_page(family):
    old = bytes(4096)
    new = bytearray(old)
    out = bytearray(16)
    for at in range(4096):
        new[at] = 7
        expected = xbzrle.put_length(at) + b"\x01\x07"
        length = _core.xbzrle_encode(old, new, out, kernels=family)
        assert bytes(out[:length]) == expected, at
        new[at] = 0


def test_one_unchanged_byte_at_every_place_of_a_page(family):
    old = bytes(512)
    new = bytearray(b"\7" * 512)
    for at in range(512):
        new[at] = 0
        BUFFERS.check(family, old, bytes(new), 520, at)
        new[at] = 7


SHORT = st.lists(st.sampled_from(EDGES) | st.integers(1, 5), min_size=1, max_size=60)
LONG = st.lists(st.sampled_from(EDGES + LONG_EDGES), min_size=1, max_size=12)


@QUICK
@given(lengths=SHORT | LONG, changed=st.booleans(), shift=st.integers(0, 63))
def test_pages_of_runs_around_the_steps_of_the_loops(family, lengths, changed, shift):
    old, new = pair(runs(lengths, changed=changed))
    for room in limits(old, new):
        BUFFERS.check(family, old, new, room, shift)


@QUICK
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 600), st.sampled_from([0, 0.02, 0.2, 0.5, 0.8, 0.98, 1])),
        min_size=1,
        max_size=15,
    ),
    seed=st.integers(0, 1000),
)
def test_pages_whose_density_varies(family, parts, seed):
    rng = np.random.default_rng(seed)
    changed = np.concatenate([rng.random(nbytes) < density for nbytes, density in parts])
    old, new = pair(changed)
    for room in limits(old, new):
        BUFFERS.check(family, old, new, room, seed)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("length", [16383, 16384, 20000])
def test_a_run_longer_than_the_format_can_say_overflows(family, changed, length):
    for before in (1, 64, 5000):
        for after in (0, 1, 500):
            tail = [after, 1] if after else []
            old, new = pair(runs([before, length, *tail], changed=not changed))
            # unchanged bytes at the end are not sent: no length has to say how many
            too_long = length > 16383 and (changed or after > 0)
            assert (xbzrle.full_encoding(old, new) is None) == too_long
            BUFFERS.check(family, old, new, 65536, length % 64)


def test_a_page_that_is_all_different(family):
    for nbytes in (16382, 16383, 16384, 65536):
        old, new = pair(np.ones(nbytes, dtype=bool))
        BUFFERS.check(family, old, new, nbytes + 8, 1)
        assert (xbzrle.encode(old, new, nbytes + 8) is None) == (nbytes > 16383)


@pytest.mark.parametrize("nbytes", [1, 7, 64, 100, 4096, 65536])
def test_equal_pages_need_room_for_two_bytes_that_are_not_used(family, nbytes):
    page = NOISE[:nbytes].tobytes()
    for room, expected in [(0, OVERFLOW), (1, OVERFLOW), (2, 0), (nbytes + 2, 0)]:
        assert _core.xbzrle_encode(page, page, bytearray(room), kernels=family) == expected
        old = bytearray(page)
        assert _core.xbzrle_update(old, page, bytearray(room), kernels=family) == expected
        assert old == page


@pytest.mark.parametrize("room", [0, 1, 64])
def test_pages_of_no_bytes_are_equal(family, room):
    assert _core.xbzrle_encode(b"", b"", bytearray(room), kernels=family) == 0
    assert _core.xbzrle_update(bytearray(), b"", bytearray(room), kernels=family) == 0


@pytest.mark.parametrize("call", [_core.xbzrle_encode, _core.xbzrle_update])
def test_pages_that_do_not_fit_are_refused(family, call):
    with pytest.raises(ValueError, match="pages of 64 and 65 bytes"):
        call(bytearray(64), bytes(65), bytearray(64), kernels=family)
    with pytest.raises(ValueError, match="65536 at most"):
        call(bytearray(65537), bytes(65537), bytearray(64), kernels=family)
    with pytest.raises(BufferError):
        call(bytearray(64), bytes(64), bytes(64), kernels=family)
    with pytest.raises(TypeError):
        call(bytearray(64), None, bytearray(64), kernels=family)


def test_update_refuses_an_old_page_that_cannot_be_written(family):
    with pytest.raises(BufferError):
        _core.xbzrle_update(bytes(64), bytes(64), bytearray(64), kernels=family)


@pytest.fixture
def fenced() -> Iterable[Callable[[bytes], np.ndarray]]:
    """Puts bytes right before memory whose use ends the process."""
    mappings = []
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def place(data: bytes) -> np.ndarray:
        inside = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
        mapping = mmap.mmap(-1, inside + mmap.PAGESIZE)
        array = np.frombuffer(mapping, dtype=np.uint8)
        assert mprotect(array.ctypes.data + inside, mmap.PAGESIZE, 0) == 0
        mappings.append(mapping)
        array[inside - len(data) : inside] = np.frombuffer(data, dtype=np.uint8)
        return array[inside - len(data) : inside]

    return place


def test_nothing_behind_the_pages_and_the_output_is_touched(family, fenced):
    for nbytes in (1, 5, 8, 17, 63, 64, 65, 130, 300, 1000, 4096):
        rng = np.random.default_rng(nbytes)
        for density in (0, 0.05, 0.4, 1):
            changed = rng.random(nbytes) < density
            changed[-1] = nbytes % 2
            old, new = pair(changed)
            for room in {nbytes, len(xbzrle.full_encoding(old, new))}:
                out = fenced(bytes(room))
                expected = xbzrle.encode(old, new, room)
                length = OVERFLOW if expected is None else len(expected)
                a, b = fenced(old), fenced(new)
                assert _core.xbzrle_encode(a, b, out, kernels=family) == length
                assert _core.xbzrle_update(a, b, out, kernels=family) == length
                assert a.tobytes() == new


# ---- pages after pages ---------------------------------------------------------------------------


@QUICK
@given(
    page_size=st.sampled_from([64, 128, 256, 4096]),
    densities=st.lists(st.sampled_from([0, 0.02, 0.2, 0.5, 1]), min_size=1, max_size=20),
    room=st.integers(0, 21),
    rest=st.integers(0, 63),
    seed=st.integers(0, 1000),
)
def test_encode_pages_does_what_fits(family, page_size, densities, room, rest, seed):
    rng = np.random.default_rng(seed)
    changed = np.concatenate([rng.random(page_size) < density for density in densities])
    old = rng.integers(0, 256, len(changed), dtype=np.uint8)
    new = np.where(changed, old + 1, old).astype(np.uint8)
    array = np.full(room * page_size + rest + 64, GUARD, dtype=np.uint8)
    out = array[: room * page_size + rest]
    lengths = np.full(len(densities) + 1, 12345, dtype=np.int32)
    found = _core.xbzrle_encode_pages(
        _core.Pages(old, page_size), _core.Pages(new, page_size), out, lengths, kernels=family
    )
    expected = bytearray()
    done = 0
    while done < len(densities) and len(out) - len(expected) >= page_size:
        page = slice(done * page_size, (done + 1) * page_size)
        encoding = xbzrle.encode(old[page].tobytes(), new[page].tobytes(), page_size)
        assert lengths[done] == (OVERFLOW if encoding is None else len(encoding))
        expected += encoding or b""
        done += 1
    assert found == (done, len(expected))
    assert array[: len(expected)].tobytes() == expected
    assert (lengths[done:] == 12345).all()
    assert (array[len(out) :] == GUARD).all()


def test_encode_pages_fills_its_output_to_the_last_byte(family):
    changed = np.zeros(256, dtype=bool)
    changed[2:] = True
    changed[64] = False  # a page's encoding of 62 bytes and two of its own: as long as the page
    old, new = pair(changed)
    first = xbzrle.encode(old[:64], new[:64], 64)
    assert len(first) == 64
    lengths = np.zeros(4, dtype=np.int32)
    out = np.zeros(64, dtype=np.uint8)
    assert _core.xbzrle_encode_pages(
        _core.Pages(old, 64), _core.Pages(new, 64), out, lengths, kernels=family
    ) == (1, 64)
    assert out.tobytes() == first


def test_encode_pages_refuses_pages_that_do_not_fit_each_other(family):
    two, three, large = (
        _core.Pages(bytes(nbytes), size) for nbytes, size in [(128, 64), (192, 64), (256, 128)]
    )
    out, lengths = np.zeros(1000, dtype=np.uint8), np.zeros(2, dtype=np.int32)
    placed = _core.Pages(bytes(256), 64, where=np.array([64, 128], dtype=np.int64))
    for old, new, sizes in [
        (two, three, lengths),
        (two, large, lengths),
        (two, two, lengths[:1]),
        (two, placed, lengths),
        (placed, two, lengths),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            _core.xbzrle_encode_pages(old, new, out, sizes, kernels=family)
    huge = _core.Pages(bytes(1 << 17), 1 << 17)
    with pytest.raises(ValueError, match="65536 at most"):
        _core.xbzrle_encode_pages(huge, huge, out, lengths, kernels=family)


# ---- a guest that goes on writing ----------------------------------------------------------------

#: Writes parts of a file that is mapped, again and again, until standard input ends.
WRITER = """
import mmap, random, select, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
rng = random.Random(1)
noise = rng.randbytes(1 << 16)
print(flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(200):
        nbytes = rng.choice([1, 3, 8, 30, 64, 500, 3000])
        at = rng.randrange(len(memory) - nbytes)
        start = rng.randrange(len(noise) - nbytes)
        memory[at : at + nbytes] = noise[start : start + nbytes]
"""


@pytest.fixture
def written_memory(tmp_path) -> Iterable[np.ndarray]:
    """64 KiB that another process writes all the time."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(1 << 16))
    with (
        path.open("r+b") as file,
        subprocess.Popen(
            [sys.executable, "-P", "-c", WRITER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as writer,
    ):
        writer.stdout.readline()
        yield np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        writer.stdin.close()
        assert writer.wait() == 0


@pytest.mark.parametrize("nbytes", [100, 4096, 65536])
def test_what_update_encodes_is_what_it_stores_while_the_page_is_written(
    family, written_memory, nbytes
):
    old, replica, out = bytearray(nbytes), bytearray(nbytes), bytearray(nbytes)
    new = written_memory[1000 : 1000 + nbytes] if nbytes < 65536 else written_memory
    encoded = 0
    while encoded < 500:
        length = _core.xbzrle_update(old, new, out, kernels=family)
        if length == OVERFLOW:
            replica[:] = old
        elif length:
            _core.xbzrle_decode(memoryview(out)[:length], replica)
            encoded += 1
        assert replica == old
