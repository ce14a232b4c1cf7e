"""Saving and loading the `ram` section, against hand-made streams and the oracle."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram, stream
from reference.ram import Record

from mig import _core
from mig.errors import MismatchError, StreamError, TruncatedError, UnsupportedError
from mig.ram.encode import PlainEncoder, RecordWriter, ZeroFinder
from mig.ram.load import RamLoader
from mig.ram.save import RamSaver
from mig.ram.search import MAX_BATCH, PageSearch, SourceBlock
from mig.stats import RamCounters
from mig.stream.reader import StreamReader
from mig.stream.writer import StreamWriter

PAGE = 4096
SECTION = 7


class Collector:
    def __init__(self) -> None:
        self.sent = b""

    def send(self, out: _core.OutQueue) -> int:
        data = out.tobytes()
        out.clear()
        self.sent += data
        return len(data)


class Memory:
    """A PageSink: blocks of bytes, filled as they come."""

    def __init__(self, refuse: str | None = None) -> None:
        self.blocks: dict[str, bytearray] = {}
        self._pages: list[tuple[_core.Pages, _core.Bitmap]] = []
        self._refuse = refuse

    def open_blocks(self, blocks, page_size):
        for block in blocks:
            if block.idstr == self._refuse:
                raise MismatchError("not mine", block=block.idstr)
            memory = self.blocks[block.idstr] = bytearray(b"\xee" * block.used_length)
            pages = _core.Pages(memory, page_size, writable=True)
            self._pages.append((pages, _core.Bitmap(block.npages(page_size))))

    def put(self, parser, data, start):
        if parser.npages:
            parser.place(data, start, *self._pages[parser.current], False)

    def received(self) -> dict[str, list[bool]]:
        return {name: list(bits) for name, (_, bits) in zip(self.blocks, self._pages, strict=True)}


class SmallReads:
    """A source that gives 1 to 5000 bytes at a time."""

    timeout = None

    def __init__(self, data: bytes, seed: int) -> None:
        self._data, self._at, self._rng = data, 0, random.Random(seed)

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        wanted = min(len(data) - start, at_least + self._rng.choice([0, 1, 13, 5000]))
        piece = self._data[self._at : self._at + wanted]
        data[start : start + len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def source_block(
    name: str, memory: bytes, *, dirty: bool = True, detect_zero: bool = True, page_size: int = PAGE
) -> SourceBlock:
    pages = _core.Pages(memory, page_size)
    bits = _core.Bitmap(len(memory) // page_size, fill=dirty)
    return SourceBlock(name, len(memory), pages, detect_zero, bits)


def load_sections(
    data: bytes, memory: Memory, *, page_size: int = PAGE, seed: int | None = None
) -> RamCounters:
    """Read the sections as the stream loader does, to the end of the data."""
    source = None if seed is None else SmallReads(data, seed)
    reader = StreamReader(data=data) if source is None else StreamReader(source, buffer_size=64)
    counters = RamCounters()
    loader = RamLoader(reader, memory, page_size, counters)
    while (kind := reader.peek()) is not None:
        reader.u8("type")
        if kind == 1:
            reader.read(4 + 1 + 3 + 8, "header")
        else:
            assert kind in (2, 3)
            assert reader.u32("id") == SECTION
        reader.section = "ram"
        loader.load_payload()
        assert reader.read(5, "footer") == stream.footer(SECTION)
    return counters


# ---- search ----------------------------------------------------------------------------------


def test_search_walks_through_the_blocks_and_clears_what_it_gives():
    a, b = source_block("a", bytes(3 * PAGE)), source_block("b", bytes(70 * PAGE), dirty=False)
    b.dirty.set(0)
    b.dirty.set(64, 3)
    search = PageSearch([a, b])
    assert search.remaining == 7 * PAGE
    first = search.next_batch()
    assert (first.block, list(first.index)) == (a, [0, 1, 2])
    second = search.next_batch()
    assert (second.block, list(second.index)) == (b, [0, 64, 65, 66])
    assert search.next_batch() is None
    assert search.next_batch() is None
    assert search.remaining == 0


def test_search_gives_batches_of_limited_length():
    block = source_block("a", bytes((2 * MAX_BATCH + 5) * 64), page_size=64)
    search, seen, lengths = PageSearch([block]), [], []
    while batch := search.next_batch():
        seen += [int(i) for i in batch.index]
        lengths.append(len(batch.index))
    assert lengths == [MAX_BATCH, MAX_BATCH, 5]
    assert seen == list(range(2 * MAX_BATCH + 5))


class ToldLog:
    """A log that finds what it is told, and remembers what was cleared."""

    def __init__(self, chunk_pages: int = 0) -> None:
        self.chunk_pages = chunk_pages
        self.found: dict[str, list[int]] = {}
        self.cleared: list[tuple[str, int, int]] = []

    def sync(self, idstr: str, dirty: _core.Bitmap) -> int:
        found = [page for page in self.found.pop(idstr, []) if not dirty[page]]
        for page in found:
            dirty.set(page)
        return len(found)

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        self.cleared.append((idstr, first_page, npages))


def test_search_goes_on_from_where_it_is_and_begins_again_after_the_last_block():
    a, b = source_block("a", bytes(4 * PAGE)), source_block("b", bytes(4 * PAGE))
    log = ToldLog()
    search, seen = PageSearch([a, b], log), []
    for _ in range(3):
        batch = search.next_batch(2)
        seen.append((batch.block.idstr, list(batch.index)))
    log.found = {"a": [3, 0], "b": [1, 3]}
    assert search.sync() == 3  # page 3 of b was still to be sent
    while batch := search.next_batch():
        seen.append((batch.block.idstr, list(batch.index)))
    assert seen == [
        ("a", [0, 1]),
        ("a", [2, 3]),
        ("b", [0, 1]),
        ("b", [2, 3]),
        ("a", [0, 3]),
        ("b", [1]),
    ]
    assert search.remaining == 0


def test_search_comes_back_to_the_front_of_the_block_that_it_is_in():
    block, log = source_block("a", bytes(8 * PAGE)), ToldLog()
    search = PageSearch([block], log)
    assert list(search.next_batch(6).index) == list(range(6))
    log.found = {"a": [2, 7]}
    search.sync()
    assert list(search.next_batch().index) == [6, 7]
    assert list(search.next_batch().index) == [2]


def test_writes_are_logged_again_before_the_first_page_of_a_chunk_is_sent():
    block, log = source_block("a", bytes(70 * PAGE)), ToldLog(chunk_pages=16)
    search = PageSearch([block], log)
    search.next_batch(20)
    assert log.cleared == [("a", 0, 16), ("a", 16, 16)]
    search.next_batch(4)
    assert len(log.cleared) == 2
    while search.next_batch():
        pass
    assert log.cleared[2:] == [("a", 32, 16), ("a", 48, 16), ("a", 64, 6)]
    log.cleared.clear()
    log.found = {"a": [40]}
    search.sync()
    assert list(search.next_batch().index) == [40]
    assert log.cleared == [("a", 32, 16)]


def test_discarded_pages_are_not_sent_whatever_the_log_says():
    plugged, log = source_block("a", bytes(8 * PAGE)), ToldLog()
    block = replace(plugged, discarded=[(2, 3), (7, 1)])
    search = PageSearch([block], log)
    assert search.remaining == 4 * PAGE
    assert list(search.next_batch().index) == [0, 1, 5, 6]
    log.found = {"a": [1, 2, 4, 7]}
    assert search.sync() == 1
    assert search.remaining == PAGE
    assert list(search.next_batch().index) == [1]


def test_pages_that_nobody_needs_are_not_sent():
    a, b = source_block("a", bytes(4 * PAGE)), source_block("b", bytes(4 * PAGE))
    search = PageSearch([a, b])
    search.forget("b", 1, 2)
    assert search.remaining == 6 * PAGE
    assert len(search.next_batch().index) == 4
    assert list(search.next_batch().index) == [0, 3]


def test_search_of_no_blocks_is_over():
    assert PageSearch([]).next_batch() is None
    assert PageSearch([]).remaining == 0


# ---- save ------------------------------------------------------------------------------------


def saver_of(
    blocks: list[SourceBlock], log: ToldLog | None = None
) -> tuple[RamSaver, PageSearch, Collector, StreamWriter]:
    sink, search = Collector(), PageSearch(blocks, log)
    writer = StreamWriter(sink)
    return plain_saver(writer, search, RamCounters()), search, sink, writer


def plain_saver(writer: StreamWriter, search: PageSearch, counters: RamCounters) -> RamSaver:
    encoder = PlainEncoder(RecordWriter(writer), ZeroFinder(lambda: True), counters)
    return RamSaver(writer, search, encoder, SECTION, counters)


def test_the_start_section_is_the_block_list():
    saver, _, sink, writer = saver_of(
        [source_block("pc.ram", bytes(2 * PAGE)), source_block("vga", bytes(PAGE))]
    )
    saver.start()
    writer.flush()
    blocks = {"pc.ram": 2 * PAGE, "vga": PAGE}
    assert sink.sent == stream.ram_start(SECTION, blocks) + stream.footer(SECTION)


def test_without_footers_sections_just_end():
    saver, _, sink, writer = saver_of([source_block("a", bytes(PAGE))])
    saver.footers = False
    saver.start()
    saver.end()
    writer.flush()
    payload = ram.encode([Record(b"a", 0, 0)], PAGE)
    expected = stream.ram_start(SECTION, {"a": PAGE}) + stream.ram_more(3, SECTION, payload)
    assert sink.sent == expected


def test_known_zero_pages_are_not_looked_at():
    """With detect_zero off a page of zeros that has storage is sent whole."""
    where = np.array([8, _core.PAGE_ZERO], dtype=np.int64)
    pages = _core.Pages(bytes(8 + PAGE), PAGE, where=where)
    block = SourceBlock("a", 2 * PAGE, pages, False, _core.Bitmap(2, fill=True))
    counters, sink = RamCounters(), Collector()
    writer = StreamWriter(sink)
    plain_saver(writer, PageSearch([block]), counters).end()
    writer.flush()
    payload = ram.encode([Record(b"a", 0, bytes(PAGE)), Record(b"a", 1, 0)], PAGE)
    assert sink.sent == stream.ram_more(3, SECTION, payload) + stream.footer(SECTION)
    assert (counters.normal, counters.fill) == (1, 1)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_what_is_saved_is_the_oracle_s_stream_and_loads_again(data, seed):
    rng = random.Random(seed)
    memories = {
        name: bytearray(
            b"".join(bytes([rng.choice([0, 1, 2])]) * PAGE for _ in range(rng.randint(1, 9)))
        )
        for name in ("pc.ram", "a", "vga.vram")
    }
    blocks = [source_block(name, memory) for name, memory in memories.items()]
    log = ToldLog()
    saver, search, sink, writer = saver_of(blocks, log)
    saver.start()
    expected = stream.ram_start(SECTION, {n: len(m) for n, m in memories.items()})
    expected += stream.footer(SECTION)
    current = None

    def payload(batch_block: str, index: list[int]) -> bytes:
        nonlocal current
        memory, records = memories[batch_block], []
        for i in index:
            page = bytes(memory[i * PAGE : (i + 1) * PAGE])
            records.append(Record(batch_block.encode(), i, page if any(page) else 0))
        encoded = ram.encode(records, PAGE, current)
        current = batch_block.encode()
        return encoded

    for _ in range(data.draw(st.integers(1, 3))):
        while batch := search.next_batch():
            index = [int(i) for i in batch.index]
            saver.part(batch)
            writer.flush()
            part = stream.ram_more(2, SECTION, payload(batch.block.idstr, index))
            expected += part + stream.footer(SECTION)
        for block in blocks:
            log.found[block.idstr] = []
            for i in range(len(block.dirty)):
                if rng.random() < 0.4:
                    value = rng.choice([0, 0, 3])
                    memories[block.idstr][i * PAGE : (i + 1) * PAGE] = bytes([value]) * PAGE
                    log.found[block.idstr].append(i)
        search.sync()
        search.rewind()
    last = b""
    for block in blocks:
        index = [i for i in range(len(block.dirty)) if block.dirty[i]]
        if index:
            last += payload(block.idstr, index)
    saver.end()
    writer.flush()
    expected += stream.ram_more(3, SECTION, last) + stream.footer(SECTION)
    assert sink.sent == expected

    for reading in (None, seed):
        memory = Memory()
        counters = load_sections(sink.sent, memory, seed=reading)
        assert memory.blocks == memories
        assert counters.total == sum(map(len, memories.values()))
        assert all(all(bits) for bits in memory.received().values())


# ---- load ------------------------------------------------------------------------------------

BLOCKS = {"a": 4 * PAGE, "pc.ram": 8 * PAGE}


def part(payload: bytes) -> bytes:
    return stream.ram_more(2, SECTION, payload) + stream.footer(SECTION)


def start() -> bytes:
    return stream.ram_start(SECTION, BLOCKS) + stream.footer(SECTION)


def page(value: int) -> bytes:
    return bytes([value]) * PAGE


def test_the_block_is_remembered_over_sections():
    data = start() + part(ram.encode([Record(b"pc.ram", 1, page(1))], PAGE))
    data += part(b"") + part(ram.encode([Record(b"pc.ram", 2, page(2))], PAGE, b"pc.ram"))
    memory = Memory()
    load_sections(data, memory)
    assert memory.blocks["pc.ram"][PAGE : 3 * PAGE] == page(1) + page(2)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (page(1), 0, page(0)),
        (0, page(1), page(1)),
        (page(1), page(2), page(2)),
        (page(1), 7, page(7)),
        (9, 0, page(0)),
    ],
)
def test_the_last_record_of_a_page_wins_in_one_burst_and_over_sections(first, second, expected):
    records = [Record(b"a", 1, first), Record(b"a", 1, second)]
    one = start() + part(ram.encode(records, PAGE))
    two = start() + part(ram.encode(records[:1], PAGE)) + part(ram.encode(records[1:], PAGE, b"a"))
    for data in (one, two):
        memory = Memory()
        load_sections(data, memory)
        assert memory.blocks["a"] == b"\xee" * PAGE + expected + b"\xee" * (2 * PAGE)
        assert memory.received()["a"] == [False, True, False, False]


def test_fill_bytes_fill_the_page():
    memory = Memory()
    load_sections(start() + part(ram.encode([Record(b"a", 3, 0xAB)], PAGE)), memory)
    assert memory.blocks["a"][3 * PAGE :] == page(0xAB)


def test_records_are_counted():
    records = [Record(b"a", 0, page(1)), Record(b"a", 1, 0), Record(b"pc.ram", 0, 0)]
    counters = load_sections(start() + part(ram.encode(records, PAGE)), Memory())
    assert (counters.total, counters.normal, counters.fill) == (12 * PAGE, 1, 2)


def test_a_setup_section_may_end_without_a_block_list():
    empty = stream.section(1, SECTION, "ram", 0, 4) + ram.eos() + stream.footer(SECTION)
    listed = part(ram.block_list(BLOCKS) + ram.encode([Record(b"a", 0, page(1))], PAGE))
    memory = Memory()
    load_sections(empty + listed, memory)
    assert memory.blocks["a"].startswith(page(1))


def load_error(data: bytes, memory: Memory | None = None) -> StreamError:
    with pytest.raises(StreamError) as caught:
        load_sections(data, memory or Memory())
    return caught.value


def test_pages_before_the_block_list_are_refused():
    head = stream.section(1, SECTION, "ram", 0, 4)
    error = load_error(head + ram.encode([Record(b"a", 0, 0)], PAGE))
    assert "before the block list" in str(error)
    assert (error.offset, error.section) == (len(head), "ram")


def test_a_block_list_that_the_sink_refuses_is_a_mismatch_with_its_place():
    error = load_error(start(), Memory(refuse="pc.ram"))
    assert isinstance(error, MismatchError)
    assert (error.block, error.section) == ("pc.ram", "ram")
    assert error.offset == len(stream.section(1, SECTION, "ram", 0, 4))


def bad_records() -> list:
    good = ram.encode([Record(b"a", 0, page(1)), Record(b"a", 1, 0)], PAGE)
    return [
        pytest.param(
            good, ram.encode([Record(b"a", 4, 0)], PAGE, b"a"), "outside its block", id="offset"
        ),
        pytest.param(good, ram.encode([Record(b"x", 0, 0)], PAGE), "does not have", id="name"),
        pytest.param(
            b"", ram.encode([Record(b"a", 0, 0)], PAGE, b"a"), "before any block", id="continue"
        ),
        pytest.param(good, ram.be64(0x400), "flags 0x400", id="flag"),
        pytest.param(b"", ram.be64(0x400 + ram.CONTINUE), "flags 0x400", id="first flag"),
        pytest.param(good, ram.be64(0), "flags 0x0", id="no flag"),
        pytest.param(good, ram.be64(ram.MEM_SIZE + PAGE), "second block list", id="second list"),
    ]


@pytest.mark.parametrize(("good", "bad", "match"), bad_records())
def test_a_bad_record_is_refused_at_its_offset(good, bad, match):
    before = start() + stream.ram_more(2, SECTION, good)[:-8]
    error = load_error(before + bad + ram.eos())
    assert match in str(error)
    assert error.section == "ram"
    assert error.offset == len(before)


def test_the_block_that_is_named_in_an_error_is_that_of_the_record():
    payload = ram.encode([Record(b"pc.ram", 0, 0), Record(b"a", 4, 0)], PAGE)
    error = load_error(start() + part(payload))
    assert "outside its block" in str(error)
    assert error.block == "a"


@pytest.mark.parametrize(
    ("flag", "capability"),
    [(0x200, "multifd")],
)
@pytest.mark.parametrize("good", [b"", ram.encode([Record(b"a", 0, 0)], PAGE)])
def test_records_of_other_features_name_the_capability(flag, capability, good):
    before = start() + stream.ram_more(2, SECTION, good)[:-8]
    error = load_error(before + ram.be64(PAGE + flag + ram.CONTINUE) + bytes(100))
    assert isinstance(error, UnsupportedError)
    assert error.capability == capability
    assert f"'{capability}'" in str(error)
    assert (error.offset, error.section) == (len(before), "ram")


def test_a_source_that_migrates_by_rdma_is_told_so():
    error = load_error(start() + part(ram.be64(0x80 + ram.CONTINUE)))
    assert isinstance(error, UnsupportedError)
    assert "RDMA" in str(error)
    assert error.capability is None


def test_a_payload_cut_anywhere_is_a_truncation():
    head = start()
    records = [Record(b"pc.ram", 1, 0), Record(b"a", 0, page(1)), Record(b"a", 1, 0)]
    payload = part(ram.encode(records, PAGE))
    cuts = [*range(80), *range(len(payload) - 40, len(payload))]
    for cut in cuts[1:]:
        for seed in (None, 1):
            with pytest.raises(TruncatedError) as caught:
                load_sections(head + payload[:cut], Memory(), seed=seed)
            assert f"after {len(head) + cut} bytes" in str(caught.value)


def test_blocks_of_no_length_are_loaded():
    data = stream.ram_start(SECTION, {"none": 0, "a": PAGE}) + stream.footer(SECTION)
    memory = Memory()
    load_sections(data + part(ram.encode([Record(b"a", 0, page(1))], PAGE)), memory)
    assert memory.blocks == {"none": b"", "a": page(1)}


@pytest.mark.parametrize("page_size", [1024, 16384, 65536])
def test_other_page_sizes_are_loaded(page_size):
    blocks = {"a": 4 * page_size}
    data = stream.ram_start(SECTION, blocks) + stream.footer(SECTION)
    contents = bytes([5]) * page_size
    memory = Memory()
    load_sections(
        data + part(ram.encode([Record(b"a", 3, contents)], page_size)), memory, page_size=page_size
    )
    assert memory.blocks["a"] == b"\xee" * (3 * page_size) + contents
