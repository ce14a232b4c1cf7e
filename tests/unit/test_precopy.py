"""The phase in which the guest runs: when it may be stopped, slowed down, and what is sent."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from uuid import UUID

import numpy as np
import pytest
from unit.boxes import FOREVER, NPAGES, PAGE, Box, ended, error_of

from mig import Status
from mig.dirty import SharedDirtyLog
from mig.engine.convergence import Period
from mig.errors import CancelledError, MigError, MismatchError, OptionError, PeerError, StateError
from mig.events import PassStarted, StatusChanged
from mig.wire import ReturnType


class Restless:
    """A log that finds the same pages dirty at each sync, until it is told to be quiet."""

    chunk_pages = 0

    def __init__(self, npages: int = 10) -> None:
        self.npages = npages
        self.quiet = False
        self.syncs = 0

    def start(self) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        if idstr != "pc.ram" or self.quiet:
            return 0
        self.syncs += 1
        fresh = self.npages - dirty.count(0, self.npages)
        dirty.set(0, self.npages)
        return fresh

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        raise AssertionError("nothing to clear")

    def stop(self) -> None:
        pass


class Told:
    """A policy that does as it is told."""

    expected_downtime = 0.125

    def __init__(self, log: Restless, *percents: int) -> None:
        self.threshold = 0.0
        self.periods: list[Period] = []
        self._log = log
        self._percents = list(percents)

    def measured(self, nbytes: int, seconds: float, remaining: int) -> None:
        assert nbytes > 0
        assert seconds > 0

    def synced(self, remaining: int) -> None:
        assert remaining > 0 or self._log.quiet

    def throttle(self, period: Period) -> int | None:
        self.periods.append(period)
        if not self._percents:
            self._log.quiet = True
            return None
        return self._percents.pop(0)


def started(made, source: Box, target: Box, **options):
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, **options)
    outgoing.start(incoming.uri)
    return outgoing, incoming


def await_that(happened, what: str) -> None:
    end = time.monotonic() + FOREVER
    while not happened():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.001)


def await_status(migration, status: Status) -> None:
    await_that(lambda: migration.status == status, status)


# ---- how far it is slowed down ---------------------------------------------------------------


def test_a_guest_is_slowed_down_as_the_policy_says_and_let_go_at_the_end(made, monkeypatch):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.02)
    log, throttled = Restless(), []
    source, target = Box(40, dirty=log), Box()
    source.guest.throttle = throttled.append
    policy = Told(log, 20, 20, 30)
    outgoing, incoming = started(made, source, target, policy=policy)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert throttled == [20, 30, 0]
    assert target.same_as(source)
    assert all(period.seconds >= 0.02 for period in policy.periods)
    # each sync found these pages, whatever was sent in between
    assert policy.periods[0].dirty >= log.npages * PAGE
    assert policy.periods[0].sent > 0


def test_auto_converge_slows_down_a_guest_that_writes_faster_than_is_sent(made, monkeypatch):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.05)
    log, throttled = Restless(NPAGES), []
    source, target = Box(41, dirty=log), Box()

    def throttle(percent: int) -> None:
        throttled.append(percent)
        log.quiet = percent >= 60

    source.guest.throttle = throttle
    outgoing, incoming = started(
        made,
        source,
        target,
        capabilities={"auto-converge"},
        parameters={
            "downtime-limit": 0,
            "cpu-throttle-initial": 40,
            "cpu-throttle-increment": 20,
            # all memory is dirty at each sync: what is dirtied is what is sent
            "throttle-trigger-threshold": 50,
        },
    )
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert throttled == [40, 60, 0]
    assert target.same_as(source)


def test_a_guest_that_was_slowed_down_is_let_go_when_the_migration_is_cancelled(made, monkeypatch):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.02)
    log, throttled = Restless(), []
    source = Box(42, dirty=log)
    policy = Told(log, *range(1, 99))
    source.guest.throttle = throttled.append
    outgoing, incoming = started(made, source, Box(), policy=policy)
    await_that(lambda: throttled, "a throttle")
    outgoing.cancel()
    ended(outgoing)
    ended(incoming)
    assert outgoing.status == Status.CANCELLED
    assert throttled[-1] == 0
    assert source.calls == []


# ---- the switchover --------------------------------------------------------------------------


def test_before_the_switchover_it_waits_to_be_continued(made):
    source, target, events = Box(43), Box(), []
    outgoing, incoming = started(
        made,
        source,
        target,
        capabilities={"pause-before-switchover", "return-path"},
        on_event=events.append,
    )
    await_status(outgoing, Status.PRE_SWITCHOVER)
    assert source.calls == ["stop"]
    assert not outgoing.wait(0.05)
    # who owns the disks may let go of them now; the guest's last words count
    source.state = b"last words"
    outgoing.migrate_continue()
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    statuses = [event.status for event in events if isinstance(event, StatusChanged)]
    assert statuses == ["setup", "active", "pre-switchover", "device", "completed"]


def test_only_a_migration_that_waits_can_be_continued(made):
    source = Box(44)
    outgoing, incoming = started(made, source, Box())
    assert outgoing.wait(FOREVER)
    with pytest.raises(StateError):
        outgoing.migrate_continue()
    ended(incoming)


@pytest.mark.parametrize("capabilities", [(), ("return-path",)])
def test_a_migration_that_waits_can_be_cancelled(made, capabilities):
    source = Box(45)
    outgoing, incoming = started(
        made, source, Box(), capabilities={"pause-before-switchover", *capabilities}
    )
    await_status(outgoing, Status.PRE_SWITCHOVER)
    outgoing.cancel()
    with pytest.raises(CancelledError):
        outgoing.wait(FOREVER)
    assert source.calls == ["stop", "resume"]
    ended(incoming)
    again, incoming = started(made, source, target := Box())
    assert again.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


def test_a_destination_that_leaves_while_it_is_waited_for_ends_the_migration(made):
    source = Box(46)
    outgoing, incoming = started(
        made, source, Box(), capabilities={"pause-before-switchover", "return-path"}
    )
    await_status(outgoing, Status.PRE_SWITCHOVER)
    incoming.cancel()
    assert isinstance(error_of(outgoing), PeerError)
    assert source.calls == ["stop", "resume"]


def test_a_destination_that_has_to_agree_is_waited_for(made):
    source, target, events = Box(47, dirty=Restless(0)), Box(), []
    outgoing, incoming = started(
        made,
        source,
        target,
        capabilities={"return-path", "switchover-ack"},
        on_event=events.append,
    )
    # this destination does not know that it is asked
    assert not outgoing.wait(0.2)
    assert outgoing.status == Status.ACTIVE
    assert source.calls == []
    outgoing.cancel()
    ended(outgoing)
    ended(incoming)

    incoming = made.incoming(target.guest, capabilities={"switchover-ack", "return-path"})
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"switchover-ack", "return-path"})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


# ---- what is sent ----------------------------------------------------------------------------


def test_what_is_discarded_is_neither_read_nor_sent(made):
    log = Restless(100)
    source, target = Box(48, dirty=log), Box()
    source.guest.discarded = {"pc.ram": [(50, 200)]}
    for page in range(50, 250):
        source.memory["pc.ram"].view[page * PAGE] = 1

    def rest(event) -> None:
        log.quiet = event == PassStarted(3)

    outgoing, incoming = started(made, source, target, on_event=rest)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    mine = np.frombuffer(source.memory["pc.ram"].view, dtype=np.uint8).reshape(-1, PAGE)
    theirs = np.frombuffer(target.memory["pc.ram"].view, dtype=np.uint8).reshape(-1, PAGE)
    assert not theirs[50:250].any()
    assert (mine[:50] == theirs[:50]).all()
    assert (mine[250:] == theirs[250:]).all()


def test_pages_that_nobody_needs_are_not_sent(made):
    source, target = Box(49), Box()
    source.memory["pc.ram"].view[:] = b"\x5a" * (NPAGES * PAGE)

    def hint(event) -> None:
        if event == PassStarted(1):
            outgoing.hint_free("pc.ram", 100, 300)

    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, on_event=hint)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    view = target.memory["pc.ram"].view
    assert bytes(view[100 * PAGE : 400 * PAGE]) == bytes(300 * PAGE)
    assert bytes(view[: 100 * PAGE]) == b"\x5a" * (100 * PAGE)
    assert bytes(view[400 * PAGE :]) == b"\x5a" * (112 * PAGE)


def test_a_hint_before_a_write_does_not_hide_it(made):
    log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
    source, target = Box(50, dirty=log), Box()

    def reuse(event) -> None:
        if event == PassStarted(1):
            outgoing.hint_free("pc.ram", 7, 1)
            source.memory["pc.ram"].view[7 * PAGE] = 0x77
            log.mark("pc.ram", 7)

    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, on_event=reuse)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


@pytest.mark.parametrize(("detection", "found"), [("none", 0), ("legacy", 300), ("multifd", 300)])
def test_zero_pages_are_looked_for_as_the_parameter_says(made, detection, found):
    source, target = Box(51), Box()
    source.memory["pc.ram"].view[:] = b"\x5a" * (NPAGES * PAGE)
    source.memory["pc.ram"].view[: 300 * PAGE] = bytes(300 * PAGE)
    source.memory["vga.vram"].view[:] = b"\x01" * (16 * PAGE)
    outgoing, incoming = started(
        made, source, target, parameters={"zero-page-detection": detection}
    )
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    assert outgoing.query().ram.duplicate == found


# ---- other endings ---------------------------------------------------------------------------


def test_a_block_that_is_resized_cancels_the_migration(made):
    source = Box(52)
    outgoing, incoming = started(made, source, Box(), capabilities={"pause-before-switchover"})
    await_status(outgoing, Status.PRE_SWITCHOVER)
    outgoing.block_resized("pc.ram")
    outgoing.cancel("said later")
    with pytest.raises(CancelledError, match=r"^RAM block 'pc.ram' resized during precopy\.$"):
        outgoing.wait(FOREVER)
    assert source.calls == ["stop", "resume"]
    ended(incoming)


def test_before_a_reboot_the_guest_is_stopped_first(made):
    log = Restless(20)
    source, target, events = Box(53, dirty=log), Box(), []

    def watch(event) -> None:
        events.append((event, list(source.calls)))
        log.quiet = True

    outgoing, incoming = started(
        made, source, target, parameters={"mode": "cpr-reboot"}, on_event=watch
    )
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    assert source.calls == ["stop"]
    assert (PassStarted(1), ["stop"]) in events
    ram = outgoing.query().ram
    # nothing but headers before it stood still
    assert ram.precopy_bytes < PAGE < ram.downtime_bytes


EXITS = """
import sys, mig
memory = mig.GuestMemory()
memory.add("pc.ram", 4096)
incoming = mig.IncomingMigration(mig.MemoryGuest("box", memory), exit_on_error=True)
incoming.listen("exec:printf nonsense")
incoming.wait()
"""


def test_a_destination_may_end_its_process_when_it_fails():
    done = subprocess.run(
        [sys.executable, "-P", "-c", EXITS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("mig: ")
    assert "Traceback" not in done.stderr


ONE, OTHER = UUID(int=1), UUID(int=2)


@pytest.mark.parametrize("capabilities", [(), ("return-path",)])
def test_a_machine_of_another_uuid_is_refused(made, capabilities):
    source, target = Box(54, uuid=ONE), Box(uuid=OTHER)
    outgoing, incoming = started(
        made, source, target, capabilities={"validate-uuid", *capabilities}
    )
    with pytest.raises(MismatchError, match=f"UUID received is {ONE} and local is {OTHER}"):
        incoming.wait(FOREVER)
    ended(outgoing)
    assert outgoing.status == Status.FAILED or not capabilities


@pytest.mark.parametrize("mine", [ONE, None])
@pytest.mark.parametrize("capability", [True, False])
def test_a_uuid_is_sent_where_it_is_to_be_validated(made, mine, capability):
    source, target = Box(55, uuid=ONE), Box(uuid=mine if capability else OTHER)
    outgoing, incoming = started(made, source, target, capabilities={"validate-uuid": capability})
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


def test_without_a_uuid_there_is_none_to_validate(made):
    outgoing = made.outgoing(Box(56).guest, capabilities={"validate-uuid"})
    with pytest.raises(OptionError, match="needs a guest that has a UUID"):
        outgoing.start("tcp:127.0.0.1:1")
    assert outgoing.status == Status.NONE


# ---- whose guest it is -----------------------------------------------------------------------


def test_a_cancel_after_the_destination_has_confirmed_comes_too_late(made):
    """Never both: the destination has confirmed, so the source must not run again."""
    for number in range(20):
        source, target = Box(70 + number), Box()
        incoming = made.incoming(target.guest)
        incoming.listen("tcp:127.0.0.1:0")
        outgoing = made.outgoing(source.guest, capabilities={"return-path"})
        say = incoming._say

        def confirm(message, say=say, outgoing=outgoing) -> None:
            say(message)
            if message.type == ReturnType.SHUT:
                outgoing.cancel()

        incoming._say = confirm
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
        assert source.calls == ["stop"]


def test_a_guest_that_did_not_run_is_not_let_run(made):
    source = Box(90)
    source.guest.stop()
    outgoing, incoming = started(made, source, Box(), capabilities={"pause-before-switchover"})
    await_status(outgoing, Status.PRE_SWITCHOVER)
    outgoing.cancel()
    ended(outgoing)
    ended(incoming)
    assert source.calls == ["stop", "stop"]
    assert not source.guest.running


def test_a_throttle_is_undone_whatever_else_fails(made, monkeypatch):
    monkeypatch.setattr("mig.engine.convergence.DirtyRate.PERIOD", 0.02)
    log, throttled = Restless(), []
    source = Box(91, dirty=log)

    def stop() -> None:
        raise MigError("the log cannot be stopped")

    log.stop = stop
    source.guest.throttle = throttled.append
    outgoing, incoming = started(made, source, Box(), policy=Told(log, *range(1, 99)))
    await_that(lambda: throttled, "a throttle")
    outgoing.cancel()
    ended(outgoing)
    ended(incoming)
    assert throttled[-1] == 0
    # nothing is in use any more
    source.memory.close()


def test_a_destination_that_fails_is_no_leave_to_go_on(made):
    source = Box(92)
    saved = []
    save = source.guest.save_devices
    source.guest.save_devices = lambda: saved.append(1) or save()
    outgoing, incoming = started(
        made, source, Box(), capabilities={"pause-before-switchover", "return-path"}
    )
    await_status(outgoing, Status.PRE_SWITCHOVER)
    incoming.cancel()
    assert isinstance(error_of(outgoing), PeerError)
    assert not saved


def test_hints_are_about_pages_that_there_are(made):
    source = Box(93)
    outgoing, incoming = started(made, source, Box(), capabilities={"pause-before-switchover"})
    await_status(outgoing, Status.PRE_SWITCHOVER)
    for hint in (("pc.ram", NPAGES, 1), ("pc.ram", -1, 1), ("none", 0, 1)):
        with pytest.raises(ValueError, match="there are no pages"):
            outgoing.hint_free(*hint)
    outgoing.migrate_continue()
    assert outgoing.wait(FOREVER)
    ended(incoming)


def test_a_migration_that_has_no_descriptors_to_begin_with_has_not_begun(made, monkeypatch):
    def refuse() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    source, target = Box(94), Box()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest)
    with monkeypatch.context() as patch:
        patch.setattr("mig.engine.migration.Wake", refuse)
        with pytest.raises(OSError, match="too many"):
            outgoing.start(incoming.uri)
        with pytest.raises(OSError, match="too many"):
            made.incoming(Box().guest).listen("tcp:127.0.0.1:0")
    assert outgoing.status == Status.NONE
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


class Manual(Restless):
    """A log that only logs again what it is told to."""

    chunk_pages = 64

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        pass


def test_a_log_that_is_cleared_by_hand_takes_no_hints(made):
    # a write between the hint and the clear of its chunk would be in nobody's log
    source, target = Box(95, dirty=Manual(0)), Box()

    def hint(event) -> None:
        if event == PassStarted(1):
            outgoing.hint_free("pc.ram", 0, NPAGES)

    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, on_event=hint)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
