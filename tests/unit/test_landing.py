"""Pages that are read straight to where they belong: what arrives is the same as without."""

from __future__ import annotations

import mmap
import os
import random
import socket
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram
from reference.ram import Record

from mig import GuestMemory, MemoryGuest, _core
from mig.channel import Channel
from mig.errors import CancelledError, IdleTimeoutError, StreamError, TruncatedError
from mig.ram.load import RamLoader
from mig.stats import RamCounters
from mig.stream.reader import StreamReader

PAGE = 4096
BLOCKS = {"pc.ram": 900, "rom": 40}
WORD = 8


class Memory:
    """A guest's memory."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        for name, npages in BLOCKS.items():
            self.memory.add(name, npages * PAGE)
        self.guest = MemoryGuest("none", self.memory)
        self.nlanded = 0

    def open_blocks(self, blocks, page_size):
        self.guest.open_blocks(blocks, page_size)

    def put(self, parser, data, start):
        self.guest.put(parser, data, start)

    def land(self, parser, fd, data, held):
        result = self.guest.land(parser, fd, data, held)
        self.nlanded += result[0] if result else 0
        return result

    def page(self, name, page):
        # the memory that was handed out is not fresh: only at the end
        return bytes(self.memory[name].view[page * PAGE : (page + 1) * PAGE])

    def close(self):
        self.guest.abort()
        self.memory.close()


class File:
    """A mapped-ram file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(buffering=0, dir="/var/tmp")  # noqa: SIM115
        fd = self.file.fileno()
        os.ftruncate(fd, 2048 * PAGE)
        self.direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
        self.offsets = {"pc.ram": 256 * PAGE, "rom": 0}
        self.pages = None
        self.nlanded = 0

    def open_blocks(self, blocks, page_size):
        pass

    def put(self, parser, data, start):
        if self.pages is None:
            offsets = list(self.offsets.values())
            self.pages = _core.MappedLog(
                self.file.fileno(), parser, offsets, direct_fd=self.direct_fd
            )
        self.pages.put(data, start)

    def land(self, parser, fd, data, held):
        result = _core.land_in_file(fd, parser, self.pages, data, held)
        self.nlanded += result[0] if result else 0
        return result

    def page(self, name, page):
        self.pages.flush()
        present = np.asarray(self.pages.present[list(BLOCKS).index(name)])
        if not present[page // 64] >> np.uint64(page % 64) & np.uint64(1):
            return bytes(PAGE)
        return os.pread(self.file.fileno(), PAGE, self.offsets[name] + page * PAGE)

    def close(self):
        self.pages = None
        os.close(self.direct_fd)
        self.file.close()


@pytest.fixture(params=[Memory, File])
def sink(request):
    sink = request.param()
    yield sink
    sink.close()


def page_of(seed):
    return np.random.default_rng(seed).integers(1, 256, PAGE, dtype=np.uint8).tobytes()


def bytes_of(records):
    blocks = {name: npages * PAGE for name, npages in BLOCKS.items()}
    return ram.block_list(blocks) + ram.encode(records, PAGE) + ram.eos()


class Load:
    """Loads what a thread writes into a connection."""

    def __init__(self, sink, *, buffer_size=100_000, timeout=20.0) -> None:
        mine, self.theirs = socket.socketpair()
        self.channel = Channel(mine.detach(), "test", timeout=timeout)
        self.reader = StreamReader(self.channel, buffer_size=buffer_size)
        self.counters = RamCounters()
        self._loader = RamLoader(self.reader, sink, PAGE, self.counters)

    def run(self, data, cuts=None, *, hang_up=True):
        """Return when all is loaded; ``cuts``: how long the pieces are that it is written in."""

        def write():
            at, pieces = 0, random.Random(1)
            while at < len(data):
                n = pieces.choice(cuts) if cuts else 1 << 20
                self.theirs.sendall(data[at : at + n])
                at += n
            if hang_up:
                self.theirs.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            self._loader.load_payload()
        finally:
            if not hang_up:
                self.channel.cancel()
            self.channel.close()
            thread.join()
            self.theirs.close()


def check(sink, records):
    wanted = {(r.block.decode(), r.page): r for r in records}
    for name, npages in BLOCKS.items():
        for page in range(npages):
            record = wanted.get((name, page))
            expected = record.expand(PAGE) if record else bytes(PAGE)
            assert sink.page(name, page) == expected, (name, page)


def run_of(block, first, n, seed=0):
    return [Record(block, first + i, page_of(seed + i)) for i in range(n)]


@pytest.mark.parametrize("buffer_size", [16 << 10, 100_000, 1 << 20])
@pytest.mark.parametrize("cuts", [None, [1, 7, 8, 9, 4095, 4096, 4104, 5000], [50_000]])
def test_a_whole_guest(sink, cuts, buffer_size):
    records = run_of(b"pc.ram", 0, 900) + run_of(b"rom", 0, 40, seed=2000)
    load = Load(sink, buffer_size=buffer_size)
    data = bytes_of(records)
    load.run(data, cuts)
    assert load.reader.offset == len(data)
    assert load.counters.records == 940
    check(sink, records)
    # few pages are seen at a time in a small buffer or in small pieces; a large one takes all
    assert sink.nlanded > (600 if buffer_size == 100_000 and cuts is None else -1)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["run", "zeros", "page", "again"]),
            st.sampled_from(list(BLOCKS)),
            st.integers(0, 899),
            st.integers(1, 300),
        ),
        max_size=12,
    ),
    into=st.sampled_from([Memory, File]),
    buffer_size=st.sampled_from([64 << 10, 1 << 20]),
    cuts=st.sampled_from([None, [100_000, 3], [4104 * 3 + 5]]),
)
def test_whatever_comes_in_between(parts, into, buffer_size, cuts):
    records = run_of(b"pc.ram", 0, 200)
    for kind, name, first, n in parts:
        npages = BLOCKS[name]
        first, block = first % npages, name.encode()
        n = min(n, npages - first)
        if kind == "run":
            records += run_of(block, first, n, seed=first * 7)
        elif kind == "zeros":
            records += [Record(block, first + i, 0) for i in range(n)]
        elif kind == "page":
            records.append(Record(block, first, page_of(5)))
        else:
            records += records[-min(n, len(records)) :]
    sink = into()
    try:
        Load(sink, buffer_size=buffer_size).run(bytes_of(records), cuts)
        check(sink, records)
    finally:
        sink.close()


def test_a_long_run_is_read_by_one_call_after_the_other():
    """Each stops after some MiB, so that the migration can be cancelled."""
    n, first = 5000, 20
    parser = _core.RamParser([(b"r", n)], PAGE)
    words = [(i * PAGE | 0x28).to_bytes(8, "big") for i in range(n)]
    data = words[0][:7] + b"\x08\x01r" + bytes([1]) * PAGE
    data += b"".join(words[i] + bytes([i % 255 + 1]) * PAGE for i in range(1, n)) + ram.eos()
    buffer, held, landed = bytearray(1 << 20), 0, []
    with mmap.mmap(-1, n * PAGE) as memory, tempfile.TemporaryFile() as file:
        parser.parse(data, 0, len(data[: 7 + 3 + PAGE + (first - 1) * (8 + PAGE)]))
        assert parser.npages == first
        file.write(data[parser.consumed :])
        file.seek(0)
        pages, received = _core.Pages(memory, PAGE, writable=True), _core.Bitmap(n)
        parser.place(data, 0, pages, received, True)
        more = True
        while more:
            result = _core.land_in_memory(
                _core.Descriptor(file.fileno()), parser, pages, received, buffer, held
            )
            npages, held, more = result
            landed.append(npages)
        assert sum(landed) == n - first
        assert min(landed) > 0
        assert bytes(buffer[:held]) + os.read(file.fileno(), 100) == ram.eos()
        assert received.count() == n
        assert memory[:] == b"".join(bytes([i % 255 + 1]) * PAGE for i in range(n))
        pages.release()


def test_what_was_read_in_vain_leaves_zeros_behind(sink):
    """The pages that were expected do not come at all."""
    records = run_of(b"pc.ram", 0, 200) + [Record(b"pc.ram", 899, page_of(1))] * 3
    load = Load(sink)
    load.run(bytes_of(records))
    assert sink.nlanded
    check(sink, records)


@pytest.mark.parametrize("at", [-1, -8, -9, -4104, -4105, -30_000, -300_000])
def test_a_stream_that_ends(sink, at):
    data = bytes_of(run_of(b"pc.ram", 0, 900))
    with pytest.raises(TruncatedError) as caught:
        Load(sink).run(data[:at])
    assert caught.value.offset <= len(data) + at
    assert sink.nlanded


@pytest.mark.parametrize(
    ("word", "match"),
    [
        (900 * PAGE + 0x28, "beyond|offset|page"),
        (5 * PAGE + 0x08, "block"),
        (5 * PAGE + 0x38, "RAM record"),
    ],
)
def test_a_record_that_is_wrong_is_named_at_its_place(sink, word, match):
    good = bytes_of(run_of(b"pc.ram", 0, 400))[:-8]
    bad = word.to_bytes(8, "big") + b"\x03xyz" + bytes(9000)
    with pytest.raises(StreamError, match=match) as caught:
        Load(sink).run(good + bad)
    assert caught.value.offset == len(good)
    assert sink.nlanded


def test_a_peer_that_falls_silent(sink):
    data = bytes_of(run_of(b"pc.ram", 0, 400))
    with pytest.raises(IdleTimeoutError):
        Load(sink, timeout=0.2).run(data[:-5000], hang_up=False)


def test_cancel_ends_it(sink):
    load = Load(sink)
    threading.Timer(0.2, load.channel.cancel).start()
    with pytest.raises(CancelledError):
        load.run(bytes_of(run_of(b"pc.ram", 0, 400))[:-5000], hang_up=False)


def test_memory_that_is_not_zero_is_left_alone():
    """What was expected and did not come must not be lost."""
    memory = GuestMemory()
    for name, npages in BLOCKS.items():
        memory.add(name, npages * PAGE)
    memory["pc.ram"].view[899 * PAGE :] = page_of(3)
    guest = MemoryGuest("none", memory)
    seen = []
    land = guest.land
    guest.land = lambda *a: seen.append(land(*a)) or seen[-1]
    records = run_of(b"pc.ram", 0, 300)
    Load(guest).run(bytes_of(records))
    assert seen
    assert not any(seen)
    assert bytes(memory["pc.ram"].view[899 * PAGE :]) == page_of(3)
    guest.abort()
    memory.close()
