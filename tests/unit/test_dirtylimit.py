"""dirty-limit: who is slowed down, how far, and that everybody runs at full speed in the end."""

from __future__ import annotations

import contextlib
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.boxes import FOREVER, NPAGES, PAGE, Box, ended

from mig import (
    Bitmap,
    GuestMemory,
    IncomingMigration,
    MemoryGuest,
    OutgoingMigration,
    ProcessGuest,
    Status,
)
from mig.engine.convergence import Convergence, Period
from mig.engine.dirtylimit import DirtyLimit
from mig.errors import KvmUnavailableError, MigError, OptionError
from mig.guest import PerVcpuGuest
from mig.guest.kvm import KvmGuest, probe
from mig.options import Parameters
from mig.options.rules import broken_rules

MB = 1 << 20
RING = 4096
#: more than is sent, and no more than half of it
TOO_MUCH, ENOUGH = Period(1.0, 600, 1000), Period(1.0, 500, 1000)


class Vcpus:
    """vCPUs that dirty so many MB/s when they run, on a clock that goes when it is told to.

    rates: of each; a function is given the share that the vCPU runs
    """

    page_size = PAGE
    round_pages = RING

    def __init__(self, *rates) -> None:
        self.rates = list(rates)
        self.pages = [1000.0 * i for i in range(len(rates))]
        self.shares = [0.0] * len(rates)
        self.calls: list[tuple[int, float]] = []
        self.now = 500.0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for i in range(len(self.rates)):
            self.pages[i] += self.rate(i) * MB / PAGE * seconds

    def rate(self, i: int) -> float:
        running, rate = 1 - self.shares[i], self.rates[i]
        return rate(running) if callable(rate) else rate * running

    def dirty_pages(self) -> list[int]:
        return [int(pages) for pages in self.pages]

    def throttle_vcpu(self, vcpu: int, share: float) -> None:
        assert 0 <= share <= 0.99
        self.shares[vcpu] = share
        self.calls.append((vcpu, share))


def limiting(vcpus: Vcpus, parameters=None, **values) -> DirtyLimit:
    chosen = Parameters(**{"vcpu_dirty_limit": 10, **values})
    limit = DirtyLimit(
        vcpus,
        parameters or (lambda: chosen),
        on_failure=lambda error: pytest.fail(str(error)),
        clock=lambda: vcpus.now,
    )
    limit.begin()
    return limit


def look(limit: DirtyLimit, vcpus: Vcpus, times: int = 1, seconds: float = 1.0) -> None:
    for _ in range(times):
        vcpus.pass_time(seconds)
        limit.look()


# ---- how far ---------------------------------------------------------------------------------


def test_only_who_writes_too_much_is_slowed_down_to_the_limit_at_once():
    vcpus = Vcpus(400, 9, 0, 10, 40)
    limit = limiting(vcpus)
    look(limit, vcpus)
    assert [vcpu for vcpu, _ in vcpus.calls] == [0, 4]
    assert vcpus.shares == pytest.approx([0.975, 0, 0, 0, 0.75], rel=1e-3)
    look(limit, vcpus, 5)
    assert len(vcpus.calls) == 2
    assert [vcpus.rate(i) for i in (0, 4)] == pytest.approx([10, 10], rel=0.01)


def test_the_limit_may_be_passed_by_a_little():
    vcpus = Vcpus(10.4, 10.6)
    look(limiting(vcpus), vcpus)
    assert [vcpu for vcpu, _ in vcpus.calls] == [1]


def test_a_vcpu_keeps_a_hundredth_of_its_time():
    vcpus = Vcpus(100_000)
    look(limiting(vcpus), vcpus, 3)
    assert vcpus.shares == [0.99]


def test_what_does_not_write_in_proportion_to_its_time_gets_there_too():
    """Pages that are written again and again count once: half the time is not half the rate."""
    vcpus = Vcpus(lambda running: min(50, 400 * running), lambda running: 100 * running**0.5)
    limit = limiting(vcpus)
    look(limit, vcpus, 12)
    assert [vcpus.rate(0), vcpus.rate(1)] == pytest.approx([10, 10], rel=0.06)
    before = len(vcpus.calls)
    look(limit, vcpus, 5)
    assert len(vcpus.calls) == before


def test_who_writes_less_gets_his_time_back_step_by_step():
    vcpus = Vcpus(1000)
    limit = limiting(vcpus)
    look(limit, vcpus)
    assert vcpus.shares == pytest.approx([0.99])
    vcpus.rates = [0]
    running = []
    while vcpus.shares[0]:
        look(limit, vcpus)
        running.append(1 - vcpus.shares[0])
    assert running == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0])
    vcpus.rates = [1000]
    look(limit, vcpus)
    assert vcpus.shares == pytest.approx([0.99])


def test_the_limit_can_change_meanwhile():
    chosen = [Parameters(vcpu_dirty_limit=10)]
    vcpus = Vcpus(100)
    limit = limiting(vcpus, lambda: chosen[0])
    look(limit, vcpus)
    assert vcpus.shares == pytest.approx([0.9])
    chosen[0] = Parameters(vcpu_dirty_limit=20)
    look(limit, vcpus)
    assert vcpus.shares == pytest.approx([0.8])
    chosen[0] = Parameters(vcpu_dirty_limit=200)
    look(limit, vcpus, 3)
    assert vcpus.shares == [0.0]


def test_who_runs_in_turns_is_measured_over_several_of_them():
    vcpus = Vcpus(100)
    limit = limiting(vcpus)
    look(limit, vcpus, seconds=0.01)
    assert len(vcpus.calls) == 1
    vcpus.rates = [200]
    look(limit, vcpus, 29, seconds=0.01)
    assert len(vcpus.calls) == 1
    look(limit, vcpus, 3, seconds=0.01)
    assert len(vcpus.calls) == 2
    assert vcpus.rate(0) == pytest.approx(10, rel=0.02)


@settings(max_examples=200)
@given(
    rates=st.lists(st.floats(0, 1e5), min_size=1, max_size=8),
    quota=st.integers(1, 5000),
    period=st.floats(0.5, 2.0),
)
def test_whatever_they_write_nobody_is_wronged(rates, quota, period):
    vcpus = Vcpus(*rates)
    limit = limiting(vcpus, vcpu_dirty_limit=quota)
    look(limit, vcpus, 12, period)
    for i, rate in enumerate(rates):
        if rate <= quota:
            assert all(vcpu != i for vcpu, _ in vcpus.calls)
        elif rate > 1.06 * quota:
            # less than a page more or less in a period is nobody's fault
            slack = 0.06 * quota + 0.1
            assert abs(vcpus.rate(i) - max(quota, rate / 100)) <= slack
    limit.end()
    assert vcpus.shares == [0.0] * len(rates)


# ---- the end ---------------------------------------------------------------------------------


def test_in_the_end_who_was_slowed_down_is_let_go():
    vcpus = Vcpus(100, 5, 200)
    limit = limiting(vcpus)
    look(limit, vcpus)
    vcpus.calls.clear()
    limit.end()
    assert sorted(vcpus.calls) == [(0, 0.0), (2, 0.0)]
    limit.end()
    assert len(vcpus.calls) == 2


def test_one_that_cannot_be_let_go_does_not_hold_the_others():
    vcpus = Vcpus(100, 200, 300)
    limit = limiting(vcpus)
    look(limit, vcpus)
    let_go = vcpus.throttle_vcpu

    def throttle(vcpu: int, share: float) -> None:
        if vcpu == 1:
            raise MigError("stuck")
        let_go(vcpu, share)

    vcpus.throttle_vcpu = throttle
    with pytest.raises(MigError, match="stuck"):
        limit.end()
    assert [vcpus.shares[0], vcpus.shares[2]] == [0, 0]


# ---- when, and what query-migrate says -------------------------------------------------------


def await_that(happened, what: str) -> None:
    end = time.monotonic() + FOREVER
    while not happened():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.001)


def test_it_begins_in_the_second_period_that_is_too_much():
    looked = threading.Event()
    vcpus = Vcpus(100)
    chosen = Parameters(throttle_trigger_threshold=50, x_vcpu_dirty_limit_period=1)
    limit = DirtyLimit(vcpus, lambda: chosen, on_failure=lambda _: None)
    vcpus.dirty_pages = lambda: looked.set() or [0]
    try:
        for period in (TOO_MUCH, ENOUGH, ENOUGH):
            limit.period_over(period)
        assert not looked.is_set()
        limit.period_over(TOO_MUCH)
        assert looked.is_set()
        looked.clear()
        assert looked.wait(FOREVER), "it does not look again"
    finally:
        limit.end()
    assert not [t for t in threading.enumerate() if t.name == "mig-dirty-limit"]


def test_the_statistics_are_of_rings_and_of_the_slowest():
    source = OutgoingMigration(Box().guest)
    vcpus = Vcpus(320, 64)
    limit = DirtyLimit(
        vcpus, lambda: Parameters(vcpu_dirty_limit=32), on_failure=print, clock=lambda: vcpus.now
    )
    info = source.query()
    assert limit.report(info) is info
    limit.begin()
    assert limit.report(info).dirty_limit_ring_full_time == 0
    assert limit.report(info).dirty_limit_throttle_time_per_round == 0
    look(limit, vcpus)
    said = limit.report(info)
    # a ring is of 16 MB: full in 0.05 s, and at 32 MB/s in 0.5
    assert said.dirty_limit_throttle_time_per_round == pytest.approx(0.45, rel=0.01)
    assert said.dirty_limit_ring_full_time == pytest.approx(16 / 192, rel=0.01)
    look(limit, vcpus)
    said = limit.report(info)
    assert said.dirty_limit_throttle_time_per_round == pytest.approx(0.45, rel=0.01)
    assert said.dirty_limit_ring_full_time == pytest.approx(0.5, rel=0.01)


# ---- in a migration --------------------------------------------------------------------------


class Restless:
    """A log that finds all of pc.ram dirty at each sync, until it is told to be quiet."""

    chunk_pages = 0

    def __init__(self) -> None:
        self.quiet = False

    def start(self) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        if idstr != "pc.ram" or self.quiet:
            return 0
        fresh = NPAGES - dirty.count(0, NPAGES)
        dirty.set(0, NPAGES)
        return fresh

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        raise AssertionError("nothing to clear")

    def stop(self) -> None:
        pass


class Machine(Vcpus):
    """vCPUs on the real clock: a greedy one and a modest one."""

    def __init__(self, log: Restless, *, quiet_when_slow: bool = True) -> None:
        super().__init__(1000, 1)
        self._log, self._quiet_when_slow = log, quiet_when_slow
        self._began = time.monotonic()

    def dirty_pages(self) -> list[int]:
        now = time.monotonic()
        self.pass_time(now - self._began)
        self._began = now
        return super().dirty_pages()

    def throttle_vcpu(self, vcpu: int, share: float) -> None:
        super().throttle_vcpu(vcpu, share)
        self._log.quiet = self._quiet_when_slow and share > 0.5


def box_with(vcpus, log: Restless) -> Box:
    box = Box(5, dirty=log)
    box.guest.vcpu_throttle = lambda: vcpus
    assert isinstance(box.guest, PerVcpuGuest)
    return box


OPTIONS = {
    "capabilities": {"dirty-limit", "return-path"},
    "parameters": {
        "downtime-limit": 0,
        # all memory is dirty at each sync: what is dirtied is what is sent
        "throttle-trigger-threshold": 50,
        "x-vcpu-dirty-limit-period": 20,
        "vcpu-dirty-limit": 100,
    },
}


@pytest.fixture
def short_periods(monkeypatch):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.05)


def test_a_guest_that_writes_faster_than_is_sent_is_limited_and_let_go(made, short_periods):
    log = Restless()
    vcpus = Machine(log)
    source, target = box_with(vcpus, log), Box()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, **OPTIONS)
    assert "dirty-limit-ring-full-time" not in outgoing.query().to_qmp()
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    assert all(vcpu == 0 for vcpu, _ in vcpus.calls)
    # the simulated machine does what it is told: a tenth is left
    assert vcpus.calls[0][1] == pytest.approx(0.9, abs=0.02)
    assert vcpus.calls[-1] == (0, 0.0)
    said = outgoing.query().to_qmp()
    # a ring of 16 MB at 100 MB/s, of which 16 ms would have been enough
    assert 130_000 < said["dirty-limit-throttle-time-per-round"] < 160_000
    assert said["dirty-limit-ring-full-time"] > 0
    assert "cpu-throttle-percentage" not in said


@pytest.mark.parametrize("end", ["cancel", "failure of the destination", "failure of a vCPU"])
def test_however_it_ends_every_vcpu_is_let_go(made, short_periods, end):
    log = Restless()
    vcpus = Machine(log, quiet_when_slow=False)
    source, target = box_with(vcpus, log), Box()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, **OPTIONS)
    outgoing.start(incoming.uri)
    await_that(lambda: vcpus.calls, "a vCPU to be slowed down")
    assert outgoing.query().to_qmp()["dirty-limit-throttle-time-per-round"] > 0
    if end == "cancel":
        outgoing.cancel()
    elif end == "failure of the destination":
        incoming.cancel()
    else:
        vcpus.dirty_pages = lambda: 1 // 0
    ended(outgoing)
    ended(incoming)
    assert outgoing.status == (Status.CANCELLED if end == "cancel" else Status.FAILED)
    if end == "failure of a vCPU":
        with pytest.raises(MigError, match="dirty-limit: ZeroDivisionError"):
            outgoing.wait(FOREVER)
    assert vcpus.shares == [0.0, 0.0]
    assert source.calls == []
    assert not [t for t in threading.enumerate() if t.name == "mig-dirty-limit"]


def test_nobody_is_slowed_down_or_measured_once_the_guest_stands_still(made, short_periods):
    log = Restless()
    vcpus = Machine(log)
    source, target = box_with(vcpus, log), Box()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    capabilities = {"dirty-limit", "return-path", "pause-before-switchover"}
    outgoing = made.outgoing(source.guest, **{**OPTIONS, "capabilities": capabilities})
    outgoing.start(incoming.uri)
    await_that(lambda: outgoing.status == Status.PRE_SWITCHOVER, "the pause")
    assert vcpus.shares == [0.0, 0.0]
    vcpus.dirty_pages = lambda: 1 // 0
    assert outgoing.query().dirty_limit_throttle_time_per_round > 0
    outgoing.migrate_continue()
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


def test_limits_may_change_while_it_runs(made, short_periods):
    log = Restless()
    vcpus = Machine(log, quiet_when_slow=False)
    source, target = box_with(vcpus, log), Box()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, **OPTIONS)
    outgoing.start(incoming.uri)
    await_that(lambda: vcpus.shares[0] > 0.8, "a vCPU to be slowed down")
    outgoing.set_parameters({"vcpu-dirty-limit": 2000, "x-vcpu-dirty-limit-period": 10})
    await_that(lambda: vcpus.shares[0] == 0, "the vCPU to be let go")
    outgoing.cancel()
    ended(outgoing)


def test_a_guest_without_vcpus_to_tell_apart_is_refused(made):
    log = Restless()
    without, none = Box(1, dirty=log), box_with(None, log)
    for box in (without, none):
        outgoing = made.outgoing(box.guest, capabilities={"dirty-limit"})
        with pytest.raises(OptionError, match="dirty-limit requires a guest that counts"):
            outgoing.start("tcp:127.0.0.1:1")
        assert outgoing.status == Status.NONE
    assert not isinstance(MemoryGuest("m", GuestMemory()), PerVcpuGuest)


def test_it_does_not_go_with_auto_converge():
    both = {"dirty-limit", "auto-converge"}
    with pytest.raises(OptionError, match="dirty-limit conflicts with auto-converge"):
        OutgoingMigration(Box().guest, capabilities=both)
    assert broken_rules(frozenset({"dirty-limit"}), Parameters()) == []
    with pytest.raises(OptionError, match="dirty-limit"):
        IncomingMigration(Box().guest, capabilities={"dirty-limit"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vcpu-dirty-limit", 0),
        ("x-vcpu-dirty-limit-period", 0),
        ("x-vcpu-dirty-limit-period", 1001),
    ],
)
def test_parameters_have_their_ranges(name, value):
    with pytest.raises(OptionError, match=name):
        OutgoingMigration(Box().guest, parameters={name: value})


# ---- real guests -----------------------------------------------------------------------------


@pytest.fixture
def kvm_guests():
    try:
        probe()
    except KvmUnavailableError as error:
        pytest.skip(f"KVM: {error}")
    with contextlib.ExitStack() as stack:

        def make(nbytes: int, **options) -> KvmGuest:
            memory = GuestMemory()
            memory.add("ram", nbytes)
            stack.callback(memory.close)
            guest = KvmGuest(memory, **options)
            stack.callback(guest.close)
            return guest

        yield make


def set_pace(guest: KvmGuest, vcpu: int, turns: int) -> None:
    """Have the vCPU take so many turns of an empty loop after each page."""
    regs = bytearray(guest._vm.get_state(vcpu, "regs"))
    regs[14 * 8 : 15 * 8] = struct.pack("<Q", turns)
    guest._vm.set_state(vcpu, "regs", regs)


def test_a_greedy_vcpu_is_slowed_down_and_a_modest_one_is_not(
    kvm_guests, made, tmp_path, monkeypatch
):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.1)
    source, target = (kvm_guests(32 * MB, vcpus=2, dirty_log="ring") for _ in range(2))
    source.boot()
    set_pace(source, 1, 10_000_000)
    source.resume()
    assert source._vm.wait(0, 1, FOREVER), "the greedy one does not run"
    incoming = made.incoming(target)
    incoming.listen(f"unix:{tmp_path}/s")

    class Patient(Convergence):
        """On a machine that is busy elsewhere the greedy one may be slow by itself for a while."""

        @property
        def threshold(self) -> float:
            return super().threshold if source._vm.counters(0)["naps"] else 0

    outgoing = made.outgoing(
        source,
        capabilities={"dirty-limit", "return-path"},
        policy=Patient(lambda: outgoing.parameters, auto_converge=False),
        parameters={
            # what the greedy one writes at full speed never gets through
            "max-bandwidth": 64 * MB,
            "downtime-limit": 100,
            "vcpu-dirty-limit": 8,
            "x-vcpu-dirty-limit-period": 100,
        },
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    source.check()
    naps = [source._vm.counters(i)["naps"] for i in source.vcpus]
    assert naps[0] > 0
    assert naps[1] == 0
    said = outgoing.query().to_qmp()
    assert said["dirty-limit-throttle-time-per-round"] > 0
    assert said["dirty-limit-ring-full-time"] > 0
    assert bytes(source.memory["ram"].view) == bytes(target.memory["ram"].view)
    assert target.verify() == []
    # both run at full speed now
    for guest in (source, target):
        before = [guest._vm.counters(i)["naps"] for i in guest.vcpus]
        guest.resume()
        assert guest._vm.wait(0, guest.heartbeats(0) + 3, FOREVER)
        guest.stop()
        assert [guest._vm.counters(i)["naps"] for i in guest.vcpus] == before
        assert guest.verify() == []


def test_a_kvm_guest_without_rings_is_refused(kvm_guests, made):
    guest = kvm_guests(4 * MB, dirty_log="bitmap")
    assert guest.vcpu_throttle() is None
    with pytest.raises(OptionError, match="dirty ring"):
        made.outgoing(guest, capabilities={"dirty-limit"}).start("tcp:127.0.0.1:1")


def test_rings_count_each_vcpu_s_pages_whoever_takes_them(kvm_guests):
    guest = kvm_guests(4 * MB, vcpus=2, dirty_log="ring")
    guest.boot()
    vcpus, log = guest.vcpu_throttle(), guest.dirty_log()
    log.start()
    assert vcpus.dirty_pages() == [0, 0]
    guest.resume()
    assert guest.wait_heartbeats(1, FOREVER)
    guest.stop()
    counts = vcpus.dirty_pages()
    for vcpu in guest.vcpus:
        where = guest.progress(vcpu)
        assert counts[vcpu] == log.pages(vcpu) >= where.end - where.first
    assert vcpus.dirty_pages() == counts
    # what was counted is still in the log
    dirty = Bitmap(4 * MB // PAGE)
    first = guest.progress(0).first
    log.sync("ram", dirty)
    assert dirty.count(first) == dirty.nbits - first
    log.stop()


def test_one_worker_of_a_process_guest_is_slowed_down():
    with ProcessGuest(8 * MB, workers=2, rate=0) as guest:
        assert guest.vcpu_throttle() is None
        guest.start()
        vcpus = guest.vcpu_throttle()
        assert vcpus.page_size == PAGE
        before = vcpus.dirty_pages()
        vcpus.throttle_vcpu(1, 0.95)
        await_that(lambda: min(map(int.__sub__, vcpus.dirty_pages(), before)) > 10_000, "writes")
        limited = vcpus.dirty_pages()
        assert limited[0] - before[0] > 2 * (limited[1] - before[1])
        vcpus.throttle_vcpu(1, 0.0)
        await_that(
            lambda: vcpus.dirty_pages()[1] - limited[1] > 2 * (limited[1] - before[1]), "writes"
        )
        for share in (-0.1, 1.0):
            with pytest.raises(ValueError, match="share"):
                vcpus.throttle_vcpu(0, share)
        with pytest.raises(IndexError):
            vcpus.throttle_vcpu(2, 0.5)
        assert guest.verify().ok


def test_a_process_guest_that_writes_too_fast_moves(made, tmp_path, monkeypatch):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.1)
    with ProcessGuest(16 * MB, workers=2, rate=0) as source, ProcessGuest(16 * MB) as target:
        source.start()
        await_that(lambda: source.counters().writes > 10_000, "writes")
        incoming = made.incoming(target)
        incoming.listen(f"unix:{tmp_path}/s")
        outgoing = made.outgoing(
            source,
            capabilities={"dirty-limit", "return-path"},
            parameters={
                "max-bandwidth": 64 * MB,
                "downtime-limit": 50,
                "vcpu-dirty-limit": 4,
                "x-vcpu-dirty-limit-period": 100,
            },
        )
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
        assert outgoing.query().to_qmp()["dirty-limit-throttle-time-per-round"] > 0
        target.resume()
        await_that(lambda: target.counters().writes > source.counters().writes, "writes")
        assert target.verify().ok
