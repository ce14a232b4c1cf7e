"""Guests with devices that must be unplugged before they migrate."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from unit.boxes import FOREVER, Box, ended, error_of
from unit.test_precopy import await_that

from mig import Status, UnpluggingGuest
from mig.errors import CancelledError, MigError, PeerError
from mig.events import StatusChanged

WAY = ["setup", "wait-unplug", "active", "device", "completed"]


class Primary:
    """A device of a guest that goes when it is told so by gone()."""

    def __init__(self, box: Box, *, pending: bool = True) -> None:
        self.box, self._pending = box, pending
        self.changed = lambda: None
        self.asked = threading.Event()
        guest = box.guest
        guest.unplug_pending = False
        guest.unplug, guest.replug = self.unplug, self.replug
        assert isinstance(guest, UnpluggingGuest)

    def unplug(self, changed) -> None:
        self.box.calls.append("unplug")
        self.changed = changed
        self.box.guest.unplug_pending = self._pending
        self.asked.set()

    def gone(self) -> None:
        self.box.guest.unplug_pending = False
        self.changed()

    def replug(self) -> None:
        self.box.calls.append("replug")


class Watch:
    """Statuses as they are told; tells of one that is waited for."""

    def __init__(self) -> None:
        self.statuses: list[Status] = []
        self._news = threading.Condition()

    def __call__(self, event) -> None:
        if isinstance(event, StatusChanged):
            with self._news:
                self.statuses.append(event.status)
                self._news.notify_all()

    def wait(self, status: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: status in self.statuses, FOREVER), status


def started(made, source: Box, target: Box, **options):
    watch = Watch()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, on_event=watch, **options)
    outgoing.start(incoming.uri)
    return outgoing, incoming, watch


def test_no_other_guest_is_one_of_these():
    assert not isinstance(Box().guest, UnpluggingGuest)


@pytest.mark.parametrize("capabilities", [(), ("return-path",)])
def test_it_waits_until_the_device_is_gone(made, capabilities):
    source, target = Box(70), Box()
    primary = Primary(source)
    outgoing, incoming, watch = started(made, source, target, capabilities=capabilities)
    watch.wait("wait-unplug")
    assert outgoing.query().to_qmp() == {"status": "wait-unplug"}
    # news that is none does not end it
    primary.changed()
    assert not outgoing.wait(0.02)
    assert outgoing.status == Status.WAIT_UNPLUG
    primary.gone()
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert watch.statuses == WAY
    assert source.calls == ["unplug", "stop"]
    assert target.same_as(source)
    # somebody may tell long after
    primary.changed()


def test_a_device_that_goes_at_once_is_not_waited_for(made):
    source = Box(71)
    Primary(source, pending=False)
    outgoing, incoming, watch = started(made, source, Box())
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert watch.statuses == [status for status in WAY if status != "wait-unplug"]
    assert source.calls == ["unplug", "stop"]


def test_news_that_comes_before_the_wait_is_not_lost(made):
    for _ in range(20):
        source = Box(72)
        primary = Primary(source)
        outgoing, incoming, watch = started(made, source, Box())
        assert primary.asked.wait(FOREVER)
        primary.gone()
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
        assert watch.statuses in (WAY, [WAY[0], *WAY[2:]])


def test_a_cancel_waits_for_the_device_and_plugs_it_in_again(made):
    source = Box(73)
    primary = Primary(source)
    outgoing, incoming, watch = started(made, source, Box())
    watch.wait("wait-unplug")
    outgoing.cancel()
    assert not outgoing.wait(0.02)
    assert outgoing.status == Status.CANCELLING
    assert source.calls == ["unplug"]
    primary.gone()
    assert isinstance(error_of(outgoing), CancelledError)
    ended(incoming)
    assert watch.statuses == ["setup", "wait-unplug", "cancelling", "cancelled"]
    assert source.calls == ["unplug", "replug"]
    # and again
    outgoing, incoming, watch = started(made, source, target := Box())
    watch.wait("wait-unplug")
    primary.gone()
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


def test_a_device_that_does_not_go_is_not_waited_for_for_ever(made, monkeypatch):
    monkeypatch.setattr("mig.engine.unplug._PATIENCE", 0.02)
    source = Box(74)
    Primary(source)
    outgoing, incoming, watch = started(made, source, Box())
    watch.wait("wait-unplug")
    outgoing.cancel()
    assert isinstance(error_of(outgoing), CancelledError)
    ended(incoming)
    assert source.calls == ["unplug", "replug"]


def test_a_destination_that_leaves_meanwhile_is_noticed(made):
    source = Box(75)
    primary = Primary(source)
    ours, theirs = socket.socketpair()
    watch = Watch()
    with ours, theirs:
        outgoing = made.outgoing(source.guest, capabilities={"return-path"}, on_event=watch)
        outgoing.start(f"fd:{ours.fileno()}")
        watch.wait("wait-unplug")
        theirs.close()
        await_that(lambda: outgoing._error is not None, "the error")
        assert outgoing.status == Status.WAIT_UNPLUG
        primary.gone()
        assert isinstance(error_of(outgoing), PeerError)
    assert watch.statuses == ["setup", "wait-unplug", "failed"]
    assert source.calls == ["unplug", "replug"]


def test_a_guest_that_cannot_be_asked_is_plugged_in_again(made):
    source = Box(76)
    primary = Primary(source)

    def unplug(changed) -> None:
        primary.unplug(changed)
        primary.gone()
        raise MigError("the bus is stuck")

    source.guest.unplug = unplug
    outgoing, incoming, watch = started(made, source, Box())
    assert str(error_of(outgoing)) == "the bus is stuck"
    ended(incoming)
    assert watch.statuses == ["setup", "failed"]
    assert source.calls == ["unplug", "replug"]


def test_a_later_failure_plugs_in_again_once_the_guest_runs(made):
    source = Box(77)
    primary = Primary(source, pending=False)
    source.guest.save_devices = lambda: 1 / 0
    outgoing, incoming, _ = started(made, source, Box())
    assert "ZeroDivisionError" in str(error_of(outgoing))
    ended(incoming)
    assert source.calls == ["unplug", "stop", "resume", "replug"]
    primary.changed()


def test_before_a_restart_in_place_nothing_is_unplugged(made):
    source = Box(78)
    Primary(source)
    outgoing, incoming, watch = started(made, source, Box(), parameters={"mode": "cpr-reboot"})
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert "wait-unplug" not in watch.statuses
    assert "unplug" not in source.calls


def test_no_descriptor_is_left(made):
    source = Box(79)
    primary = Primary(source)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        outgoing, incoming, watch = started(made, source, Box())
        watch.wait("wait-unplug")
        outgoing.cancel()
        primary.gone()
        ended(outgoing)
        ended(incoming)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
