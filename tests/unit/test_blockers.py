"""Who stands against a migration, and who is told of its moments."""

from __future__ import annotations

import pytest
from unit.boxes import FOREVER, Box, ended, error_of
from unit.test_precopy import await_status, started

from mig import Blockers, Moment, SharedDirtyLog, Status
from mig.errors import BlockedError, CancelledError, MigError


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
