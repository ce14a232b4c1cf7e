"""GuestMemory: blocks, and closing them while somebody looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mig import _core
from mig.memory import GuestMemory, RamBlock

PAGE = 4096


def resident(block: RamBlock) -> int:
    """Host pages that the kernel has given."""
    fields = {}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name and " " in line.split(":")[0]:
            start, end = (int(part, 16) for part in name.split()[0].split("-"))
            ours = start <= block.pages.hva < end
        elif ours:
            fields[name] = value
    return int(fields["Rss"].split()[0]) * 1024 // PAGE


@pytest.fixture
def memory():
    memory = GuestMemory()
    memory.add("a", 2 * PAGE)
    memory.add("b", PAGE)
    return memory


def test_blocks_are_kept_in_order_and_read_as_zeros(memory):
    assert [(b.idstr, b.used_length) for b in memory] == [("a", 2 * PAGE), ("b", PAGE)]
    assert len(memory) == 2
    assert bytes(memory["a"].view) == bytes(2 * PAGE)
    assert memory["a"].pages.npages == 2
    with pytest.raises(KeyError):
        memory["c"]


def test_a_block_can_be_the_caller_s_buffer():
    buffer = bytearray(b"x" * PAGE)
    block = GuestMemory().add("a", PAGE, memoryview(buffer))
    block.view[0] = 7
    assert buffer[0] == 7
    assert not block.take_fresh()


def test_memory_is_fresh_once_and_only_until_somebody_could_have_written_it(memory):
    assert memory["a"].take_fresh()
    assert not memory["a"].take_fresh()
    assert len(memory["b"].view) == PAGE
    assert not memory["b"].take_fresh()


@pytest.mark.parametrize("nbytes", [0, -PAGE, 1, PAGE - 1, PAGE + 1])
def test_a_block_is_a_whole_number_of_pages(nbytes):
    with pytest.raises(ValueError, match="block 'a'"):
        GuestMemory().add("a", nbytes)


def test_a_buffer_of_another_length_is_refused():
    with pytest.raises(ValueError, match="4096 bytes, not 8192"):
        GuestMemory().add("a", 2 * PAGE, memoryview(bytearray(PAGE)))


def test_a_name_is_used_once(memory):
    with pytest.raises(ValueError, match="there already"):
        memory.add("a", PAGE)


@pytest.mark.parametrize("page_size", [0, 63, 100])
def test_page_sizes_that_cannot_be_are_refused(page_size):
    with pytest.raises(ValueError, match="page size"):
        GuestMemory(page_size)


def test_close_releases_everything(memory):
    memory.close()
    assert len(memory) == 0
    memory.close()


def pin_queue(block: RamBlock) -> object:
    out = _core.OutQueue()
    out.encode(block.pages, b"a", np.array([0], dtype=np.uint64))
    return out


HOLDERS = {
    "numpy": lambda block: np.frombuffer(block.view, dtype=np.uint8),
    "slice": lambda block: block.view[10:20],
    "memoryview": lambda block: memoryview(block.view),
    "queue": pin_queue,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_closing_with_a_live_view_raises_and_the_memory_stays_usable(kind):
    memory = GuestMemory()
    block = memory.add("a", 2 * PAGE)
    holder = HOLDERS[kind](block)
    with pytest.raises(BufferError):
        memory.close()
    block.view[5] = 9
    assert memory["a"].view[5] == 9
    assert block.pages.npages == 2
    assert not _core.KERNELS.zero_pages(block.pages, np.array([0], dtype=np.uint64))[1]
    del holder
    memory.close()
    assert len(memory) == 0


def test_closing_with_a_view_of_the_last_block_leaves_the_others_usable(memory):
    holder = np.frombuffer(memory["b"].view, dtype=np.uint8)
    with pytest.raises(BufferError):
        memory.close()
    for block in memory:
        block.view[0] = 1
        assert block.pages.npages > 0
    del holder
    memory.close()


def test_memory_can_be_had_at_once_and_is_still_zeros():
    memory = GuestMemory()
    block = memory.add("a", 64 * PAGE)
    block.populate()
    assert resident(block) >= 64
    assert block.take_fresh()
    assert bytes(block.view) == bytes(64 * PAGE)
    memory.close()


def test_memory_of_the_caller_s_is_not_populated():
    memory = GuestMemory()
    block = memory.add("a", 2 * PAGE, bytearray(2 * PAGE))
    with pytest.raises(OSError, match="not mapped by mig"):
        block.populate()


def test_memory_that_cannot_be_had_is_named():
    with pytest.raises(OSError, match=r"block 'ram' of \d+ bytes: Cannot allocate memory"):
        GuestMemory().add("ram", 1 << 50)
