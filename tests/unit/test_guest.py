"""MemoryGuest: what a program's own guest gives and takes."""

from __future__ import annotations

import pytest
from reference import stream
from reference.ram import Record
from reference.stream import Device

from mig import DeviceRegistry, GuestMemory, MemoryGuest, SharedDirtyLog
from mig.errors import MismatchError
from mig.records import BlockInfo, Configuration
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

PAGE = 4096


def memory_of(page_size: int = PAGE, **blocks: int) -> GuestMemory:
    memory = GuestMemory(page_size)
    for name, npages in blocks.items():
        memory.add(name, npages * page_size)
    return memory


def receive(guest: MemoryGuest, data: bytes) -> None:
    StreamLoader(StreamReader(data=data), guest, on_command=lambda command: None).run()


def test_a_source_gives_every_block_with_every_page_dirty():
    guest = MemoryGuest("box", memory_of(a=3, b=1))
    blocks = guest.source_blocks()
    assert [(b.idstr, b.used_length, b.detect_zero) for b in blocks] == [
        ("a", 3 * PAGE, True),
        ("b", PAGE, True),
    ]
    assert [list(b.dirty) for b in blocks] == [[True] * 3, [True]]
    assert guest.configuration == Configuration("box")


def test_a_page_size_that_is_not_the_usual_one_is_in_the_configuration():
    assert MemoryGuest("box", memory_of(65536, a=1)).configuration == Configuration("box", 16)


def test_each_migration_has_dirty_bits_of_its_own():
    guest = MemoryGuest("box", memory_of(a=3))
    guest.source_blocks()[0].dirty.clear(0, 3)
    assert guest.source_blocks()[0].dirty.count() == 3


def test_the_dirty_log_is_the_owner_s():
    log = SharedDirtyLog({"a": 1})
    assert MemoryGuest("box", memory_of(a=1), dirty=log).dirty_log() is log
    assert MemoryGuest("box", memory_of(a=1)).dirty_log() is None


def test_stop_and_resume_are_the_owner_s():
    calls = []
    guest = MemoryGuest(
        "box",
        memory_of(a=1),
        on_stop=lambda: calls.append("stop"),
        on_resume=lambda: calls.append("resume"),
    )
    guest.stop()
    guest.resume()
    assert calls == ["stop", "resume"]


def test_a_stream_is_loaded_into_memory_and_devices():
    loaded = []
    devices = DeviceRegistry()
    devices.register("uart", save=bytes, load=lambda payload, version: loaded.append(payload))
    memory = memory_of(a=3, b=1)
    records = [Record(b"a", 1, b"\x07" * PAGE), Record(b"b", 0, 0)]
    blocks = {"a": 3 * PAGE, "b": PAGE}
    data = stream.whole(blocks, [records], [Device("uart", b"state", 5)])
    receive(MemoryGuest("box", memory, devices), data)
    assert bytes(memory["a"].view) == bytes(PAGE) + b"\x07" * PAGE + bytes(PAGE)
    assert loaded == [b"state"]


@pytest.mark.parametrize("again", [False, True], ids=["written by its owner", "received into"])
def test_zero_pages_overwrite_what_the_destination_s_memory_held(again):
    memory = memory_of(a=2)
    guest = MemoryGuest("box", memory)
    if again:
        ones = [Record(b"a", i, b"\x01" * PAGE) for i in range(2)]
        receive(guest, stream.whole({"a": 2 * PAGE}, [ones], []))
        guest.abort()
    else:
        # firmware, say, that a program puts there before it knows that a stream will come
        memory["a"].view[:] = b"\x01" * (2 * PAGE)
    zeros = [Record(b"a", i, 0) for i in range(2)]
    receive(guest, stream.whole({"a": 2 * PAGE}, [zeros], []))
    assert bytes(memory["a"].view) == bytes(2 * PAGE)


def test_a_machine_of_another_type_is_a_mismatch():
    guest = MemoryGuest("box", memory_of(a=1))
    with pytest.raises(MismatchError, match=r"'crate'.*'box'"):
        guest.configure(Configuration("crate"))
    guest.configure(Configuration("box"))
    with pytest.raises(MismatchError, match="does not name its machine"):
        guest.configure(None)


@pytest.mark.parametrize(
    ("blocks", "match", "block"),
    [
        ([("b", PAGE), ("a", 2 * PAGE)], "8192 bytes, this guest's 4096", "a"),
        ([("a", PAGE), ("b", PAGE), ("c", PAGE)], "no such block", "c"),
        ([("a", PAGE)], "lacks a block", "b"),
    ],
)
def test_blocks_of_another_guest_are_a_mismatch(blocks, match, block):
    guest = MemoryGuest("box", memory_of(a=1, b=1))
    with pytest.raises(MismatchError, match=match) as caught:
        guest.open_blocks([BlockInfo(*b) for b in blocks], PAGE)
    assert caught.value.block == block


def test_pages_of_another_size_are_a_mismatch():
    guest = MemoryGuest("box", memory_of(a=16))
    with pytest.raises(MismatchError, match="pages of 65536 bytes"):
        guest.open_blocks([BlockInfo("a", 65536)], 65536)


def test_blocks_may_come_in_another_order():
    memory = memory_of(a=1, b=1)
    records = [Record(b"b", 0, b"\x02" * PAGE), Record(b"a", 0, b"\x01" * PAGE)]
    receive(MemoryGuest("box", memory), stream.whole({"b": PAGE, "a": PAGE}, [records], []))
    assert (memory["a"].view[0], memory["b"].view[0]) == (1, 2)
