"""ProcessGuest: what it writes, what it finds wrong, and how it moves."""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from reference import contents

from mig import (
    Bitmap,
    DirtyLog,
    GuestMemory,
    IncomingMigration,
    OutgoingMigration,
    ProcessGuest,
    SharedDirtyLog,
    Status,
)
from mig._core import FILLS, PATTERNS, WORKER_FIELDS
from mig.errors import CancelledError, MigError, MismatchError
from mig.events import PassStarted, StatusChanged
from mig.savevm.devices import DeviceState

PAGE = 4096
#: nobody waits so long; a test that does has found a wait without an end
FOREVER = 20.0
MIB = 1 << 20


@pytest.fixture
def made():
    """Makes guests, and ends them with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kw: stack.enter_context(ProcessGuest(*args, **kw))


def await_writes(guest: ProcessGuest, more: int) -> None:
    """Return when it has written so many pages more."""
    enough, end = guest.counters().writes + more, time.monotonic() + FOREVER
    while guest.counters().writes < enough:
        assert time.monotonic() < end, "it does not write"
        time.sleep(0.001)


def ran(guest: ProcessGuest, writes: int = 300) -> ProcessGuest:
    """Start the guest, and stop it after some writes."""
    guest.start()
    await_writes(guest, writes)
    guest.stop()
    return guest


def ledger(guest: ProcessGuest) -> np.ndarray:
    npages = guest.memory["ram"].pages.npages
    return np.frombuffer(guest.memory["ledger"].view, dtype="<u8")[:npages]


def ram(guest: ProcessGuest) -> np.ndarray:
    """The memory: array of shape (pages, page size), writable."""
    return np.frombuffer(guest.memory["ram"].view, dtype=np.uint8).reshape(
        -1, guest.memory.page_size
    )


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    tasks = Path("/proc/self/task")

    def workers() -> int:
        names = []
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):
                names.append((task / "comm").read_text().strip())
        return names.count("mig-guest")

    before = workers()
    yield
    assert workers() == before


# ---- what it writes --------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pages_hold_what_seed_page_and_count_say(made, pattern, fill):
    guest = ran(made(16 * PAGE, pattern=pattern, fill=fill, seed=99), 40)
    counts = ledger(guest)
    assert counts.sum() == guest.counters().writes
    for page, count in enumerate(counts.tolist()):
        expected = contents.page_bytes(99, page, count, PAGE, pattern, fill)
        assert ram(guest)[page].tobytes() == expected


@pytest.mark.parametrize("fill", FILLS)
def test_pages_that_are_never_written_hold_the_fill(made, fill):
    guest = ran(made(64 * PAGE, working_set=PAGE, fill=fill, seed=5))
    assert ledger(guest)[1:].sum() == 0
    for page in range(1, 64):
        assert ram(guest)[page].tobytes() == contents.page_bytes(5, page, 0, PAGE, "full", fill)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_worker_writes_pages_in_the_order_of_its_pattern(made, pattern):
    guest = ran(made(50 * PAGE, pattern=pattern, seed=3))
    order = contents.order(3, 0, 50, pattern)
    counts = np.zeros(50, dtype=np.uint64)
    for page in itertools.islice(order, guest.counters().writes):
        counts[page] += 1
    assert ledger(guest).tolist() == counts.tolist()


def test_words_leave_most_of_a_page_as_it_was(made):
    guest = made(8 * PAGE, pattern="words")
    guest.start()
    guest.stop()
    before = ram(guest).copy()
    guest.resume()
    await_writes(guest, 50)
    guest.stop()
    changed = (ram(guest).view(np.uint64) != before.view(np.uint64)).sum(axis=1)
    assert changed[ledger(guest) > 0].max() <= PAGE // 512
    assert changed.sum() > 0


@pytest.mark.parametrize(
    ("working_set", "npages"), [(1.0, 128), (0.25, 32), (40 * PAGE, 40), (39 * PAGE + 1, 40)]
)
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_write_the_working_set_and_nothing_else(made, working_set, npages, workers):
    guest = made(
        128 * PAGE, pattern="sequential", rate=0, working_set=working_set, workers=workers
    )
    guest.start()
    end = time.monotonic() + FOREVER
    while (ledger(guest) > 0).sum() < npages and time.monotonic() < end:
        time.sleep(0.001)
    guest.stop()
    assert (ledger(guest) > 0).sum() == npages
    assert guest.verify().ok
    # every worker has its own part
    share = 128 // workers
    written = (ledger(guest) > 0).reshape(workers, share)
    assert written.sum(axis=1).tolist() == [npages // workers] * workers


def test_most_writes_go_to_the_hot_spot(made):
    guest = ran(made(100 * PAGE, pattern="hot", rate=0), 2000)
    assert ledger(guest)[:10].sum() > 0.8 * guest.counters().writes
    assert ledger(guest)[10:].sum() > 0


@pytest.mark.parametrize("page_size", [1024, 65536])
def test_pages_may_have_other_sizes(made, page_size):
    guest = ran(made(32 * page_size, page_size=page_size, workers=2, rate=0))
    report = guest.verify()
    assert report.ok
    assert report.npages == 32
    assert report.bytes_written == report.writes * page_size


# ---- running ---------------------------------------------------------------------------------


def test_nothing_changes_while_it_is_stopped(made):
    guest = ran(made(64 * PAGE, workers=3, rate=0))
    before, counters = ram(guest).copy(), guest.counters()
    time.sleep(0.02)
    assert not guest.running
    assert (ram(guest) == before).all()
    assert guest.counters() == counters
    guest.stop()
    guest.resume()
    assert guest.running
    await_writes(guest, 10)


def test_every_write_is_marked_when_it_is_stopped(made):
    guest = made(200 * PAGE, workers=3, rate=0)
    log = guest.dirty_log()
    guest.start()
    log.start()
    for _ in range(20):
        guest.stop()
        before = {block.idstr: bytes(block.view) for block in guest.memory}
        for block in guest.memory:
            log.sync(block.idstr, Bitmap(block.pages.npages))
        guest.resume()
        await_writes(guest, 20)
        guest.stop()
        for block in guest.memory:
            dirty = Bitmap(block.pages.npages)
            log.sync(block.idstr, dirty)
            old = np.frombuffer(before[block.idstr], dtype=np.uint8).reshape(-1, PAGE)
            new = np.frombuffer(block.view, dtype=np.uint8).reshape(-1, PAGE)
            changed = np.flatnonzero((old != new).any(axis=1)).tolist()
            # a page that is marked may have been written at any time since the last sync
            assert changed == dirty.indexes().tolist()
        guest.resume()


def test_the_rate_is_never_passed_and_can_be_changed(made):
    guest = made(64 * PAGE, workers=2, rate=8 * MIB)
    for rate in (8 * MIB, 32 * MIB):
        guest.rate = rate
        assert guest.rate == rate
        began = time.monotonic()
        if not guest.running:
            guest.start()
        before = guest.counters()
        time.sleep(0.3)
        written = guest.counters().bytes_written - before.bytes_written
        # one page of each worker is due at once
        assert written <= rate * (time.monotonic() - began) + 2 * PAGE
        assert written > rate * 0.3 / 4


def test_a_throttled_guest_does_less(made):
    guest = made(64 * PAGE, rate=0)
    guest.start()

    def writes() -> int:
        before = guest.counters().writes
        time.sleep(0.1)
        return guest.counters().writes - before

    free = writes()
    guest.throttle(99)
    time.sleep(0.02)
    assert writes() < free / 3
    # it does not sleep on until its second is over
    guest.throttle(0)
    await_writes(guest, 100)
    assert guest.verify().ok


def test_a_throttled_guest_stops_and_resumes(made):
    guest = made(64 * PAGE, rate=0, workers=2)
    guest.start()
    guest.throttle(99)
    time.sleep(0.02)
    guest.stop()
    before = guest.counters().writes
    guest.resume()
    guest.throttle(50)
    await_writes(guest, 10)
    assert guest.counters().writes > before


@pytest.mark.parametrize("percent", [-1, 100])
def test_a_throttle_that_cannot_be_is_refused(made, percent):
    guest = made(PAGE)
    guest.start()
    with pytest.raises((ValueError, OverflowError)):
        guest.throttle(percent)


def test_a_stop_is_a_gap_between_ticks(made):
    guest = ran(made(16 * PAGE))
    time.sleep(0.05)
    guest.resume()
    await_writes(guest, 10)
    counters = guest.counters()
    assert counters.longest_gap >= 0.05
    assert counters.switchover_gap is None
    assert counters.ticks >= counters.writes


@pytest.mark.parametrize(
    ("nbytes", "options", "match"),
    [
        (0, {}, "working set"),
        (PAGE + 1, {}, "4097 bytes"),
        (4 * PAGE, {"workers": 0}, "0 workers"),
        (4 * PAGE, {"workers": 257}, "257 workers"),
        (4 * PAGE, {"workers": 5}, "4 of 4 pages for 5"),
        (4 * PAGE, {"working_set": 1.5}, "6 of 4 pages"),
        (4 * PAGE, {"working_set": 5 * PAGE}, "5 of 4 pages"),
        (4 * PAGE, {"working_set": -1}, "working set"),
        (4 * PAGE, {"rate": -1}, "rate of -1"),
        (4 * PAGE, {"pattern": "zigzag"}, "'zigzag' is none of full, words"),
        (4 * PAGE, {"fill": "ones"}, "'ones' is none of random"),
        (4 * PAGE, {"seed": 1 << 64}, "seed"),
    ],
)
def test_a_guest_that_cannot_be_is_refused(nbytes, options, match):
    with pytest.raises(ValueError, match=match):
        ProcessGuest(nbytes, **options)


def test_a_guest_has_to_be_there_before_it_is_used(made):
    guest = made(4 * PAGE)
    guest.stop()
    for use in (guest.resume, guest.verify, guest.counters, guest.save_devices):
        with pytest.raises(MigError, match="neither started nor loaded"):
            use()
    guest.start()
    with pytest.raises(MigError, match="started"):
        guest.start()
    guest.close()
    guest.close()
    with pytest.raises(MigError, match="neither"):
        guest.resume()


def test_close_waits_for_a_migration_to_let_go(made):
    guest = ran(made(4 * PAGE), 1)
    pages = guest.memory["ram"].pages
    pages.pin()
    with pytest.raises(BufferError):
        guest.close()
    pages.unpin()
    guest.close()


def test_another_log_is_made_for_the_memory(made):
    logs: list[SharedDirtyLog] = []

    def make(memory: GuestMemory) -> DirtyLog:
        logs.append(SharedDirtyLog({b.idstr: b.pages.npages for b in memory}))
        return logs[0]

    guest = made(8 * PAGE, dirty=make)
    assert guest.dirty_log() is logs[0]
    logs[0].start()
    ran(guest)
    # then it is not the workers who mark
    assert logs[0].sync("ram", Bitmap(8)) == 0


# ---- the check can fail ----------------------------------------------------------------------


def flip(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    ram(guest)[7, 1234] ^= 0x10
    return {7}


def old_page(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    page = int(np.flatnonzero(counts != ledger(guest))[0])
    ram(guest)[page] = old[page]
    return {page}


def swap(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    pages = ram(guest)
    pages[[2, 5]] = pages[[5, 2]]
    return {2, 5}


def swap_with_entries(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    entries = np.frombuffer(guest.memory["ledger"].view, dtype="<u8")
    entries[[2, 5]] = entries[[5, 2]]
    return swap(guest, old, counts)


def old_entry(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    page = int(np.flatnonzero(counts != ledger(guest))[0])
    np.frombuffer(guest.memory["ledger"].view, dtype="<u8")[page] = counts[page]
    return {page}


def zeros(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    ram(guest)[3] = 0
    return {3}


def torn(guest: ProcessGuest, old: np.ndarray, counts: np.ndarray) -> set[int]:
    page = int(np.flatnonzero(counts != ledger(guest))[0])
    ram(guest)[page, PAGE // 2 :] = old[page, PAGE // 2 :]
    return {page}


DAMAGES = [flip, old_page, swap, swap_with_entries, old_entry, zeros, torn]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_damage_is_found(made, pattern, damage):
    guest = ran(made(16 * PAGE, pattern=pattern, rate=0, workers=2))
    old, counts = ram(guest).copy(), ledger(guest).copy()
    guest.resume()
    await_writes(guest, 300)
    guest.stop()
    assert guest.verify().ok
    whole, entries = ram(guest).copy(), ledger(guest).copy()
    pages = damage(guest, old, counts)
    report = guest.verify()
    assert not report.ok
    assert {page.page_index for page in report.corrupt} == pages
    assert report.ncorrupt == len(pages)
    assert report.ledger_ok == (ledger(guest) == entries).all()
    for page in report.corrupt:
        assert page.count == ledger(guest)[page.page_index]
        at = slice(page.offset, page.offset + 8)
        found = int.from_bytes(ram(guest)[page.page_index][at].tobytes(), "little")
        assert found == page.found != page.expected
        if report.ledger_ok:
            right = whole[page.page_index][at].tobytes()
            assert page.expected == int.from_bytes(right, "little")
        assert str(page).startswith(f"page {page.page_index} after {page.count} writes: 0x")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_old_page_with_its_old_entry_is_found(made, pattern):
    """They agree with each other: it is the ledger as a whole that is wrong."""
    guest = ran(made(16 * PAGE, pattern=pattern, rate=0))
    old, counts = ram(guest).copy(), ledger(guest).copy()
    guest.resume()
    await_writes(guest, 300)
    guest.stop()
    page = old_page(guest, old, counts).pop()
    np.frombuffer(guest.memory["ledger"].view, dtype="<u8")[page] = counts[page]
    report = guest.verify()
    assert report.ncorrupt == 0
    assert not report.ledger_ok
    assert not report.ok
    # and stays wrong
    guest.resume()
    await_writes(guest, 100)
    assert not guest.verify().ledger_ok


def test_workers_find_damage_and_leave_it(made):
    guest = ran(made(16 * PAGE, rate=0))
    ram(guest)[3, 100] ^= 1
    damaged = ram(guest)[3].copy()
    guest.resume()
    end = time.monotonic() + FOREVER
    while not guest.counters().refused and time.monotonic() < end:
        time.sleep(0.001)
    guest.stop()
    assert (ram(guest)[3] == damaged).all()
    report = guest.verify()
    (first,) = report.first_refused
    assert (first.page_index, first.offset) == (3, 96)
    assert report.corrupt == (first,)
    assert report.refused > 0
    ram(guest)[3, 100] ^= 1
    report = guest.verify()
    # it is whole again, but it was not
    assert report.ncorrupt == 0
    assert not report.ok


def test_only_the_first_corrupt_pages_are_named(made):
    guest = ran(made(100 * PAGE))
    ram(guest)[:] ^= 1
    report = guest.verify()
    assert report.ncorrupt == 100
    assert [page.page_index for page in report.corrupt] == list(range(8))


# ---- it moves --------------------------------------------------------------------------------


class Move:
    """One migration of a guest to another over a unix socket."""

    def __init__(self, source, target, path: Path, on_event=None, **parameters) -> None:
        self.incoming = IncomingMigration(target)
        self.incoming.listen(f"unix:{path}")
        options = {"downtime-limit": 50, "max-bandwidth": 0}
        options |= {name.replace("_", "-"): value for name, value in parameters.items()}
        self.outgoing = OutgoingMigration(
            source, capabilities={"return-path"}, parameters=options, on_event=on_event
        )

    def run(self) -> None:
        self.outgoing.start(self.incoming.uri)
        assert self.outgoing.wait(FOREVER)
        assert self.incoming.wait(FOREVER)
        assert self.outgoing.status == self.incoming.status == Status.COMPLETED


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_running_guest_moves(made, tmp_path, pattern):
    """At 50 MiB/s, with a bandwidth that makes several passes of it."""
    passes = []
    source = made(
        16 * MIB, rate=50 * MIB, workers=2, pattern=pattern, working_set=0.5, fill="half"
    )
    target = made(16 * MIB)
    source.start()
    await_writes(source, 100)

    def on_event(event) -> None:
        if isinstance(event, PassStarted):
            passes.append(source.counters().writes)

    Move(source, target, tmp_path / "s", on_event, max_bandwidth=100 * MIB).run()
    # it was written meanwhile, though perhaps not in a pass that was over at once
    assert sorted(passes) == passes
    assert len(passes) >= 3
    assert passes[0] < passes[-1]
    assert not source.running
    assert not target.running
    last = source.counters()
    arrived = target.verify()
    assert arrived.ok
    assert arrived.writes == last.writes
    assert arrived.ticks == last.ticks
    assert (ram(target) == ram(source)).all()
    assert (ledger(target) == ledger(source)).all()
    assert target.rate == 50 * MIB
    target.resume()
    await_writes(target, 100)
    report = target.verify()
    assert report.ok
    assert report.switchover_gap is not None
    assert report.longest_gap >= report.switchover_gap > 0
    assert source.counters() == last
    assert source.verify().ok


@pytest.mark.parametrize("pattern", PATTERNS)
def test_workers_go_on_exactly_where_they_stopped(made, tmp_path, pattern):
    source, target = made(60 * PAGE, pattern=pattern, workers=2, seed=8), made(60 * PAGE)
    ran(source)
    Move(source, target, tmp_path / "s").run()
    target.resume()
    await_writes(target, 300)
    target.stop()
    for worker in range(2):
        counts = np.zeros(30, dtype=np.uint64)
        mine = ledger(target)[30 * worker :][:30]
        order = contents.order(8, worker, 30, pattern)
        for page in itertools.islice(order, int(mine.sum())):
            counts[page] += 1
        assert mine.tolist() == counts.tolist()


def test_a_guest_moves_there_and_back(made, tmp_path):
    first, second = made(2 * MIB, rate=0, workers=2), made(2 * MIB)
    first.start()
    first.rate = 50 * MIB
    for i, (source, target) in enumerate([(first, second), (second, first), (first, second)]):
        await_writes(source, 100)
        before = source.counters().writes
        Move(source, target, tmp_path / f"s{i}").run()
        assert target.counters().writes >= before
        target.resume()
    await_writes(second, 100)
    assert second.verify().ok


def test_time_between_the_guests_counts_as_a_gap(made, tmp_path):
    source, target = made(16 * PAGE), made(16 * PAGE)
    ran(source)
    Move(source, target, tmp_path / "s").run()
    time.sleep(0.05)
    assert target.counters().switchover_gap is None
    target.resume()
    await_writes(target, 10)
    assert target.counters().switchover_gap >= 0.05


@pytest.mark.parametrize("status", [Status.SETUP, Status.ACTIVE, Status.DEVICE])
def test_a_guest_whose_migration_is_cancelled_runs_on(made, tmp_path, status):
    source, target = made(4 * MIB, workers=2), made(4 * MIB)
    source.start()

    def on_event(event) -> None:
        if event == StatusChanged(status):
            move.outgoing.cancel()

    move = Move(source, target, tmp_path / "s", on_event)
    move.outgoing.start(move.incoming.uri)
    with pytest.raises(CancelledError):
        assert move.outgoing.wait(FOREVER)
    move.incoming.cancel()
    with contextlib.suppress(MigError):
        assert move.incoming.wait(FOREVER)
    assert source.running
    await_writes(source, 100)
    assert source.verify().ok
    # there is nobody at the destination
    with pytest.raises(MigError, match="neither started nor loaded"):
        target.resume()
    Move(source, target, tmp_path / "again").run()
    assert target.verify().ok


def test_a_guest_whose_destination_dies_runs_on(made):
    source = made(8 * MIB, workers=2)
    source.start()
    ours, theirs = socket.socketpair()
    with ours:
        outgoing = OutgoingMigration(source, capabilities={"return-path"})
        outgoing.start(f"fd:{ours.fileno()}")
        with theirs:
            theirs.recv(MIB, socket.MSG_WAITALL)
        with pytest.raises(MigError):
            assert outgoing.wait(FOREVER)
    assert outgoing.status == Status.FAILED
    assert source.running
    await_writes(source, 100)
    assert source.verify().ok


def test_a_guest_that_is_refused_after_it_was_stopped_runs_on(made, tmp_path):
    """The destination looks at the devices last of all."""
    source, target = made(MIB, workers=2), made(MIB)
    source.start()

    def refuse(payload: bytes, version_id: int) -> None:
        raise MismatchError("not today")

    target.devices = type(target.devices)()
    target.devices.register("workers", save=bytes, load=refuse)
    move = Move(source, target, tmp_path / "s")
    move.outgoing.start(move.incoming.uri)
    with pytest.raises(MigError):
        assert move.outgoing.wait(FOREVER)
    with pytest.raises(MigError, match="not today"):
        assert move.incoming.wait(FOREVER)
    assert source.running
    await_writes(source, 100)
    assert source.verify().ok


def test_a_guest_that_runs_cannot_be_loaded(made, tmp_path):
    source, target = made(MIB), made(MIB)
    source.start()
    target.start()
    move = Move(source, target, tmp_path / "s")
    move.outgoing.start(move.incoming.uri)
    with pytest.raises(MigError, match="this guest runs"):
        assert move.incoming.wait(FOREVER)
    with pytest.raises(MigError):
        assert move.outgoing.wait(FOREVER)
    for guest in (source, target):
        await_writes(guest, 10)
        assert guest.verify().ok


# ---- device state ----------------------------------------------------------------------------

HEADER = struct.Struct(">QQQQIHBB16s")


def payload_of(guest: ProcessGuest) -> bytes:
    return guest._save_workers()


def patched(payload: bytes, field: int, value: int) -> bytes:
    fields = list(HEADER.unpack_from(payload))
    fields[field] = value
    return HEADER.pack(*fields) + payload[HEADER.size :]


def with_word(payload: bytes, name: str, value: int) -> bytes:
    at = HEADER.size + 8 * WORKER_FIELDS.index(name)
    return payload[:at] + value.to_bytes(8, "big") + payload[at + 8 :]


def test_device_state_is_big_endian(made):
    guest = ran(made(16 * PAGE, seed=0x0102, rate=5 * MIB, pattern="hot", fill="zero", workers=2))
    payload = payload_of(guest)
    *fields, boot_id = HEADER.unpack_from(payload)
    assert fields == [0x0102, 16, 16, 5 * MIB, PAGE, 2, PATTERNS["hot"], FILLS["zero"]]
    assert boot_id.hex() == Path("/proc/sys/kernel/random/boot_id").read_text().replace(
        "-", ""
    ).strip()
    words = struct.unpack(f">{2 * len(WORKER_FIELDS)}Q", payload[HEADER.size :])
    at = WORKER_FIELDS.index("writes")
    assert words[at] + words[at + len(WORKER_FIELDS)] == guest.counters().writes


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda p: b"", "no state of a process guest"),
        (lambda p: p[:-1], "multiple"),
        (lambda p: p[:-8], "reshape"),
        (lambda p: patched(p, 1, 17), "17 pages"),
        (lambda p: patched(p, 2, 17), "working set of 17"),
        (lambda p: patched(p, 3, 1 << 63), "rate"),
        (lambda p: patched(p, 4, 8192), "pages of 8192"),
        (lambda p: patched(p, 5, 0), "0 workers"),
        (lambda p: patched(p, 5, 3), "reshape"),
        (lambda p: patched(p, 5, 65535), "65535 workers"),
        (lambda p: patched(p, 6, 4), "pattern '4'"),
        (lambda p: patched(p, 7, 4), "fill '4'"),
        (lambda p: with_word(p, "position", 16), "outside of its pages"),
    ],
)
def test_device_state_that_cannot_be_is_refused(made, spoil, match):
    payload = payload_of(ran(made(16 * PAGE, workers=1)))
    target = made(16 * PAGE)
    with pytest.raises(MismatchError, match=match) as caught:
        target._load_workers(spoil(payload), 1)
    # nothing is held, not even by the error
    target.close()
    assert caught.value.section == "workers"


def test_workers_twice_are_a_mismatch(made):
    payload = payload_of(ran(made(16 * PAGE, workers=2)))
    target = made(16 * PAGE)
    target._load_workers(payload, 1)
    with pytest.raises(MismatchError, match="twice") as caught:
        target._load_workers(payload, 1)
    assert caught.value.section == "workers"
    target.close()


def test_a_stream_without_workers_is_a_mismatch(made):
    target = made(16 * PAGE)
    with pytest.raises(MismatchError, match="lacks this guest's workers"):
        target.load_devices(DeviceState(0, b"", (), b""))


def test_threads_that_cannot_be_had_are_a_mismatch(made, monkeypatch):
    payload = payload_of(ran(made(16 * PAGE, workers=2)))
    target = made(16 * PAGE)

    def refuse(load):
        raise OSError(errno.EAGAIN, "no more threads")

    monkeypatch.setattr(target, "_make_workload", refuse)
    with pytest.raises(MismatchError, match="no more threads"):
        target._load_workers(payload, 1)


def test_a_kernel_that_tells_no_boot_is_another_one(made, monkeypatch, tmp_path):
    monkeypatch.setattr("mig.guest.clock._BOOT_ID", tmp_path / "nothing")
    source = ran(made(16 * PAGE))
    payload = payload_of(source)
    assert HEADER.unpack_from(payload)[-1] == bytes(16)
    target = made(16 * PAGE)
    target._load_workers(payload, 1)
    at = WORKER_FIELDS.index("last_tick")
    assert source._existing().state()[0, at] > 0
    assert target._existing().state()[0, at] == 0


def test_times_of_another_boot_are_no_gap(made):
    source = ran(made(16 * PAGE))
    payload = payload_of(source)
    fields = [*HEADER.unpack_from(payload)[:-1], bytes(16)]
    target = made(16 * PAGE)
    for block in source.memory:
        target.memory[block.idstr].view[:] = block.view
    target._load_workers(HEADER.pack(*fields) + payload[HEADER.size :], 1)
    time.sleep(0.02)
    target.resume()
    await_writes(target, 100)
    report = target.verify()
    assert report.ok
    assert report.switchover_gap is None


def test_guests_do_not_disturb_each_other(made):
    """Controls of one guest from several threads, while another runs."""
    guests = [made(MIB, workers=2, rate=0, seed=i) for i in range(2)]
    for guest in guests:
        guest.start()
    guests[1].rate = 10 * MIB

    def control() -> None:
        for i in range(10):
            guests[0].stop()
            guests[0].throttle(i * 9)
            guests[0].resume()
            assert guests[0].verify().ok

    threads = [threading.Thread(target=control) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FOREVER)
    for guest in guests:
        assert guest.verify().ok
