"""What the owner of a destination in postcopy is told, and can do."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from reference import postcopy, stream
from reference.postcopy import PAGE, Source
from unit.boxes import FOREVER, error_of
from unit.missing import NPAGES, Box, record
from unit.postcopies import open_files, ours

import mig
from mig.engine import uninvited
from mig.errors import MigError, OptionError, PeerError, StateError, UnsupportedError
from mig.events import StatusChanged
from mig.guest import BalloonedGuest, LockedGuest
from mig.guest.kvm import probe


def running(made, folder, preempt=False) -> Box:
    box = Box(made, folder, capabilities=("postcopy-ram", *["postcopy-preempt"] * preempt))
    if preempt:
        # closed with the test
        box.urgent = Source.connect(box.incoming.uri)
    box.switch()
    box.runs()
    return box


def paused(made, folder, preempt=False) -> Box:
    box = running(made, folder, preempt)
    box.source.close()
    box.reach("postcopy-paused")
    return box


# ---- giving up -------------------------------------------------------------------------------


def given_up(box: Box) -> PeerError:
    box.incoming.abandon()
    error = error_of(box.incoming)
    assert isinstance(error, PeerError)
    assert "given up" in str(error)
    assert box.incoming.status == "failed"
    assert not box.guest.running
    with pytest.raises(StateError):
        box.incoming.abandon()
    with pytest.raises(StateError):
        box.incoming.recover("unix:/x")
    return error


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("status", ["active", "paused", "listening", "recover"])
def test_a_destination_is_given_up(made, tmp_path, status, preempt):
    before = open_files()
    box = (running if status == "active" else paused)(made, tmp_path, preempt)
    waiting = box.touch(99)
    while box.guest.postcopy_times().requests < 1:
        pass
    if status in ("listening", "recover"):
        box.incoming.recover(f"unix:{tmp_path / 'again'}")
    if status == "recover":
        source = Source.connect(box.incoming.uri)
        assert len(source.bitmap("pc.ram")) == 32
        assert box.incoming.status == "postcopy-recover"
    error = given_up(box)
    if status != "active":
        assert "stream ends" in str(error)
    # who waited does not wait any more, and the memory is its owner's
    assert waiting.value() == bytes(PAGE)
    box.memory.close()
    box.source.close()
    if preempt:
        box.urgent.close()
    if status == "recover":
        source.close()
    assert not [name for name in ours() if name != "mig-incoming"]
    assert open_files() <= before


def test_workers_that_wait_for_memory_are_given_up(made, tmp_path):
    mine, other = mig.ProcessGuest(4 << 20, workers=2, rate=0), mig.ProcessGuest(4 << 20)
    with mine, other:
        mine.start()
        incoming = made.incoming(other, capabilities={"postcopy-ram"})
        incoming.listen(f"unix:{tmp_path / 'in'}")
        outgoing = made.outgoing(mine, capabilities={"postcopy-ram"})
        outgoing.background = False
        outgoing.start_postcopy()
        outgoing.start(incoming.uri)
        while other.postcopy_times().requests < 20:
            pass
        incoming.abandon()
        assert isinstance(error_of(incoming), PeerError)
        with pytest.raises(MigError):
            other.resume()
        # the source is paused, and its owner knows what to do
        while outgoing.status != "postcopy-paused":
            pass
        outgoing.abandon()
        error_of(outgoing)
        mine.resume()
        writes = mine.counters().writes
        while mine.counters().writes < writes + 10:
            pass
        assert mine.verify().ok


def test_a_file_that_is_given_up_is_not_there(made, tmp_path):
    capture = mig.StreamCapture(tmp_path / "vm.mig")
    incoming = made.incoming(capture, capabilities={"postcopy-ram"})
    incoming.listen(f"unix:{tmp_path / 'in'}")
    source = Source.connect(incoming.uri)
    blocks = {"pc.ram": NPAGES * PAGE}
    cpu = [stream.Device("cpu", b"registers", 7)]
    source.send(postcopy.head(blocks) + postcopy.discard("pc.ram", (0, NPAGES * PAGE)))
    source.send(postcopy.package(cpu))
    while source.hear() != (postcopy.PONG, b"\0\0\0\x42"):
        pass
    incoming.abandon()
    assert "given up" in str(error_of(incoming))
    with pytest.raises(EOFError):
        source.hear()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_given_up(made, tmp_path):
    box = Box(made, tmp_path)
    with pytest.raises(StateError):
        box.incoming.abandon()
    box.begin()
    while box.incoming.status != "active":
        pass
    with pytest.raises(StateError):
        box.incoming.abandon()
    cpu = [stream.Device("cpu", b"registers", 7)]
    box.source.send(postcopy.package(cpu))
    box.source.send(postcopy.pages(box.rest(), 3) + b"\0")
    box.check()
    with pytest.raises(StateError):
        box.incoming.abandon()


def test_an_owner_who_fails_at_the_news_of_a_break_loses_the_guest(made, tmp_path):
    """Nobody would ever wake what waits for pages."""
    box = running(made, tmp_path)

    def note(event) -> None:
        if event == StatusChanged("postcopy-paused"):
            raise RuntimeError("a slip")

    box.incoming._on_event = note
    waiting = box.touch(99)
    box.source.request()
    box.source.close()
    assert "a slip" in str(error_of(box.incoming))
    assert waiting.value() == bytes(PAGE)
    assert not box.guest.running


def test_a_virtual_machine_is_given_up(made, tmp_path):
    try:
        probe()
    except MigError as error:
        pytest.skip(str(error))
    guests = []
    for _ in range(2):
        memory = mig.GuestMemory()
        memory.add("ram", 4 << 20)
        guests.append(mig.guest.KvmGuest(memory, vcpus=2))
    mine, other = guests
    mine.boot()
    mine.resume()
    incoming = made.incoming(other, capabilities={"postcopy-ram"})
    incoming.listen(f"unix:{tmp_path / 'in'}")
    outgoing = made.outgoing(mine, capabilities={"postcopy-ram"})
    outgoing.background = False
    outgoing.start_postcopy()
    outgoing.start(incoming.uri)
    while other.postcopy_times().requests < 5:
        pass
    incoming.abandon()
    error_of(incoming)
    with pytest.raises(MigError):
        other.resume()
    outgoing.abandon()
    error_of(outgoing)
    for guest in guests:
        guest.close()
        guest.memory.close()


# ---- a source with postcopy-preempt ----------------------------------------------------------


def refused(box: Box) -> None:
    error = error_of(box.incoming)
    assert isinstance(error, UnsupportedError), error
    assert error.capability == "postcopy-preempt"
    assert "postcopy-preempt" in str(error)
    assert not box.resumed.is_set()


def stranger(uri: str) -> subprocess.Popen[bytes]:
    """Another process connects, and is silent."""
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(flush=True); s.recv(1)"
    )
    command = [sys.executable, "-P", "-c", code, uri.removeprefix("unix:")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def test_a_connection_for_urgent_pages_is_refused_before_the_guest_runs(made, tmp_path):
    box = Box(made, tmp_path)
    box.begin()
    urgent = Source.connect(box.incoming.uri)
    box.source.send(postcopy.package([stream.Device("cpu", b"registers", 7)]))
    refused(box)
    while box.source.hear() != (postcopy.SHUT, b"\0\0\0\1"):
        pass
    urgent.close()
    box.memory.close()


@pytest.mark.parametrize("first", [False, True], ids=["7.2", "8.0"])
def test_it_is_refused_in_precopy_so_that_the_guest_runs_on_there(
    made, tmp_path, monkeypatch, first
):
    monkeypatch.setattr(uninvited, "_PATIENCE", 0.2)
    box = Box(made, tmp_path)
    if first:
        box.begin()
    urgent = Source.connect(box.incoming.uri)
    if not first:
        threading.Event().wait(0.1)
        box.begin()
    refused(box)
    assert box.incoming._postcopy is None
    urgent.close()


def test_who_is_not_the_source_may_be_silent(made, tmp_path, monkeypatch):
    box = Box(made, tmp_path)
    strangers = [stranger(box.incoming.uri) for _ in range(2)]
    gone = Source.connect(box.incoming.uri)
    gone.close()
    box.switch()
    box.runs()
    box.finish()
    for process in strangers:
        process.kill()
        process.wait()
        process.stdout.close()


# ---- balloon and locked memory ---------------------------------------------------------------


class Host(mig.MemoryGuest):
    """Notes what it is told, and what its memory was then."""

    calls: list[str]

    def inhibit_balloon(self, inhibited):
        assert (self.postcopy_server() is not None) == inhibited
        self.calls.append(f"balloon {'inhibited' if inhibited else 'allowed'}")

    def unlock_memory(self):
        self.calls.append("unlock")

    def lock_memory(self):
        assert self.postcopy_server() is None
        self.calls.append("lock")

    def postcopy_run(self):
        self.calls.append("run")
        super().postcopy_run()


class Hosted(Box):
    guest_type = Host


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(Host, "calls", calls, raising=False)
    return calls


ALL = ["unlock", "balloon inhibited", "run", "balloon allowed", "lock"]


def test_a_guest_is_told_when_pages_may_be_missing(made, tmp_path, calls):
    box = Hosted(made, tmp_path)
    assert isinstance(box.guest, BalloonedGuest)
    assert isinstance(box.guest, LockedGuest)
    assert calls == ["unlock"]
    box.begin()
    assert calls == ["unlock"]
    box.source.send(postcopy.package([stream.Device("cpu", b"registers", 7)]))
    assert box.resumed.wait(FOREVER)
    assert calls == ALL[:3]
    box.source.send(postcopy.pages(box.rest(), 3) + b"\0")
    box.check()
    assert calls == ALL


@pytest.mark.parametrize("how", ["given up", "a device fails", "no postcopy", "cancelled"])
def test_it_is_told_whichever_way_it_ends(made, tmp_path, calls, how):
    box = Hosted(made, tmp_path)
    if how == "given up":
        box.switch()
        box.runs()
        box.incoming.abandon()
        error_of(box.incoming)
        assert calls == ALL
        return
    if how == "a device fails":
        box.on_load = lambda: 1 / 0
        box.switch()
        error_of(box.incoming)
        assert calls == ["unlock", "balloon inhibited", "balloon allowed", "lock"]
        return
    box.source.send(postcopy.head(box.blocks))
    if how == "cancelled":
        box.incoming.cancel()
        error_of(box.incoming)
    else:
        box.source.send(postcopy.pages([record(i) for i in range(NPAGES)], 3))
        box.source.send(stream.device_state([stream.Device("cpu", b"registers", 7)]))
        assert box.incoming.wait(FOREVER)
    assert calls == ["unlock", "lock"]


def test_memory_that_cannot_be_unlocked_is_refused_at_once(made, tmp_path, calls, monkeypatch):
    def refuse(self) -> None:
        raise OSError(1, "no")

    memory = mig.GuestMemory()
    memory.add("ram", PAGE)
    monkeypatch.setattr(Host, "unlock_memory", refuse)
    incoming = made.incoming(Host("box", memory), capabilities={"postcopy-ram"})
    with pytest.raises(OptionError, match="cannot be unlocked"):
        incoming.listen(f"unix:{tmp_path / 'in'}")
    assert calls == []


def test_an_address_that_cannot_be_had_leaves_memory_locked(made, tmp_path, calls):
    memory = mig.GuestMemory()
    memory.add("ram", PAGE)
    incoming = made.incoming(Host("box", memory), capabilities={"postcopy-ram"})
    with pytest.raises(MigError):
        incoming.listen(f"unix:{tmp_path / 'no' / 'folder'}")
    assert calls == ["unlock", "lock"]


def test_memory_that_cannot_be_locked_again_is_no_failure(made, tmp_path, calls, monkeypatch):
    def refuse(self) -> None:
        raise OSError(12, "no room")

    monkeypatch.setattr(Host, "lock_memory", refuse)
    box = Hosted(made, tmp_path)
    box.switch()
    box.runs()
    # told by the migration's thread
    with pytest.warns(RuntimeWarning, match="no room"):
        box.finish()
