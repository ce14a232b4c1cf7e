"""Pages that a channel of multifd hands to a unix socket without a copy."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

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
    """A source's only channel, and its other end, which nobody has read yet.

    buffer: bytes that the socket is to take, None: as many as usual
    """

    def __init__(
        self,
        *,
        splice: bool = True,
        ends: tuple[socket.socket, socket.socket] | None = None,
        timeout: float | None = None,
        buffer: int | None = None,
    ) -> None:
        self.mine, self.theirs = ends or socket.socketpair()
        if buffer is not None:
            self.mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.cancel = os.eventfd(0)
        self.memory = bytearray([OLD]) * (NPAGES * PAGE)
        self.sender = _core.MultifdSender(1, PAGE, splice=splice)
        self.error: MigError | None = None
        self.mask: set[signal.Signals] = set()
        self._pages = _core.Pages(self.memory, PAGE)
        descriptor = _core.Descriptor(
            self.mine.fileno(), is_socket=True, cancel_fd=self.cancel, timeout=timeout
        )
        self._thread = threading.Thread(target=self._run, args=(descriptor,))
        self._thread.start()

    def _run(self, descriptor: _core.Descriptor) -> None:
        try:
            self.sender.run(0, descriptor)
        except MigError as error:
            self.error = error
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.mine.shutdown(socket.SHUT_RDWR)

    def send(self) -> None:
        """Have all pages sent."""
        self.sender.send(self._pages, b"pc.ram", np.arange(NPAGES, dtype=np.uint64), False)

    def write(self) -> None:
        """Write to all pages."""
        self.memory[:] = bytes([NEW]) * len(self.memory)

    def finish(self) -> list[bytes]:
        """Read all that comes; returns the contents of pages, packet by packet."""
        said = b""
        self.sender.finish()
        while data := self.theirs.recv(1 << 20):
            said += data
        packets = multifd.decode(said, PAGE).packets
        return [packet.data for packet in packets if packet.normal]

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(60)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.join()
        self.mine.close()
        self.theirs.close()
        os.close(self.cancel)


@pytest.mark.parametrize("splice", [False, True])
def test_what_is_written_before_pages_are_read_may_arrive(splice):
    lane = Lane(splice=splice)
    lane.send()
    lane.sender.sync()
    lane.write()
    assert set(b"".join(lane.finish())) == {NEW if splice and SPLICES else OLD}
    lane.close()


def test_small_packets_are_copied():
    lane = Lane()
    lane.sender.send(lane._pages, b"pc.ram", np.arange(2, dtype=np.uint64), False)
    lane.sender.sync()
    lane.write()
    assert set(b"".join(lane.finish())) == {OLD}
    lane.close()


def test_a_peer_of_another_user_gets_copies(tmp_path):
    """Who runs as that user may not look into our memory otherwise."""
    if os.geteuid() != 0:
        pytest.skip("only root can connect as somebody else")
    tmp_path.chmod(0o755)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        Path(path).chmod(0o777)
        listener.listen()
        mine = socket.socket(socket.AF_UNIX)
        connecting = [sys.executable, "-P", "-c", CONNECTS]
        with subprocess.Popen(connecting, stdin=listener.fileno(), stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            mine.connect(path)
            theirs, _ = listener.accept()
            assert user_behind(mine) == 65534
            lane = Lane(ends=(mine, theirs))
            lane.send()
            lane.sender.sync()
            lane.write()
            assert set(b"".join(lane.finish())) == {OLD}
            lane.close()


#: listens anew on the socket that is its standard input, as nobody
CONNECTS = """
import os, socket, sys
os.setgid(65534)
os.setuid(65534)
socket.socket(fileno=0).listen(4)
print(flush=True)
"""


def user_behind(sock: socket.socket) -> int:
    """Return the user at the other end."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], "little")


@pytest.mark.parametrize("buffer", [0, 16 << 10, 48 << 10, 200 << 10])
@pytest.mark.parametrize("end", ["cancelled", "idle", "gone", "shut"])
def test_waiting_for_room_ends(end, buffer):
    lane = Lane(timeout=0.05 if end == "idle" else None, buffer=buffer)
    for _ in range(2):
        lane.send()
    sending = threading.Thread(target=send_much, args=(lane,))
    sending.start()
    if end == "cancelled":
        os.eventfd_write(lane.cancel, 1)
    elif end == "gone":
        lane.theirs.close()
    elif end == "shut":
        lane.theirs.shutdown(socket.SHUT_RDWR)
    lane.join()
    sending.join(60)
    assert not sending.is_alive()
    wanted = {"cancelled": CancelledError, "idle": IdleTimeoutError}
    assert isinstance(lane.error, wanted.get(end, MigError))
    if end not in wanted:
        assert os.strerror(errno.EPIPE) in str(lane.error)
    lane.close()


def send_much(lane: Lane) -> None:
    """More than any buffer takes, or until the channel has ended."""
    try:
        for _ in range(200):
            lane.send()
    except _core.MultifdStoppedError:
        pass


@pytest.mark.parametrize("buffer", [0, 16 << 10, 200 << 10, 4 << 20])
def test_all_arrives_whatever_the_socket_takes_at_once(buffer):
    lane = Lane(buffer=buffer)
    sending = threading.Thread(target=lambda: [lane.send() for _ in range(40)])
    sending.start()
    arrived: list[bytes] = []
    reading = threading.Thread(target=lambda: arrived.extend(finish_slowly(lane, sending)))
    reading.start()
    reading.join(60)
    assert not reading.is_alive()
    assert arrived == [bytes(lane.memory)] * 40
    lane.close()


def finish_slowly(lane: Lane, sending: threading.Thread) -> list[bytes]:
    """Read in small pieces until all is sent."""
    said = b""
    while sending.is_alive():
        lane.theirs.settimeout(0.01)
        with contextlib.suppress(TimeoutError):
            said += lane.theirs.recv(5000)
    lane.theirs.settimeout(None)
    lane.sender.finish()
    while data := lane.theirs.recv(7000):
        said += data
    return [packet.data for packet in multifd.decode(said, PAGE).packets if packet.normal]


def test_the_socket_and_the_thread_are_left_as_they_were():
    lane = Lane()
    before = fcntl.fcntl(lane.mine, fcntl.F_GETFL)
    lane.send()
    lane.finish()
    lane.join()
    assert fcntl.fcntl(lane.mine, fcntl.F_GETFL) & ~os.O_NONBLOCK == before & ~os.O_NONBLOCK
    assert not fcntl.fcntl(lane.mine, fcntl.F_GETFL) & os.O_NONBLOCK
    assert signal.SIGPIPE not in lane.mask
    lane.close()


BREAKS = """
import signal, sys, time
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
sys.path.insert(0, sys.argv[1])
from unit.test_splice import Lane

lane = Lane(buffer=0)
lane.send()
# until it waits, behind the header of a packet, for room for its pages
time.sleep(0.2)
lane.theirs.close()
lane.join()
print(lane.error)
"""

LEAVES_ALONE = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
sys.path.insert(0, sys.argv[1])
from unit.test_splice import Lane

os.kill(os.getpid(), signal.SIGPIPE)
lane = Lane()
lane.send()
lane.finish()
lane.join()
print(signal.SIGPIPE in signal.sigpending())
"""

#: seccomp: the process has no splice(), or no vmsplice()
FORBIDS = """
import ctypes, struct, sys
sys.path.insert(0, sys.argv[1])
from unit.test_splice import NEW, OLD, Lane

number = int(sys.argv[2])
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *line) for line in code)
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter) == 0
lane = Lane()
lane.send()
lane.sender.sync()
lane.write()
assert set(b"".join(lane.finish())) == {OLD}
print(lane.error)
"""


def run(request, program: str, *arguments: str) -> str:
    """Run a program of its own; what it printed."""
    tests = request.config.rootpath / "tests"
    command = [sys.executable, "-P", "-c", program, str(tests), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


def test_a_connection_that_breaks_does_not_end_the_process(request):
    """As it would where the process is told of broken pipes, as those of a shell are."""
    assert os.strerror(errno.EPIPE) in run(request, BREAKS)


def test_somebody_else_s_signal_is_left_alone(request):
    assert run(request, LEAVES_ALONE) == "True"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls of x86-64")
@pytest.mark.parametrize("number", [275, 278], ids=["splice", "vmsplice"])
def test_a_sandbox_without_them(request, number):
    assert run(request, FORBIDS, str(number)) == "None"


@pytest.mark.parametrize("return_path", [False, True])
def test_a_guest_arrives(made, tmp_path, return_path):
    source, target = Box(11), Box()
    incoming = made.incoming(target.guest, capabilities={"multifd"})
    incoming.listen(f"unix:{tmp_path}/s")
    wanted = {"multifd", "return-path"} if return_path else {"multifd"}
    outgoing = made.outgoing(source.guest, capabilities=wanted)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
