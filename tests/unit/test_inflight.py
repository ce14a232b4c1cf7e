"""Parameters that change while a migration runs, and what query() says then."""

from __future__ import annotations

import contextlib
import threading

import pytest

from mig import GuestMemory, IncomingMigration, MemoryGuest, OutgoingMigration, Parameters, Status
from mig.errors import MigError, OptionError
from mig.events import PassStarted, StatusChanged

PAGE = 4096
NPAGES = 512
#: nobody waits so long
FOREVER = 10.0
#: bytes a second: no batch ends before the test does
CRAWL = 1


class EndlessLog:
    """A log in which there is always one more dirty page."""

    chunk_pages = 0

    def __init__(self) -> None:
        self.synced = threading.Event()

    def start(self) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        self.synced.set()
        fresh = not dirty[7]
        dirty.set(7)
        return int(fresh)

    def stop(self) -> None:
        pass


def guest(*, filled: bool) -> MemoryGuest:
    memory = GuestMemory()
    memory.add("pc.ram", NPAGES * PAGE)
    if filled:
        memory["pc.ram"].view[:] = bytes([1, 2, 3, 4]) * (NPAGES * PAGE // 4)
    return MemoryGuest("box", memory)


@pytest.fixture
def pair(tmp_path):
    """Makes a source and a destination, started, that end with the test."""
    made = []

    def make(source: MemoryGuest, parameters, until, scheme="tcp"):
        reached = threading.Event()
        target = guest(filled=False)
        incoming = IncomingMigration(target)
        incoming.listen("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/s")
        outgoing = OutgoingMigration(
            source, parameters=parameters, on_event=lambda e: until(e) and reached.set()
        )
        made.extend((outgoing, incoming))
        outgoing.start(incoming.uri)
        assert reached.wait(FOREVER)
        return outgoing, incoming

    yield make
    for migration in made:
        migration.cancel()
        with contextlib.suppress(MigError):
            assert migration.wait(FOREVER)


def is_active(event) -> bool:
    return event == StatusChanged(Status.ACTIVE)


def test_a_source_that_crawls_can_be_told_to_run(pair):
    source = guest(filled=True)
    outgoing, incoming = pair(source, {"max-bandwidth": CRAWL}, lambda e: e == PassStarted(1))
    assert not outgoing.wait(0.05)
    outgoing.set_parameters({"max-bandwidth": 0})
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


def test_a_guest_that_always_writes_stops_when_more_downtime_is_allowed(pair):
    source, log = guest(filled=True), EndlessLog()
    source.dirty_log = lambda: log
    outgoing, incoming = pair(source, {"downtime-limit": 0}, is_active)
    assert log.synced.wait(FOREVER)
    assert not outgoing.wait(0.05)
    outgoing.set_parameters({"downtime-limit": 2_000_000})
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


def test_what_cannot_change_is_refused_and_nothing_changes(pair):
    outgoing, incoming = pair(guest(filled=True), {"max-bandwidth": CRAWL}, is_active)
    before = outgoing.parameters
    with pytest.raises(OptionError) as caught:
        outgoing.set_parameters({"max-bandwidth": 0, "direct-io": "off", "idle-timeout": 3})
    assert len(caught.value.violations) == 2
    with pytest.raises(OptionError, match="mig does not do x-checkpoint-delay yet"):
        incoming.set_parameters({"x-checkpoint-delay": 4096})
    assert outgoing.parameters is before


def test_before_the_start_everything_can_change():
    outgoing = OutgoingMigration(guest(filled=True), parameters={"max-bandwidth": 7})
    outgoing.set_parameters({"idle-timeout": 3, "downtime-limit": 5})
    assert outgoing.parameters == Parameters(max_bandwidth=7, idle_timeout=3.0, downtime_limit=5)


def test_after_the_end_a_change_is_without_effect(pair):
    outgoing, incoming = pair(guest(filled=True), {"max-bandwidth": 0}, is_active)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    outgoing.set_parameters({"max-bandwidth": 1})
    incoming.set_parameters({"max-bandwidth": 1})
    assert outgoing.status == incoming.status == Status.COMPLETED


def test_any_thread_may_change_parameters(pair):
    outgoing, _ = pair(guest(filled=True), {"max-bandwidth": CRAWL}, is_active)

    def change(first: int) -> None:
        for i in range(200):
            # together or not at all
            outgoing.set_parameters({"max-bandwidth": CRAWL, "downtime-limit": first + i})

    threads = [threading.Thread(target=change, args=(n * 1000,)) for n in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outgoing.parameters.downtime_limit % 1000 == 199


# ---- query -----------------------------------------------------------------------------------


def test_both_sides_say_what_qemu_says_while_they_run(pair):
    outgoing, incoming = pair(guest(filled=True), {"max-bandwidth": CRAWL}, is_active)
    sent, received = outgoing.query(), incoming.query()
    assert (sent.incoming, received.incoming) == (False, True)
    qmp = sent.to_qmp()
    assert qmp.keys() == {"status", "setup-time", "total-time", "expected-downtime", "ram"}
    assert qmp["status"] == "active"
    assert qmp["expected-downtime"] == 300
    qmp = received.to_qmp()
    assert qmp["socket-address"][0].keys() == {"type", "host", "port", "ipv4"}


def test_a_unix_socket_is_listened_on(pair, tmp_path):
    _, incoming = pair(guest(filled=True), {"max-bandwidth": CRAWL}, is_active, "unix")
    assert incoming.query().to_qmp()["socket-address"] == [
        {"type": "unix", "path": f"{tmp_path}/s"}
    ]


def test_both_sides_say_what_qemu_says_in_the_end(pair):
    outgoing, incoming = pair(guest(filled=True), {"max-bandwidth": 0}, is_active)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    qmp = outgoing.query().to_qmp()
    assert qmp.keys() == {"status", "setup-time", "total-time", "downtime", "ram"}
    assert qmp["ram"]["normal-bytes"] == NPAGES * PAGE
    assert qmp["ram"]["mbps"] > 0
    assert incoming.query().to_qmp() == {"status": "completed"}


def test_nothing_is_said_before_the_start():
    assert OutgoingMigration(guest(filled=True)).query().to_qmp() == {}
    assert IncomingMigration(guest(filled=False)).query().to_qmp() == {}


def test_options_are_told_as_qemu_tells_them():
    outgoing = OutgoingMigration(
        guest(filled=True), capabilities=["return-path"], parameters={"max-bandwidth": "1k"}
    )
    on = [entry["capability"] for entry in outgoing.query_capabilities() if entry["state"]]
    assert on == ["return-path"]
    assert outgoing.query_parameters()["max-bandwidth"] == 1024
    outgoing.set_parameters({"max-bandwidth": 0})
    assert outgoing.query_parameters()["max-bandwidth"] == 0


#: what a capability cannot be without
NEEDS = {
    "switchover-ack": {"return-path"},
    "zero-copy-send": {"multifd"},
    "postcopy-preempt": {"postcopy-ram"},
}


@pytest.mark.parametrize("side", [OutgoingMigration, IncomingMigration])
def test_what_is_named_as_unsupported_is_refused_and_the_rest_is_not(side):
    migration = side(guest(filled=True))
    missing = migration.query_unsupported()
    for entry in migration.query_capabilities():
        name = entry["capability"]
        wanted = {name} | NEEDS.get(name, set())
        if name in missing:
            with pytest.raises(OptionError, match=f"'{name}'"):
                side(guest(filled=True), capabilities=wanted)
        else:
            side(guest(filled=True), capabilities=wanted)
    assert "tls-creds" in missing
    assert "max-bandwidth" not in missing
