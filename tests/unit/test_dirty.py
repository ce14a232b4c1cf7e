"""SharedDirtyLog: nothing that is marked is lost."""

from __future__ import annotations

import threading

import pytest

from mig import Bitmap
from mig.dirty import SharedDirtyLog


def test_marks_move_into_the_dirty_bitmap_once():
    log, dirty = SharedDirtyLog({"a": 100, "b": 10}), Bitmap(100)
    log.start()
    log.mark("a", 3)
    log.mark("a", 99)
    log.mark("a", 3)
    log.mark("b", 5)
    assert log.sync("a", dirty) == 2
    assert [i for i in range(100) if dirty[i]] == [3, 99]
    assert log.sync("a", dirty) == 0
    assert log.sync("b", Bitmap(10)) == 1


def test_sync_counts_only_what_was_not_dirty_before():
    log, dirty = SharedDirtyLog({"a": 10}), Bitmap(10)
    dirty.set(1)
    log.start()
    log.mark("a", 1)
    log.mark("a", 2)
    assert log.sync("a", dirty) == 1


def test_nothing_is_logged_before_start_or_after_stop():
    log = SharedDirtyLog({"a": 10})
    log.mark("a", 1)
    log.start()
    assert log.sync("a", Bitmap(10)) == 0
    log.stop()
    log.mark("a", 2)
    assert log.sync("a", Bitmap(10)) == 0


def test_what_was_marked_before_stop_can_still_be_fetched():
    log = SharedDirtyLog({"a": 10})
    log.start()
    log.mark("a", 2)
    log.stop()
    assert log.sync("a", Bitmap(10)) == 1


def test_starting_again_forgets_what_was_marked():
    log = SharedDirtyLog({"a": 10})
    log.start()
    log.mark("a", 2)
    log.start()
    assert log.sync("a", Bitmap(10)) == 0


def test_writers_may_set_bits_themselves():
    log, dirty = SharedDirtyLog({"a": 10, "b": 10}), Bitmap(10)
    log.bitmap("a").set_atomic(1)
    log.start()
    log.bitmap("a").set_atomic(2, 3)
    assert log.sync("b", Bitmap(10)) == 0
    assert log.sync("a", dirty) == 3
    assert dirty.indexes().tolist() == [2, 3, 4]


def test_pages_and_blocks_that_are_not_there_are_refused():
    log = SharedDirtyLog({"a": 10})
    log.start()
    with pytest.raises(IndexError):
        log.mark("a", 10)
    with pytest.raises(KeyError):
        log.mark("b", 0)
    with pytest.raises(ValueError, match="10"):
        log.sync("a", Bitmap(11))


def test_threads_that_mark_while_another_syncs_lose_nothing():
    npages, nthreads = 8000, 4
    log, seen = SharedDirtyLog({"a": npages}), Bitmap(npages)
    log.start()
    done = threading.Event()

    def mark(first: int) -> None:
        for page in range(first, npages, nthreads):
            log.mark("a", page)

    def collect() -> None:
        while not done.is_set():
            fetched = Bitmap(npages)
            log.sync("a", fetched)
            seen.merge(fetched)

    collector = threading.Thread(target=collect)
    markers = [threading.Thread(target=mark, args=(i,)) for i in range(nthreads)]
    for thread in (collector, *markers):
        thread.start()
    for thread in markers:
        thread.join()
    done.set()
    collector.join()
    log.sync("a", seen)
    assert seen.next_clear() == npages
