"""A source in postcopy whose connection breaks, wherever that is."""

from __future__ import annotations

import contextlib
import random
import re
import struct
import threading

import pytest
from unit.boxes import FOREVER, PAGE, Box, error_of
from unit.far import MARK, until
from unit.postcopies import (
    RAM,
    TOTAL,
    VGA,
    box,
    is_paused,
    stands,
)

import mig
from mig import OutgoingMigration, Status
from mig.errors import CancelledError, MigError, OptionError, PeerError, StateError
from mig.events import StatusChanged

# ---- breaks ----------------------------------------------------------------------------------


def length_of(postcopies) -> tuple[int, int]:
    """Bytes of a whole postcopy of a box, and of it before the package."""
    source, far = postcopies.started(box())
    assert source.wait(FOREVER)
    total = far.link.nbytes
    info = source.query().ram
    return total, info.transferred - info.postcopy_bytes


def test_a_connection_that_breaks_anywhere(postcopies):
    """Before the package the guest runs again; from the package on it never does, here."""
    total, package_at = length_of(postcopies)
    rng = random.Random(3)
    points = [
        *(rng.randrange(package_at) for _ in range(10)),
        *(rng.randrange(package_at, package_at + 300) for _ in range(5)),
        *(rng.randrange(package_at + 300, total) for _ in range(15)),
        *(total - 1, total - 2),
    ]
    for point in points:
        mine = box()
        source, far = postcopies.started(mine, limits=(point,))
        assert stands(source) != Status.COMPLETED
        assert "cancelled" not in str(source.query().error)
        if source.status == Status.FAILED:
            # what is written is not read at once: the source may be further than this
            assert not far.running
            error_of(source)
            assert mine.calls in ([], ["stop", "resume"])
            continue
        assert mine.calls == ["stop"]
        if not far.running:
            # half of a package; nobody is there to be recovered
            source.abandon()
            error_of(source)
            assert mine.calls == ["stop"]
            continue
        source.recover(far.uri)
        assert source.wait(FOREVER)
        assert far.same_as(mine.memory)
        assert mine.calls == ["stop"]
        assert not far.twice


def test_a_connection_that_breaks_again_and_again(postcopies):
    for seed in range(6):
        rng = random.Random(seed)
        mine = box()
        limits = [rng.randrange(3000, 60 * PAGE) for _ in range(5)]
        source, far = postcopies.started(
            mine, background=False, limits=(20000 + rng.randrange(60 * PAGE), *limits)
        )
        source.background = True
        for _ in range(10):
            if stands(source) == Status.COMPLETED:
                break
            source.recover(far.uri)
        assert source.wait(FOREVER)
        assert far.same_as(mine.memory)
        assert not far.twice
        ram = source.query().ram
        # what the destination has not read was sent all the same
        assert ram.transferred >= sum(link.nbytes for link in far.links)
        assert ram.remaining == 0


def test_recovery_sends_only_what_is_missing(postcopies):
    mine = box()
    source, far = postcopies.paused(mine)
    before = source.query()
    assert before.status == Status.POSTCOPY_PAUSED
    assert re.search("went away|Broken pipe|reset", before.error)
    seen = len(far.heard)
    source.recover(far.uri)
    until(lambda: source.status == Status.POSTCOPY_ACTIVE)
    assert source.query().error is None
    assert source.query().ram.remaining == (TOTAL - 41) * PAGE
    source.background = True
    assert source.wait(FOREVER)
    again = far.heard[seen:]
    assert [x for x in again if x[0] != "page"][:3] == [
        ("recv-bitmap", RAM),
        ("recv-bitmap", VGA),
        ("resume",),
    ]
    assert len([x for x in again if x[0] == "page"]) == TOTAL - 41
    assert far.same_as(mine.memory)
    assert not far.twice
    after = source.query().ram
    assert after.transferred > before.ram.transferred
    assert after.precopy_bytes + after.downtime_bytes + after.postcopy_bytes == after.transferred
    assert after.postcopy_requests == before.ram.postcopy_requests


def twice(far):
    far.say_bitmap(RAM)
    far.say_bitmap(RAM)


DURING_RECOVERY = {
    "a bitmap of another size": ("recv-bitmap", lambda f: f.say_bitmap(RAM, bytes(8))),
    "a bitmap without end": ("recv-bitmap", lambda f: f.say_bitmap(RAM, size=1 << 60)),
    "another mark": ("recv-bitmap", lambda f: f.say_bitmap(RAM, mark=MARK + 1)),
    "an unknown block": ("recv-bitmap", lambda f: f.say_bitmap("none", bytes(8))),
    "no block": ("recv-bitmap", lambda f: f.link.say(5, b"", bytes(80))),
    "a bitmap twice": ("recv-bitmap", twice),
    "half a bitmap": ("recv-bitmap", lambda f: (f.link.say(5, b"\6pc.ram", b"\0"), f.cut())),
    "a resume before the bitmaps": ("recv-bitmap", lambda f: f.link.say(6, b"\0\0\0\1")),
    "not ready": ("resume", lambda f: f.link.say(6, b"\0\0\0\0")),
    "ready for something else": ("resume", lambda f: f.link.say(6, b"\0\0\0\2")),
    "failure": ("resume", lambda f: f.link.say(1, b"\0\0\0\1")),
    "silence instead of a bitmap": ("recv-bitmap", lambda f: None),
    "silence instead of a resume": ("resume", lambda f: None),
    "a cut instead of a bitmap": ("recv-bitmap", lambda f: f.cut()),
    "a cut instead of a resume": ("resume", lambda f: f.cut()),
}


@pytest.mark.parametrize("what", DURING_RECOVERY)
def test_a_recovery_that_fails_can_be_tried_again(postcopies, what):
    mine = box()
    at, answer = DURING_RECOVERY[what]
    parameters = {"idle-timeout": 0.3} if "silence" in what else None
    source, far = postcopies.paused(mine, parameters=parameters)
    far.on[at] = lambda _: answer(far)
    links = len(far.links)
    source.recover(far.uri)
    until(lambda: len(far.links) > links)
    is_paused(source)
    assert source.query().error
    assert "cancelled" not in source.query().error
    assert not source.wait(0)
    # what it has not read yet of this attempt is not to be answered in the next one
    until(lambda: all(link.ended for link in far.links))
    del far.on[at]
    source.background = True
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice
    assert mine.calls == ["stop"]


def test_a_destination_that_is_silent_in_a_recovery_can_be_paused_by_hand(postcopies):
    source, far = postcopies.paused(box())
    far.on["resume"] = lambda _: None
    source.recover(far.uri)
    until(lambda: far.said("resume"))
    assert source.status == Status.POSTCOPY_RECOVER
    source.pause()
    is_paused(source)
    assert "migrate-pause" in source.query().error


def test_nobody_is_there_to_recover(postcopies, tmp_path):
    mine = box()
    source, far = postcopies.paused(mine)
    for _ in range(3):
        source.recover(f"unix:{tmp_path}/nobody")
        until(lambda: source.query().error and "nobody" in source.query().error)
        is_paused(source)
    source.background = True
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_recovery_needs_a_uri_that_can_carry_it(postcopies, tmp_path):
    source, _ = postcopies.paused(box())
    with pytest.raises(OptionError):
        source.recover(f"file:{tmp_path}/f")
    with pytest.raises(OptionError):
        source.recover("nonsense")
    assert source.status == Status.POSTCOPY_PAUSED


def test_a_pause_by_hand(postcopies):
    mine = box()
    source, far = postcopies.started(mine, background=False)
    until(lambda: far.running)
    source.pause()
    is_paused(source)
    assert "migrate-pause" in source.query().error
    with pytest.raises(StateError):
        source.pause()
    source.background = True
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_what_cannot_be_done_when(postcopies):
    mine = box()
    source = postcopies.source(mine.guest, background=False, at_once=False)
    for wrong in (source.pause, source.abandon, lambda: source.recover("unix:/x")):
        with pytest.raises(StateError):
            wrong()
    plain = OutgoingMigration(mine.guest, capabilities={"return-path"})
    with pytest.raises(OptionError):
        plain.start_postcopy()
    with pytest.raises(OptionError):
        plain.start("unix:/x", resume=True)
    source.start_postcopy()
    far = postcopies.far()
    source.start(far.uri)
    until(lambda: far.running)
    for wrong in (source.cancel, source.start_postcopy, lambda: source.recover(far.uri)):
        with pytest.raises(StateError):
            wrong()
    far.cut()
    is_paused(source)
    for wrong in (source.cancel, source.start_postcopy, source.pause):
        with pytest.raises(StateError):
            wrong()
    assert mine.calls == ["stop"]


@pytest.mark.parametrize("status", ["active", "paused", "recover-setup", "recover"])
def test_giving_up(postcopies, status, monkeypatch):
    mine = box()
    if status == "active":
        source, far = postcopies.started(mine, background=False)
        until(lambda: far.running)
    else:
        source, far = postcopies.paused(mine)
    if status == "recover":
        far.on["recv-bitmap"] = lambda _: None
        source.recover(far.uri)
        until(lambda: far.said("recv-bitmap"))
    if status == "recover-setup":
        held, go = threading.Event(), threading.Event()

        def slow(*args):
            held.set()
            go.wait(FOREVER)
            return mig.channel.connect(*args)

        monkeypatch.setattr("mig.engine.outlink.connect", slow)
        source.recover(far.uri)
        held.wait(FOREVER)
    links = len(far.links)
    source.abandon()
    if status == "recover-setup":
        go.set()
    error = error_of(source)
    assert isinstance(error, PeerError)
    assert "given up" in str(error)
    assert source.status == Status.FAILED
    assert mine.calls == ["stop"]
    if status == "paused":
        assert len(far.links) == links, "somebody was called up without being asked"
    with pytest.raises(StateError):
        source.abandon()
    with pytest.raises(StateError):
        source.recover(far.uri)


def test_events_tell_it_all_and_may_recover(postcopies):
    seen = []
    mine = box()
    far = postcopies.far(limits=(60 * PAGE, 60 * PAGE))

    def on_event(event):
        if isinstance(event, StatusChanged):
            seen.append(event.status)
            if event.status == Status.POSTCOPY_PAUSED:
                assert source.query().error
                source.recover(far.uri)

    source = postcopies.source(mine.guest, on_event=on_event)
    source.start(far.uri)
    assert source.wait(FOREVER)
    again = [
        Status.POSTCOPY_PAUSED,
        Status.POSTCOPY_RECOVER_SETUP,
        Status.POSTCOPY_RECOVER,
        Status.POSTCOPY_ACTIVE,
    ]
    assert seen == [
        *(Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.POSTCOPY_ACTIVE),
        *again,
        *again,
        Status.COMPLETED,
    ]
    assert far.same_as(mine.memory)


def test_another_source_takes_over(postcopies):
    mine = box()
    first, far = postcopies.paused(mine)
    first.abandon()
    error_of(first)
    second = postcopies.source(mine.guest, at_once=False)
    second.start(far.uri, resume=True)
    assert second.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice
    ram = second.query().ram
    assert ram.normal + ram.duplicate == TOTAL - 41
    assert ram.postcopy_bytes == ram.transferred
    assert mine.calls == ["stop"]


def test_a_guest_that_is_resumed_does_not_run_here(postcopies):
    mine = box()
    first, far = postcopies.paused(mine)
    first.abandon()
    error_of(first)
    mine.guest.resume()
    second = postcopies.source(mine.guest, at_once=False)
    second.start(far.uri, resume=True)
    assert second.wait(FOREVER)
    assert mine.calls == ["stop", "resume", "stop"]
    assert not mine.guest.running


def test_another_source_that_finds_nobody_is_paused(postcopies, tmp_path):
    mine = box()
    first, far = postcopies.paused(mine)
    first.abandon()
    second = postcopies.source(mine.guest, at_once=False)
    second.start(f"unix:{tmp_path}/nobody", resume=True)
    with pytest.raises(StateError):
        second.cancel()
    is_paused(second)
    assert "nobody" in second.query().error
    second.recover(far.uri)
    assert second.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_another_source_can_be_given_up_at_once(postcopies, tmp_path):
    mine = box()
    second = postcopies.source(mine.guest, at_once=False)
    second.start(f"unix:{tmp_path}/nobody", resume=True)
    second.abandon()
    assert isinstance(error_of(second), PeerError)
    # one that ran here and there would be two
    assert mine.calls in ([], ["stop"])


# ---- the moment of the hand-over -------------------------------------------------------------


def at_save(mine: Box, action) -> None:
    """Do something when the devices are saved: the last step before the guest is handed over."""
    save = mine.guest.save_devices

    def saved() -> bytes:
        action()
        return save()

    mine.guest.save_devices = saved


def test_cancelled_just_before_the_package(postcopies):
    mine = box()
    far = postcopies.far()
    source = postcopies.source(mine.guest)
    at_save(mine, source.cancel)
    source.start(far.uri)
    assert isinstance(error_of(source), CancelledError)
    assert mine.calls == ["stop", "resume"]
    far.close()
    assert not far.running


def test_the_destination_fails_just_before_the_package(postcopies):
    mine = box()
    far = postcopies.far()
    source = postcopies.source(mine.guest)

    def fails():
        far.link.say(1, b"\0\0\0\1")
        until(lambda: source._error is not None)

    at_save(mine, fails)
    source.start(far.uri)
    assert isinstance(error_of(source), PeerError)
    assert mine.calls == ["stop", "resume"]
    far.close()
    assert not far.running


@pytest.mark.parametrize("how", ["reports failure", "cut", "pause"])
def test_the_link_breaks_just_before_the_package_is_written(postcopies, how):
    """The status says that the guest is handed over: nobody knows better than the destination."""
    mine = box()
    far = postcopies.far()

    def on_event(event):
        if event != StatusChanged(Status.POSTCOPY_ACTIVE) or len(far.links) > 1:
            return
        if how == "pause":
            source.pause()
            return
        # the thread that reads waits for the lock that is held here
        far.link.say(1, b"\0\0\0\1") if how == "reports failure" else far.cut()

    source = postcopies.source(mine.guest, on_event=on_event)
    source.start(far.uri)
    is_paused(source)
    assert source.query().error
    assert mine.calls == ["stop"]
    source.abandon()
    assert isinstance(error_of(source), PeerError)
    assert mine.calls == ["stop"]


def test_given_up_just_before_the_package_is_written(postcopies):
    """Who is told that it is postcopy-active can give it up: nothing was sent, but who knows."""
    mine = box()
    far = postcopies.far()

    def on_event(event):
        if event == StatusChanged(Status.POSTCOPY_ACTIVE):
            source.abandon()

    source = postcopies.source(mine.guest, on_event=on_event)
    source.start(far.uri)
    assert isinstance(error_of(source), PeerError)
    assert mine.calls == ["stop"]
    far.close()
    assert not far.running


def test_an_owner_who_fails_at_the_news_gets_the_guest_back(postcopies):
    """No byte of the package was written, and none will be."""
    mine = box()
    far = postcopies.far()

    def on_event(event):
        if event == StatusChanged(Status.POSTCOPY_ACTIVE):
            raise RuntimeError("a slip")

    source = postcopies.source(mine.guest, on_event=on_event)
    source.start(far.uri)
    assert "a slip" in str(error_of(source))
    assert mine.calls == ["stop", "resume"]
    far.close()
    assert not far.running


def test_cancel_at_any_moment_never_leaves_two_guests_or_none(postcopies):
    """A cancel that says it is done has the guest run here; one that is refused, there."""
    rng = random.Random(8)
    outcomes = set()
    for _ in range(30):
        mine = box()
        source, far = postcopies.started(mine)
        delay = rng.random() * 0.004
        threading.Event().wait(delay)
        try:
            source.cancel()
            refused = False
        except StateError:
            refused = True
        with contextlib.suppress(MigError):
            assert source.wait(FOREVER)
        outcomes.add(source.status)
        if source.status == Status.COMPLETED:
            assert mine.calls == ["stop"]
            assert far.same_as(mine.memory)
        else:
            assert not refused
            assert source.status == Status.CANCELLED
            assert mine.calls in ([], ["stop", "resume"])
            far.close()
            assert not far.running
    assert outcomes


def test_half_of_a_package_is_followed_by_nothing(postcopies):
    """A destination too slow to read it: what came next would be taken for the rest of it."""
    mine = box()
    mine.state = bytes(32 << 20)
    far = postcopies.far()
    held = threading.Event()
    pong = struct.pack(">I", 1)
    far.on["ping"] = lambda what: held.wait(FOREVER) if what[1] == 2 else far.link.say(2, pong)
    source = postcopies.source(mine.guest, parameters={"idle-timeout": 0.2})
    source.start(far.uri)
    is_paused(source)
    assert mine.calls == ["stop"]
    held.set()
    until(lambda: not far._threads[-1].is_alive())
    assert not far.errors
    assert not far.running
    assert not far.said("page")
