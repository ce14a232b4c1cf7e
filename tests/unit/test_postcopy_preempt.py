"""Urgent pages over a connection of their own, as the source sends them."""

from __future__ import annotations

import random
import re
import struct
import threading

import numpy as np
import pytest
from unit.answers import Answering
from unit.boxes import FOREVER, NPAGES, PAGE, Box, error_of
from unit.far import until
from unit.postcopies import RAM, TOTAL, VGA, closed_lab, is_paused

import mig
from mig import MemoryGuest, OutgoingMigration, Status, _core
from mig.errors import OptionError, PeerError
from mig.postcopy.dialect import preempt_dialect
from mig.ram.search import PageSearch, SourceBlock

PREEMPT = {"postcopy-ram", "postcopy-preempt"}


@pytest.fixture
def preempt(tmp_path):
    with closed_lab(tmp_path, {"postcopy-preempt"}) as lab:
        yield lab


# ---- one search, two threads -----------------------------------------------------------------


def search_of(blocks: dict[str, tuple[int, int]]) -> PageSearch:
    """blocks: {name: (pages, target pages in a host page)}, all of them dirty"""
    return PageSearch(
        [
            SourceBlock(
                name,
                npages * PAGE,
                _core.Pages(np.zeros((npages, PAGE), np.uint8), PAGE),
                True,
                _core.Bitmap(npages, fill=True),
                host_page_size=group * PAGE,
            )
            for name, (npages, group) in blocks.items()
        ]
    )


def test_a_host_page_that_was_begun_stays_with_the_walk():
    search = search_of({"a": (4 * 4096, 4096), "b": (10, 1)})
    shared, block = Answering(search), search["a"]
    assert shared.next_batch(100).index.tolist() == list(range(100))
    assert shared.inside_host_page
    # inside it, at its beginning that has gone, and at its end
    for first, npages in ((2000, 1), (0, 1), (0, 4096), (4095, 1)):
        assert shared.take(block, first, npages) is None
    # others are taken, also by a request that goes over it
    assert shared.take(search["b"], 3, 1).index.tolist() == [3]
    assert shared.take(block, 4000, 100).index.tolist() == list(range(4096, 8192))
    # the walk goes on where it was, to the end of the host page
    assert shared.next_batch(4096).index[0] == 100
    while shared.inside_host_page:
        last = shared.next_batch(1000).index[-1]
    assert last == 4095
    # then where pages were asked for last
    assert shared.next_batch(10).index[0] == 8192
    assert shared.take(block, 9000, 5) is None
    assert shared.take(block, 8191, 2) is None
    assert shared.take(block, 0, 4 * 4096).index.tolist() == list(range(12288, 16384))


@pytest.mark.parametrize("seed", range(6))
def test_no_page_is_taken_by_both_or_by_none(seed):
    """And each host page by one of them alone."""
    rng = random.Random(seed)
    blocks = {"a": (30000, 1), "b": (8192, 4096), "c": (4096, 8)}
    search = search_of(blocks)
    shared = Answering(search)
    takers: list[list[tuple[str, int]]] = [[], []]

    def asks() -> None:
        rng = random.Random(seed + 100)
        while shared.remaining:
            name = rng.choice(list(blocks))
            npages = blocks[name][0]
            first = rng.randrange(npages)
            batch = shared.take(search[name], first, rng.randint(1, min(5000, npages - first)))
            if batch is not None:
                takers[1] += [(name, i) for i in batch.index.tolist()]

    thread = threading.Thread(target=asks)
    thread.start()
    while (batch := shared.next_batch(rng.randint(1, 50))) is not None:
        takers[0] += [(batch.block.idstr, i) for i in batch.index.tolist()]
    thread.join()
    walked, asked = map(set, takers)
    assert len(walked) + len(asked) == len(takers[0]) + len(takers[1])
    assert not walked & asked
    assert walked | asked == {(n, i) for n, (npages, _) in blocks.items() for i in range(npages)}
    assert walked
    assert asked
    for name, (npages, group) in blocks.items():
        for first in range(0, npages, group):
            pages = {(name, i) for i in range(first, first + group)}
            assert pages <= walked or pages <= asked


# ---- when it opens, how it ends --------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "early", "ends"),
    [
        ("pc-i440fx-7.1", True, True),
        ("pc-q35-7.2", True, True),
        ("pc-i440fx-8.0", False, False),
        ("virt-10.0", False, False),
        ("microvm", False, True),
        (None, False, True),
    ],
)
def test_the_machine_type_decides(machine, early, ends):
    dialect = preempt_dialect(machine)
    assert (dialect.early, dialect.ends) == (early, ends)


@pytest.mark.parametrize("machine", ["box-7.2", "box-8.0", "box"])
def test_it_opens_and_ends_as_the_machine_type_says(preempt, machine):
    mine, far = Box(5, machine=machine), preempt.far()
    dialect = preempt_dialect(machine)
    seen = {}

    def at(name, usual):
        def note(what):
            seen.setdefault(what, len(far._all))
            usual(what)

        far.on[name] = note

    at("ping", lambda what: far.link.say(2, struct.pack(">I", what[1])))
    at("recv-bitmap", lambda what: far.say_bitmap(what[1]))
    at("resume", lambda what: far.link.say(6, b"\0\0\0\1"))
    slow = {"max-bandwidth": 1 << 20}
    source = preempt.source(mine.guest, background=False, at_once=False, parameters=slow)
    source.start(far.uri)
    until(lambda: ("ping", 1) in seen)
    if dialect.early:
        until(lambda: len(far._all) == 2, "the second connection")
    # it is not needed before; then it comes while the guest still runs
    source.start_postcopy()
    until(lambda: far.running)
    until(lambda: len(far._all) == 2)
    far.request(RAM, 500 * PAGE)
    until(lambda: far.has(RAM, 500))
    far.cut()
    is_paused(source)
    source.recover(far.uri)
    until(lambda: source.status == Status.POSTCOPY_ACTIVE)
    far.request(RAM, 510 * PAGE)
    until(lambda: far.has(RAM, 510))
    source.background = True
    assert source.wait(FOREVER)
    assert len(far._all) == 4
    if dialect.early:
        assert seen["recv-bitmap", VGA] >= 3
    assert seen["recv-bitmap", RAM] <= (4 if dialect.early else 3)
    assert far.urgent[:2] == [("page", RAM, 500), ("page", RAM, 510)]
    until(lambda: not far._threads[-1].is_alive())
    assert far.urgent[2:] == ([("eos",)] if dialect.ends else [])
    assert far.same_as(mine.memory)
    assert not far.twice


def test_it_opens_before_the_guest_stops(preempt):
    mine, far = Box(5, machine="box-8.0"), preempt.far()
    connected = []
    mine.guest._on_stop = lambda: (until(lambda: len(far._all) == 2), connected.append(1))
    source = preempt.source(mine.guest)
    source.start(far.uri)
    assert source.wait(FOREVER)
    assert connected


def test_who_does_not_answer_does_not_get_a_second_connection(preempt):
    """The guest goes on here: it was not even stopped."""
    mine, far = Box(5), preempt.far()
    far.on["ping"] = lambda _: None
    source = preempt.source(mine.guest, parameters={"idle-timeout": 0.2})
    source.start(far.uri)
    assert isinstance(error_of(source), PeerError)
    assert mine.calls == []
    assert len(far._all) == 1


def test_a_destination_that_takes_one_connection_only(preempt):
    mine, far = Box(5), preempt.far()
    far.on["ping"] = lambda what: (
        far._path.unlink(missing_ok=True),
        far.link.say(2, struct.pack(">I", what[1])),
    )
    source = preempt.source(mine.guest)
    source.start(far.uri)
    error_of(source)
    assert mine.calls in ([], ["stop", "resume"])
    assert not far.running


def test_it_needs_an_address_for_two(preempt):
    mine = Box(5)
    with pytest.raises(OptionError, match="multi-channel"):
        preempt.source(mine.guest).start("fd:0")
    with pytest.raises(OptionError, match="requires postcopy-ram"):
        OutgoingMigration(mine.guest, capabilities={"postcopy-preempt"})


# ---- what goes over it -----------------------------------------------------------------------


def test_what_is_asked_for_goes_over_it_and_nothing_else(preempt):
    mine = Box(5)
    source, far = preempt.started(mine, parameters={"max-postcopy-bandwidth": 1})
    until(lambda: far.running)
    wanted = [*range(500, 400, -1)]
    for n in wanted:
        far.request(RAM, n * PAGE)
    far.request(VGA, 0, 3 * PAGE)
    until(lambda: far.has(VGA, 2), "103 pages at 1 byte/s")
    fast = [x[1:] for x in far.urgent]
    asked = {*((RAM, n) for n in wanted), *((VGA, n) for n in range(3))}
    assert set(fast) <= asked
    # the background may have had one of them in its first batch
    assert len(fast) >= len(asked) - 1
    ram = source.query().ram
    assert ram.postcopy_requests == 103
    source.set_parameters({"max-postcopy-bandwidth": 0})
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice
    ram = source.query().ram
    assert ram.normal + ram.duplicate == TOTAL
    assert ram.precopy_bytes + ram.downtime_bytes + ram.postcopy_bytes == ram.transferred
    assert ram.transferred >= sum(link.nbytes for link in far._all)


def test_a_request_need_not_wait_for_a_main_connection_that_is_stuck(preempt):
    mine = Box(5)
    far = preempt.far()
    go = threading.Event()
    pong = lambda what: far.link.say(2, struct.pack(">I", what[1]))  # noqa: E731
    far.on["ping"] = lambda what: go.wait(FOREVER) if what[1] == 4 else pong(what)
    source = preempt.source(mine.guest, background=False)
    source.start(far.uri)
    until(lambda: far.running)
    far.request(RAM, 77 * PAGE)
    until(lambda: far.has(RAM, 77))
    go.set()
    source.background = True
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


@pytest.mark.parametrize("idle", [True, False])
def test_a_break_of_it_alone_pauses(preempt, idle):
    mine = Box(5)
    source, far = preempt.started(mine, background=False)
    until(lambda: far.running)
    far.request(RAM, 0)
    until(lambda: far.has(RAM, 0))
    far.beside[0].close()
    if not idle:
        far.request(RAM, 40 * PAGE)
    is_paused(source)
    # who writes may find out before who watches
    assert re.search("went away|Broken pipe|reset", source.query().error)
    source.recover(far.uri)
    source.background = True
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice


def test_what_a_destination_says_there_is_a_break(preempt):
    source, far = preempt.started(Box(5), background=False)
    until(lambda: far.running)
    far.request(RAM, 0)
    until(lambda: far.has(RAM, 0))
    far.beside[0].sock.sendall(b"hello")
    is_paused(source)
    source.abandon()
    error_of(source)


def test_breaks_of_either_at_any_byte(preempt):
    for seed in range(25):
        rng = random.Random(seed)
        mine = Box(5, machine=rng.choice(["box-7.2", "box-8.0"]))
        source, far = preempt.started(mine, background=rng.random() < 0.5)
        until(lambda far=far: far.running)
        for _ in range(3):
            for _ in range(rng.randrange(20)):
                far.request(RAM, rng.randrange(NPAGES) * PAGE)
            links = far.beside if far.beside and rng.random() < 0.5 else far.links
            links[-1].left = rng.randrange(30 * PAGE)
            if rng.random() < 0.3:
                links[-1].close()
            standing = (Status.COMPLETED, Status.POSTCOPY_PAUSED)
            source.background = True
            until(lambda source=source, standing=standing: source.status in standing)
            if source.status == Status.COMPLETED:
                break
            source.recover(far.uri)
        for link in far._all:
            link.left = None
        while source.status != Status.COMPLETED:
            if source.status == Status.POSTCOPY_PAUSED:
                source.recover(far.uri)
            source.wait(0.01)
        assert far.same_as(mine.memory)
        assert not far.twice


def big_box(npages: int) -> MemoryGuest:
    memory = mig.GuestMemory()
    memory.add(RAM, npages * PAGE).view[:] = b"\x11" * (npages * PAGE)
    devices = mig.DeviceRegistry()
    devices.register("core", save=lambda: b"x", load=lambda *_: None)
    return MemoryGuest("box", memory, devices)


def held(link) -> threading.Event:
    """Nobody reads it any more, until the event is set."""
    go, read = threading.Event(), link.read

    def wait(n: int) -> bytes:
        go.wait(FOREVER)
        return read(n)

    link.read = wait
    return go


@pytest.fixture
def running(preempt):
    """A source without background, and a destination that has one page."""

    def begin(npages: int, **options):
        source = preempt.source(big_box(npages), background=False, **options)
        far = preempt.far()
        source.start(far.uri)
        until(lambda: far.running)
        far.request(RAM, 0)
        until(lambda: far.has(RAM, 0))
        return source, far

    return begin


def test_the_end_is_not_said_when_the_last_answer_was_lost(running):
    source, far = running(2048)
    go = held(far.beside[0])
    far.request(RAM, 0, 2048 * PAGE)
    until(lambda: not source.query().ram.remaining)
    far.beside[0].close()
    is_paused(source)
    go.set()
    assert not far.said("end")
    assert not far.said("eof")


def test_a_guest_that_goes_on_to_ask_does_not_hide_a_break(running):
    source, far = running(1024)
    far.beside[0].close()
    asked = threading.Event()

    def asks() -> None:
        number = 0
        while not asked.wait(0.05):
            number += 1
            far.request(RAM, number % 1024 * PAGE)

    thread = threading.Thread(target=asks)
    thread.start()
    is_paused(source)
    asked.set()
    thread.join(FOREVER)


@pytest.mark.parametrize("background", [False, True])
def test_the_main_connection_breaks_while_an_answer_waits(running, background):
    source, far = running(16384)
    go = held(far.beside[0])
    far.request(RAM, 0, 12000 * PAGE)
    until(lambda: source._requests.server.sent[0] > 1000)
    source.background = background
    far.cut()
    is_paused(source)
    go.set()


# ---- both ends -------------------------------------------------------------------------------


class Ends:
    """A process guest that runs, and an empty one that waits for it; both ends preempt."""

    def __init__(self, made, folder, seed: int) -> None:
        self.folder = folder
        self.mine = mig.ProcessGuest(8 << 20, workers=2, rate=0, working_set=0.5, seed=seed)
        self.other = mig.ProcessGuest(8 << 20)
        self.mine.start()
        self.incoming = made.incoming(self.other, capabilities=PREEMPT)
        self.incoming.listen(f"unix:{folder / 'in'}")
        self.outgoing = made.outgoing(self.mine, capabilities=PREEMPT)

    def reach(self, status: Status) -> None:
        for migration in (self.outgoing, self.incoming):
            until(lambda m=migration: m.status == status, status)

    def check(self) -> None:
        assert self.outgoing.wait(FOREVER)
        assert self.incoming.wait(FOREVER)
        assert self.other.running
        assert not self.mine.running
        writes = self.other.counters().writes
        until(lambda: self.other.counters().writes >= writes + 100, "writes")
        report = self.other.verify()
        assert report.ok, report

    def close(self) -> None:
        self.mine.close()
        self.other.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_guest_runs_on_while_its_memory_follows(made, tmp_path, seed):
    rng = random.Random(seed)
    ends = Ends(made, tmp_path, seed)
    try:
        ends.outgoing.background = False
        ends.outgoing.start(ends.incoming.uri)
        threading.Event().wait(rng.random() * 0.05)
        ends.outgoing.start_postcopy()
        ends.reach(Status.POSTCOPY_ACTIVE)
        for number in range(3):
            asked = ends.other.postcopy_times().requests + rng.randrange(1, 40)
            until(lambda asked=asked: ends.other.postcopy_times().requests >= asked, "requests")
            if rng.random() < 0.5:
                ends.outgoing.pause()
            else:
                ends.outgoing._urgent._channel.finish()
            ends.reach(Status.POSTCOPY_PAUSED)
            ends.incoming.recover(f"unix:{tmp_path / f'again{number}'}")
            ends.outgoing.recover(ends.incoming.uri)
            ends.reach(Status.POSTCOPY_ACTIVE)
        ends.outgoing.background = True
        ends.check()
    finally:
        ends.close()


def test_a_destination_of_mig_takes_it_at_once_or_later(made, tmp_path):
    """By machine type; a box is not a process guest, which has no version in its name."""
    for machine in ("box-7.2", "box-8.0"):
        mine, other = Box(5, machine=machine), Box(machine=machine)
        incoming = made.incoming(other.guest, capabilities=PREEMPT)
        incoming.listen(f"unix:{tmp_path / machine}")
        outgoing = made.outgoing(mine.guest, capabilities=PREEMPT)
        outgoing.start_postcopy()
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
        assert other.same_as(mine)
