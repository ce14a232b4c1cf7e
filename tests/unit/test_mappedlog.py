"""MappedLog: whatever comes in whatever order, every page stands in its place as it was last."""

from __future__ import annotations

import os
import socket
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import multifd, ram
from reference.pagelog import PageLog as Oracle
from reference.ram import Record

from mig import _core
from mig._core import Descriptor, MappedLog, MultifdReceiver, RamParser, RamRecordError
from mig.errors import ChannelError

PAGE = 4096
BLOCKS = {b"a": 3, b"pc.ram": 700, b"rom": 200}


class Writer:
    """A page file fed with bursts as the loader feeds it, and its oracle."""

    def __init__(
        self, file, *, blocks=None, direct=False, capacity=4096, page_size=PAGE, first=1 << 20
    ):
        self.file, self.blocks = file, blocks or BLOCKS
        self.page_size, self.capacity = page_size, capacity
        # blocks stand apart, and not in order
        self.offsets, at = {}, first
        for name, npages in reversed(self.blocks.items()):
            self.offsets[name] = at
            at += (npages + 1) * page_size + PAGE - npages * page_size % PAGE
        os.ftruncate(file.fileno(), at)
        self.direct_fd = -1
        if direct:
            self.direct_fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
        offsets = [self.offsets[name] for name in self.blocks]
        self.parser = self.another_parser()
        self.pages = MappedLog(file.fileno(), self.parser, offsets, direct_fd=self.direct_fd)
        self.oracle = Oracle(page_size)
        self._current = None

    def another_parser(self):
        return RamParser(list(self.blocks.items()), self.page_size, self.capacity)

    def close(self):
        if self.direct_fd >= 0:
            os.close(self.direct_fd)

    def put(self, records):
        self.put_by(self.parser, records, self._current)
        for record in records:
            self.oracle.put(record)
            self._current = record.block

    def put_by(self, parser, records, current=None):
        data = ram.encode(records, self.page_size, current) + ram.eos()
        at, stop = 0, None
        while stop != _core.STOP_EOS:
            stop = parser.parse(data, at, len(data))
            assert stop != _core.STOP_MORE
            self.pages.put(data, at, parser)
            at += parser.consumed

    def check(self):
        self.pages.flush()
        zero = bytes(self.page_size)
        for number, (name, npages) in enumerate(self.blocks.items()):
            present = np.unpackbits(
                np.asarray(self.pages.present[number]).view(np.uint8), bitorder="little"
            )
            for page in range(npages):
                wanted = self.oracle.pages.get((name, page), zero)
                at = self.offsets[name] + page * self.page_size
                got = os.pread(self.file.fileno(), self.page_size, at) if present[page] else zero
                assert got == wanted, (name, page)
            assert not present[npages:].any()
        # what is between them stays as it was
        assert not any(os.pread(self.file.fileno(), 1 << 20, 0))


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def direct(request):
    return request.param


@pytest.fixture
def writer(direct):
    with tempfile.TemporaryFile(buffering=0, dir="/var/tmp") as file:
        writer = Writer(file, direct=direct)
        yield writer
        writer.close()


def page_of(seed, nbytes=PAGE):
    return np.random.default_rng(seed).integers(1, 256, nbytes, dtype=np.uint8).tobytes()


RECORDS = st.builds(
    lambda block, page, contents: Record(block, page % BLOCKS[block], contents),
    st.sampled_from(list(BLOCKS)),
    st.one_of(st.integers(0, 5), st.integers(0, 699)),
    st.one_of(
        st.just(0),
        st.integers(0, 20).map(page_of),
        st.sampled_from([b"\x05\x01A", b"\0\x7d" + b"D" * 125, b"\x80\x10\x02xy"]).map(ram.Delta),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    bursts=st.lists(st.lists(RECORDS, max_size=30), max_size=4),
    capacity=st.sampled_from([1, 3, 4096]),
    direct=st.booleans(),
)
def test_every_page_is_as_it_was_last(bursts, capacity, direct):
    with tempfile.TemporaryFile(buffering=0, dir="/var/tmp") as file:
        writer = Writer(file, direct=direct, capacity=capacity)
        for burst in bursts:
            writer.put(burst)
        writer.check()
        writer.close()


def test_more_pages_than_are_held_at_a_time_again_and_again(writer):
    """In the buffer being filled, on their way to the disk, and on disk."""
    rng = np.random.default_rng(1)
    for _ in range(3):
        order = rng.permutation(700)[:650]
        writer.put([Record(b"pc.ram", int(i), page_of(int(rng.integers(1 << 30)))) for i in order])
        writer.put([Record(b"pc.ram", int(i), 0) for i in order[:20]])
        writer.put([Record(b"pc.ram", int(i), ram.Delta(b"\x05\x01A")) for i in order[:200]])
    writer.check()


def test_two_connections(writer):
    records = [
        [Record(b"pc.ram", i, page_of(i)) for i in range(start, 700, 2)] for start in range(2)
    ]
    threads = [
        threading.Thread(target=writer.put_by, args=(writer.another_parser(), half))
        for half in records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for record in records[0] + records[1]:
        writer.oracle.put(record)
    writer.check()


def test_a_page_that_comes_again_on_a_channel(writer):
    """In one packet, and before the packet before is on the disk."""
    packets = [[5, 5, 6, 7, 5], [7, 8], [*range(100), 7, *range(20)], [7]]
    writer.put([Record(b"a", 0, page_of(1))])
    receiver = MultifdReceiver(writer.parser, 1)
    receiver.to_file(writer.pages)
    data, seed = b"", 10
    for indexes in packets:
        pages = [page_of(seed + i) for i in range(len(indexes))]
        seed += len(pages)
        offsets = [i * PAGE for i in indexes]
        data += multifd.Packet(block=b"pc.ram", normal=offsets, data=b"".join(pages)).encode()
        for index, page in zip(indexes, pages, strict=True):
            writer.oracle.put(Record(b"pc.ram", index, page))
    mine, theirs = socket.socketpair()
    with mine, theirs:
        thread = threading.Thread(target=lambda: (theirs.sendall(data), theirs.close()))
        thread.start()
        receiver.run(0, Descriptor(mine.fileno()))
        thread.join()
    writer.check()


def test_places_that_direct_writes_do_not_take():
    with tempfile.TemporaryFile(buffering=0, dir="/var/tmp") as file:
        writer = Writer(file, direct=True, first=(1 << 20) + 100)
        for seed in (1, 1000):
            writer.put([Record(b"pc.ram", i, page_of(seed + i)) for i in range(0, 700, 3)])
            writer.put([Record(b"rom", i, page_of(seed + i)) for i in range(200)])
        writer.check()
        writer.close()


@pytest.mark.parametrize("page_size", [1024, 2 << 20])
def test_pages_of_any_size(page_size):
    with tempfile.TemporaryFile(buffering=0, dir="/var/tmp") as file:
        writer = Writer(file, blocks={b"r": 5}, page_size=page_size)
        writer.put([Record(b"r", i, page_of(i, page_size)) for i in (4, 1, 2)])
        writer.check()


def test_a_fill_byte_has_no_place(writer):
    with pytest.raises(RamRecordError, match="fill"):
        writer.put([Record(b"rom", 0, 7)])


def test_a_difference_that_is_wrong(writer):
    with pytest.raises(RamRecordError, match="XBZRLE"):
        writer.put([Record(b"rom", 0, ram.Delta(b"\xff\xff\x7f\x01A"))])


def test_a_descriptor_that_cannot_be_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 << 10))
    parser = RamParser([(b"r", 4)], PAGE)
    data = ram.encode([Record(b"r", 1, page_of(1))], PAGE, None) + ram.eos()
    with path.open("rb") as file:
        pages = MappedLog(file.fileno(), parser, [PAGE])
        parser.parse(data, 0, len(data))
        pages.put(data, 0)
        with pytest.raises(ChannelError):
            pages.flush()


def test_offsets_and_blocks_must_fit(writer):
    with pytest.raises(ValueError, match="offsets"):
        MappedLog(writer.file.fileno(), writer.parser, [0])
    other = RamParser([(b"r", 5000)], PAGE)
    data = ram.encode([Record(b"r", 0, page_of(1))], PAGE, None) + ram.eos()
    other.parse(data, 0, len(data))
    with pytest.raises(ValueError, match="other blocks"):
        writer.pages.put(data, 0, other)
