"""A source with multifd against destinations that refuse, stall or drop its channels.

Whatever they do: a typed error, the guest runs again, nothing hangs and nothing is left.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from faults import streams
from faults.streams import Guest, be16, be32

import mig
from mig.errors import CancelledError, ChannelError, IdleTimeoutError, MigError, PeerError

#: of 1 KiB
PAGES = 4 << 10
#: more than the buffers of the sockets hold
MANY = 48 << 10
CHANNELS = 3
SHUT = be16(1) + be16(4)

Peer = Callable[[socket.socket, list[socket.socket]], None]


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest({"pc.ram": b"\x5a" * PAGES}) as made:
        yield made


@pytest.fixture
def large() -> Iterator[Guest]:
    """Nobody can take it at once; it cannot be compressed either."""
    with Guest({"pc.ram": b"\0" * MANY}) as made:
        made.memory["pc.ram"].view[:] = random.Random(1).randbytes(MANY << 10)
        yield made


class Destination:
    """Accepts so many connections, the main one and its channels, and has ``peer`` treat them."""

    def __init__(self, folder: Path, peer: Peer, accepts: int = 1 + CHANNELS) -> None:
        self.uri = f"unix:{folder}/socket"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{folder}/socket")
        self._listener.listen(16)
        self._peer, self._accepts = peer, accepts
        self.problem: BaseException | None = None
        self.sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._listener:
                for _ in range(self._accepts):
                    sock, _ = self._listener.accept()
                    sock.settimeout(60)
                    self.sockets.append(sock)
            self._peer(self.sockets[0], self.sockets[1:])
        except OSError:
            pass  # the source has gone
        except BaseException as error:
            self.problem = error

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self.sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        for sock in self.sockets:
            sock.close()
        assert not self._thread.is_alive()
        assert self.problem is None


def send(guest: Guest, folder: Path, peer: Peer, *, accepts: int = 1 + CHANNELS, timeout=20.0,
         return_path: bool = True, then=None, **parameters) -> MigError | None:  # fmt: skip
    """Send to ``peer``; the error, None for success. then: done with the running migration."""
    there = Destination(folder, peer, accepts)
    migration = mig.OutgoingMigration(
        guest.guest,
        capabilities={"multifd": True, "return-path": return_path},
        parameters={
            "max-bandwidth": 0,
            "multifd-channels": CHANNELS,
            "idle-timeout": timeout,
            **{name.replace("_", "-"): value for name, value in parameters.items()},
        },
    )
    with ExitStack() as stack:
        stack.callback(there.close)
        migration.start(there.uri)
        if then is not None:
            then(migration)
        error = streams.outcome(migration)
    if error is not None:
        assert guest.resumes == guest.stops
        assert type(error) is not MigError, repr(error)
        # its memory is nobody's but its owner's
        guest.memory["pc.ram"].view[0] = 1
    return error


def read_some(sock: socket.socket, nbytes: int) -> None:
    while nbytes > 0:
        data = sock.recv(min(nbytes, 1 << 16))
        assert data
        nbytes -= len(data)


def drain(sock: socket.socket) -> None:
    with suppress(OSError):
        while sock.recv(1 << 20):
            pass


def drain_all(socks: list[socket.socket]) -> list[threading.Thread]:
    threads = [threading.Thread(target=drain, args=(sock,)) for sock in socks]
    for thread in threads:
        thread.start()
    return threads


def wait_for_end(sock: socket.socket) -> None:
    """Hold on until the source has let go of its end."""
    with suppress(OSError):
        while sock.recv(1 << 16):
            pass


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_reads_everything(guest, tmp_path, compression, return_path):
    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        threads = drain_all(lanes)
        tail = b""
        while not tail.endswith(b"]}]}"):
            tail = (tail + main.recv(1 << 20))[-8:]
        if return_path:
            main.sendall(SHUT + be32(0))
        drain(main)
        for thread in threads:
            thread.join()

    error = send(guest, tmp_path, peer, return_path=return_path, multifd_compression=compression)
    assert error is None
    assert (guest.stops, guest.resumes) == (1, 0)


@pytest.mark.parametrize("accepts", range(1, 1 + CHANNELS))
def test_refuses_connections(large, tmp_path, accepts):
    """The listener closes: what waits in its queue is reset, and later ones are refused."""
    error = send(large, tmp_path, lambda main, lanes: wait_for_end(main), accepts=accepts)
    assert isinstance(error, ChannelError)
    assert large.stops == 0


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
@pytest.mark.parametrize("nbytes", [0, 64, 1 << 18])
@pytest.mark.parametrize("which", [0, 2])
def test_drops_a_channel(large, tmp_path, which, nbytes, return_path):
    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        read_some(lanes[which], nbytes)
        lanes[which].shutdown(socket.SHUT_RDWR)
        # not before: else the source might have written everything by then
        for thread in drain_all([lane for i, lane in enumerate(lanes) if i != which] + [main]):
            thread.join()

    error = send(large, tmp_path, peer, return_path=return_path)
    assert isinstance(error, ChannelError)
    assert f"multifd channel {which}" in str(error)
    assert large.stops == large.resumes


def test_drops_everything(guest, tmp_path):
    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        for sock in (*lanes, main):
            sock.shutdown(socket.SHUT_RDWR)

    assert isinstance(send(guest, tmp_path, peer), ChannelError)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("reads", [0, 1, 2])
def test_never_reads_some_channels(large, tmp_path, reads, compression):
    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        for thread in drain_all([main, *lanes[:reads]]):
            thread.join()

    error = send(large, tmp_path, peer, timeout=0.4, multifd_compression=compression)
    # what the others do not take, one channel's buffers may hold: then nobody confirms it
    assert isinstance(error, ChannelError)
    assert "multifd channel" in str(error) or (reads and "did not confirm" in str(error))
    assert isinstance(error, IdleTimeoutError if "channel" in str(error) else PeerError)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_refuses_in_words_while_its_channels_stand_still(large, tmp_path, when):
    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        read_some(main, 30)
        if when == "later":
            for lane in lanes:
                read_some(lane, 1 << 19)
        main.sendall(SHUT + be32(1))
        wait_for_end(main)

    error = send(large, tmp_path, peer)
    assert isinstance(error, PeerError)


def test_says_the_reason_after_it_has_dropped_a_channel(large, tmp_path):
    """As mig's own destination does: what it says is the better error."""

    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        read_some(lanes[1], 1 << 18)
        for lane in lanes:
            lane.shutdown(socket.SHUT_RDWR)
        time.sleep(0.1)
        main.sendall(SHUT + be32(1))
        wait_for_end(main)

    assert isinstance(send(large, tmp_path, peer), PeerError)


def test_never_confirms(guest, tmp_path):
    def peer(main: socket.socket, lanes: list[socket.socket]) -> None:
        for thread in drain_all([main, *lanes]):
            thread.join()

    assert isinstance(send(guest, tmp_path, peer, timeout=0.4), MigError)
    assert (guest.stops, guest.resumes) == (1, 1)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.2])
def test_cancelled_while_nobody_reads(large, tmp_path, delay, compression):
    def cancel(migration: mig.OutgoingMigration) -> None:
        time.sleep(delay)
        migration.cancel()

    error = send(
        large,
        tmp_path,
        lambda main, lanes: wait_for_end(main),
        then=cancel,
        multifd_compression=compression,
    )
    assert isinstance(error, CancelledError)
    assert large.stops == large.resumes


def test_a_guest_is_sent_elsewhere_after_all_that(large, tmp_path):
    """The same guest, three failures and then a destination that takes it."""

    def drop(main: socket.socket, lanes: list[socket.socket]) -> None:
        read_some(lanes[0], 1 << 18)
        for sock in (main, *lanes):
            sock.shutdown(socket.SHUT_RDWR)

    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert send(large, folder, drop) is not None
    with Guest({"pc.ram": b"\0" * MANY}) as target:
        incoming = mig.IncomingMigration(target.guest, capabilities={"multifd"})
        incoming.listen(f"unix:{tmp_path}/last")
        outgoing = mig.OutgoingMigration(large.guest, capabilities={"multifd", "return-path"})
        outgoing.start(incoming.uri)
        assert streams.outcome(outgoing) is None
        assert streams.outcome(incoming) is None
        assert target.contents() == large.contents()
