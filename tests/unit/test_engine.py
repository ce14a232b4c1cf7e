"""Migrations as a whole: source and destination in one process."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from reference import stream
from reference.ram import Record
from unit.boxes import FOREVER, NPAGES, PAGE, Box, ended, error_of

from mig import (
    GuestMemory,
    IncomingMigration,
    OutgoingMigration,
    SharedDirtyLog,
    Status,
    StreamCapture,
    open_image,
)
from mig.errors import (
    CancelledError,
    ChannelError,
    MigError,
    MismatchError,
    OptionError,
    PeerError,
    StateError,
    StreamError,
    UriError,
)
from mig.events import Listening, PassStarted, StatusChanged

RETURN_PATH = [
    pytest.param((), id="without return path"),
    pytest.param(("return-path",), id="with return path"),
]


# ---- test number one -------------------------------------------------------------------------


def test_two_guests_migrate_at_the_same_time_in_one_process(made, tmp_path):
    runs = []
    for seed, uri in ((1, "tcp:127.0.0.1:0"), (2, f"unix:{tmp_path}/s")):
        source, target = Box(seed), Box()
        incoming = made.incoming(target.guest)
        incoming.listen(uri)
        outgoing = made.outgoing(source.guest, capabilities={"return-path"})
        runs.append((source, target, outgoing, incoming))
    for _, _, outgoing, incoming in runs:
        outgoing.start(incoming.uri)
    for source, target, outgoing, incoming in runs:
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
        assert source.state
        assert target.same_as(source)
        assert source.calls == ["stop"]
        assert outgoing.status == incoming.status == Status.COMPLETED
    assert not runs[0][1].same_as(runs[1][1])


def test_two_guests_can_change_places(made):
    """Each side of one process is source and destination at once."""
    first, second = Box(1), Box(2)
    targets = [Box(), Box()]
    for box, target in zip((first, second), targets, strict=True):
        incoming = made.incoming(target.guest)
        incoming.listen("tcp:127.0.0.1:0")
        made.outgoing(box.guest).start(incoming.uri)
    for migration in made.migrations:
        assert migration.wait(FOREVER)
    assert targets[0].same_as(first)
    assert targets[1].same_as(second)


@pytest.mark.parametrize("capabilities", RETURN_PATH)
@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_guest_arrives(made, tmp_path, scheme, capabilities):
    source, target = Box(3), Box()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/s")
    outgoing = made.outgoing(source.guest, capabilities=capabilities)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    assert not (tmp_path / "s").exists()


def test_a_guest_arrives_through_descriptors_of_the_caller(made):
    source, target = Box(4), Box()
    a, b = socket.socketpair()
    with a, b:
        incoming = made.incoming(target.guest)
        incoming.listen(f"fd:{b.fileno()}")
        outgoing = made.outgoing(source.guest, capabilities={"return-path"})
        outgoing.start(f"fd:{a.fileno()}")
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    assert target.same_as(source)


@pytest.mark.parametrize("uri", ["file:{}/f,offset=512", "exec:cat > {}/f", "exec:gzip -1 > {}/f"])
def test_a_guest_can_be_kept_and_fetched_later(made, tmp_path, uri):
    source, target = Box(5), Box()
    outgoing = made.outgoing(source.guest)
    outgoing.start(uri.format(tmp_path))
    assert outgoing.wait(FOREVER)
    incoming = made.incoming(target.guest)
    back = {"e": "exec:cat {}/f", "f": uri}["f" if uri.startswith("file") else "e"]
    if "gzip" in uri:
        back = "exec:gzip -dc {}/f"
    incoming.listen(back.format(tmp_path))
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


def test_a_captured_guest_goes_on(made, tmp_path):
    source, target, path = Box(6), Box(), tmp_path / "vm.mig"
    incoming = made.incoming(StreamCapture(path))
    incoming.listen("tcp:127.0.0.1:0")
    made.outgoing(source.guest, capabilities={"return-path"}).start(incoming.uri)
    assert incoming.wait(FOREVER)
    assert made.migrations[1].wait(FOREVER)
    with open_image(path) as image:
        incoming = made.incoming(target.guest)
        incoming.listen("tcp:127.0.0.1:0")
        outgoing = made.outgoing(image, capabilities={"return-path"})
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    assert target.same_as(source)


# ---- a guest that runs -----------------------------------------------------------------------


class Writer:
    """A thread that writes memory and marks what it wrote, until it is stopped."""

    def __init__(self, box: Box, log: SharedDirtyLog) -> None:
        self._block, self._log = box.memory["pc.ram"], log
        self.running = threading.Event()
        self.running.set()
        self.writes = 0
        self._idle = threading.Event()
        self._end = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        view, page = self._block.view, 0
        while not self._end:
            if not self.running.is_set():
                self._idle.set()
                self.running.wait()
                continue
            self._idle.clear()
            page = (page * 5 + 7) % NPAGES
            self.writes += 1
            view[page * PAGE : page * PAGE + 8] = self.writes.to_bytes(8, "big")
            self._log.mark("pc.ram", page)
            if self.writes % 50 == 0:
                time.sleep(0)

    def await_writes(self, count: int) -> None:
        """Let it write, and return when it has written so often."""
        enough = self.writes + count
        self.running.set()
        while self.writes < enough:
            time.sleep(0.0005)

    def pause(self) -> None:
        """Return when it writes no more."""
        self.running.clear()
        assert self._idle.wait(FOREVER)

    def finish(self) -> None:
        self._end = True
        self.running.set()
        self._thread.join(FOREVER)


@pytest.fixture
def living():
    """A box whose memory is written all the time."""
    log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
    box = Box(7, dirty=log)
    writer = Writer(box, log)

    def stop() -> None:
        box.calls.append("stop")
        # the last things that it does before it stands still must arrive too
        writer.await_writes(20)
        writer.pause()

    def resume() -> None:
        box.calls.append("resume")
        writer.running.set()

    box.guest.stop, box.guest.resume = stop, resume
    box.writer = writer
    writer.start()
    yield box
    writer.finish()


def test_a_guest_that_writes_arrives_as_it_was_when_it_was_stopped(made, living):
    target, passes = Box(), []

    def on_event(event) -> None:
        """Dirty some pages in each of the first passes, then let it converge."""
        if isinstance(event, PassStarted):
            passes.append(event.number)
            if event.number <= 4:
                living.writer.await_writes(50)
            else:
                living.writer.pause()

    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(
        living.guest,
        capabilities={"return-path"},
        parameters={"downtime-limit": 0},
        on_event=on_event,
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert living.calls == ["stop"]
    assert target.same_as(living)
    assert passes == list(range(1, len(passes) + 1))
    assert len(passes) >= 5
    info = outgoing.query()
    assert info.ram.dirty_sync_count == len(passes)
    # pages were sent again
    assert info.ram.normal + info.ram.duplicate > NPAGES + 16


class ScriptedLog:
    """A log that has something to say a fixed number of times."""

    chunk_pages = 0

    def __init__(self, memory: GuestMemory, rounds: int) -> None:
        self._memory, self._rounds = memory, rounds
        self.syncs = 0
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def sync(self, idstr: str, dirty) -> int:
        if idstr != "pc.ram":
            return 0
        self.syncs += 1
        if self.syncs > self._rounds:
            return 0
        page = self.syncs % NPAGES
        self._memory[idstr].view[page * PAGE] = self.syncs % 251
        fresh = not dirty[page]
        dirty.set(page)
        return int(fresh)

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_passes_go_on_while_pages_get_dirty(made, rounds):
    source, target, events = Box(8), Box(), []
    log = ScriptedLog(source.memory, rounds)
    source.guest.dirty_log = lambda: log
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(
        source.guest, parameters={"downtime-limit": 0}, on_event=events.append
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    passes = [e.number for e in events if isinstance(e, PassStarted)]
    # the first, one for every sync while it runs, and the last when it is stopped
    assert passes == list(range(1, rounds + 4))
    assert log.calls == ["start", "stop"]


def test_pages_that_get_dirty_as_the_guest_is_stopped_are_sent(made):
    source, target = Box(9), Box()
    log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
    source.guest.dirty_log = lambda: log

    def stop() -> None:
        source.memory["vga.vram"].view[5 * PAGE] = 0x77
        log.mark("vga.vram", 5)

    source.guest.stop = stop
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.memory["vga.vram"].view[5 * PAGE] == 0x77


# ---- cancel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", RETURN_PATH)
@pytest.mark.parametrize("status", [Status.SETUP, Status.ACTIVE, Status.DEVICE])
def test_a_source_cancelled_in_any_status_runs_again(made, tmp_path, status, capabilities):
    source = Box(10)
    incoming = made.incoming(StreamCapture(tmp_path / "vm.mig"))
    incoming.listen("tcp:127.0.0.1:0")

    def on_event(event) -> None:
        if event == StatusChanged(status):
            outgoing.cancel()

    outgoing = made.outgoing(source.guest, capabilities=capabilities, on_event=on_event)
    outgoing.start(incoming.uri)
    assert isinstance(error_of(outgoing), CancelledError)
    assert outgoing.status == Status.CANCELLED
    assert source.calls.count("stop") == source.calls.count("resume")
    if status == Status.DEVICE:
        assert source.calls == ["stop", "resume"]
    if status == Status.SETUP:
        # it may never have come to a connection: nobody will
        incoming.cancel()
    error = error_of(incoming)
    assert isinstance(error, StreamError | ChannelError | CancelledError)
    assert incoming.status in (Status.FAILED, Status.CANCELLED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("capabilities", RETURN_PATH)
def test_a_source_whose_destination_does_not_read_can_be_cancelled(made, capabilities):
    source = Box(11)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # so small that the guest does not fit into it
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        outgoing = made.outgoing(source.guest, capabilities=capabilities)
        outgoing.start(f"fd:{ours.fileno()}")
        assert theirs.recv(4, socket.MSG_WAITALL) == b"QEVM"
        outgoing.cancel()
        outgoing.cancel()
        assert isinstance(error_of(outgoing), CancelledError)
    assert source.calls == []


def test_a_source_that_waits_for_confirmation_can_be_cancelled(made):
    source = Box(12)
    with socket.create_server(("127.0.0.1", 0)) as server:
        outgoing = made.outgoing(source.guest, capabilities={"return-path"})
        outgoing.start(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        with connection:
            received = b""
            while b'"devices"' not in received[-2000:]:
                received += connection.recv(1 << 20)
            outgoing.cancel()
            assert isinstance(error_of(outgoing), CancelledError)
    assert source.calls == ["stop", "resume"]


def test_a_source_that_waits_for_a_command_can_be_cancelled(made):
    source, stopped = Box(12), threading.Event()
    source.guest.stop = stopped.set
    outgoing = made.outgoing(source.guest)
    outgoing.start("exec:cat > /dev/null; exec sleep 60")
    assert stopped.wait(FOREVER)
    outgoing.cancel()
    assert isinstance(error_of(outgoing), CancelledError)


def test_a_slow_source_can_be_cancelled_however_slow(made):
    source, target, first = Box(13), Box(), threading.Event()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(
        source.guest,
        parameters={"max-bandwidth": 1},
        on_event=lambda e: isinstance(e, PassStarted) and first.set(),
    )
    outgoing.start(incoming.uri)
    assert first.wait(FOREVER)
    outgoing.cancel()
    assert isinstance(error_of(outgoing), CancelledError)
    assert source.calls == []
    ended(incoming)


def test_a_destination_nobody_connects_to_can_be_cancelled(made, tmp_path):
    incoming = made.incoming(StreamCapture(tmp_path / "vm.mig"))
    incoming.listen(f"unix:{tmp_path}/s")
    assert not incoming.wait(0)
    incoming.cancel()
    assert isinstance(error_of(incoming), CancelledError)
    assert incoming.status == Status.CANCELLED
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("capabilities", RETURN_PATH)
def test_a_cancelled_destination_makes_the_source_run_on(made, tmp_path, capabilities):
    source = Box(13)
    # there is always something dirty: this would go on for ever
    log = ScriptedLog(source.memory, 10**9)
    source.guest.dirty_log = lambda: log
    incoming = made.incoming(StreamCapture(tmp_path / "vm.mig"))
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(
        source.guest, capabilities=capabilities, parameters={"downtime-limit": 0}
    )
    outgoing.start(incoming.uri)
    while incoming.query().ram.normal == 0:
        time.sleep(0.001)
    incoming.cancel()
    assert isinstance(error_of(incoming), CancelledError)
    assert list(tmp_path.iterdir()) == []
    error = error_of(outgoing)
    assert isinstance(error, PeerError if capabilities else ChannelError)
    assert outgoing.status == Status.FAILED
    assert source.calls == []
    assert log.calls == ["start", "stop"]


def test_cancel_after_the_end_and_before_the_start_does_nothing(made):
    source, target = Box(14), Box()
    incoming, outgoing = made.incoming(target.guest), made.outgoing(source.guest)
    incoming.cancel()
    outgoing.cancel()
    assert incoming.status == outgoing.status == Status.NONE
    incoming.listen("tcp:127.0.0.1:0")
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    incoming.cancel()
    outgoing.cancel()
    assert incoming.status == outgoing.status == Status.COMPLETED


# ---- failure ---------------------------------------------------------------------------------


def fail_to_load(box: Box, error: Exception) -> None:
    def load_devices(state) -> None:
        raise error

    box.guest.load_devices = load_devices


def test_a_destination_that_fails_says_so_and_the_source_runs_again(made):
    source, target = Box(15), Box()
    fail_to_load(target, MismatchError("no such device"))
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    error = error_of(outgoing)
    assert isinstance(error, PeerError)
    assert "reports failure" in str(error)
    assert outgoing.status == Status.FAILED
    assert source.calls == ["stop", "resume"]
    assert isinstance(error_of(incoming), MismatchError)
    assert incoming.status == Status.FAILED
    assert outgoing.query().error == str(error)


def test_a_destination_of_another_machine_refuses(made, tmp_path):
    source, target = Box(16), Box(machine="crate")
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    error = error_of(incoming)
    assert isinstance(error, MismatchError)
    assert "'box'" in str(error)
    assert "'crate'" in str(error)
    assert isinstance(error_of(outgoing), ChannelError)
    assert source.calls.count("stop") == source.calls.count("resume")


def test_a_destination_with_other_blocks_refuses(made):
    source, target = Box(17), Box()
    target.memory.add("extra", PAGE)
    source.memory.add("extra", 2 * PAGE)
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    error = error_of(incoming)
    assert isinstance(error, MismatchError)
    assert error.block == "extra"
    assert isinstance(error_of(outgoing), PeerError)


@pytest.mark.parametrize("capabilities", RETURN_PATH)
def test_a_destination_that_goes_away_makes_the_source_run_on(made, capabilities):
    source = Box(18)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # so small that the source cannot have handed everything over
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        outgoing = made.outgoing(source.guest, capabilities=capabilities)
        outgoing.start(f"fd:{ours.fileno()}")
        assert theirs.recv(8, socket.MSG_WAITALL) == stream.header()
        theirs.close()
        assert isinstance(error_of(outgoing), ChannelError)
    assert outgoing.status == Status.FAILED
    assert source.calls == []


def test_a_source_that_nobody_listens_to_fails(made, tmp_path):
    source = Box(19)
    outgoing = made.outgoing(source.guest)
    outgoing.start(f"unix:{tmp_path}/none")
    assert isinstance(error_of(outgoing), ChannelError)
    assert outgoing.status == Status.FAILED
    assert source.calls == []


def test_a_command_that_fails_makes_the_source_run_again(made):
    source = Box(20)
    outgoing = made.outgoing(source.guest)
    outgoing.start("exec:cat > /dev/null; exit 3")
    error = error_of(outgoing)
    assert isinstance(error, ChannelError)
    assert "status 3" in str(error)
    assert source.calls == ["stop", "resume"]


def test_a_stream_that_ends_early_leaves_no_file(made, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    data = stream.whole({"a": PAGE}, [[Record(b"a", 0, b"\x01" * PAGE)]], [])
    (tmp_path / "in" / "f").write_bytes(data[:200])
    incoming = made.incoming(StreamCapture(tmp_path / "out" / "vm.mig"))
    incoming.listen(f"file:{tmp_path}/in/f")
    assert isinstance(error_of(incoming), StreamError)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_return_path_is_refused_where_there_is_none(made, tmp_path):
    outgoing = made.outgoing(Box(21).guest, capabilities={"return-path"})
    for uri in (f"file:{tmp_path}/f", "exec:cat"):
        with pytest.raises(OptionError, match="return-path"):
            outgoing.start(uri)
    assert outgoing.status == Status.NONE
    assert list(tmp_path.iterdir()) == []


def test_a_multifd_channel_is_refused_by_name(made):
    incoming = made.incoming(Box().guest)
    incoming.listen("tcp:127.0.0.1:0")
    _, host, port = incoming.uri.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\x11\x22\x33\x44" + bytes(60))
        assert "'multifd'" in str(error_of(incoming))


def test_no_channel_can_bring_pages_once_the_device_state_is_loaded(made):
    # the file of a capture would have them behind its end, a guest that runs in its memory
    source, target, seen = Box(22), Box(), []
    load = target.guest.load_devices

    def load_devices(state):
        seen.append(set(incoming._lanes._serving))
        load(state)

    target.guest.load_devices = load_devices
    incoming = made.incoming(target.guest, capabilities={"multifd"})
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"multifd", "return-path"})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert seen == [set()]
    assert target.memory["pc.ram"].view == source.memory["pc.ram"].view


# ---- callbacks that raise --------------------------------------------------------------------


def boom(*_: object) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("name", ["source_blocks", "dirty_log", "stop", "save_devices"])
@pytest.mark.parametrize("capabilities", RETURN_PATH)
def test_a_source_guest_that_raises_ends_the_migration(made, name, capabilities):
    source, target = Box(22), Box()
    setattr(source.guest, name, boom)
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities=capabilities)
    outgoing.start(incoming.uri)
    error = error_of(outgoing)
    assert "RuntimeError: boom" in str(error)
    assert isinstance(error.__cause__, RuntimeError)
    assert outgoing.status == Status.FAILED
    expected = {"stop": ["resume"], "save_devices": ["stop", "resume"]}
    assert source.calls == expected.get(name, [])
    assert isinstance(error_of(incoming), MigError)


@pytest.mark.parametrize(
    "name", ["configure", "open_blocks", "put", "ram_started", "load_devices", "commit"]
)
@pytest.mark.parametrize("capabilities", RETURN_PATH)
def test_a_destination_guest_that_raises_ends_both_migrations(made, name, capabilities):
    source, target = Box(23), Box()
    setattr(target.guest, name, boom)
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities=capabilities)
    outgoing.start(incoming.uri)
    assert "RuntimeError: boom" in str(error_of(incoming))
    assert incoming.status == Status.FAILED
    ended(outgoing)
    if capabilities:
        assert outgoing.status == Status.FAILED
        assert source.calls.count("stop") == source.calls.count("resume")


def test_a_guest_that_calls_exit_does_not_complete_its_migration(made):
    source, target = Box(24), Box()

    def leave() -> bytes:
        raise SystemExit(1)

    source.guest.save_devices = leave
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest)
    outgoing.start(incoming.uri)
    ended(outgoing)
    assert outgoing.status == Status.FAILED
    assert source.calls == ["stop", "resume"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dirty_log_that_cannot_be_stopped_does_not_keep_the_guest_stopped(made):
    source, target = Box(25), Box()
    log = ScriptedLog(source.memory, 0)
    log.stop = boom
    source.guest.dirty_log = lambda: log
    fail_to_load(target, MismatchError("no"))
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    ended(outgoing)
    assert source.calls == ["stop", "resume"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_guest_that_cannot_resume_does_not_hide_the_first_error(made):
    source, target = Box(26), Box()
    source.guest.resume = boom
    fail_to_load(target, MismatchError("no"))
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    assert isinstance(error_of(outgoing), PeerError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_destination_that_cannot_abort_still_lets_go_of_everything(made, tmp_path):
    source, target = Box(27), Box()
    target.guest.abort = boom
    fail_to_load(target, MismatchError("no"))
    incoming = made.incoming(target.guest)
    incoming.listen(f"unix:{tmp_path}/s")
    outgoing = made.outgoing(source.guest)
    outgoing.start(incoming.uri)
    assert isinstance(error_of(incoming), MismatchError)
    assert not (tmp_path / "s").exists()
    ended(outgoing)


@pytest.mark.parametrize("status", [Status.ACTIVE, Status.DEVICE])
def test_a_callback_that_raises_in_the_migration_s_thread_ends_it(made, status):
    source, target = Box(28), Box()

    def on_event(event) -> None:
        if event == StatusChanged(status):
            boom()

    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, on_event=on_event)
    outgoing.start(incoming.uri)
    assert "boom" in str(error_of(outgoing))
    assert source.calls.count("stop") == source.calls.count("resume")
    ended(incoming)


def test_a_callback_that_raises_at_the_start_leaves_nobody_waiting(made, tmp_path):
    outgoing = made.outgoing(Box(29).guest, on_event=boom)
    with contextlib.suppress(RuntimeError):
        outgoing.start(f"file:{tmp_path}/f")
    if outgoing.status != Status.NONE:
        ended(outgoing)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_when_cancelled_does_not_stop_the_cancelling(made):
    def on_event(event) -> None:
        if event == StatusChanged(Status.CANCELLING):
            boom()

    incoming = made.incoming(Box().guest, on_event=on_event)
    incoming.listen("tcp:127.0.0.1:0")
    with contextlib.suppress(RuntimeError):
        incoming.cancel()
    ended(incoming)
    assert incoming.status == Status.CANCELLED


# ---- commit or abort -------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", RETURN_PATH)
@pytest.mark.parametrize("outcome", ["completes", "is cancelled in commit"])
def test_a_destination_is_committed_or_aborted_but_never_both(
    made, tmp_path, capabilities, outcome
):
    calls = []

    class Noting(StreamCapture):
        def commit(self):
            calls.append("commit")
            super().commit()
            if outcome != "completes":
                incoming.cancel()

        def abort(self):
            calls.append("abort")
            super().abort()

    source = Box(30)
    incoming = made.incoming(Noting(tmp_path / "vm.mig"))
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities=capabilities)
    outgoing.start(incoming.uri)
    ended(incoming)
    ended(outgoing)
    assert calls == ["commit"]
    assert incoming.status == outgoing.status == Status.COMPLETED


# ---- looking on ------------------------------------------------------------------------------


def test_query_tells_the_figures(made):
    source, target = Box(31), Box()
    incoming = made.incoming(target.guest)
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    before = outgoing.query()
    assert (before.status, before.total_time, before.downtime) == (Status.NONE, None, None)
    assert before.ram.transferred == 0
    incoming.listen("tcp:127.0.0.1:0")
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    sent, received = outgoing.query(), incoming.query()
    pages = NPAGES + 16
    data = -(-NPAGES // 3) + -(-16 // 3)
    for info in (sent, received):
        assert info.status == Status.COMPLETED
        assert info.error is None
        assert info.ram.total == pages * PAGE
        assert (info.ram.normal, info.ram.duplicate) == (data, pages - data)
        assert info.ram.page_size == PAGE
        assert info.total_time >= info.setup_time >= 0
    assert sent.ram.transferred == received.ram.transferred > data * PAGE
    assert (sent.ram.remaining, received.ram.remaining) == (0, None)
    assert sent.downtime >= 0
    assert received.downtime is None
    assert outgoing.query().total_time == sent.total_time


def test_query_can_be_asked_at_any_time(made, living):
    target, done = Box(), threading.Event()
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(living.guest, capabilities={"return-path"})
    errors, asked = [], []

    def ask() -> None:
        try:
            while not done.is_set():
                asked.append((outgoing.query(), incoming.query()))
                time.sleep(0)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    finally:
        done.set()
        thread.join()
    assert errors == []
    assert asked


def test_events_come_in_order(made):
    source, target, sent, received = Box(32), Box(), [], []
    incoming = made.incoming(target.guest, on_event=received.append)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, on_event=sent.append)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert sent == [
        StatusChanged(Status.SETUP),
        StatusChanged(Status.ACTIVE),
        PassStarted(1),
        StatusChanged(Status.DEVICE),
        StatusChanged(Status.COMPLETED),
    ]
    assert received == [
        StatusChanged(Status.SETUP),
        Listening(incoming.uri),
        StatusChanged(Status.ACTIVE),
        StatusChanged(Status.COMPLETED),
    ]


def test_wait_before_the_start_and_after_the_end(made):
    source, target = Box(33), Box()
    incoming, outgoing = made.incoming(target.guest), made.outgoing(source.guest)
    assert not outgoing.wait(0)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing.start(incoming.uri)
    for _ in range(2):
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)


def test_a_failed_migration_raises_at_every_wait(made, tmp_path):
    outgoing = made.outgoing(Box(34).guest)
    outgoing.start(f"unix:{tmp_path}/none")
    assert error_of(outgoing) is error_of(outgoing)


def test_a_migration_runs_once(made):
    source, target = Box(35), Box()
    incoming, outgoing = made.incoming(target.guest), made.outgoing(source.guest)
    incoming.listen("tcp:127.0.0.1:0")
    with pytest.raises(StateError):
        incoming.listen("tcp:127.0.0.1:0")
    outgoing.start(incoming.uri)
    with pytest.raises(StateError):
        outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    with pytest.raises(StateError):
        outgoing.start(incoming.uri)


def test_a_uri_that_cannot_be_read_changes_nothing(made, tmp_path):
    incoming, outgoing = made.incoming(Box().guest), made.outgoing(Box(36).guest)
    with pytest.raises(UriError):
        outgoing.start("nonsense")
    with pytest.raises(UriError):
        incoming.listen("nonsense")
    with pytest.raises(ChannelError):
        incoming.listen(f"unix:{tmp_path}/none/s")
    assert outgoing.status == incoming.status == Status.NONE
    incoming.listen("tcp:127.0.0.1:0")
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)


def test_options_that_cannot_be_are_refused_at_once():
    with pytest.raises(OptionError, match="x-colo"):
        OutgoingMigration(Box().guest, capabilities={"x-colo"})
    with pytest.raises(OptionError, match="max-bandwidth"):
        OutgoingMigration(Box().guest, parameters={"max-bandwidth": -1})
    with pytest.raises(OptionError, match="speed"):
        IncomingMigration(Box().guest, parameters={"speed": 1})


def test_max_bandwidth_is_not_passed(made):
    """At least as long as the bytes must take; an upper limit would depend on the machine."""
    source, target, bandwidth = Box(37), Box(), 4 << 20
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, parameters={"max-bandwidth": bandwidth})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    info = outgoing.query()
    # what is sent while the guest stands still is not limited
    running = info.total_time - info.setup_time - info.downtime
    assert running >= NPAGES // 3 * PAGE / bandwidth - 0.1


def test_nothing_is_left_open_behind_migrations(made, tmp_path):
    fds, threads = Path("/proc/self/fd"), threading.active_count()
    count = None
    for seed in range(4):
        source, target = Box(seed), Box()
        incoming = made.incoming(target.guest)
        incoming.listen(f"unix:{tmp_path}/s")
        outgoing = made.outgoing(source.guest, capabilities={"return-path"})
        outgoing.start(incoming.uri)
        if seed % 2:
            outgoing.cancel()
            incoming.cancel()
        ended(outgoing)
        ended(incoming)
        for migration in (outgoing, incoming):
            migration._thread.join(FOREVER)
        now = len(os.listdir(fds))  # noqa: PTH208
        assert count is None or now <= count
        count = now
    assert threading.active_count() <= threads
