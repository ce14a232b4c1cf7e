"""Compression threads: what is sent, what arrives, and what is refused."""

from __future__ import annotations

import random
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram, stream
from reference.ram import Packed, Record
from unit.ends import NAMES, SECTION, Source, Target, begin

import mig
from mig import _core
from mig.errors import OptionError, StreamError, TruncatedError
from mig.events import PassStarted
from mig.guest import ProcessGuest
from mig.ram.compress import CompressEncoder
from mig.ram.encode import RecordWriter, ZeroFinder
from mig.ram.save import RamSaver


class PackedSource(Source):
    """Blocks, and a sender of them with compression threads."""

    def __init__(
        self, page_size: int, *, nthreads: int = 2, level: int = 1, waits: bool = True
    ) -> None:
        super().__init__(page_size, page_size)
        self.waits = waits
        self.encoder = CompressEncoder(
            RecordWriter(self.writer),
            ZeroFinder(lambda: True),
            self.counters,
            page_size=page_size,
            nthreads=nthreads,
            level=level,
            waits=lambda: self.waits,
        )
        self.saver = RamSaver(self.writer, self.search, self.encoder, SECTION, self.counters)

    def fill(self, seed: int) -> None:
        rng = random.Random(seed)
        for name, n in NAMES.items():
            for page in range(n):
                kind = rng.randrange(3)
                data = [rng.randbytes(self.page_size), b"ab" * (self.page_size // 2), b""][kind]
                self.write(name, page, 0, data)


def sent_records(source: Source) -> list[Record]:
    data, out, at, current = bytes(source.sink.sent), [], len(begin(source.page_size)), None
    while at < len(data):
        at += 5
        while True:
            found = ram.parse_record(data, at, source.page_size, current)
            if isinstance(found, ram.End):
                at = found.offset + 5
                break
            record, at = found
            current = record.block
            out.append(record)
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    page_bits=st.integers(9, 16),
    nthreads=st.integers(1, 9),
    level=st.integers(0, 9),
    waits=st.booleans(),
    batch=st.sampled_from([1, 3, 1000]),
)
def test_two_ends_have_the_same_memory(seed, page_bits, nthreads, level, waits, batch):
    source = PackedSource(1 << page_bits, nthreads=nthreads, level=level, waits=waits)
    target = Target(1 << page_bits)
    source.fill(seed)
    source.start()
    source.send_pass(batch)
    source.fill(seed + 1)
    source.sync()
    source.send_pass(batch)
    source.waits = not source.waits
    source.fill(seed + 2)
    source.end()
    target.load(bytes(source.sink.sent))
    assert target.everything() == source.everything()
    assert target.counters == source.counters
    stats = source.encoder.stats
    assert stats.pages == source.counters.packed
    assert stats.busy == source.counters.normal
    assert (stats.pages > 0) or waits is False or not source.counters.records


def test_pages_go_in_order_and_are_counted():
    source = PackedSource(4096)
    source.fill(3)
    source.start()
    source.send_pass()
    records = sent_records(source)
    assert [(r.block, r.page) for r in records] == [
        (name.encode(), page) for name, n in NAMES.items() for page in range(n)
    ]
    packed = [r.contents for r in records if isinstance(r.contents, Packed)]
    assert len(packed) == source.counters.packed > 0
    assert source.counters.normal == 0
    for record in records:
        expected = source.memory[record.block.decode()][record.page].tobytes()
        assert record.expand(4096) == expected
    names = {r.block for r in records}
    first = {name: next(r for r in records if r.block == name) for name in names}
    named = sum(1 + len(n) for n, r in first.items() if isinstance(r.contents, Packed))
    nbytes = sum(4 + len(p.stream) for p in packed) + named
    source.encoder.end_period()
    stats = source.encoder.stats
    assert (stats.pages, stats.compressed_size, stats.busy) == (len(packed), nbytes, 0)
    assert stats.compression_rate == pytest.approx(len(packed) * 4096 / nbytes)
    assert stats.to_qmp() == {
        "pages": len(packed),
        "busy": 0,
        "busy-rate": 0.0,
        "compressed-size": nbytes,
        "compression-rate": stats.compression_rate,
    }
    source.encoder.end_period()
    assert source.encoder.stats == stats


def test_without_waiting_most_pages_go_as_they_are():
    source, target = PackedSource(4096, nthreads=1, waits=False), Target(4096)
    for name, n in NAMES.items():
        for page in range(n):
            source.write(name, page, 0, b"xy" * 2048)
    source.start()
    source.send_pass()
    stats = source.encoder.stats
    # one of each batch has its thread, and the others find it taken
    assert (stats.pages, stats.busy) == (2, 10)
    source.encoder.end_period()
    assert source.encoder.stats.busy_rate == pytest.approx(10 / 12)
    source.end()
    target.load(bytes(source.sink.sent))
    assert target.everything() == source.everything()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nthreads": 0}, "threads"),
        ({"nthreads": 256}, "threads"),
        ({"level": 10}, "level"),
        ({"page_size": 256}, "pages of 256"),
    ],
)
def test_what_cannot_be_compressed(change, words):
    with pytest.raises(OptionError, match=words):
        PackedSource(**{"page_size": 4096, **change})


def test_pages_may_be_too_large():
    source = PackedSource(4096)
    records, zeros = RecordWriter(source.writer), ZeroFinder(lambda: True)
    with pytest.raises(OptionError, match="too large"):
        CompressEncoder(
            records,
            zeros,
            source.counters,
            page_size=1 << 17,
            nthreads=1,
            level=1,
            waits=lambda: True,
        )


def test_a_compressor_is_used_in_turn():
    pages, index = _core.Pages(bytes(4 * 4096), 4096), np.arange(4, dtype=np.uint64)
    compressor, out = _core.Compressor(2, 1, 4096, 3), _core.OutQueue()
    assert len(compressor.wait()) == 0
    assert compressor.start(pages, index) == 3
    for use in (
        lambda: compressor.start(pages, index),
        lambda: out.encode_compressed(compressor, pages, b"a", index),
    ):
        with pytest.raises(RuntimeError, match="being compressed"):
            use()
    with pytest.raises(BufferError):
        pages.release()
    assert list(compressor.wait()) == [0, 1, 2]
    assert compressor.done
    assert out.encode_compressed(compressor, pages, b"a", index) == 4
    # the fourth found no room among the jobs
    found, _ = ram.parse(out.tobytes(), 4096)
    assert [type(r.contents) for r in found] == [Packed] * 3 + [bytes]
    out.clear()
    assert compressor.compressed == 3
    assert compressor.start(pages, index, most=1) == 1
    assert out.encode_compressed(compressor, pages, b"a", index, skip=True) == 4
    assert len(ram.parse(out.tobytes(), 4096)[0]) == 3
    compressor.wait()
    for arguments in (
        (compressor, pages, b"x" * 256, index),
        (compressor, _core.Pages(bytes(4096), 1024), None, index),
        (compressor, pages, None, index, 0, _core.Bitmap(3)),
    ):
        with pytest.raises(ValueError, match=r"name|pages of|fewer bits"):
            out.encode_compressed(*arguments)
    with pytest.raises(IndexError):
        out.encode_compressed(compressor, pages, None, np.array([4], np.uint64))
    with pytest.raises(ValueError, match="no room"):
        _core.OutQueue(arena_size=4096).encode_compressed(compressor, pages, None, index)
    out.clear()
    pages.release()


# ---- hostile records -----------------------------------------------------------------------------

BOUND = 4096 + 1 + 13
PAGE = bytes(range(256)) * 16


def raw(data: bytes, *, length: int | None = None, page: int = 2) -> bytes:
    """A COMPRESS_PAGE record of pc.ram, with any length."""
    length = len(data) if length is None else length
    return ram.be64(page * 4096 + ram.COMPRESS) + b"\x06pc.ram" + ram.be64(length)[4:] + data


BAD = "corrupt, or not of a page"
HOSTILE = {
    "nothing": (raw(b""), BAD),
    "one byte": (raw(b"\x78"), BAD),
    "garbage": (raw(b"garbage" * 20), BAD),
    "too long by one": (raw(bytes(BOUND + 1)), "more bytes than"),
    "longest, but nonsense": (raw(bytes(BOUND)), BAD),
    "4 GiB": (raw(b"", length=0xFFFFFFFF), "more bytes than"),
    "2 GiB": (raw(b"", length=0x80000000), "more bytes than"),
    "less than a page": (raw(zlib.compress(PAGE[:-1])), BAD),
    "more than a page": (raw(zlib.compress(PAGE + b"x")), BAD),
    "a bomb": (raw(zlib.compress(bytes(1 << 20))), BAD),
    "cut": (raw(zlib.compress(PAGE)[:-1]), BAD),
    "wrong checksum": (raw(zlib.compress(PAGE)[:-1] + b"\xff"), BAD),
    "a dictionary": (raw(b"\x78\xbb" + bytes(30)), BAD),
    "raw deflate": (raw(zlib.compress(PAGE)[2:-4]), BAD),
    "outside": (raw(zlib.compress(PAGE), page=9), "outside its block"),
}


def error_of(payload: bytes) -> StreamError:
    target = Target(4096)
    with pytest.raises(StreamError) as caught:
        target.load(begin() + stream.ram_more(2, SECTION, payload) + stream.footer(SECTION))
    return caught.value


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_wrong_record_is_refused_where_it_is(name, before):
    record, words = HOSTILE[name]
    good = [
        *[Record(b"pc.ram", 0, 0), Record(b"pc.ram", 1, Packed(zlib.compress(PAGE)))],
        Record(b"pc.ram", 2, b"\x01" * 4096),
    ]
    head = ram.encode(good[:before], 4096)
    error = error_of(head + record)
    assert words in str(error)
    assert (error.block, error.section) == ("pc.ram", "ram")
    assert error.offset == len(begin()) + 5 + len(head)


@pytest.mark.parametrize("level", range(10))
def test_every_level_is_understood(level):
    target = Target(4096)
    noise = random.Random(level).randbytes(4096)
    records = [Record(b"pc.ram", 1, Packed(zlib.compress(PAGE, level)))]
    records.append(Record(b"pc.ram", 2, Packed(zlib.compress(noise, level))))
    # the same page again, and a difference to it: in order, whoever inflates
    records.append(Record(b"pc.ram", 2, Packed(zlib.compress(PAGE, level))))
    records.append(Record(b"pc.ram", 2, ram.Delta(b"\x05\x01A")))
    payload = ram.encode(records, 4096)
    target.load(begin() + stream.ram_more(2, SECTION, payload) + stream.footer(SECTION))
    memory = target.everything()["pc.ram"]
    assert memory[4096 : 3 * 4096] == PAGE + PAGE[:5] + b"A" + PAGE[6:]
    assert target.counters.packed == 3


def test_more_than_one_burst_can_hold():
    names = {"pc.ram": 3000}
    target = Target(4096, names)
    rng = random.Random(2)
    pages = [rng.randbytes(8) * 512 for _ in range(3000)]
    records = [Record(b"pc.ram", i, Packed(zlib.compress(p))) for i, p in enumerate(pages)]
    head = stream.ram_start(SECTION, {"pc.ram": 3000 * 4096}) + stream.footer(SECTION)
    payload = ram.encode(records, 4096)
    target.load(head + stream.ram_more(2, SECTION, payload) + stream.footer(SECTION))
    assert target.everything()["pc.ram"] == b"".join(pages)


def test_a_stream_cut_anywhere_in_a_compressed_page():
    data = begin() + stream.ram_more(2, SECTION, raw(zlib.compress(PAGE)))
    for cut in range(len(begin()) + 1, len(data), 5):
        with pytest.raises(TruncatedError):
            Target(4096).load(data[:cut])


# ---- whole migrations ----------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["on", "off"])
@pytest.mark.parametrize("xbzrle", [False, True])
def test_a_live_guest_ends_intact(tmp_path, wait, xbzrle):
    """Pages change while they are compressed; what a later pass sends sets them right."""
    nbytes = 4 << 20
    with (
        ProcessGuest(nbytes, rate=100 << 20, pattern="words", fill="half") as guest,
        ProcessGuest(nbytes) as copy,
    ):

        def some_writes(event: object) -> None:
            if isinstance(event, PassStarted) and event.number < 4:
                enough = guest.counters().writes + 100
                while guest.counters().writes < enough:
                    time.sleep(0.0005)

        guest.start()
        incoming = mig.IncomingMigration(copy, parameters={"decompress-threads": 3})
        incoming.listen(f"unix:{tmp_path}/s")
        outgoing = mig.OutgoingMigration(
            guest,
            capabilities=["compress", "return-path", *(["xbzrle"] if xbzrle else [])],
            parameters={
                "compress-wait-thread": wait,
                "compress-threads": 2,
                "max-bandwidth": 0,
                "downtime-limit": 0,
            },
            on_event=some_writes,
        )
        outgoing.start(incoming.uri)
        while outgoing.query().ram.dirty_sync_count < 4 and not outgoing.wait(0.005):
            pass
        outgoing.set_parameters({"downtime-limit": 2000})
        assert outgoing.wait(60)
        assert incoming.wait(60)
        assert copy.verify().ok
        stats = outgoing.query().compression
        assert stats is not None
        assert stats.pages > 0
        assert (stats.busy == 0) == (wait == "on")
        assert outgoing.query().to_qmp()["compression"]["pages"] == stats.pages


def test_a_capture_holds_plain_pages(tmp_path):
    rng = np.random.default_rng(1)
    memory = mig.GuestMemory()
    block = memory.add("pc.ram", 600 * 4096)
    pages = np.frombuffer(block.view, np.uint8).reshape(-1, 4096)
    pages[::2, ::7] = rng.integers(0, 4, pages[::2, ::7].shape, np.uint8)
    incoming = mig.IncomingMigration(mig.StreamCapture(tmp_path / "vm.mig"))
    incoming.listen(f"unix:{tmp_path}/s")
    outgoing = mig.OutgoingMigration(
        mig.MemoryGuest("box", memory), capabilities={"compress", "return-path"}
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(30)
    assert incoming.wait(30)
    assert outgoing.query().compression.pages == 300
    with mig.open_image(tmp_path / "vm.mig") as image:
        for i, page in enumerate(pages):
            assert image.page("pc.ram", i) == page.tobytes()
