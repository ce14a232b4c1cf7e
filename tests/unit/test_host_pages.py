"""Host pages larger than a target page: a search does not leave one before it is done with it."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import hostpages
from unit.boxes import FOREVER, Box
from unit.boxes import PAGE as BOX_PAGE

from mig import GuestMemory, _core
from mig.engine.precopy import SLICE, Precopy
from mig.pages import HOST_PAGE_SIZE
from mig.ram import search as search_module
from mig.ram.search import MAX_BATCH, PageSearch, SourceBlock

#: the smallest target page, so that many of them take little memory
PAGE = 64


def block_of(name: str, npages: int, per_host_page: int, dirty: set[int]) -> SourceBlock:
    bits = _core.Bitmap(npages)
    for page in dirty:
        bits.set(page)
    pages = _core.Pages(bytes(npages * PAGE), PAGE)
    return SourceBlock(name, npages * PAGE, pages, False, bits, host_page_size=per_host_page * PAGE)


def drain(search: PageSearch, sizes=()) -> list[tuple[SourceBlock, list[int]]]:
    """Every batch that is left, asked for in these sizes as long as they last."""
    sizes, out = iter(sizes), []
    while batch := search.next_batch(next(sizes, MAX_BATCH)):
        out.append((batch.block, [int(i) for i in batch.index]))
    return out


BLOCKS = st.lists(
    st.tuples(
        st.integers(1, 200),  # pages
        st.integers(0, 6).map(lambda shift: 1 << shift),  # pages of a host page
        st.sets(st.integers(0, 199)),  # dirty ones
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(blocks=BLOCKS, sizes=st.lists(st.integers(0, 70), max_size=40))
def test_everything_is_sent_once_in_order_and_no_host_page_is_left(blocks, sizes):
    dirty = [{p for p in pages if p < npages} for npages, _, pages in blocks]
    each = [n for _, n, _ in blocks]
    made = [block_of(str(i), npages, n, dirty[i]) for i, (npages, n, _) in enumerate(blocks)]
    search = PageSearch(made)
    batches = [(int(b.idstr), pages) for b, pages in drain(search, sizes)]
    assert [(b, p) for b, pages in batches for p in pages] == hostpages.order(dirty, each)
    assert hostpages.splits(batches, each) == []
    assert search.remaining == 0
    for (_, pages), size in zip(batches, sizes, strict=False):
        # no more than the rest of one host page beyond what was asked for
        assert len(pages) < max(size, 1) + max(each)


@settings(deadline=None, max_examples=60)
@given(
    npages=st.integers(1, 300),
    shift=st.integers(3, 9),
    sizes=st.lists(st.integers(1, 40), max_size=60),
    pages=st.sets(st.integers(0, 299)),
)
def test_host_pages_too_large_for_a_batch_go_on_with_the_next(npages, shift, sizes, pages):
    most, each = 16, 1 << shift
    dirty = {p for p in pages if p < npages}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "MAX_BATCH", most)
        patch.setattr(search_module, "_MAX_WHOLE_BATCH", 2 * most)
        search = PageSearch([block_of("a", npages, each, dirty)])
        batches, inside = [], []
        for size in sizes + [most] * npages:
            if (batch := search.next_batch(size)) is None:
                break
            batches.append((0, [int(i) for i in batch.index]))
            inside.append(search.inside_host_page)
            assert len(batch.index) <= 2 * most
    assert search.remaining == 0
    assert not search.inside_host_page
    assert [(0, p) for _, got in batches for p in got] == hostpages.order([dirty], [each])
    assert [i for i, is_inside in enumerate(inside) if is_inside] == hostpages.splits(
        batches, [each]
    )


def test_a_page_of_1_gib_is_sent_in_batches_one_after_another():
    # where=: pages without memory
    npages = (1 << 30) // 4096
    places = np.full(2 * npages, _core.PAGE_ZERO, dtype=np.int64)
    pages = _core.Pages(b"", 4096, where=places)
    dirty = _core.Bitmap(2 * npages, fill=True)
    block = SourceBlock("a", 2 << 30, pages, False, dirty, host_page_size=1 << 30)
    search, ends = PageSearch([block]), []
    taken = 0
    while batch := search.next_batch(100):
        assert int(batch.index[0]) == taken
        taken += len(batch.index)
        if not search.inside_host_page:
            ends.append(taken)
    assert ends == [npages, 2 * npages]


class ChunkLog:
    """A log with chunks, which remembers what was cleared."""

    def __init__(self, chunk_pages: int) -> None:
        self.chunk_pages = chunk_pages
        self.cleared: list[tuple[int, int]] = []

    def start(self) -> None:
        """Nothing to start."""

    def sync(self, idstr: str, dirty: _core.Bitmap) -> int:
        return 0

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        self.cleared.append((first_page, npages))

    def stop(self) -> None:
        """Nothing to stop."""


@pytest.mark.parametrize(("chunk", "each"), [(64, 16), (64, 64), (64, 256), (128, 512)])
def test_chunks_are_cleared_for_the_rest_of_a_host_page_too(chunk, each):
    npages = 1000
    log = ChunkLog(chunk)
    search = PageSearch([block_of("a", npages, each, set(range(npages)))], log)
    batch = search.next_batch(10)
    assert len(batch.index) == each
    assert log.cleared == [(first, min(chunk, npages - first)) for first in range(0, each, chunk)]
    drain(search)
    assert log.cleared == [(first, min(chunk, npages - first)) for first in range(0, npages, chunk)]


def test_hints_and_discarded_ranges_take_pages_out_of_a_host_page_and_leave_the_rest():
    block = replace(block_of("a", 64, 16, set(range(64))), discarded=[(8, 12)])
    search = PageSearch([block])
    search.forget("a", 30, 4)
    assert search.remaining == (64 - 12 - 4) * PAGE
    assert [pages for _, pages in drain(search, [1] * 9)] == [
        list(range(8)),
        list(range(20, 30)),
        list(range(34, 48)),
        list(range(48, 64)),
    ]


def test_a_hint_may_take_what_a_large_host_page_still_has(monkeypatch):
    monkeypatch.setattr(search_module, "MAX_BATCH", 16)
    block = block_of("a", 64, 64, set(range(64)))
    search = PageSearch([block])
    search.next_batch(16)
    assert search.inside_host_page
    search.forget("a", 0, 64)
    assert search.next_batch() is None
    assert not search.inside_host_page


# ---- the slice -------------------------------------------------------------------------------


class FastClock:
    """Every look at it costs most of a slice."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 0.8 * SLICE
        return self._now


def test_a_slice_ends_between_host_pages(made, monkeypatch):
    """A slice has time for one batch only, and still sends a host page to its end."""
    monkeypatch.setattr(search_module, "MAX_BATCH", 16)
    monkeypatch.setattr("mig.engine.precopy.MAX_BATCH", 16)
    monkeypatch.setattr("mig.engine.precopy.time", FastClock())
    left, send_slice = [], Precopy._send_slice

    def watched(self):
        send_slice(self)
        assert not self._search.inside_host_page
        left.append(self._search.remaining // BOX_PAGE)

    monkeypatch.setattr(Precopy, "_send_slice", watched)
    source, target = Box(71), Box()
    for block in source.memory:
        block.host_page_size = 128 * BOX_PAGE
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, parameters={"downtime-limit": 0})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    # the second block is smaller than a host page
    assert left[:5] == [16 + 3 * 128, 16 + 2 * 128, 16 + 128, 16, 0]


# ---- what pages memory is made of ------------------------------------------------------------


def test_memory_says_of_what_pages_it_is():
    memory = GuestMemory()
    assert memory.add("a", 4096).host_page_size == mmap.PAGESIZE == HOST_PAGE_SIZE
    huge = memory.add("b", 1 << 21, bytearray(1 << 21), host_page_size=1 << 21)
    assert huge.host_page_size == 1 << 21
    for size in (0, -4096, 12288):
        with pytest.raises(ValueError, match="host page size"):
            memory.add("c", 4096, host_page_size=size)
    memory.close()


def test_a_file_on_hugetlbfs_says_of_what_pages_it_is():
    try:
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages: {error}")
    try:
        page = _core.fd_page_size(fd)
        assert page > mmap.PAGESIZE
        assert page & (page - 1) == 0
        with pytest.raises(ValueError, match=f"in pages of {page}"):
            GuestMemory().add("a", page + 4096, fd=fd)
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)
    fd = os.memfd_create("small", os.MFD_CLOEXEC)
    assert _core.fd_page_size(fd) == mmap.PAGESIZE
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.fd_page_size(fd)
