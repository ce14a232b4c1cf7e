"""Who stands against a migration, and who is told of its moments."""

from __future__ import annotations

import itertools
import threading

import pytest
from unit.boxes import FOREVER, Box, ended, error_of
from unit.test_precopy import await_status, started

from mig import Blockers, Moment, SharedDirtyLog, Status
from mig.errors import BlockedError, CancelledError, MigError
from mig.events import StatusChanged
from mig.options import MigMode


def test_a_guest_with_a_blocker_does_not_begin_to_migrate(made):
    source, target, blockers = Box(60), Box(), Blockers()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, blockers=blockers)
    with blockers.blocked("the disk is in use"), blockers.blocked("and the network card"):
        with pytest.raises(BlockedError, match="the disk is in use; and the network card"):
            outgoing.start(incoming.uri)
        assert outgoing.status == Status.NONE
        assert outgoing.query().blocked_reasons == ("the disk is in use", "and the network card")
        assert outgoing.query().to_qmp() == {
            "blocked-reasons": ["the disk is in use", "and the network card"]
        }
    assert blockers.reasons == ()
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


@pytest.mark.parametrize("end", ["continue", "cancel"])
def test_while_a_guest_migrates_no_blocker_can_be_added(made, end):
    source, blockers = Box(61), Blockers()
    outgoing, incoming = started(
        made, source, Box(), capabilities={"pause-before-switchover"}, blockers=blockers
    )
    await_status(outgoing, Status.PRE_SWITCHOVER)
    with pytest.raises(BlockedError, match="for: too late"):
        blockers.add("too late")
    if end == "cancel":
        outgoing.cancel()
    else:
        outgoing.migrate_continue()
    ended(outgoing)
    ended(incoming)
    blockers.add("not any more")
    blockers.remove("not any more")
    with pytest.raises(ValueError, match="not in list"):
        blockers.remove("not any more")


def test_a_migration_that_cannot_begin_blocks_nobody(made):
    source, blockers = Box(62), Blockers()
    outgoing = made.outgoing(source.guest, blockers=blockers)
    with pytest.raises(MigError):
        outgoing.start("nothing://")
    blockers.add("still free")


# ---- modes -----------------------------------------------------------------------------------

MODES = [list(chosen) for n in range(4) for chosen in itertools.combinations(MigMode, n)]


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "+".join(modes) or "none")
def test_a_reason_stands_against_the_modes_it_was_given(modes):
    blockers = Blockers()
    blockers.add("always")
    blockers.add("sometimes", modes)
    blockers.remove("always")
    assert blockers.reasons == ("sometimes",)
    for mode in MigMode:
        if mode in modes:
            assert blockers.reasons_for(mode) == ("sometimes",)
            with pytest.raises(BlockedError, match=r"^sometimes$"):
                blockers.begin(mode)
        else:
            assert blockers.reasons_for(mode) == ()
            blockers.begin(mode)
            blockers.end()
    blockers.remove("sometimes")
    assert not any(blockers.reasons_for(mode) for mode in MigMode)


def test_modes_have_qmps_names():
    blockers = Blockers()
    with blockers.blocked("here", ["cpr-reboot"]):
        assert blockers.reasons_for(MigMode.CPR_REBOOT) == ("here",)
        assert blockers.reasons_for(MigMode.NORMAL) == ()
    with pytest.raises(ValueError, match="cpr-magic"):
        blockers.add("there", ["cpr-magic"])
    assert blockers.reasons == ()


def test_reasons_come_in_their_order_and_one_at_a_time():
    blockers = Blockers()
    for reason in ("a", "b", "a"):
        blockers.add(reason)
    assert blockers.reasons == blockers.reasons_for(MigMode.NORMAL) == ("a", "b", "a")
    blockers.remove("a")
    assert blockers.reasons == ("b", "a")


def test_the_mode_that_counts_is_the_one_that_the_migration_starts_with(made):
    source, target, blockers = Box(67), Box(), Blockers()
    blockers.add("not live", ["normal"])
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, blockers=blockers, parameters={"mode": "cpr-reboot"})
    assert outgoing.query().blocked_reasons == ()
    outgoing.set_parameters({"mode": "normal"})
    assert outgoing.query().blocked_reasons == ("not live",)
    with pytest.raises(BlockedError, match="not live"):
        outgoing.start(incoming.uri)
    outgoing.set_parameters({"mode": "cpr-reboot"})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert outgoing.query().blocked_reasons == ()


def test_with_only_migratable_nobody_may_make_it_not_so():
    blockers = Blockers(only_migratable=True)
    said = r"disallowing migration blocker \(--only-migratable\) for: a disk"
    for modes in (list(MigMode), ["normal"], ["normal", "cpr-reboot"]):
        with pytest.raises(BlockedError, match=said):
            blockers.add("a disk", modes)
    blockers.add("a reboot", ["cpr-reboot"])
    blockers.add_internal("a moment")
    assert blockers.reasons_for(MigMode.NORMAL) == ("a moment",)
    assert blockers.reasons == ("a reboot", "a moment")


def test_while_a_guest_migrates_no_kind_of_blocker_can_be_added():
    said = r"disallowing migration blocker \(migration/snapshot in progress\) for: late"
    blockers = Blockers()
    blockers.begin(MigMode.CPR_REBOOT)
    for add in (
        lambda: blockers.add("late"),
        lambda: blockers.add("late", ["normal"]),
        lambda: blockers.add_internal("late"),
    ):
        with pytest.raises(BlockedError, match=said):
            add()
    blockers.end()
    blockers.add_internal("late")


# ---- who sees what when ----------------------------------------------------------------------


class Asked(Blockers):
    """Blockers that somebody asks as soon as the migration does not hold them any more."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Status] = []
        self._lock = self
        self._real = threading.Lock()

    def __enter__(self) -> None:
        self._real.acquire()

    def __exit__(self, *error: object) -> None:
        free = not self._migrations
        self._real.release()
        if free and hasattr(self, "migration"):
            self.seen.append(self.migration.status)


@pytest.mark.parametrize("end", ["completed", "cancelled", "failed"])
def test_who_may_add_a_blocker_sees_the_final_status_and_the_other_way_round(made, end):
    source, blockers, added = Box(68), Asked(), []

    def on_event(event) -> None:
        if event == StatusChanged(Status(end)):
            blockers.add("at once")
            added.append(outgoing.status)

    def veto(moment: Moment) -> None:
        if moment == Moment.CLEANUP:
            with pytest.raises(BlockedError):
                blockers.add("too early")
        elif moment == Moment.COMPLETE and end != "completed":
            if end == "cancelled":
                outgoing.cancel()
            raise MigError("no")

    incoming = made.incoming(Box().guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, blockers=blockers, notifiers=[veto], on_event=on_event)
    blockers.migration = outgoing
    outgoing.start(incoming.uri)
    ended(outgoing)
    ended(incoming)
    assert set(blockers.seen) == {end}
    assert added == [end]
    assert blockers.reasons == ("at once",)


def test_statuses_are_told_in_their_order_however_early_the_cancel(made, monkeypatch):
    source, seen = Box(69), []
    outgoing = made.outgoing(source.guest, on_event=seen.append)
    run, go = threading.Thread.run, threading.Event()

    def late(thread: threading.Thread) -> None:
        if thread.name == outgoing.thread_name:
            go.wait(FOREVER)
        run(thread)

    monkeypatch.setattr(threading.Thread, "run", late)
    outgoing.start("exec:cat > /dev/null")
    outgoing.cancel()
    assert seen == [StatusChanged(Status.SETUP), StatusChanged(Status.CANCELLING)]
    go.set()
    assert isinstance(error_of(outgoing), CancelledError)
    assert [event.status for event in seen] == ["setup", "cancelling", "cancelled"]


# ---- notifiers -------------------------------------------------------------------------------


def test_notifiers_are_told_of_the_moments_in_order(made):
    log = SharedDirtyLog({"pc.ram": 512, "vga.vram": 16})
    source, target, seen = Box(63, dirty=log), Box(), []
    outgoing, incoming = started(made, source, target, notifiers=[seen.append])
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    sync = [Moment.BEFORE_BITMAP_SYNC, Moment.AFTER_BITMAP_SYNC]
    assert seen[0] == Moment.SETUP
    assert seen[-4:] == [*sync, Moment.COMPLETE, Moment.CLEANUP]
    assert seen[1:-2] == sync * (outgoing.query().ram.dirty_sync_count - 1)


@pytest.mark.parametrize("moment", [m for m in Moment if m != Moment.CLEANUP])
def test_a_notifier_may_veto(made, moment):
    log = SharedDirtyLog({"pc.ram": 512, "vga.vram": 16})
    source, seen = Box(64, dirty=log), []

    def veto(now: Moment) -> None:
        seen.append(now)
        if now == moment:
            raise MigError(f"not at {now}")

    outgoing, incoming = started(made, source, Box(), notifiers=[veto])
    assert str(error_of(outgoing)) == f"not at {moment}"
    ended(incoming)
    assert seen[-1] == Moment.CLEANUP
    assert source.calls in ([], ["stop", "resume"])
    outgoing, incoming = started(made, source, target := Box())
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


def test_a_notifier_that_fails_in_the_end_does_not_undo_it(made):
    source, target = Box(65), Box()

    def boom(now: Moment) -> None:
        if now == Moment.CLEANUP:
            raise MigError("too late")

    seen = []
    outgoing, incoming = started(
        made, source, target, notifiers=[boom, seen.append, boom, seen.append]
    )
    assert outgoing.wait(FOREVER)
    assert seen.count(Moment.CLEANUP) == 2
    assert incoming.wait(FOREVER)
    assert outgoing.status == Status.COMPLETED
    assert target.same_as(source)


def test_a_cancelled_migration_tells_its_notifiers(made):
    source, seen = Box(66), []
    outgoing, incoming = started(
        made, source, Box(), capabilities={"pause-before-switchover"}, notifiers=[seen.append]
    )
    await_status(outgoing, Status.PRE_SWITCHOVER)
    outgoing.cancel()
    with pytest.raises(CancelledError):
        outgoing.wait(FOREVER)
    ended(incoming)
    assert seen == [Moment.SETUP, Moment.CLEANUP]
