"""Memory of this process is filled by a postcopy while threads use it."""

from __future__ import annotations

import mmap
import os
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from reference import postcopy, ram, stream
from reference.postcopy import PAGE, Source
from unit.boxes import FOREVER, error_of
from unit.far import until
from unit.missing import BIG, EARLY, RAM, UNIT, Box, Touch, page, record

import mig
from mig import _core
from mig.engine.inpostcopy import IncomingPostcopy
from mig.errors import MigError, MismatchError, OptionError, PeerError
from mig.postcopy.faults import MemoryFaults
from mig.postcopy.times import PostcopyTimes


@pytest.fixture
def box(made, tmp_path):
    return Box(made, tmp_path)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memfd"])
def test_a_page_that_is_touched_is_asked_for_and_comes(made, tmp_path, shared):
    box = Box(made, tmp_path, shared=shared)
    box.switch()
    box.runs()
    for number in (100, 101, 3):
        touch = box.touch(number)
        assert box.source.request() == ("pc.ram", number * PAGE, PAGE)
        box.source.send(postcopy.pages([record(number)]))
        assert touch.value() == page(number)
    # zero, and never written in precopy: it is there, nobody has to be asked
    assert box.touch(8).value() == bytes(PAGE)
    assert box.touch(2).value() == page(2)
    # who waited may be gone before his wait is noted
    while (times := box.guest.postcopy_times()).faults < 3:
        pass
    assert (times.requests, times.faults) == (3, 3)
    assert 0 < times.percentile(0.5) <= times.percentile(1) < FOREVER
    box.finish()
    assert box.guest.postcopy_times() == times


def test_a_page_is_asked_for_once_whoever_waits(box):
    box.switch()
    box.runs()
    touches = [box.touch(77) for _ in range(5)]
    assert box.source.request() == ("pc.ram", 77 * PAGE, PAGE)
    while box.guest.postcopy_times().requests < 1:
        pass
    other = box.touch(90)
    # the next message is not about 77 again
    assert box.source.request() == ("pc.ram", 90 * PAGE, PAGE)
    box.source.send(postcopy.pages([record(77), record(90)]))
    assert [touch.value() for touch in touches] == [page(77)] * 5
    assert other.value() == page(90)
    box.finish()


def test_a_device_that_touches_memory_does_not_stop_everything(box):
    """It holds Python's lock while it waits: what brings the page must not need it."""
    seen = []
    box.on_load = lambda: seen.append(box.memory["pc.ram"].view[201 * PAGE])
    answering = threading.Event()

    pid = os.fork()
    if pid == 0:  # a source with a Python of its own
        try:
            box.source.send(b"")
            box.switch()
            while True:
                kind, data = box.source.hear()
                if kind == postcopy.REQ_PAGES_ID:
                    break
            assert int.from_bytes(data[:8], "big") == 201 * PAGE
            box.source.send(postcopy.pages([record(201)]))
            box.source.send(postcopy.pages(box.rest(), 3) + b"\0")
            while box.source.hear()[0] != postcopy.SHUT:
                pass
            os._exit(0)
        finally:
            os._exit(1)
    box.check()
    assert os.waitpid(pid, 0)[1] == 0
    assert seen == [page(201)[0]]
    assert not answering.is_set()


@pytest.mark.parametrize("last", [b"", b"nonsense", postcopy.END], ids=["cut", "bad", "end"])
def test_a_device_does_not_wait_for_a_source_that_is_gone(box, last):
    box.on_load = lambda: box.memory["pc.ram"].view[201 * PAGE]
    pid = os.fork()
    if pid == 0:
        try:
            box.switch()
            while box.source.hear()[0] != postcopy.REQ_PAGES_ID:
                pass
            box.source.send(last)
        finally:
            os._exit(0)
    box.source.close()
    assert "while the devices waited" in str(error_of(box.incoming))
    assert not box.resumed.is_set()
    os.waitpid(pid, 0)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "memfd"])
def test_larger_pages_of_the_host_are_placed_whole(made, tmp_path, shared):
    box = Box(made, tmp_path, big=True, shared=shared)
    box.switch()
    box.runs()
    touch = box.touch(UNIT // PAGE + 5, "big")
    assert box.source.request() == ("big", UNIT, UNIT)
    npages = UNIT // PAGE
    box.source.send(postcopy.pages([record(i, BIG) for i in range(npages, 2 * npages - 1)]))
    assert touch.thread.is_alive()
    box.source.send(postcopy.pages([record(2 * npages - 1, BIG)]))
    assert touch.value() == page(npages + 5, BIG)
    zero = box.touch(0, "big")
    assert box.source.request() == ("big", 0, UNIT)
    box.source.send(postcopy.pages([ram.Record(BIG, i, 0) for i in range(npages)]))
    assert zero.value() == bytes(PAGE)
    # the page is the guest's by now: what comes again does not change it
    rest = [r for r in box.rest() if r.block == RAM or r.page >= npages]
    box.source.send(postcopy.pages([record(i, BIG) for i in range(npages)] + rest, 3) + b"\0")
    assert box.incoming.wait(FOREVER)
    assert bytes(box.memory["big"].view[: UNIT]) == bytes(UNIT)
    assert bytes(box.memory["big"].view[UNIT + PAGE : UNIT + 2 * PAGE]) == page(npages + 1, BIG)


@pytest.mark.parametrize(
    "numbers", [[1], [0, 2], [0, 0], [0, 1, 16]], ids=["middle", "gap", "twice", "other"]
)
def test_half_a_page_of_the_host_is_no_page(made, tmp_path, numbers):
    box = Box(made, tmp_path, big=True)
    box.switch()
    box.runs()
    box.source.send(postcopy.pages([record(i, BIG) for i in numbers]))
    box.reach("postcopy-paused")
    again(box, tmp_path)


def test_a_stream_that_ends_in_a_page_of_the_host_has_not_ended(made, tmp_path):
    box = Box(made, tmp_path, big=True)
    box.switch()
    box.runs()
    box.source.send(postcopy.pages(box.rest()[:-1], 3) + b"\0")
    box.reach("postcopy-paused")
    assert "not all there" in box.incoming.query().error
    again(box, tmp_path)


def again(box: Box, folder) -> Source:
    """Recover, and send what is missing."""
    box.incoming.recover(f"unix:{folder / 'again'}")
    source = Source.connect(box.incoming.uri)
    source.bitmap("pc.ram")
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    box.finish(source)
    return source


def test_what_was_asked_for_is_asked_for_again_after_a_break(box, tmp_path):
    box.switch()
    box.runs()
    touches = [box.touch(number) for number in (100, 102, 240)]
    asked = {box.source.request()[1] // PAGE for _ in range(3)}
    assert asked == {100, 102, 240}
    box.source.send(postcopy.pages([record(102)]))
    assert touches[1].value() == page(102)
    box.source.close()
    box.reach("postcopy-paused")
    late = box.touch(150)
    while box.guest.postcopy_times().requests < 4:
        pass
    box.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(box.incoming.uri)
    even = [i for i in range(EARLY) if i % 2 == 0]
    assert source.bitmap("pc.ram") == [*even, 102]
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    assert [source.request() for _ in range(3)] == [
        ("pc.ram", number * PAGE, PAGE) for number in (100, 150, 240)
    ]
    source.send(postcopy.pages([record(i) for i in (240, 150, 100)]))
    assert [t.value() for t in (touches[0], touches[2], late)] == [page(i) for i in (100, 240, 150)]
    box.finish(source)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_streams_pause(made, tmp_path, seed):
    rng = random.Random(seed)
    box = Box(made, tmp_path, big=True)
    box.switch()
    box.runs()
    data = bytearray(postcopy.pages(box.rest(), 3) + b"\0")
    for _ in range(3):
        data[rng.randrange(len(data) // 2)] ^= 1 << rng.randrange(8)
    box.source.send(bytes(data[: rng.randrange(len(data))]))
    box.source.close()
    box.reach("postcopy-paused")
    box.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(box.incoming.uri)
    source.send(stream.command(postcopy.RESUME))
    source.send(postcopy.pages(box.rest(), 3) + b"\0")
    assert box.incoming.wait(FOREVER)
    assert box.guest.running


def test_urgent_pages_come_on_their_own_connection(made, tmp_path):
    box = Box(made, tmp_path, capabilities=("postcopy-ram", "postcopy-preempt"))
    urgent = Source.connect(box.incoming.uri)
    box.switch()
    box.runs()
    touch, last = box.touch(101), None
    assert box.source.request() == ("pc.ram", 101 * PAGE, PAGE)
    urgent.send(ram.encode([record(101)], PAGE))
    assert touch.value() == page(101)
    # the main stream ends before the last urgent page is there: it is waited for
    last = box.touch(103)
    assert box.source.request() == ("pc.ram", 103 * PAGE, PAGE)
    rest = [r for r in box.rest() if r.page != 103]
    box.source.send(postcopy.pages(rest, 3) + b"\0")
    box.source.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        box.source.hear()
    box.source.sock.settimeout(FOREVER)
    urgent.send(ram.encode([record(103)], PAGE, RAM))
    assert last.value() == page(103)
    box.source.expect(postcopy.SHUT, 0)
    box.check()


class Leaving(mig.MemoryGuest):
    """Notes who reads connections when its memory is let go."""

    readers: list[str] | None = None

    def postcopy_end(self) -> None:
        names = (thread.name for thread in threading.enumerate())
        self.readers = [name for name in names if name in ("mig-urgent", "mig-listen")]
        super().postcopy_end()


def test_nobody_places_pages_when_memory_is_let_go(made, tmp_path):
    """A source may leave the connection for urgent pages open to the end."""

    class Mine(Box):
        guest_type = Leaving

    box = Mine(made, tmp_path, capabilities=("postcopy-ram", "postcopy-preempt"))
    urgent = Source.connect(box.incoming.uri)
    box.switch()
    box.runs()
    box.finish()
    assert box.guest.readers == []
    urgent.close()


@pytest.mark.parametrize("early", [True, False], ids=["unread", "end"])
def test_devices_are_not_loaded_when_nobody_reads_the_connection(early):
    """They would wait for memory with Python's lock, and nobody would see that it never comes."""
    loaded = []

    def listen() -> None:
        if early:
            raise PeerError("cut at once")

    server = SimpleNamespace(
        await_readers=lambda *_: False, interrupt=lambda: None, settle=lambda: None
    )
    guest = SimpleNamespace(
        postcopy_server=lambda: server, load_devices=loaded.append, postcopy_end=lambda: None
    )
    package = SimpleNamespace(state=None, pings=())
    loader = SimpleNamespace(package=package, serve_by=lambda _: None, listen=listen)
    line = SimpleNamespace(
        serve_urgent=lambda: False,
        drain_urgent=lambda: None,
        end_urgent=lambda: None,
        abandon=lambda: None,
    )
    postcopy_ = IncomingPostcopy(line, loader, guest)
    if early:
        # as when it is interrupted because of that
        server.await_readers = lambda *_: until(lambda: postcopy_._unread) or False
    with pytest.raises(MigError, match="cut at once" if early else "before the devices"):
        postcopy_.run()
    assert not loaded


def test_urgent_pages_that_never_come_are_a_break(made, tmp_path):
    box = Box(made, tmp_path, capabilities=("postcopy-ram", "postcopy-preempt"))
    urgent = Source.connect(box.incoming.uri)
    box.switch()
    box.runs()
    touch = box.touch(103)
    assert box.source.request() == ("pc.ram", 103 * PAGE, PAGE)
    box.source.send(postcopy.pages([r for r in box.rest() if r.page != 103], 3) + b"\0")
    urgent.send(ram.eos())
    box.reach("postcopy-paused")
    box.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(box.incoming.uri)
    urgent = Source.connect(box.incoming.uri)
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    assert source.request() == ("pc.ram", 103 * PAGE, PAGE)
    source.send(postcopy.pages([record(103)], 3) + b"\0")
    assert touch.value() == page(103)
    source.expect(postcopy.SHUT, 0)
    box.check()


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "nonsense"])
def test_what_is_wrong_with_urgent_pages_is_told(made, tmp_path, cut):
    box = Box(made, tmp_path, capabilities=("postcopy-ram", "postcopy-preempt"))
    urgent = Source.connect(box.incoming.uri)
    box.switch()
    box.runs()
    if not cut:
        urgent.send(b"\xff" * 8)
    urgent.close()
    box.reach("postcopy-paused")
    assert box.incoming.query().error != "cancelled"
    box.incoming.recover(f"unix:{tmp_path / 'again'}")
    source, urgent = (Source.connect(box.incoming.uri) for _ in range(2))
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    box.finish(source)
    urgent.close()


def test_a_failure_before_the_guest_runs_leaves_memory_that_can_be_used(box):
    def refuse() -> None:
        raise MismatchError("no")

    box.on_load = refuse
    box.switch()
    assert isinstance(error_of(box.incoming), MismatchError)
    assert not box.resumed.is_set()
    assert box.memory["pc.ram"].view[200 * PAGE] == 0
    box.memory.close()


@pytest.mark.parametrize("summary", [PAGE | 2 << 20, 2 << 20, 1 << 14])
def test_pages_of_other_sizes_are_refused(box, summary):
    box.source.send(stream.header() + stream.configuration() + postcopy.advise(summary))
    words = f"Postcopy needs matching RAM page sizes (s={summary:x} d=1000)"
    assert words in str(error_of(box.incoming))


def test_blocks_must_have_pages_of_the_same_size(made, tmp_path):
    box = Box(made, tmp_path, big=True)
    head = postcopy.head(
        box.blocks, host_pages={"pc.ram": UNIT}, advised={"summary": PAGE | UNIT}
    )
    box.source.send(head)
    assert "Mismatched RAM page size pc.ram (local) 4096 != 65536" in str(error_of(box.incoming))


def test_half_a_page_cannot_be_discarded(made, tmp_path):
    box = Box(made, tmp_path, big=True)
    box.source.send(
        postcopy.head(box.blocks, host_pages={"big": UNIT}, advised={"summary": PAGE | UNIT})
        + postcopy.discard("big", (PAGE, UNIT))
    )
    assert isinstance(error_of(box.incoming), MismatchError)


def test_memory_that_cannot_be_missing_is_refused_at_once(made):
    memory = mig.GuestMemory()
    held = mmap.mmap(-1, 4 * PAGE)
    memory.add("ram", 2 * PAGE, memoryview(held)[64 : 64 + 2 * PAGE])
    incoming = made.incoming(mig.MemoryGuest("box", memory), capabilities={"postcopy-ram"})
    with pytest.raises(OptionError, match="does not begin at a page"):
        incoming.listen("tcp:127.0.0.1:0")


def test_why_the_kernel_cannot_is_said(made, monkeypatch):
    def refuse():
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_core, "probe_page_faults", refuse)
    assert "vm.unprivileged_userfaultfd" in MemoryFaults.probe(mig.GuestMemory())


def test_times_of_vcpus():
    requests = _core.PageRequests()
    memory = mig.GuestMemory()
    block = memory.add("ram", 8 * PAGE)
    received = _core.Bitmap(8)
    server = _core.FaultServer(
        [(b"ram", block.pages, PAGE, received, True, True)], PAGE, requests
    )
    server.settle()
    server.set_vcpus([0, 0])
    near, far = os.pipe()

    def give(*numbers: int) -> None:
        parser = _core.RamParser([(b"ram", 8)], PAGE)
        data = ram.encode([record(i, b"ram") for i in numbers], PAGE) + ram.eos()
        assert _core.PageReader(server, parser, data=data, bare=True).run(_core.Descriptor(near))

    first = Touch(block, 1)
    while server.wanted < 1:
        pass
    second = Touch(block, 2)
    while server.wanted < 2:
        pass
    threading.Event().wait(0.02)
    give(1)
    assert first.value() == page(1, b"ram")
    threading.Event().wait(0.02)
    give(2)
    assert second.value() == page(2, b"ram")
    vcpus, together, latencies = server.times()
    assert vcpus[1] > 0.04
    assert 0.02 < together <= vcpus[0] < vcpus[1] + 0.02 or vcpus[0] >= together
    assert together < vcpus[1]
    assert sum(count for _, count in latencies) == 2
    server.close()
    server.close()
    os.close(near)
    os.close(far)
    with pytest.raises(ValueError, match="no more"):
        server.drain()


def test_block_times_are_told_when_they_are_asked_for(made, tmp_path):
    box = Box(made, tmp_path, capabilities=("postcopy-ram", "postcopy-blocktime"))
    box.guest.vcpu_threads = [0, 1]
    box.switch()
    box.runs()
    touch = box.touch(99)
    box.source.request()
    threading.Event().wait(0.02)
    # as QEMU's: in the end only
    assert "postcopy-blocktime" not in box.incoming.query().to_qmp()
    box.source.send(postcopy.pages([record(99)]))
    touch.value()
    box.finish()
    info = box.incoming.query()
    first, second = info.postcopy_vcpu_blocktime
    assert first >= 0.02
    assert (second, info.postcopy_blocktime) == (0, 0)
    assert sum(count for _, count in info.postcopy_latencies) == 1
    assert info.postcopy_latencies[0][0] > first
    answer = info.to_qmp()
    assert answer["postcopy-blocktime"] == 0
    assert answer["postcopy-vcpu-blocktime"] == [round(first * 1000), 0]
    assert answer.keys() == {"status", "postcopy-blocktime", "postcopy-vcpu-blocktime"}


class Worker:
    """A source that sends pages of a guest as they are asked for, and all of them in the end."""

    def __init__(self, guest, uri) -> None:
        self.guest, self.source = guest, Source.connect(uri)
        blocks = {block.idstr: block.used_length for block in guest.memory}
        machine = guest.configuration.machine
        self.source.send(postcopy.head(blocks, machine))
        for block in guest.memory:
            self.source.send(self.records(block.idstr, range(0, block.pages.npages, 2)))
        guest.stop()
        for idstr, nbytes in blocks.items():
            self.source.send(postcopy.discard(idstr, (0, nbytes)))
        state = guest.save_devices()
        # without EOF and the description behind it
        devices = state[: state.rindex(b"\x00\x06")]
        blob = stream.command(postcopy.LISTEN) + devices + postcopy.ping(3)
        self.source.send(postcopy.packaged(blob + stream.command(postcopy.RUN)))
        self.sent = {idstr: set() for idstr in blocks}
        self.asked = 0

    def records(self, idstr, numbers, kind=2) -> bytes:
        view = self.guest.memory[idstr].view
        pages = ((i, bytes(view[i * PAGE : (i + 1) * PAGE])) for i in numbers)
        return postcopy.pages(
            [ram.Record(idstr.encode(), i, data if any(data) else 0) for i, data in pages], kind
        )

    def serve(self, count: int) -> None:
        """Answer so many requests."""
        while self.asked < count:
            kind, data = self.source.hear()
            if kind not in (postcopy.REQ_PAGES, postcopy.REQ_PAGES_ID):
                continue
            start, nbytes = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:12], "big")
            if kind == postcopy.REQ_PAGES_ID:
                self.source.last_block = data[13:].decode()
            idstr = self.source.last_block
            numbers = set(range(start // PAGE, (start + nbytes) // PAGE)) - self.sent[idstr]
            self.sent[idstr] |= numbers
            self.asked += 1
            self.source.send(self.records(idstr, sorted(numbers)))

    def finish(self) -> None:
        for block in self.guest.memory:
            left = sorted(set(range(block.pages.npages)) - self.sent[block.idstr])
            self.source.send(self.records(block.idstr, left))
        self.source.send(postcopy.END)
        while self.source.hear()[0] != postcopy.SHUT:
            pass


def test_workers_go_on_while_their_memory_comes(made, tmp_path):
    options = {"workers": 2, "rate": 0, "working_set": 0.5}
    with mig.ProcessGuest(1 << 20, **options) as mine, mig.ProcessGuest(1 << 20) as other:
        mine.start()
        incoming = made.incoming(other, capabilities={"postcopy-ram", "postcopy-blocktime"})
        incoming.listen(f"unix:{tmp_path / 'in'}")
        worker = Worker(mine, incoming.uri)
        before = mine.counters().writes
        worker.serve(60)
        assert incoming.status == "postcopy-active"
        assert other.running
        worker.finish()
        assert incoming.wait(FOREVER)
        written = other.counters().writes
        assert written > before
        while other.counters().writes < written + 100:
            pass
        report = other.verify()
        assert report.ok
        times = other.postcopy_times()
        assert times.requests >= 60
        # which of them waits is up to the machine
        assert any(times.vcpus)
        assert 0 <= times.all_vcpus <= min(times.vcpus)
        assert incoming.query().postcopy_vcpu_blocktime == times.vcpus


def test_percentiles():
    times = PostcopyTimes(latencies=((0.001, 98), (0.002, 1), (0.5, 1)))
    assert times.faults == 100
    assert times.percentile(0.5) == times.percentile(0.98) == 0.001
    assert times.percentile(0.99) == 0.002
    assert times.percentile(1) == 0.5
    assert PostcopyTimes().percentile(0.5) is None


def test_a_guest_that_is_not_a_destination_says_so():
    guest = mig.MemoryGuest("box", mig.GuestMemory())
    assert guest.postcopy_server() is None
    assert guest.postcopy_times() == PostcopyTimes()
    with pytest.raises(MigError):
        guest.postcopy_run()


HUGE = 2 << 20


@pytest.mark.parametrize("kind", ["declared", "hugetlbfs"])
def test_huge_pages_are_placed_whole_while_they_are_used(made, tmp_path, kind):
    """With real ones the kernel has to have some: /proc/sys/vm/nr_hugepages."""
    there, here = mig.GuestMemory(), mig.GuestMemory()
    flags = os.MFD_HUGETLB if kind == "hugetlbfs" else 0
    fd = os.memfd_create("huge", flags)
    size = None if flags else HUGE
    try:
        theirs = there.add("huge", 4 * HUGE, fd=fd, shared=False, host_page_size=size)
    except OSError as error:
        pytest.skip(f"4 pages of hugetlbfs cannot be had (see /proc/sys/vm/nr_hugepages): {error}")
    finally:
        os.close(fd)
    assert theirs.host_page_size == HUGE
    ours = here.add("huge", 4 * HUGE, host_page_size=HUGE)
    pages = np.frombuffer(ours.view, dtype=np.uint8).reshape(-1, PAGE)
    # the third one is all zeros
    pages[: 2 * HUGE // PAGE : 3] = np.random.default_rng(3).integers(0, 256, PAGE, dtype=np.uint8)
    pages[3 * HUGE // PAGE :] = 7
    incoming = made.incoming(mig.MemoryGuest("box", there), capabilities={"postcopy-ram"})
    incoming.listen(f"unix:{tmp_path / 'in'}")
    outgoing = made.outgoing(mig.MemoryGuest("box", here), capabilities={"postcopy-ram"})
    outgoing.background = False
    outgoing.start_postcopy()
    outgoing.start(incoming.uri)
    while incoming.status != "postcopy-active":
        pass
    for number in (HUGE // PAGE + 5, 2 * HUGE // PAGE + 1):
        assert Touch(theirs, number).value() == pages[number].tobytes()
    outgoing.background = True
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert bytes(theirs.view) == bytes(ours.view)
