"""PageLog: whatever comes in whatever order, the file holds each page once, as it was last."""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram
from reference.pagelog import PageLog as Oracle
from reference.ram import Record

from mig import _core
from mig._core import PageLog, RamParser, RamRecordError
from mig.errors import ChannelError

PAGE = 64
BLOCKS = {b"a": 6, b"pc.ram": 12, b"rom": 3}


class Writer:
    """A page log fed with bursts as the loader feeds it, and its oracle."""

    def __init__(
        self,
        file: BinaryIO,
        blocks: dict[bytes, int] = BLOCKS,
        *,
        page_size: int = PAGE,
        tail: int = 100,
        capacity: int = 4096,
        direct_fd: int = -1,
    ) -> None:
        self.file, self.blocks, self.page_size, self.start = file, blocks, page_size, tail
        self.parser = RamParser(list(blocks.items()), page_size, capacity)
        self.log = PageLog(file.fileno(), self.parser, direct_fd=direct_fd)
        self.log.append(bytes(tail))
        self.oracle = Oracle(page_size)
        self._current: bytes | None = None

    def put(self, records: list[Record]) -> None:
        data = ram.encode(records, self.page_size, self._current) + ram.eos()
        at, stop = 0, None
        while stop != _core.STOP_EOS:
            stop = self.parser.parse(data, at, len(data))
            assert stop != _core.STOP_MORE
            self.log.put(data, at)
            at += self.parser.consumed
        for record in records:
            self.oracle.put(record)
            self._current = record.block

    def finish(self) -> bytes:
        """The records of the file."""
        self.log.put_zeros()
        self.log.finish()
        assert os.fstat(self.file.fileno()).st_size == self.log.tail
        return os.pread(self.file.fileno(), 1 << 30, self.start)

    def check(self) -> list[Record]:
        data = self.finish()
        assert self.log.tail == self.start + len(data)
        records, end = ram.parse(data + ram.eos(), self.page_size)
        assert end == ram.End(len(data) + 8)
        keys = [(r.block, r.page) for r in records]
        assert len(keys) == len(set(keys)), "a page stands in the file twice"
        found = {(r.block, r.page): r.expand(self.page_size) for r in records}
        assert found == self.oracle.pages
        self.check_by_index(data)
        return records

    def check_by_index(self, data: bytes) -> None:
        """Read it as an image does: note the places, then look there."""
        parser = RamParser(list(self.blocks.items()), self.page_size)
        places = [np.zeros(n, dtype=np.int64) for n in self.blocks.values()]
        whole, at, stop = data + ram.eos(), 0, None
        while stop != _core.STOP_EOS:
            stop = parser.parse(whole, at, len(whole))
            if parser.npages:
                # a place is never 0 in a file that has something before its first record
                parser.index(at + 1, places[parser.current])
            at += parser.consumed
        for (block, npages), where in zip(self.blocks.items(), places, strict=True):
            for page in range(npages):
                place, wanted = int(where[page]), self.oracle.pages.get((block, page))
                if place > 0:
                    assert data[place - 1 : place - 1 + self.page_size] == wanted
                else:
                    zero = bytes(self.page_size)
                    assert wanted == (zero if place == _core.PAGE_ZERO else None)


@pytest.fixture
def file():
    with tempfile.TemporaryFile(buffering=0) as file:
        yield file


DELTAS = [b"\x05\x01A", b"\0\x7d" + b"D" * 125, b"\x7f\x01\0", b"", b"\0\x02AB\x03\x02CD"]


@settings(max_examples=150, deadline=None)
@given(
    bursts=st.lists(
        st.lists(
            st.builds(
                lambda block, page, contents: Record(block, page % BLOCKS[block], contents),
                st.sampled_from(list(BLOCKS)),
                st.integers(0, 11),
                st.one_of(
                    st.just(0),
                    st.integers(0, 255).map(lambda b: bytes([b]) * 128),
                    st.sampled_from(DELTAS).map(ram.Delta),
                ),
            ),
            max_size=20,
        ),
        max_size=4,
    ),
    capacity=st.sampled_from([1, 3, 4096]),
)
def test_differences_are_laid_over_what_the_file_has(bursts, capacity):
    with tempfile.TemporaryFile(buffering=0) as file:
        writer = Writer(file, page_size=128, capacity=capacity)
        for burst in bursts:
            writer.put(burst)
        assert not any(isinstance(r.contents, ram.Delta) for r in writer.check())


@pytest.mark.parametrize("direct", [False, True])
def test_a_difference_to_a_page_that_lies_anywhere(file, direct):
    """In the chunk being filled, on its way to the disk, on disk, and across two chunks."""
    fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT) if direct else -1
    try:
        page_size, npages = 4096, 1500
        writer = Writer(file, {b"r": npages}, page_size=page_size, direct_fd=fd)
        rng = np.random.default_rng(3)
        for first in range(0, npages, 100):
            writer.put([Record(b"r", i, rng.bytes(page_size)) for i in range(first, first + 100)])
            back = rng.integers(0, first + 100, 40)
            writer.put([Record(b"r", int(i), ram.Delta(b"\x09\x02xy")) for i in back])
        writer.check()
    finally:
        if direct:
            os.close(fd)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_wrong_difference_is_refused_with_its_place(file, before):
    parser = RamParser([(b"r", 8)], 4096)
    log = PageLog(file.fileno(), parser)
    good = [Record(b"r", 0, 0), Record(b"r", 1, b"\x01" * 4096), Record(b"r", 2, 0)][:before]
    head = ram.encode(good, 4096)
    data = head + ram.encode([Record(b"r", 3, ram.Delta(b"\0"))], 4096)
    parser.parse(data, 0, len(data))
    with pytest.raises(RamRecordError, match="ends within a run"):
        log.put(data, 0)
    assert parser.wrong_offset(data, 0) == len(head)


RECORDS = st.builds(
    lambda block, page, contents: Record(block, page % BLOCKS[block], contents),
    st.sampled_from(list(BLOCKS)),
    st.integers(0, 11),
    st.one_of(st.just(0), st.integers(0, 255).map(lambda b: bytes([b]) * PAGE)),
)


@settings(max_examples=200, deadline=None)
@given(
    bursts=st.lists(st.lists(RECORDS, max_size=25), max_size=5),
    capacity=st.sampled_from([1, 2, 5, 4096]),
    tail=st.sampled_from([0, 1, 100, 4096]),
)
def test_any_puts_leave_the_last_contents_of_every_page(bursts, capacity, tail):
    with tempfile.TemporaryFile(buffering=0) as file:
        writer = Writer(file, capacity=capacity, tail=tail)
        for burst in bursts:
            writer.put(burst)
        writer.check()


def data(value: int) -> bytes:
    return bytes([value]) * PAGE


@pytest.mark.parametrize(
    ("puts", "expected"),
    [
        # contents by page; "zeros" is a PAGE record of zeros
        ([(0, data(1)), (0, data(2))], data(2)),
        ([(0, 0), (0, data(1))], data(1)),
        ([(0, data(1)), (0, 0)], bytes(PAGE)),
        ([(0, data(1)), (0, 0), (0, data(2))], data(2)),
        ([(0, 0), (0, data(1)), (0, 0)], bytes(PAGE)),
        ([(0, 0), (0, 0)], 0),
        ([(0, data(0))], bytes(PAGE)),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["one burst", "a burst each"])
def test_a_page_that_comes_again_keeps_its_record(file, puts, expected, apart):
    writer = Writer(file)
    records = [Record(b"a", page, contents) for page, contents in puts]
    for burst in [[r] for r in records] if apart else [records]:
        writer.put(burst)
    assert writer.check() == [Record(b"a", 0, expected)]


def test_a_run_of_pages_is_written_in_order(file):
    writer = Writer(file)
    records = [Record(b"pc.ram", i, data(i + 1)) for i in range(12)]
    writer.put(records)
    assert writer.check() == records


def test_pages_between_rewritten_ones_go_to_the_end(file):
    writer = Writer(file)
    writer.put([Record(b"pc.ram", i, data(1)) for i in (0, 1, 2, 3)])
    writer.put([Record(b"pc.ram", i, data(2)) for i in (1, 5, 2, 3, 6, 0)])
    order = [(r.page, r.contents) for r in writer.check()]
    assert order == [(i, data(2)) for i in (0, 1, 2, 3, 5, 6)]


def test_blocks_can_take_turns(file):
    writer = Writer(file)
    for i in range(3):
        writer.put([Record(block, i, data(i + 1)) for block in BLOCKS])
    writer.put([Record(block, i, data(9)) for i in range(3) for block in reversed(BLOCKS)])
    assert len(writer.check()) == 9


def test_long_runs_of_rewritten_pages_are_written_whole(file):
    """More pieces than one burst holds in order, from the burst and from the log's own zeros."""
    n = 1000
    writer = Writer(file, {b"a": n, b"b": 5})
    writer.put([Record(b"a", i, bytes([i % 255 + 1]) * PAGE) for i in range(n)])
    writer.put([Record(b"a", i, 0) for i in range(n) if i % 7])
    writer.put([Record(b"a", i, bytes([i % 13 + 1]) * PAGE) for i in range(n - 1, -1, -3)])
    writer.put([Record(b"b", 0, data(1))])
    writer.put([Record(b"a", i, bytes([i % 11 + 1]) * PAGE) for i in range(0, n, 2)])
    assert len(writer.check()) == n + 1


def test_many_zero_pages_of_many_blocks_are_all_recorded_once_at_the_end(file):
    blocks = {b"a": 2500, b"b": 3, b"c": 1025, b"d": 1024}
    writer = Writer(file, blocks)
    for block, n in blocks.items():
        writer.put([Record(block, i, 0) for i in range(n)])
    writer.put([Record(b"c", 7, data(5)), Record(b"a", 2499, data(6))])
    records = writer.check()
    assert len(records) == sum(blocks.values())
    assert [r.contents for r in records[:2]] == [data(5), data(6)]
    assert all(r.contents == 0 for r in records[2:])


def test_a_log_without_puts_is_empty(file):
    writer = Writer(file)
    assert writer.finish() == b""
    assert writer.log.tail == 100


def test_zero_pages_cost_nothing_until_the_end(file):
    writer = Writer(file)
    writer.put([Record(b"a", 0, 0), Record(b"rom", 1, 0)])
    assert writer.log.tail == 100
    assert os.fstat(file.fileno()).st_size == 0
    assert {(r.block, r.page) for r in writer.check()} == {(b"a", 0), (b"rom", 1)}


@pytest.mark.parametrize("page_size", [64, 4096, 1 << 16])
def test_every_page_size(file, page_size):
    writer = Writer(file, {b"a": 4, b"n" * 255: 4}, page_size=page_size)
    for value in (1, 2):
        for name in (b"n" * 255, b"a"):
            contents = bytes([value]) * page_size
            writer.put([Record(name, i, contents) for i in (3, 0, 1)] + [Record(name, 2, 0)])
    writer.check()


def test_a_fill_byte_is_refused(file):
    writer = Writer(file)
    with pytest.raises(RamRecordError, match=r"older than QEMU 2\.0"):
        writer.put([Record(b"a", 0, data(1)), Record(b"a", 1, 7)])


@pytest.mark.parametrize("contents", [data(1), 0])
def test_a_file_that_cannot_be_written_is_a_channel_error(tmp_path, contents):
    path = tmp_path / "file"
    path.write_bytes(b"")

    def write(file: BinaryIO) -> None:
        writer = Writer(file)
        writer.put([Record(b"a", 0, contents)])
        writer.finish()

    with path.open("rb") as file, pytest.raises(ChannelError, match="Bad file descriptor"):
        write(file)


def test_a_full_device_is_a_channel_error():
    with open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123
        writer = Writer(file)
        writer.put([Record(b"a", 0, data(1)), Record(b"a", 1, data(1))])
        with pytest.raises(ChannelError, match="No space left"):
            writer.finish()


BIG = 4096


def big(value: int) -> bytes:
    return value.to_bytes(4, "little") * (BIG // 4)


@pytest.fixture(params=["cached", "direct"])
def big_writer(tmp_path, request):
    """A log of pages of 4 KiB, many chunks of them, written both ways."""
    path = tmp_path / "file"
    with path.open("w+b", buffering=0) as file:
        direct_fd = -1
        if request.param == "direct":
            try:
                direct_fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                pytest.skip(f"the file system of {tmp_path} has no O_DIRECT: {error}")
        try:
            yield Writer(file, {b"a": 3000, b"b": 9}, page_size=BIG, direct_fd=direct_fd)
        finally:
            if direct_fd >= 0:
                os.close(direct_fd)


def test_chunks_are_written_and_changed_wherever_they_are(big_writer):
    """On disk, in flight, in the chunk that is being filled, and across their borders."""
    writer = big_writer
    writer.put([Record(b"a", i, big(i)) for i in range(1, 2000)])
    writer.put([Record(b"a", i, big(i + 7)) for i in range(1990, 2010)])
    writer.put([Record(b"a", i, big(i + 8)) for i in range(1, 2000, 3)])
    writer.put([Record(b"b", i, 0) for i in range(9)])
    writer.put([Record(b"a", i, big(i + 9)) for i in range(1500, 2999)])
    writer.put([Record(b"a", i, 0) for i in range(1, 2999, 50)])
    assert len(writer.check()) == 2998 + 9


def test_a_chunk_ends_exactly_where_the_file_does(big_writer):
    writer = big_writer
    writer.log.append(bytes((1 << 20) - writer.log.tail))
    writer.start = 1 << 20
    assert writer.finish() == b""
    assert writer.log.tail == 1 << 20


def test_a_burst_from_other_data_is_refused(file):
    writer = Writer(file)
    burst = ram.encode([Record(b"a", 0, data(1))], PAGE)
    writer.parser.parse(burst, 0, len(burst))
    for wrong, start in ((burst[:-1], 0), (burst, 1), (b"", 0)):
        with pytest.raises(IndexError):
            writer.log.put(wrong, start)
