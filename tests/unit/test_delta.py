"""XBZRLE over a migration's sections: what is sent, what the cache is then, and what arrives."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram, stream
from reference.delta import DeltaSender
from reference.ram import Delta, Record
from unit.ends import NAMES, SECTION, Collector, Source, Target, begin

import mig
from mig import _core
from mig.engine.convergence import DirtyRate
from mig.errors import OptionError, StreamError, TruncatedError
from mig.events import PassStarted
from mig.guest import ProcessGuest

WRITES = st.lists(
    st.tuples(
        st.sampled_from(list(NAMES)),
        st.integers(0, 8),
        st.integers(0, 1 << 16),
        st.sampled_from(["word", "page", "zeros", "nothing"]),
        st.integers(0, 3),
    ),
    max_size=12,
)


def written(kind: str, seed: int) -> bytes:
    """What a guest writes: a whole page is too much for a difference."""
    rng = random.Random(seed)
    data = {"word": rng.randbytes(4), "page": rng.randbytes(1 << 16), "zeros": bytes(1 << 16)}
    return data.get(kind, b"")


@settings(max_examples=120, deadline=None)
@given(
    passes=st.lists(WRITES, min_size=1, max_size=6),
    page_bits=st.integers(7, 16),
    cache_bits=st.integers(0, 5),
    batch=st.sampled_from([1, 2, 1000]),
    resizes=st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=6, max_size=6),
)
def test_two_ends_have_the_same_memory(passes, page_bits, cache_bits, batch, resizes):
    page_size = 1 << page_bits
    source, target = Source(page_size, page_size << cache_bits), Target(page_size)
    source.start()
    for writes, resize in zip(passes, resizes, strict=False):
        for name, page, offset, kind, seed in writes:
            source.write(name, page % NAMES[name], offset, written(kind, seed))
        source.sync()
        source.send_pass(batch)
        if resize is not None:
            source.cache_size = page_size << resize
    source.end()
    target.load(bytes(source.sink.sent))
    assert target.everything() == source.everything()
    assert target.counters == source.counters


@settings(max_examples=100, deadline=None)
@given(
    passes=st.lists(WRITES, min_size=1, max_size=5),
    page_bits=st.sampled_from([7, 10, 12]),
    cache_bits=st.integers(0, 4),
)
def test_every_byte_is_the_oracle_s(passes, page_bits, cache_bits):
    page_size = 1 << page_bits
    source = Source(page_size, page_size << cache_bits)
    oracle = DeltaSender(NAMES, page_size, 1 << cache_bits)
    source.start()
    source.writer.flush()
    start = len(source.sink.sent)
    source.send_pass()
    expected = [
        b"".join(oracle.plain(n, p, bytes(page_size)) for p in range(NAMES[n])) for n in NAMES
    ]
    generation = 1
    stages = [*((writes, False) for writes in passes), (passes[0], True)]
    for writes, last in stages:
        for name, page, offset, kind, seed in writes:
            source.write(name, page % NAMES[name], offset, written(kind, seed))
        generation += 1
        source.search.batches = []
        if last:
            source.end()
        else:
            source.sync()
            source.send_pass()
        sections = [
            b"".join(
                oracle.send(
                    name, page, source.memory[name][page].tobytes(), generation, last_stage=last
                )
                for page in map(int, index)
            )
            for name, *index in source.search.batches
        ]
        expected += [b"".join(sections)] if last else sections
    kinds = [2] * (len(expected) - 1) + [3]
    whole = b"".join(
        stream.ram_more(kind, SECTION, payload) + stream.footer(SECTION)
        for kind, payload in zip(kinds, expected, strict=True)
    )
    assert source.sink.sent[start:] == whole
    stats, cache = source.encoder.stats, oracle.cache
    assert (stats.npages, stats.cache_miss, stats.overflow) == (
        cache.hits,
        cache.misses,
        cache.overflows,
    )
    assert stats.nbytes == oracle.record_bytes
    assert source.counters.xbzrle == cache.encoded_pages


def test_the_first_round_is_whole_and_the_second_is_differences():
    source = Source(4096, 1 << 20)
    for name, n in NAMES.items():
        for page in range(n):
            source.write(name, page, 0, random.Random(page).randbytes(4096))
    source.start()
    source.send_pass()
    assert (source.counters.normal, source.encoder.stats.cache_miss) == (12, 0)
    for change in range(3):
        for name, n in NAMES.items():
            for page in range(n):
                source.write(name, page, 100 * change, b"new word")
        source.sync()
        source.send_pass()
    # what is met for the first time is sent whole and kept
    assert (source.counters.normal, source.counters.xbzrle) == (24, 24)
    source.encoder.end_period()
    stats = source.encoder.stats
    assert (stats.npages, stats.cache_miss, stats.overflow) == (24, 12, 0)
    deltas = [r for r in all_records(source) if isinstance(r.contents, Delta)]
    # two passes, in which each block is named by one record
    names = 2 * sum(1 + len(name) for name in NAMES)
    assert stats.nbytes == sum(3 + len(r.contents.encoding) for r in deltas) + names
    assert stats.cache_miss_rate == pytest.approx(12 / 48)
    assert stats.encoding_rate == pytest.approx(24 * 4096 / stats.nbytes)


def all_records(source: Source) -> list[Record]:
    """Every record that was sent."""
    data, out, at, current = bytes(source.sink.sent), [], len(begin()), None
    while at < len(data):
        at += 5
        while True:
            found = ram.parse_record(data, at, 4096, current)
            if isinstance(found, ram.End):
                at = found.offset + 5
                break
            record, at = found
            current = record.block
            out.append(record)
    return out


def test_a_page_that_has_not_changed_is_not_sent_and_names_nothing():
    source, target = Source(4096, 1 << 20), Target(4096)
    source.write("pc.ram", 1, 0, b"x")
    source.write("vga", 1, 0, b"x")
    source.start()
    source.send_pass()
    for _ in range(3):
        source.write("pc.ram", 1, 0, b"x")
        source.write("vga", 1, 0, b"x")
        source.sync()
        source.send_pass()
    assert source.encoder.stats.npages == 4
    assert source.counters.records == 12 + 2
    source.write("vga", 1, 0, b"y")
    source.end()
    target.load(bytes(source.sink.sent))
    assert target.everything() == source.everything()
    assert target.counters == source.counters


def test_what_is_sent_by_reference_is_what_was_cached():
    """The guest writes between the encoding and the sending: later differences still fit."""
    source = Source(4096, 1 << 20)
    target = Target(4096)

    def scribble() -> None:
        for name, n in NAMES.items():
            for page in range(n):
                nbytes = rng.choice([1, 4096])
                source.write(name, page, rng.randrange(4096 // nbytes), rng.randbytes(nbytes))

    rng = random.Random(5)
    source.sink = Collector(scribble)
    source.writer._sink = source.sink
    source.start()
    source.send_pass()
    for _ in range(20):
        source.sync()
        source.send_pass()
    source.sink._before = lambda: None
    source.end()
    target.load(bytes(source.sink.sent))
    assert target.everything() == source.everything()
    assert source.encoder.stats.overflow > 0
    assert source.counters.xbzrle > 0


def test_a_slot_on_its_way_out_is_left_alone():
    """A cache of one page, and generations that would let every page replace the one before."""
    memory = np.random.default_rng(1).integers(1, 255, (8, 128), dtype=np.uint8)
    pages = _core.Pages(memory, 128)
    cache, out = _core.XbzrleCache(128, 128), _core.OutQueue()
    sent = b""
    for page in range(8):
        index = np.array([page], np.uint64)
        for attempt in range(3):
            done = out.encode_deltas(cache, pages, None, index, address=0, generation=1 + 5 * page)
            if done:
                break
            assert attempt == 0
            sent += out.tobytes()
            out.clear()
    sent += out.tobytes()
    out.clear()
    found, _ = ram.parse(sent, 128, b"ram")
    assert [r.contents for r in found] == [row.tobytes() for row in memory]
    assert cache.misses == 8


def test_the_cache_belongs_to_the_queue_that_holds_its_pages():
    memory = bytearray(b"\x01" * 512)
    pages, index = _core.Pages(memory, 128), np.arange(4, dtype=np.uint64)
    cache, out, other = _core.XbzrleCache(512, 128), _core.OutQueue(), _core.OutQueue()

    def encode(queue: _core.OutQueue) -> int:
        return queue.encode_deltas(cache, pages, b"a", index, address=0, generation=1)

    assert encode(out) == 4
    for use in (
        lambda: encode(other),
        lambda: cache.resize(128),
        lambda: cache.insert(0, None, 1),
        lambda: cache.insert_pages(pages, [0], 1),
        lambda: cache.encode(pages, [0], 1, bytearray(128)),
    ):
        with pytest.raises(BufferError, match="on their way out"):
            use()
    with pytest.raises(BufferError):
        pages.release()
    # its own queue is told to send first
    assert encode(out) == 0
    out.clear()
    assert encode(other) == 4
    other.clear()
    cache.resize(128)
    pages.release()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": b"x" * 256}, ValueError),
        ({"zero": _core.Bitmap(3)}, ValueError),
        ({"index": np.array([4], np.uint64)}, IndexError),
        ({"address": 1}, ValueError),
        ({"address": (1 << 64) - 256}, ValueError),
        ({"pages": _core.Pages(bytes(256), 64)}, ValueError),
        ({"pages": _core.Pages(bytes(512), 128, where=np.zeros(4, np.int64))}, ValueError),
    ],
)
def test_what_cannot_be_encoded(change, error):
    arguments = {
        "cache": _core.XbzrleCache(512, 128),
        "pages": _core.Pages(bytes(512), 128),
        "name": None,
        "index": np.arange(4, dtype=np.uint64),
        "first": 0,
        "zero": None,
        "address": 0,
        "generation": 1,
        **change,
    }
    out = _core.OutQueue()
    with pytest.raises(error):
        out.encode_deltas(**arguments)
    assert out.nbytes == 0
    arguments["pages"].release()


def test_records_need_pages_of_128_bytes():
    cache, pages = _core.XbzrleCache(64, 64), _core.Pages(bytes(64), 64)
    with pytest.raises(ValueError, match="128"):
        _core.OutQueue().encode_deltas(
            cache, pages, None, np.zeros(1, np.uint64), address=0, generation=1
        )
    with pytest.raises(OptionError, match="too small"):
        Source(64, 4096)


def test_an_arena_must_have_room_for_a_page():
    cache, pages = _core.XbzrleCache(4096, 4096), _core.Pages(bytes(4096), 4096)
    out = _core.OutQueue(arena_size=4096)
    with pytest.raises(ValueError, match="no room"):
        out.encode_deltas(cache, pages, None, np.zeros(1, np.uint64), address=0, generation=1)


def test_a_cache_that_cannot_be_is_refused_at_the_start_and_left_out_in_flight():
    with pytest.raises(OptionError, match="smaller than the page size"):
        Source(8192, 4096)
    with pytest.raises(OptionError, match="no memory"):
        Source(4096, 1 << 62)
    source, target = Source(4096, 1 << 20), Target(4096)
    source.start()
    source.send_pass()
    for nbytes in (1 << 62, 2048, 1 << 16):
        source.cache_size = nbytes
        source.write("pc.ram", 3, 0, bytes([nbytes.bit_length()]))
        source.sync()
        source.send_pass()
        assert source.encoder.stats.cache_size == (1 << 16 if nbytes == 1 << 16 else 1 << 20)
    assert source.encoder.stats.npages == 1
    source.end()
    target.load(bytes(source.sink.sent))
    assert target.everything() == source.everything()


def test_rates_without_anything_sent_stay():
    source = Source(4096, 1 << 20)
    source.encoder.end_period()
    assert source.encoder.stats.to_qmp() == {
        "cache-size": 1 << 20,
        "bytes": 0,
        "pages": 0,
        "cache-miss": 0,
        "cache-miss-rate": 0.0,
        "encoding-rate": 0.0,
        "overflow": 0,
    }


def test_a_guest_without_blocks():
    source = Source(4096, 1 << 20, {})
    source.start()
    source.send_pass()
    source.end()
    assert source.counters.records == 0


# ---- hostile records -----------------------------------------------------------------------------


def raw(encoding: bytes, *, length: int | None = None, coding: int = 1, page: int = 2) -> bytes:
    """An XBZRLE record of pc.ram, with any length."""
    length = len(encoding) if length is None else length
    word = ram.be64(page * 4096 + ram.XBZRLE)
    return word + b"\x06pc.ram" + bytes([coding, length >> 8, length & 255]) + encoding


HOSTILE = [
    (raw(b"\0\x01A", coding=0), "unknown encoding"),
    (raw(b"\0\x01A", coding=2), "unknown encoding"),
    (raw(bytes(4097)), "more bytes than"),
    (raw(bytes(0xFFFF)), "more bytes than"),
    (raw(b"\0\x01A", page=9), "outside its block"),
    (raw(b"\0"), "ends within a run"),
    (raw(b"\0\x02A"), "ends within a run"),
    (raw(b"\x01\x01A\0"), "ends within a run"),
    (raw(b"\0\0\x01"), "run of no bytes"),
    (raw(b"\0\x01A\0\x01B"), "run of no bytes"),
    (raw(b"\x01\x01A\x80\0\x01"), "run of no bytes"),
    (raw(b"\x80\x80\x01A"), "more than two bytes"),
    (raw(b"\x80\x20\x01A"), "past the end of the page"),
    (raw(b"\xff\x1f\x02AB"), "past the end of the page"),
    (raw(b"\xff\x7f\x01A"), "past the end of the page"),
    (raw(b"\x01\x80\x20" + bytes(4000)), "past the end of the page"),
]


def error_of(payload: bytes) -> StreamError:
    target = Target(4096)
    with pytest.raises(StreamError) as caught:
        target.load(begin() + stream.ram_more(2, SECTION, payload) + stream.footer(SECTION))
    return caught.value


@pytest.mark.parametrize(("record", "words"), HOSTILE)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_wrong_record_is_refused_where_it_is(record, words, before):
    good = [
        *[Record(b"pc.ram", 0, 0), Record(b"pc.ram", 1, Delta(b"\x05\x01A"))],
        Record(b"pc.ram", 2, b"\x01" * 4096),
    ]
    head = ram.encode(good[: before + 1] if before else [], 4096)
    error = error_of(head + record)
    assert words in str(error)
    assert (error.block, error.section) == ("pc.ram", "ram")
    assert error.offset == len(begin()) + 5 + len(head)


@pytest.mark.parametrize(
    "encoding",
    [
        b"",
        b"\xff\x1f\x01A",
        b"\0\x80\x20" + bytes(range(256)) * 16,
        b"\0\x01A" + b"\x01\x01B" * 1000,
    ],
)
def test_the_longest_and_shortest_that_are_right(encoding):
    if len(encoding) > 4096:
        assert "more bytes than" in str(error_of(raw(encoding)))
        return
    target = Target(4096)
    target.load(begin() + stream.ram_more(2, SECTION, raw(encoding)) + stream.footer(SECTION))
    expected = Record(b"pc.ram", 2, Delta(encoding)).expand(4096)
    # a page that was never sent is zeros
    assert target.everything()["pc.ram"][2 * 4096 : 3 * 4096] == expected
    assert target.counters.xbzrle == 1


def test_a_stream_cut_anywhere_in_a_difference():
    payload = raw(b"\x05\x03abc") + raw(b"\x80\x01\x01z", page=3)
    data = begin() + stream.ram_more(2, SECTION, payload)
    for cut in range(len(begin()) + 1, len(data)):
        with pytest.raises(TruncatedError):
            Target(4096).load(data[:cut])


PASSES = 8


@pytest.mark.parametrize("cache_size", [4096, 1 << 20, 16 << 20])
def test_a_live_guest_ends_intact(tmp_path, cache_size, monkeypatch):
    """Its words are written while they are encoded; the destination's memory is what it says."""
    nbytes = 4 << 20
    # rates of every pass, not of every second
    monkeypatch.setattr(DirtyRate, "PERIOD", 0.0)
    rates = []
    with (
        ProcessGuest(nbytes, rate=400 << 20, pattern="words") as guest,
        ProcessGuest(nbytes) as copy,
    ):

        def some_writes(event: object) -> None:
            """The next sync finds something: the migration does not end by itself."""
            if isinstance(event, PassStarted) and event.number < PASSES:
                if event.number > 2:
                    rates.append(outgoing.query().xbzrle_cache.encoding_rate)
                if event.number == 3:
                    with pytest.raises(OptionError, match="power of two no less than"):
                        outgoing.set_parameters({"xbzrle-cache-size": 2048})
                if event.number == PASSES // 2:
                    outgoing.set_parameters({"xbzrle-cache-size": cache_size * 2})
                enough = guest.counters().writes + 200
                while guest.counters().writes < enough:
                    time.sleep(0.0005)

        guest.start()
        incoming = mig.IncomingMigration(copy)
        incoming.listen(f"unix:{tmp_path}/s")
        outgoing = mig.OutgoingMigration(
            guest,
            capabilities={"xbzrle", "return-path"},
            parameters={
                "xbzrle-cache-size": cache_size,
                "max-bandwidth": 0,
                "downtime-limit": 0,
            },
            on_event=some_writes,
        )
        outgoing.start(incoming.uri)
        while outgoing.query().ram.dirty_sync_count < PASSES and not outgoing.wait(0.005):
            pass
        outgoing.set_parameters({"downtime-limit": 1000})
        assert outgoing.wait(60)
        assert incoming.wait(60)
        report = copy.verify()
        assert report.ok, report
        stats = outgoing.query().xbzrle_cache
        assert stats is not None
        assert stats.cache_size == 2 * cache_size
        assert stats.cache_miss > 0
        if cache_size > nbytes:
            assert stats.npages > 100
            # eight words of eight bytes in each page
            assert max(rates) > 10
