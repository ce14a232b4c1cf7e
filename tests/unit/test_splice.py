"""Pages that a channel of multifd hands to a unix socket without a copy."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from reference import multifd
from unit.boxes import FOREVER, PAGE, Box

from mig import _core
from mig.errors import CancelledError, IdleTimeoutError, MigError

NPAGES = 16
OLD, NEW = ord("a"), ord("b")
#: older ones copy
SPLICES = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 5)


class Lane:
    """A source's only channel. Nobody has read the other end yet."""

    def __init__(self, timeout: float | None = None) -> None:
        self._mine, self.theirs = socket.socketpair()
        self.cancel = os.eventfd(0)
        self.memory = bytearray([OLD]) * (NPAGES * PAGE)
        self.sender = _core.MultifdSender(1, PAGE)
        self.error: MigError | None = None
        descriptor = _core.Descriptor(
            self._mine.fileno(), is_socket=True, cancel_fd=self.cancel, timeout=timeout
        )
        self._thread = threading.Thread(target=self._run, args=(descriptor,))
        self._thread.start()
        self.pages = _core.Pages(self.memory, PAGE)
        self.sender.send(self.pages, b"pc.ram", np.arange(NPAGES, dtype=np.uint64), False)

    def _run(self, descriptor: _core.Descriptor) -> None:
        try:
            self.sender.run(0, descriptor)
        except MigError as error:
            self.error = error
        self._mine.shutdown(socket.SHUT_RDWR)

    def write(self) -> None:
        """Write to all pages."""
        self.memory[:] = bytes([NEW]) * len(self.memory)

    def read(self) -> set[int]:
        """Read all that comes; returns the bytes that pages have."""
        said = b""
        while data := self.theirs.recv(1 << 20):
            said += data
        packets = multifd.decode(said, PAGE).packets
        assert [len(packet.normal) for packet in packets if not packet.flags & 1] == [NPAGES]
        return set(b"".join(packet.data for packet in packets))

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.join()
        self._mine.close()
        self.theirs.close()
        os.close(self.cancel)


@pytest.fixture
def lane():
    lane = Lane()
    yield lane
    lane.close()


def test_what_is_written_to_settledpages_does_not_arrive(lane):
    def migrate() -> None:
        lane.sender.sync(settle=True)
        lane.write()
        lane.sender.finish()

    thread = threading.Thread(target=migrate)
    thread.start()
    if SPLICES:
        # somebody has to read first
        thread.join(0.05)
        assert thread.is_alive()
    assert lane.read() == {OLD}
    thread.join()


def testpages_that_are_not_settled_are_not_waited_for(lane):
    lane.sender.sync()
    lane.write()
    lane.sender.finish()
    assert lane.read() == {NEW if SPLICES else OLD}


@pytest.mark.skipif(not SPLICES, reason="Linux before 6.5 copies: there is nothing to wait for")
@pytest.mark.parametrize("end", ["cancelled", "idle", "gone"])
def test_settling_ends(end):
    lane = Lane(timeout=0.05 if end == "idle" else None)
    outcome: list[MigError | None] = []

    def settle() -> None:
        try:
            lane.sender.sync(settle=True)
            outcome.append(None)
        except MigError as error:
            outcome.append(error)

    lane.sender.sync()
    thread = threading.Thread(target=settle)
    thread.start()
    if end == "cancelled":
        os.eventfd_write(lane.cancel, 1)
    elif end == "gone":
        lane.theirs.close()
    thread.join(60)
    assert not thread.is_alive()
    lane.sender.finish()
    lane.join()
    # what nobody will read is nobody's: that the other end is gone is found elsewhere
    expected = {"cancelled": CancelledError, "idle": IdleTimeoutError}.get(end, type(None))
    assert type(lane.error) is expected or (end == "gone" and "roken pipe" in str(lane.error))
    if end != "gone":
        assert isinstance(outcome[0], _core.MultifdStoppedError)
    lane.close()


BREAKS = """
import signal, sys, time
import numpy as np
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
sys.path.insert(0, sys.argv[1])
from unit.test_splice import NPAGES, Lane

lane = Lane()
for _ in range(2):
    lane.sender.send(lane.pages, b"pc.ram", np.arange(NPAGES, dtype=np.uint64), False)
# until it waits, behind the header of a packet, for room for its pages
time.sleep(0.2)
lane.theirs.close()
lane.join()
print(lane.error)
"""


def test_a_connection_that_breaks_does_not_end_the_process(request):
    """As it would where the process is told of broken pipes, as those of a shell are."""
    tests = request.config.rootpath / "tests"
    command = [sys.executable, "-P", "-c", BREAKS, str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (signal.strsignal(-done.returncode), done.stderr)
    assert "roken pipe" in done.stdout


def test_a_guest_arrives_without_a_copy(made, tmp_path):
    source, target = Box(11), Box()
    wanted = {"multifd", "return-path"} | ({"zero-copy-send"} if SPLICES else set())
    incoming = made.incoming(target.guest, capabilities={"multifd"})
    incoming.listen(f"unix:{tmp_path}/s")
    outgoing = made.outgoing(source.guest, capabilities=wanted)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    assert outgoing.query().ram.dirty_sync_missed_zero_copy == 0
