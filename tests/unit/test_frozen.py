"""FrozenMemory: pages as they were at one moment, and its kernels."""

from __future__ import annotations

import random

import numpy as np
import pytest
from unit.snapshots import LIBC, MIB, PAGE, Block

from mig import _core
from mig.dirty.track import refusal
from mig.errors import OptionError
from mig.ram.search import PageSearch
from mig.snapshot.memory import FrozenMemory

REFUSAL = refusal("userfaultfd")
pytestmark = [
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
    pytest.mark.usefixtures("nothing_is_left"),
]


def frozen(some: Block, **options) -> FrozenMemory:
    memory = FrozenMemory(some.guest.source_blocks(), **options)
    memory.freeze()
    return memory


def test_copies_are_taken_by_ascending_page_and_their_room_is_used_again(block):
    some = block()
    some.view[:] = 1
    blocks = some.guest.source_blocks()
    memory = FrozenMemory(blocks)
    memory.freeze()
    try:
        for first in (300, 5, 100):
            LIBC.memset(some.address + first * PAGE + 17, 2, 2 * PAGE)
        taken = [(batch.index.tolist(), cleared) for batch, cleared in memory.copies()]
        assert taken == [([5, 6, 7, 100, 101, 102, 300, 301, 302], 9)]
        assert memory.faults == 9
        assert not blocks[0].dirty[5]
        assert blocks[0].dirty[4]
        assert memory._core.waiting_bytes == 0
        assert list(memory.copies()) == []
    finally:
        memory.close()


@pytest.mark.parametrize("unit", [PAGE, 8 * PAGE])
def test_what_is_written_before_the_moment_belongs_to_it(block, unit):
    """Most of memory is protected before; that is lifted again where it is written to."""
    some = block(16 * MIB, host_page_size=unit)
    blocks = some.guest.source_blocks()
    memory = FrozenMemory(blocks)
    rng = random.Random(unit)
    try:
        memory.arm()
        for value in range(1, 60):
            LIBC.memset(some.address + rng.randrange(16 * MIB - 9 * PAGE), value, 9 * PAGE)
        assert memory.faults == 0
        memory.freeze()
        then = bytes(some.view)
        for value in range(60, 120):
            LIBC.memset(some.address + rng.randrange(16 * MIB - 9 * PAGE), value, 9 * PAGE)
        assert bytes(some.view) != then
        found = {}
        search = PageSearch(blocks)
        while True:
            for batch, _ in memory.copies():
                pages = batch.block.pages
                zero = pages.without_storage(batch.index)
                out = _core.OutQueue(4096, 1 << 17)
                assert out.encode(pages, None, batch.index) == len(batch.index)
                data, at = out.tobytes(), 0
                for i, page in enumerate(batch.index.tolist()):
                    length = 1 if zero[i] else PAGE
                    found[page] = bytes(PAGE) if zero[i] else data[at + 8 : at + 8 + PAGE]
                    at += 8 + length
                out.clear()
            if (batch := search.next_batch(100)) is None:
                break
            memory.save(batch)
        assert b"".join(found[page] for page in range(16 * MIB // PAGE)) == then
    finally:
        memory.close()


def test_memory_is_frozen_once(block):
    """A second userfaultfd cannot have it."""
    some = block()
    first = frozen(some)
    try:
        with pytest.raises(OptionError, match="guest memory configuration"):
            frozen(some)
        LIBC.memset(some.address, 1, PAGE)
        assert first.faults == 1
    finally:
        first.close()


def test_it_holds_memory_until_it_is_closed(block):
    some = block()
    memory = frozen(some)
    with pytest.raises(BufferError):
        some.memory["ram"].pages.release()
    memory.close()
    memory.close()
    assert memory.fd == -1
    with pytest.raises(ValueError, match="closed"):
        memory.freeze()


def test_numbers_are_checked(block):
    some = block()
    memory = frozen(some)
    core = memory._core
    index = np.array([512], dtype=np.uint64)
    try:
        with pytest.raises(IndexError):
            core.save(0, index)
        with pytest.raises(IndexError):
            core.save(1, index[:0])
        with pytest.raises(IndexError):
            core.free(0, index)
        with pytest.raises(ValueError, match="bitmap"):
            core.take(0, index, _core.Bitmap(5))
        assert core.save(0, index[:0]) == 0
        assert core.take(0, index[:0], _core.Bitmap(512)) == (0, 0)
    finally:
        memory.close()
