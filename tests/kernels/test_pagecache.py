"""The XBZRLE page cache: against its model, and with a guest that writes meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from reference import pagecache

from mig import _core, xbzrle
from mig.errors import KernelError

MIB = 1 << 20
QUICK = settings(max_examples=80, deadline=None)


def usable() -> Iterable[_core.Kernels]:
    for name in _core.kernel_names():
        with contextlib.suppress(KernelError):
            yield _core.kernels(name)


@pytest.fixture(scope="module", params=list(usable()), ids=lambda kernels: kernels.name)
def family(request) -> _core.Kernels:
    return request.param


def numbers(*index: int) -> np.ndarray:
    return np.array(index, dtype=np.uint64)


def room(nbytes: int) -> np.ndarray:
    return np.empty(nbytes, dtype=np.uint8)


# ---- against the model ---------------------------------------------------------------------------

PAGE = 64
#: pages that are equal, near to each other and all different
PAGES = [
    bytes(PAGE),
    bytes(PAGE - 1) + b"\1",
    bytes(30) + b"abc" + bytes(PAGE - 33),
    b"ab" * (PAGE // 2),
    b"\0b" * (PAGE // 2),
    bytes(range(1, PAGE + 1)),
    b"\xff" * PAGE,
]
#: more pages than slots, near 0 and in another block far away
FAR = (1 << 40) + 3 * PAGE
NUMBERS = st.integers(0, 19)
BLOCKS = st.sampled_from([0, 2 * PAGE, FAR])


class CacheMachine(RuleBasedStateMachine):
    kernels: _core.Kernels

    def __init__(self) -> None:
        super().__init__()
        self.cache = _core.XbzrleCache(8 * PAGE, PAGE, kernels=self.kernels)
        self.model = pagecache.PageCache(8, PAGE)
        self.generation = 0
        self.memory = bytearray(20 * PAGE)

    def pages(self) -> list[bytes]:
        return [bytes(self.memory[at : at + PAGE]) for at in range(0, len(self.memory), PAGE)]

    @rule(number=NUMBERS, page=st.sampled_from(PAGES))
    def write(self, number, page):
        self.memory[number * PAGE : (number + 1) * PAGE] = page

    @rule(number=NUMBERS, at=st.integers(0, PAGE - 1), data=st.binary(min_size=1, max_size=9))
    def write_a_part(self, number, at, data):
        data = data[: PAGE - at]
        self.memory[number * PAGE + at : number * PAGE + at + len(data)] = data

    @rule()
    def sync(self):
        self.generation += 1

    @rule(block=BLOCKS, number=NUMBERS)
    def lookup(self, block, number):
        address = block + number * PAGE
        assert self.cache.lookup(address, self.generation) == self.model.lookup(
            address, self.generation
        )

    @rule(block=BLOCKS, number=NUMBERS, page=st.sampled_from([None, *PAGES]))
    def insert(self, block, number, page):
        address = block + number * PAGE
        assert self.cache.insert(address, page, self.generation) == self.model.insert(
            address, page, self.generation
        )

    @rule(block=BLOCKS, index=st.lists(NUMBERS, max_size=8))
    def insert_pages(self, block, index):
        assert self.cache.insert_pages(
            self.memory, index, self.generation, address=block
        ) == self.model.insert_pages(self.pages(), index, self.generation, block)

    @rule(
        block=BLOCKS,
        index=st.lists(NUMBERS, max_size=12),
        last_stage=st.booleans(),
        nbytes=st.integers(PAGE, 6 * PAGE),
    )
    def encode(self, block, index, last_stage, nbytes):
        out = np.full(nbytes + 64, 0xA5, dtype=np.uint8)
        results, used = self.cache.encode(
            self.memory,
            index,
            self.generation,
            out[:nbytes],
            address=block,
            last_stage=last_stage,
        )
        expected, encodings = self.model.encode(
            self.pages(), index, self.generation, nbytes, address=block, last_stage=last_stage
        )
        assert results.dtype == np.int32
        assert results.tolist() == expected
        assert out[:used].tobytes() == encodings
        assert (out[nbytes:] == 0xA5).all()

    @rule(npages=st.sampled_from([1, 2, 4, 8, 16, 64]))
    def resize(self, npages):
        self.cache.resize(npages * PAGE)
        self.model.resize(npages)

    @rule(nbytes=st.sampled_from([-1, 0, PAGE - 1, 3 * PAGE, 7 * PAGE]))
    def resize_to_what_cannot_be(self, nbytes):
        with pytest.raises(ValueError, match="cache"):
            self.cache.resize(nbytes)

    @rule()
    def resize_to_more_than_there_is(self):
        with pytest.raises(MemoryError):
            self.cache.resize(1 << 60)

    @invariant()
    def the_same_pages_are_in_it(self):
        for block in (0, 2 * PAGE, FAR):
            for number in range(20):
                address = block + number * PAGE
                assert self.cache.page(address) == self.model.page(address), hex(address)

    @invariant()
    def the_counters_agree(self):
        cache = self.cache
        assert (
            cache.hits,
            cache.misses,
            cache.overflows,
            cache.unchanged,
            cache.encoded_pages,
            cache.encoded_bytes,
            cache.used,
        ) == self.model.counters()
        assert (cache.npages, cache.nbytes) == (self.model.npages, self.model.npages * PAGE)


def test_any_sequence_of_calls_agrees_with_the_model(family):
    machine = type("FamilyMachine", (CacheMachine,), {"kernels": family})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


@QUICK
@given(
    page_bits=st.integers(6, 16),
    slots=st.sampled_from([1, 2, 16, 64]),
    parts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_pages_of_every_size_agree_with_the_model(family, page_bits, slots, parts, seed):
    # 64 slots of 65536 bytes and 16 of the larger pages are more than 1 MiB, the others less
    page_size = 1 << page_bits
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, 6 * page_size, dtype=np.uint8)
    cache = _core.XbzrleCache(slots * page_size, page_size, kernels=family)
    model = pagecache.PageCache(slots, page_size)
    for generation, (number, percent) in enumerate(parts):
        page = memory[number * page_size : (number + 1) * page_size]
        page[rng.random(page_size) < percent / 400] += 1
        pages = [memory[i * page_size : (i + 1) * page_size].tobytes() for i in range(6)]
        out = room(4 * page_size)
        results, used = cache.encode(memory, range(6), generation, out)
        expected, encodings = model.encode(
            pages, range(6), generation, len(out), address=0, last_stage=False
        )
        assert results.tolist() == expected
        assert out[:used].tobytes() == encodings
        for i in range(6):
            assert cache.page(i * page_size) == model.page(i * page_size)


@pytest.mark.parametrize("age", [0, 1, 5, 1 << 40])
def test_a_page_keeps_its_slot_for_two_generations(age):
    for generation in range(max(age - 3, 0), age + 4):
        cache = _core.XbzrleCache(4 * 64, 64)
        assert cache.insert(0, b"a" * 64, age)
        kept = age + 2 > generation
        assert cache.insert(4 * 64, b"b" * 64, generation) == (not kept)
        assert (cache.page(0) is not None) == kept
        assert (cache.page(4 * 64) is not None) == (not kept)
        assert cache.used == 1


def test_its_own_slot_is_never_refused_to_a_page():
    cache = _core.XbzrleCache(64, 64)
    for page, generation in [(b"a", 9), (b"b", 9), (b"c", 0)]:
        assert cache.insert(64, page * 64, generation)
        assert cache.page(64) == page * 64


def test_a_lookup_is_a_use_and_a_copy_is_none():
    cache = _core.XbzrleCache(64, 64)
    cache.insert(0, None, 0)
    cache.page(0)
    assert not cache.lookup(64, 7)
    assert cache.lookup(0, 5)
    assert not cache.insert(64, None, 6)
    assert cache.page(0) is not None
    assert cache.insert(64, None, 7)


def test_pages_far_apart_are_told_by_their_whole_address():
    cache = _core.XbzrleCache(64 * 64, 64)
    last = (1 << 64) - 64
    cache.insert(last, b"z" * 64, 0)
    assert cache.page(last) == b"z" * 64
    for address in (63 * 64, last - 64 * 64, (1 << 63) - 64):
        assert cache.page(address) is None
        assert not cache.lookup(address, 0)
    assert not cache.lookup(0, 0)


@pytest.mark.parametrize("nbytes", [MIB // 2, MIB, 2 * MIB, 8 * MIB])
@pytest.mark.parametrize("page_size", [64, 4096, 65536])
def test_pages_of_caches_small_and_large_come_back(nbytes, page_size):
    cache = _core.XbzrleCache(nbytes, page_size)
    rng = np.random.default_rng(nbytes)
    # not aligned
    memory = rng.integers(0, 256, 40 * page_size + 3, dtype=np.uint8)[3:]
    index = rng.permutation(40)[: min(cache.npages, 30)]
    base = cache.npages // 2 * page_size
    assert cache.insert_pages(memory, index, 0, address=base) == len(
        {i % cache.npages for i in index.tolist()}
    )
    kept = 0
    for i in range(40):
        page = cache.page(base + i * page_size)
        if page is not None:
            assert page == memory[i * page_size : (i + 1) * page_size].tobytes()
            kept += 1
    assert kept == cache.used
    assert cache.insert(base, None, 2)
    assert cache.page(base) == bytes(page_size)


# ---- what a sender does --------------------------------------------------------------------------


def test_a_page_is_missed_then_unchanged_then_encoded_then_overflows(family):
    cache = _core.XbzrleCache(16 * 4096, kernels=family)
    memory = np.zeros(4096, dtype=np.uint8)
    out = room(4096)

    def encode() -> tuple[list[int], int]:
        results, used = cache.encode(memory, [0], 1, out, address=1 << 30)
        return results.tolist(), used

    assert encode() == ([_core.CACHE_MISS], 0)
    assert encode() == ([0], 0)
    memory[100] = 7
    assert encode() == ([3], 3)
    assert out[:3].tobytes() == b"\x64\x01\x07"
    memory[::2] += 1
    assert encode() == ([_core.CACHE_OVERFLOW], 0)
    assert encode() == ([0], 0)
    assert cache.page(1 << 30) == memory.tobytes()
    assert (cache.hits, cache.misses, cache.unchanged) == (4, 1, 2)
    assert (cache.overflows, cache.encoded_pages, cache.encoded_bytes) == (1, 1, 3)


def test_the_last_stage_leaves_the_cache_alone(family):
    cache = _core.XbzrleCache(2 * 64, 64, kernels=family)
    memory = bytearray(3 * 64)
    cache.insert_pages(memory, [0], 0)
    memory[5] = 1
    memory[70] = 1
    for _ in range(2):
        out = room(256)
        results, used = cache.encode(memory, [0, 1, 2], 1, out, last_stage=True)
        # page 1 has an empty slot, page 2 one that another keeps
        assert results.tolist() == [3, _core.CACHE_REFUSED, _core.CACHE_REFUSED]
        assert out[:used].tobytes() == b"\x05\x01\x01"
        assert cache.page(0) == bytes(64)
        assert cache.page(64) is cache.page(128) is None
        assert cache.used == 1
    memory[:64] = b"\1" * 64
    results, _ = cache.encode(memory, [0], 1, room(64), last_stage=True)
    assert results.tolist() == [_core.CACHE_OVERFLOW]
    assert cache.page(0) == bytes(64)


def test_the_last_stage_does_not_replace_an_old_page(family):
    cache = _core.XbzrleCache(64, 64, kernels=family)
    cache.insert(0, b"a" * 64, 0)
    results, _ = cache.encode(bytes(128), [1], 50, room(64), last_stage=True)
    assert results.tolist() == [_core.CACHE_REFUSED]
    assert cache.page(0) == b"a" * 64


def test_a_page_given_twice_is_unchanged_the_second_time(family):
    cache = _core.XbzrleCache(4 * 64, 64, kernels=family)
    results, _ = cache.encode(bytes(128), [1, 1, 0, 1], 0, room(64))
    assert results.tolist() == [_core.CACHE_MISS, 0, _core.CACHE_MISS, 0]


@pytest.mark.parametrize("pages_of_room", [1, 2, 5])
def test_what_does_not_fit_can_be_continued(family, pages_of_room):
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, 40 * 256, dtype=np.uint8)
    replica = memory.copy()
    cache = _core.XbzrleCache(64 * 256, 256, kernels=family)
    cache.insert_pages(memory, range(40), 0)
    memory[rng.random(len(memory)) < 0.1] += 1
    index = rng.permutation(40)
    done = calls = 0
    while done < len(index):
        out = room(pages_of_room * 256)
        results, used = cache.encode(memory, index[done:], 1, out)
        assert len(results) >= 1
        assert done + len(results) == 40 or len(out) - used < 256
        # those that were not done are still as they were
        for i in index[done + len(results) :]:
            assert cache.page(int(i) * 256) == replica[i * 256 : (i + 1) * 256].tobytes()
        at = 0
        for i, length in zip(index[done:].tolist(), results.tolist(), strict=False):
            if length > 0:
                xbzrle.decode(out[at : at + length], replica[i * 256 : (i + 1) * 256])
                at += length
        assert at == used
        done += len(results)
        calls += 1
    assert replica.tobytes() == memory.tobytes()
    assert calls > 1


def test_no_pages_are_no_results(family):
    cache = _core.XbzrleCache(64, 64, kernels=family)
    results, used = cache.encode(bytes(64), [], 0, room(64))
    assert (results.tolist(), used) == ([], 0)
    assert cache.insert_pages(bytes(64), [], 0) == 0
    assert cache.insert_pages(b"", [], 0) == 0


def test_pages_of_a_file_are_inserted_from_where_they_are():
    cache = _core.XbzrleCache(4 * 64, 64)
    where = np.array([_core.PAGE_ZERO, 70, _core.PAGE_NONE], dtype=np.int64)
    pages = _core.Pages(b"\xff" * 70 + b"a" * 64, 64, where=where)
    assert cache.insert_pages(pages, [0, 1, 2], 0) == 3
    assert [cache.page(i * 64) for i in range(3)] == [bytes(64), b"a" * 64, bytes(64)]
    with pytest.raises(ValueError, match="file"):
        cache.encode(pages, [1], 0, room(64))


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1 << i for i in range(6, 17)])
def test_sizes_are_powers_of_two_of_pages(page_size):
    for npages in (1, 2, 8):
        cache = _core.XbzrleCache(npages * page_size, page_size)
        assert (cache.npages, cache.page_size) == (npages, page_size)
        assert (cache.nbytes, cache.used) == (npages * page_size, 0)
    for npages in (3, 5, 6, 7, 12):
        with pytest.raises(ValueError, match="not a power of two"):
            _core.XbzrleCache(npages * page_size, page_size)
    for nbytes in (-(1 << 70), -page_size, 0, 1, page_size - 1):
        with pytest.raises(ValueError, match="smaller than the page size"):
            _core.XbzrleCache(nbytes, page_size)


@pytest.mark.parametrize("nbytes", [4096 + 1, 4096 + 2048, 8 * 4096 - 1, 8 * 4096 + 64])
def test_sizes_that_are_not_whole_pages_are_refused(nbytes):
    with pytest.raises(ValueError, match="cache"):
        _core.XbzrleCache(nbytes)


@pytest.mark.parametrize("page_size", [0, 1, 32, 63, 65, 96, 4095, 65537, 1 << 17])
def test_page_sizes_that_cannot_be_are_refused(page_size):
    with pytest.raises(ValueError, match="power of two from 64 to 65536"):
        _core.XbzrleCache(1 << 20, page_size)


@pytest.mark.parametrize("page_size", [64, 4096, 65536])
@pytest.mark.parametrize("bits", [58, 59, 60, 62, 63, 64, 70, 100])
def test_memory_that_cannot_be_had_leaves_the_cache_as_it_was(page_size, bits):
    with pytest.raises(MemoryError):
        _core.XbzrleCache(1 << bits, page_size)
    cache = _core.XbzrleCache(page_size, page_size)
    cache.insert(0, b"a" * page_size, 3)
    with pytest.raises(MemoryError):
        cache.resize(1 << bits)
    assert cache.page(0) == b"a" * page_size
    assert (cache.used, cache.nbytes) == (1, page_size)
    assert not cache.insert(page_size, None, 4)  # nor has the age changed


def test_a_process_that_may_not_have_the_memory_keeps_the_cache_it_has():
    code = """
import re, resource
from pathlib import Path
from mig import XbzrleCache
cache = XbzrleCache(1 << 20)
assert cache.insert(4096, b"a" * 4096, 0)
now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (68 << 20),) * 2)
small = XbzrleCache(64, 64)
for call, arguments in [(XbzrleCache, (1 << 28,)), (cache.resize, (1 << 28,)),
                        (cache.resize, (1 << 40,)),
                        # 64 MiB for the pages can be had, then 8 MiB for their table cannot
                        (XbzrleCache, (1 << 25, 64)), (small.resize, (1 << 25,))]:
    for _ in range(20):  # a failure keeps no memory
        try:
            call(*arguments)
        except MemoryError as error:
            assert str(arguments[0]) in str(error), error
        else:
            raise AssertionError(arguments)
    assert cache.page(4096) == b"a" * 4096 and cache.nbytes == 1 << 20
cache.resize(1 << 25)
assert cache.page(4096) is None and cache.insert(4096, b"b" * 4096, 0)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_pages_that_were_never_inserted_take_no_memory():
    before = resident()
    caches = [_core.XbzrleCache(4 << 30, 65536) for _ in range(3)]
    caches[0].insert(3 << 30, b"a" * 65536, 0)
    assert caches[0].page(3 << 30) == b"a" * 65536
    assert resident() - before < 64 * MIB


def test_a_cache_that_is_resized_or_dropped_gives_its_memory_back():
    page = b"a" * 65536
    before = resident()
    cache = _core.XbzrleCache(16 * MIB, 65536)
    for _ in range(20):
        for address in range(0, 16 * MIB, 65536):
            cache.insert(address, page, 0)
        cache.resize(16 * MIB)
        _core.XbzrleCache(16 * MIB, 65536).insert_pages(bytes(16 * MIB), range(256), 0)
    assert resident() - before < 128 * MIB


def test_resize_empties_the_cache_and_goes_on_counting():
    cache = _core.XbzrleCache(4 * 64, 64)
    cache.encode(bytes(256), range(4), 0, room(64))
    for npages in (4, 8, 1):
        cache.resize(npages * 64)
        assert (cache.npages, cache.used, cache.misses) == (npages, 0, 4)
        assert cache.page(0) is None
        cache.insert(0, None, 0)


# ---- what is refused -----------------------------------------------------------------------------


def test_addresses_that_are_no_pages_are_refused():
    cache = _core.XbzrleCache(4 * 64, 64)
    for address in (1, 32, 63, 65, (1 << 64) - 1):
        for call in (
            lambda at: cache.lookup(at, 0),
            lambda at: cache.insert(at, bytes(64), 0),
            cache.page,
            lambda at: cache.insert_pages(bytes(64), [0], 0, address=at),
            lambda at: cache.encode(bytes(64), [0], 0, room(64), address=at),
        ):
            with pytest.raises(ValueError, match="multiple of the page size"):
                call(address)
    for address in (-64, 1 << 64):
        with pytest.raises(OverflowError):
            cache.lookup(address, 0)
    assert cache.used == 0


def test_pages_and_output_that_do_not_fit_are_refused():
    cache = _core.XbzrleCache(4 * 64, 64)
    for page in (b"", bytes(63), bytes(65), bytes(128)):
        with pytest.raises(ValueError, match="a page has 64"):
            cache.insert(0, page, 0)
    other = _core.Pages(bytes(256), 128)
    with pytest.raises(ValueError, match="pages of 128 bytes"):
        cache.encode(other, [0], 0, room(64))
    with pytest.raises(ValueError, match="pages of 128 bytes"):
        cache.insert_pages(other, [0], 0)
    for nbytes in (0, 63):
        with pytest.raises(ValueError, match=f"out has {nbytes} bytes"):
            cache.encode(bytes(64), [0], 0, room(nbytes))
    with pytest.raises(BufferError):
        cache.encode(bytes(64), [0], 0, bytes(64))
    with pytest.raises(ValueError, match="127 bytes are not a whole number of pages of 64"):
        cache.encode(bytes(127), [0], 0, room(64))
    assert (cache.used, cache.misses) == (0, 0)


@pytest.mark.parametrize(
    "index", [[2], [0, 1, 2], np.array([-1]), np.array([2**64 - 1], dtype=np.uint64)]
)
def test_page_numbers_past_the_block_are_refused(index):
    cache = _core.XbzrleCache(4 * 64, 64)
    for pages in (bytes(128), _core.Pages(bytes(128), 64)):
        with pytest.raises(IndexError):
            cache.encode(pages, index, 0, room(64))
        with pytest.raises(IndexError):
            cache.insert_pages(pages, index, 0)
    assert cache.used == 0


def test_a_released_block_has_no_pages():
    cache = _core.XbzrleCache(4 * 64, 64)
    pages = _core.Pages(bytearray(128), 64)
    cache.encode(pages, [0, 1], 0, room(64))
    pages.release()
    with pytest.raises(IndexError):
        cache.encode(pages, [0], 0, room(64))


def test_one_thread_at_a_time():
    page_size, npages = 4096, 1 << 12
    cache = _core.XbzrleCache(npages * page_size)
    pages = _core.Pages(np.ones(npages * page_size, dtype=np.uint8), page_size)
    index = np.arange(npages, dtype=np.uint64)
    one, out = bytes(page_size), room(page_size)
    wanted = {
        "lookup": lambda: cache.lookup(0, 0),
        "insert": lambda: cache.insert(0, None, 0),
        "page": lambda: cache.page(0),
        "resize": lambda: cache.resize(npages * page_size),
        "insert_pages": lambda: cache.insert_pages(one, [0], 0),
        "encode": lambda: cache.encode(one, [0], 0, out),
    }
    ended = threading.Event()

    def use() -> None:
        while not ended.is_set():
            # the other thread may have been first
            with contextlib.suppress(RuntimeError):
                cache.encode(pages, index, 0, room(page_size))
                cache.insert_pages(pages, index, 0)

    thread = threading.Thread(target=use)
    thread.start()
    messages = set()
    try:
        while wanted:
            for name, call in list(wanted.items()):
                try:
                    call()
                except RuntimeError as error:
                    messages.add(str(error))
                    del wanted[name]
    finally:
        ended.set()
        thread.join()
    assert messages == {"the cache is in use by another thread"}
    cache.resize(page_size)
    assert cache.npages == 1


# ---- a guest that goes on writing ----------------------------------------------------------------


@contextlib.contextmanager
def written(memory: np.ndarray) -> Iterator[None]:
    """Writes parts of the memory from another thread, without the interpreter's lock."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, len(memory), dtype=np.uint8)
    sizes = rng.choice(
        [1, 3, 17, 64, 300, 4096], 4096, p=[0.2, 0.3, 0.3, 0.15, 0.04, 0.01]
    ).tolist()
    places = (rng.random(4096) * (len(memory) // 2)).astype(int).tolist()
    sources = rng.permutation(places).tolist()
    ended = threading.Event()
    interval = sys.getswitchinterval()

    def write() -> None:
        base, source = memory.ctypes.data, noise.ctypes.data
        while not ended.is_set():
            for nbytes, to, of in zip(sizes, places, sources, strict=True):
                ctypes.memmove(base + to, source + of, nbytes)
                ctypes.memset(base + len(memory) - to - 1, nbytes & 0xFF, 1)
                if ended.is_set():
                    return

    thread = threading.Thread(target=write)
    # both threads want the lock back after each call
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("page_size", [64, 4096, 65536])
def test_a_receiver_has_what_is_cached_while_the_pages_are_written(family, page_size):
    npages = max(MIB // 4 // page_size, 8) if page_size >= 4096 else 512
    memory = np.zeros(npages * page_size, dtype=np.uint8)
    # half as many slots as pages: some miss, some are refused
    cache = _core.XbzrleCache(npages // 2 * page_size, page_size, kernels=family)
    replica = bytearray(npages * page_size)
    out = room(npages * page_size)
    index = np.arange(npages, dtype=np.uint64)
    generation = 0
    with written(memory):
        while generation < 50 or cache.encoded_pages < 100:
            results, used = cache.encode(memory, index, generation, out)
            assert len(results) == npages
            at = 0
            for i, result in enumerate(results.tolist()):
                page = memoryview(replica)[i * page_size : (i + 1) * page_size]
                cached = cache.page(i * page_size)
                if result > 0:
                    xbzrle.decode(out[at : at + result], page)
                    at += result
                elif result in (_core.CACHE_MISS, _core.CACHE_OVERFLOW) and cached:
                    page[:] = cached
                if cached:
                    assert page == cached, (generation, i, result)
            assert at == used
            generation += 1
    # and when the guest stands still, what is in the cache is what is in memory
    cache.encode(memory, index, generation, out)
    for i in range(npages):
        cached = cache.page(i * page_size)
        assert cached in (None, memory[i * page_size : (i + 1) * page_size].tobytes())


def test_a_block_that_wraps_around_the_address_space_is_refused():
    cache = _core.XbzrleCache(4 * 64, 64)
    for call in (
        lambda address: cache.insert_pages(bytes(128), [0], 0, address=address),
        lambda address: cache.encode(bytes(128), [0], 0, room(64), address=address),
    ):
        with pytest.raises(ValueError, match="past the end of the address space"):
            call(2**64 - 64)
        call(2**64 - 128)


def test_page_numbers_are_integers():
    cache = _core.XbzrleCache(4 * 64, 64)
    with pytest.raises(TypeError, match="page numbers are integers"):
        cache.insert_pages(bytes(128), [True, False], 0)
    with pytest.raises(TypeError, match="page numbers are integers"):
        cache.encode(bytes(128), np.array([0.5]), 0, room(64))
