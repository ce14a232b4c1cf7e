"""RamParser: bursts of records, cut anywhere."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram
from reference.ram import Record

from mig import _core
from mig._core import RamParser, RamRecordError

PAGE = 64
BLOCKS = {b"a": 5, b"pc.ram": 100, b"n" * 255: 2}


def make_parser(capacity: int = 4096) -> RamParser:
    return RamParser(list(BLOCKS.items()), PAGE, capacity)


@st.composite
def record_lists(draw: st.DrawFn, max_size: int = 30) -> list[Record]:
    records = []
    for _ in range(draw(st.integers(0, max_size))):
        block = draw(st.sampled_from(list(BLOCKS)))
        page = draw(st.integers(0, BLOCKS[block] - 1))
        fill = st.sampled_from([0, 0, 1, 255])
        page_bytes = st.binary(min_size=1, max_size=2).map(lambda b: (b * PAGE)[:PAGE])
        records.append(Record(block, page, draw(st.one_of(fill, page_bytes))))
    return records


def burst(parser: RamParser, data: bytes, start: int) -> list[Record]:
    """The records of the parser's last burst, which was parsed from data[start:]."""
    name = list(BLOCKS)[parser.current] if parser.npages else b""
    out = []
    for page, source in parser.records():
        if source >= 0:
            contents: bytes | int = data[start + source : start + source + PAGE]
        else:
            contents = -1 - source
        out.append(Record(name, page, contents))
    return out


def parse_all(parser: RamParser, data: bytes) -> tuple[list[Record], int, int]:
    """Parse until something is missing or the payload ends: records, stop, offset."""
    records, at = [], 0
    while True:
        stop = parser.parse(data, at, len(data))
        found = burst(parser, data, at)
        assert parser.nfill == sum(isinstance(r.contents, int) for r in found)
        records += found
        at += parser.consumed
        if stop in (_core.STOP_MORE, _core.STOP_EOS, _core.STOP_OTHER):
            return records, stop, at
        assert stop in (_core.STOP_FULL, _core.STOP_SWITCH)


@settings(max_examples=150, deadline=None)
@given(records=record_lists(), capacity=st.sampled_from([1, 2, 3, 4096]))
def test_records_come_out_as_the_oracle_put_them_in(records, capacity):
    data = ram.encode(records, PAGE) + ram.eos()
    found, stop, at = parse_all(make_parser(capacity), data)
    assert found == records
    assert (stop, at) == (_core.STOP_EOS, len(data))


@settings(max_examples=60, deadline=None)
@given(records=record_lists(4))
def test_every_truncation_says_exactly_what_is_needed(records):
    whole = ram.encode(records, PAGE) + ram.eos()
    for cut in range(len(whole)):
        data = whole[:cut]
        parser = make_parser()
        found, stop, at = parse_all(parser, data)
        expected, end = ram.parse(data, PAGE)
        assert found == expected
        assert stop == _core.STOP_MORE
        assert at + parser.need > cut
        assert end == ram.Incomplete(parser.need)


@settings(max_examples=60, deadline=None)
@given(records=record_lists(12))
def test_feeding_just_what_is_needed_reads_the_whole_stream(records):
    """Nothing is asked for that the record does not have: at its end nothing is left over."""
    whole = ram.encode(records, PAGE) + ram.eos()
    parser, found, at, have = make_parser(), [], 0, 0
    while True:
        stop = parser.parse(whole[:have], at, have)
        found += burst(parser, whole, at)
        at += parser.consumed
        if stop == _core.STOP_EOS:
            break
        if stop == _core.STOP_MORE:
            assert at + parser.need > have
            have = at + parser.need
            assert have <= len(whole)
    assert found == records
    assert at == have == len(whole)


DELTAS = st.one_of(
    st.binary(max_size=128).map(ram.Delta),
    st.just(0),
    st.just(b"\x07" * 128),
)


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(DELTAS, max_size=12), named=st.booleans())
def test_differences_come_out_wherever_they_are_cut(contents, named):
    names = [b"a", b"pc.ram"] if named else [b"a", b"a"]
    records = [Record(names[i % 2], i % 5, c) for i, c in enumerate(contents)]
    whole = ram.encode(records, 128) + ram.eos()
    for step in (1, 7, len(whole)):
        parser, found, at, have = RamParser([(b"a", 5), (b"pc.ram", 5)], 128, 5), [], 0, 0
        stop = _core.STOP_MORE
        while stop != _core.STOP_EOS:
            stop = parser.parse(whole, at, have)
            name = [b"a", b"pc.ram"][parser.current]
            assert parser.nxbzrle == sum(kind == ram.XBZRLE for kind, _ in parser.kinds())
            for (page, src), (kind, length) in zip(parser.records(), parser.kinds(), strict=True):
                data = whole[at + src : at + src + length]
                value = {ram.ZERO: -1 - src, ram.PAGE: data, ram.XBZRLE: ram.Delta(data)}[kind]
                found.append(Record(name, page, value))
            at += parser.consumed
            if stop == _core.STOP_MORE:
                assert at + parser.need > have
                assert at + parser.need <= len(whole)
                have = min(max(have + step, at + parser.need), len(whole))
        assert found == records
        assert at == len(whole)


@pytest.mark.parametrize("page_size", [1 << bits for bits in range(6, 17)])
def test_every_page_size(page_size):
    records = [Record(b"a", 1, b"\x5a" * page_size), Record(b"a", 0, 0), Record(b"b", 3, 7)]
    data = ram.encode(records, page_size) + ram.eos()
    parser = RamParser([(b"a", 2), (b"b", 4)], page_size)
    assert parser.parse(data, 0, len(data)) == _core.STOP_SWITCH
    assert parser.records() == [(1, 10), (0, -1)]
    at = parser.consumed
    assert parser.parse(data, at, len(data)) == _core.STOP_EOS
    assert (parser.current, parser.records()) == (1, [(3, -8)])
    assert at + parser.consumed == len(data)


def test_before_the_first_record_there_is_no_block():
    parser = make_parser()
    assert parser.current == -1
    assert parser.parse(b"", 0, 0) == _core.STOP_MORE
    assert (parser.need, parser.npages, parser.consumed, parser.current) == (8, 0, 0, -1)


def test_the_block_is_kept_over_calls_and_ends_of_payload():
    parser = make_parser()
    first = ram.encode([Record(b"pc.ram", 99, 0)], PAGE) + ram.eos()
    assert parser.parse(first, 0, len(first)) == _core.STOP_EOS
    more = ram.encode([Record(b"pc.ram", 98, 1)], PAGE, b"pc.ram") + ram.eos()
    assert parser.parse(more, 0, len(more)) == _core.STOP_EOS
    assert (parser.current, parser.records()) == (1, [(98, -2)])


def test_another_block_stops_the_burst_before_its_record():
    parser = make_parser()
    first = ram.encode([Record(b"a", 0, 0)], PAGE)
    data = first + ram.encode([Record(b"pc.ram", 1, 0)], PAGE)
    assert parser.parse(data, 0, len(data)) == _core.STOP_SWITCH
    assert (parser.current, parser.consumed, parser.npages) == (0, len(first), 1)


def test_naming_the_same_block_again_is_no_switch():
    parser = make_parser()
    data = ram.encode([Record(b"a", 0, 0)], PAGE) * 3 + ram.eos()
    assert parser.parse(data, 0, len(data)) == _core.STOP_EOS
    assert parser.npages == 3


def test_a_burst_ends_when_the_arrays_are_full():
    parser = make_parser(capacity=1)
    data = ram.encode([Record(b"a", 0, 0), Record(b"a", 1, 0)], PAGE) + ram.eos()
    assert parser.parse(data, 0, len(data)) == _core.STOP_FULL
    assert parser.records() == [(0, -1)]
    at = parser.consumed
    assert parser.parse(data, at, len(data)) == _core.STOP_FULL
    assert parser.records() == [(1, -1)]
    at += parser.consumed
    assert parser.parse(data, at, len(data)) == _core.STOP_EOS
    assert parser.npages == 0


@pytest.mark.parametrize("flags", [0x04, 0x06, 0x0A, 0x18, 0x00, 0x20, 0x24])
def test_records_that_are_no_pages_are_left_to_the_caller(flags):
    parser = make_parser()
    head = ram.encode([Record(b"a", 0, 0)], PAGE)
    data = head + ram.be64(4 * PAGE + flags) + bytes(100)
    assert parser.parse(data, 0, len(data)) == _core.STOP_OTHER
    assert parser.word == 4 * PAGE + flags
    assert (parser.consumed, parser.npages) == (len(head), 1)


@pytest.mark.parametrize("flag", [0x80, 0x200, 0x400, 0x800])
def test_flags_above_those_of_pages_are_left_to_the_caller(flag):
    parser = RamParser([(b"a", 4)], 4096)
    data = ram.be64(4096 + flag + ram.CONTINUE) + bytes(5000)
    assert parser.parse(data, 0, len(data)) == _core.STOP_OTHER
    assert parser.word == 4096 + flag + ram.CONTINUE


def test_the_end_may_say_continue():
    data = ram.be64(ram.EOS + ram.CONTINUE)
    assert make_parser().parse(data, 0, 8) == _core.STOP_EOS


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("contents", [0, bytes(PAGE)])
def test_continue_before_any_block_is_an_error(contents):
    data = ram.encode([Record(b"a", 0, contents)], PAGE, b"a")
    with pytest.raises(RamRecordError, match="before any block"):
        make_parser().parse(data, 0, len(data))


@pytest.mark.parametrize("name", [b"b", b"", b"A", b"a\0", b"pc.ra", b"pc.ramx", b"n" * 254])
def test_an_unknown_block_is_an_error(name):
    data = ram.encode([Record(name, 0, 0)], PAGE)
    with pytest.raises(RamRecordError, match="does not have"):
        make_parser().parse(data, 0, len(data))


@pytest.mark.parametrize("page", [5, 6, 2**58 - 1])
@pytest.mark.parametrize("contents", [0, bytes(PAGE)])
def test_a_page_outside_of_its_block_is_an_error(page, contents):
    parser = make_parser()
    data = ram.encode([Record(b"a", 4, 0), Record(b"a", page, contents)], PAGE)
    with pytest.raises(RamRecordError, match="outside its block"):
        parser.parse(data, 0, len(data))


def test_a_bad_record_is_known_before_its_contents_arrive():
    data = ram.encode([Record(b"a", 5, bytes(PAGE))], PAGE)[:-PAGE]
    with pytest.raises(RamRecordError, match="outside its block"):
        make_parser().parse(data, 0, len(data))


def test_a_parser_without_blocks_knows_none():
    parser = RamParser([], PAGE)
    data = ram.encode([Record(b"a", 0, 0)], PAGE)
    with pytest.raises(RamRecordError):
        parser.parse(data, 0, len(data))
    assert parser.parse(ram.eos(), 0, 8) == _core.STOP_EOS


def test_ranges_outside_of_the_data_are_refused():
    parser = make_parser()
    for start, end in ((0, 9), (9, 9), (5, 4), (2**63, 2**63)):
        with pytest.raises(IndexError):
            parser.parse(bytes(8), start, end)


@pytest.mark.parametrize("page_size", [0, 32, 65, 3 * 64, 1 << 31])
def test_page_sizes_that_cannot_be_are_refused(page_size):
    with pytest.raises(ValueError, match="page size"):
        RamParser([], page_size)


@pytest.mark.parametrize("capacity", [0, (1 << 24) + 1])
def test_capacities_that_cannot_be_are_refused(capacity):
    with pytest.raises(ValueError, match="capacity"):
        RamParser([], PAGE, capacity)


def test_names_longer_than_the_wire_allows_are_refused():
    with pytest.raises(ValueError, match="255"):
        RamParser([(b"x" * 256, 1)], PAGE)


# ---- place -----------------------------------------------------------------------------------


def place(records: list[Record], memory: bytearray, *, fresh: bool = False) -> _core.Bitmap:
    data = ram.encode(records, PAGE)
    parser = RamParser([(b"a", len(memory) // PAGE)], PAGE)
    parser.parse(data, 0, len(data))
    received = _core.Bitmap(len(memory) // PAGE)
    parser.place(data, 0, _core.Pages(memory, PAGE, writable=True), received, fresh)
    return received


def test_place_copies_pages_and_notes_them():
    memory = bytearray(b"\xee" * (4 * PAGE))
    records = [Record(b"a", 2, b"\x01" * PAGE), Record(b"a", 0, 0), Record(b"a", 3, 9)]
    received = place(records, memory)
    assert memory == bytes(PAGE) + b"\xee" * PAGE + b"\x01" * PAGE + b"\x09" * PAGE
    assert list(received) == [True, False, True, True]


@pytest.mark.parametrize("fresh", [False, True])
def test_the_last_record_of_a_page_wins(fresh):
    memory = bytearray(2 * PAGE)
    data = b"\x01" * PAGE
    records = [Record(b"a", page, what) for page, what in ((0, data), (0, 0), (1, 0), (1, data))]
    place(records, memory, fresh=fresh)
    assert memory == bytes(PAGE) + data


def test_zeros_into_fresh_memory_are_not_written():
    """Seen by lying: the memory is not zero, yet said to be."""
    memory = bytearray(b"\xee" * PAGE)
    received = place([Record(b"a", 0, 0)], memory, fresh=True)
    assert memory == b"\xee" * PAGE
    assert received[0]


def test_fill_bytes_are_written_into_fresh_memory_too():
    memory = bytearray(PAGE)
    place([Record(b"a", 0, 255)], memory, fresh=True)
    assert memory == b"\xff" * PAGE


def test_place_refuses_memory_that_does_not_fit():
    data = ram.encode([Record(b"a", 1, 0)], PAGE)
    parser = RamParser([(b"a", 2)], PAGE)
    parser.parse(data, 0, len(data))
    good = _core.Pages(bytearray(2 * PAGE), PAGE, writable=True)
    for pages, received in (
        (_core.Pages(bytearray(PAGE), PAGE, writable=True), _core.Bitmap(2)),
        (_core.Pages(bytearray(2 * PAGE), PAGE), _core.Bitmap(2)),
        (_core.Pages(bytearray(4 * PAGE), 2 * PAGE, writable=True), _core.Bitmap(2)),
        (good, _core.Bitmap(1)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            parser.place(data, 0, pages, received, False)
    with pytest.raises(IndexError):
        parser.place(data[:-1], 0, good, _core.Bitmap(2), False)
    with pytest.raises(IndexError):
        parser.place(data, 1, good, _core.Bitmap(2), False)
    good.release()
    with pytest.raises(ValueError, match="does not fit"):
        parser.place(data, 0, good, _core.Bitmap(2), False)


def test_place_of_an_empty_burst_does_nothing():
    parser = make_parser()
    parser.parse(ram.eos(), 0, 8)
    parser.place(ram.eos(), 0, _core.Pages(b"", PAGE), _core.Bitmap(0), False)


# ---- index -----------------------------------------------------------------------------------


def test_index_notes_places_in_the_file():
    records = [Record(b"a", 1, b"\x01" * PAGE), Record(b"a", 3, 0), Record(b"a", 0, b"\x02" * PAGE)]
    data = ram.encode(records, PAGE)
    parser = RamParser([(b"a", 4)], PAGE)
    parser.parse(data, 0, len(data))
    where = np.zeros(4, dtype=np.int64)
    parser.index(1000, where)
    first = 1000 + 8 + 2
    assert list(where) == [first + PAGE + 8 + 1 + 8, first, _core.PAGE_NONE, _core.PAGE_ZERO]


def test_index_has_no_place_for_a_fill_byte():
    data = ram.encode([Record(b"a", 0, 1)], PAGE)
    parser = RamParser([(b"a", 4)], PAGE)
    parser.parse(data, 0, len(data))
    with pytest.raises(RamRecordError, match=r"older than QEMU 2\.0"):
        parser.index(0, np.zeros(4, dtype=np.int64))


def test_index_refuses_places_that_are_too_few():
    data = ram.encode([Record(b"a", 0, 0)], PAGE)
    parser = RamParser([(b"a", 4)], PAGE)
    parser.parse(data, 0, len(data))
    with pytest.raises(ValueError, match="shorter"):
        parser.index(0, np.zeros(3, dtype=np.int64))


def test_words_are_big_endian():
    data = struct.pack(">Q", 2 * PAGE + ram.ZERO) + b"\x01a\0"
    parser = make_parser()
    assert parser.parse(data, 0, len(data)) == _core.STOP_MORE
    assert parser.records() == [(2, -1)]
