"""The KVM guest and KVM's dirty logs: on machines whose KVM runs the guest's program."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mig import GuestMemory, IncomingMigration, OutgoingMigration, Status, _core
from mig.dirty.kvm import choose_log
from mig.errors import KvmError, KvmUnavailableError, MigError, MismatchError
from mig.guest.kvm import KvmGuest, probe
from mig.guest.kvmstate import PARTS, decode_state, encode_state

PAGE = 4096
NPAGES = 1024
#: nobody waits so long; a test that does has found a wait without an end
FOREVER = 20.0
LOGS = ("bitmap", "manual", "ring")


@pytest.fixture(scope="module")
def kvm():
    try:
        probe()
    except KvmUnavailableError as error:
        pytest.skip(f"KVM: {error}")


@pytest.fixture
def make(kvm):
    """Makes guests, and closes them and their memory afterwards."""
    with contextlib.ExitStack() as stack:

        def make(*npages: int, **options) -> KvmGuest:
            memory = GuestMemory()
            for number, n in enumerate(npages or (NPAGES, 77)):
                memory.add(f"ram{number}", n * PAGE)
            stack.callback(memory.close)
            guest = KvmGuest(memory, **options)
            stack.callback(guest.close)
            return guest

        yield make


def run(guest: KvmGuest, rounds: int = 3) -> None:
    guest.resume()
    assert guest.wait_heartbeats(rounds, FOREVER)
    guest.stop()
    guest.check()


def contents(guest: KvmGuest) -> list[bytes]:
    return [bytes(block.view) for block in guest.memory]


def page_of(guest: KvmGuest, page: int) -> memoryview:
    """A guest page, counted over all blocks."""
    for block in guest.memory:
        if page < block.pages.npages:
            return block.view[page * PAGE : (page + 1) * PAGE]
        page -= block.pages.npages
    raise IndexError


# ---- the guest runs --------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 3])
def test_every_vcpu_walks_its_share_and_finds_what_it_wrote(make, vcpus):
    guest = make(vcpus=vcpus)
    guest.boot()
    run(guest)
    total = NPAGES + 77
    shares = [guest.progress(i) for i in guest.vcpus]
    assert shares[0].first == _core.kvm_boot_pages(total)
    assert shares[-1].end == total
    assert [s.first for s in shares[1:]] == [s.end for s in shares[:-1]]
    for share in shares:
        assert share.first <= share.next_page < share.end
        assert share.passes >= 3
    assert guest.verify() == []
    assert guest.corrupt == 0
    assert guest.first_corrupt_page is None


def test_a_stopped_guest_stands_still_and_runs_on_where_it_was(make):
    guest = make(vcpus=2)
    guest.boot()
    passes = 0
    for _ in range(5):
        run(guest, 1)
        before = [guest.progress(i) for i in guest.vcpus], contents(guest)
        assert guest.verify() == []
        time.sleep(0.01)
        assert ([guest.progress(i) for i in guest.vcpus], contents(guest)) == before
        assert before[0][0].passes > passes
        passes = before[0][0].passes


def test_stop_and_resume_at_any_moment(make):
    guest = make(vcpus=2)
    guest.boot()
    rng = random.Random(1)
    for _ in range(100):
        guest.resume()
        time.sleep(rng.random() * 0.001)
        guest.stop()
        assert guest.verify() == []
    guest.check()


def test_only_the_working_set_is_written(make):
    guest = make(dirty_log="bitmap")
    guest.boot(working_set=10 * PAGE, key=5)
    run(guest)
    data = np.frombuffer(b"".join(contents(guest)), dtype="<u8").reshape(-1, PAGE // 8)
    boot = _core.kvm_boot_pages(NPAGES + 77)
    assert list(np.flatnonzero(data[boot:].any(axis=1)) + boot) == list(
        range(NPAGES + 67, NPAGES + 77)
    )


@pytest.mark.parametrize("nbytes", [0, (NPAGES + 77) * PAGE])
def test_a_working_set_that_cannot_be(make, nbytes):
    with pytest.raises(ValueError, match="working set"):
        make().boot(working_set=nbytes)


def test_the_guest_notices_a_flipped_bit(make):
    guest = make()
    guest.boot()
    run(guest)
    where = guest.progress(0)
    page = where.first if where.next_page > where.first + 1 else where.end - 1
    page_of(guest, page)[1234] ^= 1
    assert guest.verify() == [page]
    guest.resume()
    assert guest.wait_heartbeats(3, FOREVER)
    guest.stop()
    assert guest.corrupt == 1
    assert guest.first_corrupt_page == page
    with pytest.raises(KvmError, match=f"guest page {page} "):
        guest.check()
    assert guest.verify() == []  # it has written it anew


def test_the_guest_notices_a_page_that_is_one_round_old(make):
    guest = make()
    guest.boot()
    run(guest)
    where = guest.progress(0)
    page = where.first if where.next_page > where.first + 1 else where.end - 1
    old = bytes(page_of(guest, page))
    run(guest, 2)
    page_of(guest, page)[:] = old
    guest.resume()
    assert guest.wait_heartbeats(2, FOREVER)
    guest.stop()
    assert guest.corrupt == 1


@pytest.mark.parametrize("part", ["regs", "xsave"])
def test_the_guest_notices_lost_registers(make, part):
    guest = make()
    guest.boot()
    run(guest)
    state = bytearray(guest._vm.get_state(0, part))
    # r12, the number of the round; the first byte of xmm15
    state[12 * 8 if part == "regs" else 400] ^= 1
    guest._vm.set_state(0, part, state)
    guest.resume()
    assert guest.wait_heartbeats(2, FOREVER)
    guest.stop()
    assert guest.corrupt > 0


def test_a_vcpu_that_fails_says_why_and_stop_still_returns(make):
    guest = make(vcpus=2)
    guest.boot()
    state = bytearray(guest._vm.get_state(1, "regs"))
    state[16 * 8 : 17 * 8] = struct.pack("<Q", 0)  # rip: a page that is not mapped
    guest._vm.set_state(1, "regs", state)
    guest.resume()
    assert not guest.wait_heartbeats(1, FOREVER)
    guest.stop()
    with pytest.raises(KvmError, match="vCPU 1 left the guest for exit reason"):
        guest.check()


def test_state_of_a_running_vcpu_is_refused(make):
    guest = make()
    guest.boot()
    guest.resume()
    with pytest.raises(KvmError, match="runs"):
        guest.progress(0)
    guest.stop()
    guest.progress(0)


def test_throttle_makes_vcpus_stand_still_and_lets_them_go_on(make):
    guest = make(vcpus=2)
    guest.boot()
    guest.resume()
    guest.throttle(80)
    deadline = time.monotonic() + FOREVER
    while not all(guest._vm.counters(i)["naps"] >= 3 for i in guest.vcpus):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert guest.wait_heartbeats(1, FOREVER)
    guest.throttle(0)
    time.sleep(0.02)
    naps = [guest._vm.counters(i)["naps"] for i in guest.vcpus]
    assert guest.wait_heartbeats(3, FOREVER)
    guest.stop()
    guest.check()
    assert [guest._vm.counters(i)["naps"] for i in guest.vcpus] == naps
    with pytest.raises(ValueError, match="100 %"):
        guest.throttle(100)


def test_a_stop_ends_a_nap(make):
    guest = make()
    guest.boot()
    guest.throttle(99)  # naps of a second
    for _ in range(3):
        guest.resume()
        time.sleep(0.015)
        guest.stop()
    assert guest.verify() == []


def test_signals_stay_the_program_s_own(make):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        guest = make()
        guest.boot()
        guest.resume()
        for _ in range(20):
            guest.stop()
            guest.resume()
        assert got == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert guest.wait_heartbeats(1, FOREVER)
        assert got == [1]
        guest.stop()
    finally:
        signal.signal(signal.SIGUSR1, before)


def kick_signal() -> int:
    """The signal that vCPUs let through while they are in the guest, and only then."""
    mine = {thread.native_id for thread in threading.enumerate()}
    deadline = time.monotonic() + FOREVER
    while time.monotonic() < deadline:
        tasks = Path("/proc/self/task").iterdir()
        for task in (task for task in tasks if int(task.name) not in mine):
            status = task.joinpath("status").read_text()
            blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
            # all can be blocked but KILL, STOP and the two that are glibc's own
            through = ~blocked & ((1 << 64) - 1) & ~(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32)
            if through.bit_count() == 1:
                return through.bit_length()
    raise AssertionError("no vCPU lets one signal through")


class Sender(threading.Thread):
    """Sends the process one signal after the other; of those that wait together one is kept."""

    def __init__(self, number: int, got: list[int], count: int) -> None:
        super().__init__()
        self.number, self.got, self.count = number, got, count
        self.lost: int | None = None

    def run(self) -> None:
        # who sends a signal to himself has it before the call returns, too soon to get lost
        signal.pthread_sigmask(signal.SIG_BLOCK, {self.number})
        for sent in range(1, self.count + 1):
            os.kill(os.getpid(), self.number)
            end = time.monotonic() + FOREVER / 4
            while len(self.got) < sent:
                if time.monotonic() > end:
                    self.lost = sent
                    return
                time.sleep(0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, None], ids=["usr1", "the kick's own"])
def test_no_signal_of_the_program_s_is_lost_among_kicks(make, number):
    guest = make(vcpus=2)
    guest.boot()
    guest.resume()
    number = number or kick_signal()
    got: list[int] = []
    before = signal.signal(number, lambda *_: got.append(1))
    try:
        sender = Sender(number, got, 500)
        sender.start()
        while sender.is_alive():
            guest._vm.collect()  # kicks
            time.sleep(0)
        sender.join()
    finally:
        signal.signal(number, before)
    assert sender.lost is None
    assert len(got) == sender.count
    guest.stop()
    assert guest.verify() == []


def test_kicks_do_not_pile_up(make):
    """The kernel keeps so many signals for a user, and no more."""
    limit = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    guest = make(vcpus=2)
    guest.boot()
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (min(limit[1], 300), limit[1]))
    try:
        for percent in range(1000):
            guest.throttle(percent % 2)
        guest.throttle(0)
        guest.resume()
        for percent in range(1000):
            guest.throttle(percent % 2)
    finally:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, limit)
    guest.throttle(0)
    assert guest.wait_heartbeats(1, FOREVER)
    guest.stop()
    assert guest.verify() == []


#: every thread keeps the signal for somebody who reads it, as signalfd wants it
_READER = """
import os, signal
number = signal.SIGRTMAX
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
from mig import GuestMemory
from mig.guest.kvm import KvmGuest
memory = GuestMemory()
memory.add("ram", 4 << 20)
guest = KvmGuest(memory)
guest.boot()
guest.resume()
os.kill(os.getpid(), number)
assert guest.wait_heartbeats(2, 20)
for _ in range(20):
    guest.stop()
    guest.resume()
assert signal.sigtimedwait({number}, 0).si_pid == os.getpid()
assert signal.sigtimedwait({number}, 0) is None
guest.stop()
guest.check()
"""


def test_a_signal_that_waits_for_its_reader_is_still_there(kvm):
    command = [sys.executable, "-P", "-c", _READER]
    subprocess.run(command, check=True, timeout=FOREVER)


def test_a_wait_lasts_its_timeout_in_all(make, monkeypatch):
    guest, given = make(vcpus=3), []
    clock = itertools.count(100.0)  # a second passes at each look
    monkeypatch.setattr("mig.guest.kvm.time.monotonic", lambda: next(clock))

    class Waiter:
        def wait(self, index: int, heartbeats: int, timeout: float) -> bool:
            given.append(timeout)
            return True

        def counters(self, index: int) -> dict[str, int]:
            return {"heartbeats": 0}

    monkeypatch.setattr(guest, "_vm", Waiter())
    assert guest.wait_heartbeats(1, 10.0)
    monkeypatch.undo()
    assert given == [9.0, 8.0, 7.0]


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e12])
def test_a_wait_may_be_as_long_as_it_likes(make, timeout):
    guest = make()
    guest.boot()
    guest.resume()
    assert guest.wait_heartbeats(1, timeout)
    guest.stop()


def test_a_wait_that_is_over_before_it_begins(make):
    guest = make()
    for timeout in (0.0, -1.0, float("-inf"), -1e300):
        assert not guest.wait_heartbeats(1, timeout)
        assert guest.wait_heartbeats(0, timeout)
    with pytest.raises(ValueError, match="not a number"):
        guest.wait_heartbeats(1, float("nan"))


def test_one_vcpu_alone_is_made_to_stand_still(make):
    guest = make(vcpus=2)
    guest.boot()
    guest.resume()
    guest._vm.limit(1, 0.9)
    deadline = time.monotonic() + FOREVER
    while guest._vm.counters(1)["naps"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert guest._vm.counters(0)["naps"] == 0
    guest._vm.limit(1, 0)
    time.sleep(0.02)
    naps = guest._vm.counters(1)["naps"]
    assert guest.wait_heartbeats(3, FOREVER)
    guest.stop()
    assert guest._vm.counters(1)["naps"] == naps
    assert guest.verify() == []
    for share in (-0.1, 0.991, float("nan")):
        with pytest.raises(ValueError, match="share"):
            guest._vm.limit(0, share)
    with pytest.raises(IndexError):
        guest._vm.limit(2, 0.5)


# ---- state -----------------------------------------------------------------------------------


def copy_memory(source: KvmGuest, target: KvmGuest) -> None:
    for block in source.memory:
        target.memory[block.idstr].view[:] = block.view


def volatile(part, data: bytes) -> bytes:
    """What does not go on by itself while the vCPU stands still: all but the TSC."""
    if part.name == "msrs":
        return b"".join(e for e in map(bytes, np.frombuffer(data, "V16")) if e[:4] != b"\x10\0\0\0")
    return data


@pytest.mark.parametrize("vcpus", [1, 2])
def test_state_goes_on_in_another_machine(make, vcpus):
    source, target = make(vcpus=vcpus), make(vcpus=vcpus)
    source.boot()
    for _ in range(3):
        run(source, 1)
        copy_memory(source, target)
        for index in source.vcpus:
            saved = source._save(index)
            target._load(index, saved)
            again = [volatile(p, d) for p, d in decode_state(target._save(index))]
            assert again == [volatile(p, d) for p, d in decode_state(saved)]
        where = [source.progress(i) for i in source.vcpus]
        assert [target.progress(i) for i in target.vcpus] == where
        assert target.verify() == []
        run(target)
        assert target.verify() == []
        assert all(target.progress(i).passes > w.passes for i, w in enumerate(where))


def test_state_has_every_part(make):
    guest = make()
    guest.boot()
    names = {part.name for part, _ in decode_state(guest._save(0))}
    assert {"sregs", "regs", "xsave", "tsc_khz", "msrs", "mp_state", "events"} <= names


def test_hostile_state_is_a_mismatch_or_runs_in_its_box(make):
    guest = make()
    guest.boot()
    run(guest, 1)
    good = guest._save(0)
    rng = random.Random(7)
    for length in [*range(0, 700, 7), len(good) - 1]:
        with pytest.raises(MismatchError):
            guest._load(0, good[:length])
    for number in range(150):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 3, 20])):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        with contextlib.suppress(MismatchError):
            guest._load(0, bytes(bad))
        if number % 10 == 0:
            guest.resume()
            time.sleep(0.001)
            guest.stop()
    with contextlib.suppress(MismatchError):
        guest._load(0, good + b"\0")
    guest._load(0, good)


def test_numbers_are_big_endian_on_the_wire():
    by_name = {part.name: part for part in PARTS}
    regs = struct.pack("<18Q", *range(1, 19))
    assert by_name["regs"].form.encode(regs) == struct.pack(">18Q", *range(1, 19))
    msrs = struct.pack("<IIQ", 0x10, 0, 0x0102030405060708)
    assert by_name["msrs"].form.encode(msrs) == bytes.fromhex("00000010 0102030405060708")
    xcrs = struct.pack("<IIIIQ", 1, 0, 0, 0, 7) + bytes(15 * 16 + 128)
    assert by_name["xcrs"].form.encode(xcrs) == struct.pack(">IQ", 0, 7)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_comes_back_as_it_was(part):
    sizes = {"sregs": 312, "regs": 144, "xcrs": 392, "xsave": 4096, "tsc_khz": 4, "lapic": 1024}
    sizes |= {"msrs": 640, "debugregs": 128, "mp_state": 4, "events": 64}
    data = bytes(sizes[part.name])  # what is reserved is zero
    assert decode_state(encode_state([(part, data)])) == [(part, data)]
    if part.name not in ("xsave", "lapic"):
        wire = part.form.encode(data)
        with pytest.raises(MismatchError, match=part.name):
            decode_state(struct.pack(">HI", part.number, len(wire) + 1) + wire + b"\0")


def test_parts_twice_or_out_of_order_are_a_mismatch():
    regs = struct.pack(">HI", 2, 144) + bytes(144)
    for payload in (regs + regs, struct.pack(">HI", 99, 0), regs[:3], regs[:-1]):
        with pytest.raises(MismatchError):
            decode_state(payload)


# ---- dirty logs ------------------------------------------------------------------------------


def written(guest: KvmGuest, before, after) -> set[int]:
    """Guest pages written between two stops."""
    pages = set()
    for old, new in zip(before, after, strict=True):
        length = old.end - old.first
        n = new.pages_written - old.pages_written
        start = old.next_page - old.first
        pages |= {old.first + (start + i) % length for i in range(min(n, length))}
    return pages


def take_log(guest: KvmGuest) -> set[int]:
    """Sync, and clear what is to be cleared."""
    log, pages, first = guest.dirty_log(), set(), 0
    for block in guest.memory:
        n = block.pages.npages
        bitmap = _core.Bitmap(n)
        fresh = log.sync(block.idstr, bitmap)
        assert fresh == bitmap.count()
        pages |= {first + int(i) for i in bitmap.indexes()}
        if log.chunk_pages:
            for at in range(0, n, log.chunk_pages):
                log.clear(block.idstr, at, min(log.chunk_pages, n - at))
        first += n
    return pages


@pytest.mark.parametrize("dirty_log", LOGS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_the_log_has_what_was_written_and_nothing_else(make, dirty_log, vcpus):
    guest = make(vcpus=vcpus, dirty_log=dirty_log, chunk_pages=64)
    guest.boot(pace=20000)
    log = guest.dirty_log()
    log.start()
    first = take_log(guest)
    assert first == (set(range(NPAGES + 77)) if dirty_log == "manual" else set())
    sizes = set()
    rng = random.Random(3)
    for _ in range(25):
        before = [guest.progress(i) for i in guest.vcpus]
        guest.resume()
        time.sleep(rng.random() * 0.01)
        guest.stop()
        after = [guest.progress(i) for i in guest.vcpus]
        found, sure = take_log(guest), written(guest, before, after)
        assert sure <= found
        # a page is mapped writable when it is checked, just before it is written
        assert found <= sure | {where.next_page for where in (*before, *after)}
        sizes.add(len(found))
    assert len(sizes) > 3, "nothing was tried"
    assert take_log(guest) == set()
    log.stop()
    guest.check()


@pytest.mark.parametrize("dirty_log", LOGS)
def test_nothing_is_lost_by_taking_the_log_while_the_guest_runs(make, dirty_log):
    guest = make(vcpus=2, dirty_log=dirty_log, chunk_pages=64)
    guest.boot()
    log = guest.dirty_log()
    copy = [bytearray(len(block.view)) for block in guest.memory]

    def send() -> None:
        for block, mine in zip(guest.memory, copy, strict=True):
            dirty = _core.Bitmap(block.pages.npages)
            log.sync(block.idstr, dirty)
            if log.chunk_pages:
                for at in range(0, block.pages.npages, 64):
                    log.clear(block.idstr, at, min(64, block.pages.npages - at))
            for page in map(int, dirty.indexes()):
                part = slice(page * PAGE, (page + 1) * PAGE)
                mine[part] = block.view[part]

    log.start()
    for block, mine in zip(guest.memory, copy, strict=True):
        mine[:] = block.view
    guest.resume()
    for _ in range(20):
        send()
    guest.stop()
    send()
    log.stop()
    assert contents(guest) == [bytes(mine) for mine in copy]
    guest.check()


def test_a_page_that_is_not_cleared_stays_in_the_log(make):
    guest = make(256, dirty_log="manual", chunk_pages=64)
    guest.boot()
    log = guest.dirty_log()
    log.start()
    take_log(guest)
    run(guest, 1)
    assert log.sync("ram0", _core.Bitmap(256)) == 256 - _core.kvm_boot_pages(256)
    for at, left in [(0, 192), (192, 128), (64, 64), (128, 0)]:
        log.clear("ram0", at, 64)
        dirty = _core.Bitmap(256)
        assert log.sync("ram0", dirty) == dirty.count() == left
        assert dirty.count(at, 64) == 0
    log.stop()


def test_what_is_written_after_a_sync_survives_the_clear(make):
    guest = make(256, dirty_log="manual", chunk_pages=64)
    guest.boot()
    log, dirty = guest.dirty_log(), _core.Bitmap(256)
    log.start()
    take_log(guest)
    log.sync("ram0", dirty)
    assert dirty.count() == 0
    run(guest, 1)
    log.clear("ram0", 0, 256)
    log.sync("ram0", dirty)
    boot = _core.kvm_boot_pages(256)
    assert dirty.count(boot) == 256 - boot
    log.stop()


@pytest.mark.parametrize("dirty_log", LOGS)
def test_memory_around_the_hole_below_4_gib(make, dirty_log):
    """A block is cut in two at 3 GiB, at a page that is not the first of a word of the bitmap."""
    before, length = (3 << 30) // PAGE - 1000, 3001
    guest = make(before, length, dirty_log=dirty_log, chunk_pages=256)
    guest.boot(working_set=length * PAGE)
    log = guest.dirty_log()
    log.start()
    dirty = _core.Bitmap(length)
    run(guest, 2)
    assert guest.verify() == []
    log.sync("ram1", dirty)
    assert dirty.count() == length
    for at in range(0, length, 256):
        log.clear("ram1", at, min(256, length - at))
    dirty = _core.Bitmap(length)
    assert log.sync("ram1", dirty) == 0
    run(guest, 2)  # of which the first began before
    assert log.sync("ram1", dirty) == dirty.count() == length
    log.stop()


def test_a_ring_that_is_full_is_emptied_and_pages_are_counted(make):
    entries = 1024
    guest = make(8192, vcpus=2, dirty_log="ring", ring_entries=entries)
    guest.boot()
    log = guest.dirty_log()
    log.start()
    run(guest, 3)
    assert take_log(guest) >= set(range(_core.kvm_boot_pages(8192), 8192))
    for index in guest.vcpus:
        share = guest.progress(index)
        assert log.pages(index) >= share.end - share.first > 2 * entries
    log.stop()
    assert guest.verify() == []


def test_a_ring_is_taken_while_vcpus_come_and_go(make):
    guest = make(vcpus=4, dirty_log="ring")
    guest.boot()
    log, dirty = guest.dirty_log(), _core.Bitmap(NPAGES)
    log.start()
    for _ in range(10):
        guest.resume()
        for _ in range(100):
            log.sync("ram0", dirty)
        guest.stop()
    log.stop()
    guest.check()


def test_logs_that_cannot_be(make):
    with pytest.raises(ValueError, match="no dirty log 'paper'"):
        make(dirty_log="paper")
    with pytest.raises(ValueError, match="power of two"):
        make(dirty_log="manual", chunk_pages=100)
    with pytest.raises(ValueError, match="power of two"):
        make(dirty_log="ring", ring_entries=1000)
    with pytest.raises(KvmUnavailableError, match="at most"):
        make(dirty_log="ring", ring_entries=1 << 30)
    memory = GuestMemory(1 << 16)
    memory.add("ram", 1 << 20)
    with pytest.raises(ValueError, match="pages of 4096"):
        KvmGuest(memory)
    memory.close()


def test_a_kvm_without_a_log_says_so(monkeypatch):
    monkeypatch.setattr(_core, "kvm_log_capabilities", lambda: (0, 0))
    with pytest.raises(KvmUnavailableError, match="KVM_CAP_DIRTY_LOG_RING"):
        choose_log("ring", 4096)
    with pytest.raises(KvmUnavailableError, match="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"):
        choose_log("manual", 4096)
    assert choose_log(None, 4096) == "bitmap"


# ---- migration -------------------------------------------------------------------------------


def ended(migration) -> None:
    with contextlib.suppress(MigError):
        assert migration.wait(FOREVER), f"still {migration.status}"


def migrate(source: KvmGuest, target, path: Path, **options) -> None:
    incoming = IncomingMigration(target)
    incoming.listen(f"unix:{path}")
    outgoing = OutgoingMigration(source, **options)
    outgoing.start(incoming.uri)
    try:
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    finally:
        for migration in (outgoing, incoming):
            with contextlib.suppress(RuntimeError, MigError):
                migration.cancel()
            ended(migration)
    assert outgoing.status == incoming.status == Status.COMPLETED


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("dirty_log", LOGS)
def test_a_running_guest_moves(make, tmp_path, dirty_log, vcpus):
    source, target = (make(vcpus=vcpus, dirty_log=dirty_log, chunk_pages=64) for _ in range(2))
    source.boot(pace=500)
    source.resume()
    assert source.wait_heartbeats(1, FOREVER)
    migrate(source, target, tmp_path / "s", capabilities={"return-path"})
    source.check()
    assert contents(source) == contents(target)
    assert target.verify() == []
    there = [source.progress(i) for i in source.vcpus]
    assert [target.progress(i) for i in target.vcpus] == there
    run(target)
    assert target.verify() == []
    assert all(target.progress(i).passes > there[i].passes for i in target.vcpus)


def test_it_knows_how_long_it_stood_still(make, tmp_path, monkeypatch):
    source, target, other = make(), make(), make()
    source.boot(pace=500)
    source.resume()
    assert source.wait_heartbeats(1, FOREVER)
    began = time.monotonic()
    migrate(source, target, tmp_path / "s1", capabilities={"return-path"})
    assert target.switchover_gap is None
    target.resume()
    assert 0 < target.switchover_gap <= time.monotonic() - began
    monkeypatch.setattr("mig.guest.clock._BOOT_ID", tmp_path / "nothing")
    migrate(target, other, tmp_path / "s2", capabilities={"return-path"})
    other.resume()
    assert other.switchover_gap is None


def test_a_moment_that_is_none_is_refused(make):
    guest = make()
    with pytest.raises(MismatchError, match="no moment"):
        guest._load_moment(b"short", 0)


def test_a_guest_moves_there_and_back(make, tmp_path):
    here, there = make(vcpus=2), make(vcpus=2)
    here.boot(pace=500)
    here.resume()
    for number in range(4):
        assert here.wait_heartbeats(1, FOREVER)
        migrate(here, there, tmp_path / str(number), capabilities={"return-path"})
        there.resume()
        assert there.wait_heartbeats(1, FOREVER)
        here, there = there, here
    here.stop()
    for guest in (here, there):
        guest.check()
    assert here.verify() == []


def test_the_check_of_a_migration_can_fail(make, tmp_path):
    source, target = make(), make()
    source.boot(pace=500)
    source.resume()
    assert source.wait_heartbeats(1, FOREVER)
    migrate(source, target, tmp_path / "s")
    where = target.progress(0)
    page = where.first if where.next_page > where.first + 1 else where.end - 1
    page_of(target, page)[0] ^= 0x80
    target.resume()
    assert target.wait_heartbeats(2, FOREVER)
    with pytest.raises(KvmError, match=f"guest page {page} "):
        target.check()
    target.stop()


def test_a_cancelled_migration_leaves_the_source_running(make, tmp_path):
    source, target = make(vcpus=2), make(vcpus=2)
    source.boot(pace=500)
    source.resume()
    assert source.wait_heartbeats(1, FOREVER)
    rng = random.Random(5)
    for number in range(5):
        incoming = IncomingMigration(target)
        incoming.listen(f"unix:{tmp_path}/{number}")
        # slow enough that it does not end before it is cancelled
        outgoing = OutgoingMigration(source, parameters={"max-bandwidth": 1 << 20})
        outgoing.start(incoming.uri)
        time.sleep(rng.random() * 0.05)
        outgoing.cancel()
        ended(outgoing)
        incoming.cancel()
        ended(incoming)
        assert outgoing.status == Status.CANCELLED
        assert source.wait_heartbeats(1, FOREVER)
        source.check()
    migrate(source, target, tmp_path / "s", capabilities={"return-path"})
    run(target)
    source.check()
    assert target.verify() == []


@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_destination_with_other_vcpus_refuses_and_the_source_runs_on(make, tmp_path, vcpus):
    source, target = make(vcpus=2), make(vcpus=vcpus)
    source.boot(pace=500)
    source.resume()
    incoming = IncomingMigration(target)
    incoming.listen(f"unix:{tmp_path}/s")
    outgoing = OutgoingMigration(source, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    with pytest.raises(MismatchError):
        incoming.wait(FOREVER)
    ended(outgoing)
    assert outgoing.status == Status.FAILED
    assert source.wait_heartbeats(1, FOREVER)
    source.stop()
    source.check()
    assert source.verify() == []


def test_what_was_loaded_in_part_does_not_run(make, tmp_path):
    source, target = make(vcpus=2), make(vcpus=2)
    source.boot(pace=500)
    source.resume()
    assert source.wait_heartbeats(1, FOREVER)
    incoming = IncomingMigration(target)
    incoming.listen(f"unix:{tmp_path}/half")
    outgoing = OutgoingMigration(source, parameters={"max-bandwidth": 1 << 20})
    outgoing.start(incoming.uri)
    deadline = time.monotonic() + FOREVER
    while not incoming.query().ram.total:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with pytest.raises(MigError, match="being loaded"):
        target.boot()
    with pytest.raises(MigError, match="in part only"):
        target.resume()
    outgoing.cancel()
    ended(outgoing)
    ended(incoming)
    assert incoming.status in (Status.FAILED, Status.CANCELLED)
    with pytest.raises(MigError, match="in part only"):
        target.resume()
    assert not target.running
    target.boot()  # reset: it is a guest of its own
    run(target)
    assert target.verify() == []
    migrate(source, target, tmp_path / "whole", capabilities={"return-path"})
    run(target)
    assert target.verify() == []


# ---- what is left ----------------------------------------------------------------------------


def held() -> tuple[int, int, int]:
    """Descriptors, threads and mappings of KVM that this process has."""
    me = Path("/proc/self")
    maps = me.joinpath("maps").read_text().count("kvm-vcpu")
    return len(list(me.joinpath("fd").iterdir())), len(list(me.joinpath("task").iterdir())), maps


@pytest.mark.parametrize("dirty_log", LOGS)
def test_nothing_is_left_behind(kvm, dirty_log):
    before = held()
    for number in range(5):
        memory = GuestMemory()
        memory.add("ram", 1 << 20)
        guest = KvmGuest(memory, vcpus=3, dirty_log=dirty_log)
        with pytest.raises(BufferError):
            memory.close()
        if number:
            guest.boot()
        if number > 1:
            guest.dirty_log().start()
            guest.resume()
            guest.throttle(50)
        if number > 2:
            assert guest.wait_heartbeats(1, FOREVER)
        guest.close()
        guest.close()
        memory.close()
        with pytest.raises(ValueError, match="closed"):
            guest.stop()
    assert held() == before
    assert threading.active_count() <= before[1]


def test_a_machine_that_cannot_be_made_says_what_failed_and_leaves_nothing(kvm):
    memory = GuestMemory()
    memory.add("ram", 1 << 20)
    before = held()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = os.open("/dev/null", os.O_RDONLY)  # the lowest number that is free
    os.close(limit)
    words, made = set(), None
    try:
        while made is None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            try:
                made = _core.KvmVm([block.pages for block in memory], vcpus=2)
            except KvmUnavailableError as error:
                words.add(str(error).partition(":")[0])
            limit += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    made.close()
    assert words == {"opening /dev/kvm", "KVM_CREATE_VM", "KVM_CREATE_VCPU"}
    assert held() == before
    memory.close()
