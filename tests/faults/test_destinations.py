"""A source against destinations that leave, refuse, talk nonsense or say nothing.

Whatever they do: a typed error, the guest runs again, its memory is free, nothing hangs.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults import streams
from faults.streams import Guest, be16, be32, be64, counted

import mig
from mig.errors import (
    CancelledError,
    ChannelError,
    IdleTimeoutError,
    MigError,
    PeerError,
    StreamError,
)
from mig.events import Event, PassStarted

#: more than the buffers of any socket here hold
PAGES = 8 << 10
HEAD = 5000

Peer = Callable[[socket.socket], None]


def message(number: int, data: bytes) -> bytes:
    return be16(number) + be16(len(data)) + data


def shut(error: int) -> bytes:
    return message(1, be32(error))


def drain(sock: socket.socket) -> int:
    """Read until the other side ends; returns the number of bytes."""
    total = 0
    while data := sock.recv(1 << 20):
        total += len(data)
    return total


def read_all_of(sock: socket.socket) -> int:
    """Read until the description is complete (its last bytes), as a source holds on."""
    tail, total = b"", 0
    while not tail.endswith(b"]}]}"):
        data = sock.recv(1 << 20)
        assert data
        tail, total = (tail + data)[-8:], total + len(data)
    return total


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest({"pc.ram": b"\x5a" * PAGES}) as made:
        yield made


def send(
    guest: Guest, peer: Peer, *, return_path: bool = True, timeout: float = 20
) -> MigError | None:
    """Send to ``peer``, which has its own thread; the error, None for success."""
    problems: list[BaseException] = []

    def run(sock: socket.socket) -> None:
        try:
            peer(sock)
        except OSError:
            pass  # the source has gone
        except BaseException as error:
            problems.append(error)

    with streams.pair() as (mine, theirs):
        mine.settimeout(60)
        migration = mig.OutgoingMigration(
            guest.guest,
            capabilities={"return-path": return_path},
            parameters={"max-bandwidth": 0, "idle-timeout": timeout},
        )
        thread = threading.Thread(target=run, args=(mine,))
        thread.start()
        migration.start(f"fd:{theirs.fileno()}")
        error = streams.outcome(migration)
        theirs.close()
        if thread.is_alive():
            with suppress(OSError):
                mine.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        assert not thread.is_alive()
    assert problems == []
    if error is None:
        assert (guest.stops, guest.resumes) == (1, 0)
        assert migration.status == mig.Status.COMPLETED
    else:
        assert guest.resumes == guest.stops
        assert migration.status == mig.Status.FAILED
        assert type(error) is not MigError, repr(error)
    return error


# ---- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
@pytest.mark.parametrize("nbytes", [0, 1, HEAD, 1 << 20, 6 << 20])
def test_destination_leaves(guest: Guest, nbytes: int, return_path: bool) -> None:
    def peer(sock: socket.socket) -> None:
        got = 0
        while got < nbytes:
            got += len(sock.recv(min(1 << 16, nbytes - got)))
        sock.close()

    error = send(guest, peer, return_path=return_path)
    assert isinstance(error, PeerError if return_path else ChannelError)


def test_destination_leaves_without_a_word(guest: Guest) -> None:
    def peer(sock: socket.socket) -> None:
        read_all_of(sock)
        sock.close()

    assert isinstance(send(guest, peer), PeerError)
    assert (guest.stops, guest.resumes) == (1, 1)


def test_plain_destination_reads_everything(guest: Guest) -> None:
    assert send(guest, lambda sock: void(drain(sock)), return_path=False) is None


def void(_: object) -> None:
    return None


# ---- refusing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 0xFFFFFFFF])
@pytest.mark.parametrize("when", ["at once", "midway", "after all"])
def test_destination_says_failure(guest: Guest, code: int, when: str) -> None:
    def peer(sock: socket.socket) -> None:
        if when == "midway":
            sock.recv(1 << 16)
        elif when == "after all":
            read_all_of(sock)
        sock.sendall(shut(code))
        drain(sock)

    error = send(guest, peer)
    assert isinstance(error, PeerError)
    assert f"{code:#x}" in str(error)


# ---- too early ----------------------------------------------------------------------------------


def test_early_success_and_gone(guest: Guest) -> None:
    """SHUT 0 in the middle of RAM confirms nothing."""

    def peer(sock: socket.socket) -> None:
        sock.recv(HEAD)
        sock.sendall(shut(0))
        sock.recv(1 << 16)
        sock.close()

    assert send(guest, peer) is not None


def test_early_success_and_all_read(guest: Guest) -> None:
    """It said SHUT 0 before it can have loaded the devices, then left without a word."""

    def peer(sock: socket.socket) -> None:
        sock.recv(HEAD)
        sock.sendall(shut(0))
        drain(sock)

    assert send(guest, peer) is not None


# ---- nonsense -----------------------------------------------------------------------------------

NONSENSE = {
    "unknown type": message(0, b""),
    "unknown type 8": message(8, bytes(4)),
    "type 0xffff": message(0xFFFF, bytes(100)),
    "SHUT of no bytes": message(1, b""),
    "SHUT of 8 bytes": message(1, bytes(8)),
    "PONG of 3 bytes": message(2, bytes(3)),
    "PONG past the limit": be16(2) + be16(0xFFFF) + bytes(64),
    "REQ_PAGES": message(4, be64(0) + be32(4096)),
    "REQ_PAGES_ID": message(3, be64(0) + be32(4096) + counted("pc.ram")),
    "REQ_PAGES of 11 bytes": message(4, bytes(11)),
    "REQ_PAGES_ID past the limit": be16(3) + be16(513) + bytes(513),
    "RECV_BITMAP": message(5, counted("pc.ram")),
    "RESUME_ACK": message(6, be32(1)),
    "SWITCHOVER_ACK of 1 byte": message(7, b"\0"),
    "a stream": b"QEVM" + be32(3),
}


@pytest.mark.parametrize("when", ["midway", "after all"])
@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_on_the_return_path(guest: Guest, what: str, when: str) -> None:
    def peer(sock: socket.socket) -> None:
        if when == "midway":
            sock.recv(HEAD)
        else:
            read_all_of(sock)
        sock.sendall(NONSENSE[what])
        drain(sock)

    error = send(guest, peer)
    assert isinstance(error, StreamError), repr(error)
    assert error.offset is not None


def test_half_a_message(guest: Guest) -> None:
    def peer(sock: socket.socket) -> None:
        read_all_of(sock)
        sock.sendall(shut(0)[:6])
        sock.close()

    assert isinstance(send(guest, peer), PeerError)


def test_many_pongs_are_no_confirmation(guest: Guest) -> None:
    def peer(sock: socket.socket) -> None:
        sock.recv(HEAD)
        sock.sendall(message(2, be32(1)) * 20_000 + message(7, b""))
        read_all_of(sock)
        sock.sendall(message(2, be32(7)))
        sock.close()

    assert isinstance(send(guest, peer), PeerError)


def test_words_in_pieces(guest: Guest) -> None:
    def peer(sock: socket.socket) -> None:
        read_all_of(sock)
        for byte in message(2, be32(1)) + shut(0):
            sock.sendall(bytes([byte]))
        drain(sock)

    assert send(guest, peer) is None


# ---- silence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
def test_destination_never_reads(guest: Guest, return_path: bool) -> None:
    ended = threading.Event()

    def peer(sock: socket.socket) -> None:
        ended.wait(60)

    try:
        error = _send_then(ended, guest, peer, return_path)
    finally:
        ended.set()
    assert isinstance(error, IdleTimeoutError)


def _send_then(
    ended: threading.Event, guest: Guest, peer: Peer, return_path: bool
) -> MigError | None:
    with streams.pair() as (mine, theirs):
        thread = threading.Thread(target=peer, args=(mine,))
        thread.start()
        migration = mig.OutgoingMigration(
            guest.guest,
            capabilities={"return-path": return_path},
            parameters={"max-bandwidth": 0, "idle-timeout": 0.2},
        )
        migration.start(f"fd:{theirs.fileno()}")
        error = streams.outcome(migration)
        ended.set()
        thread.join(60)
    assert guest.resumes == guest.stops
    return error


def test_destination_never_confirms(guest: Guest) -> None:
    def peer(sock: socket.socket) -> None:
        drain(sock)

    error = send(guest, peer, timeout=0.2)
    assert isinstance(error, ChannelError)
    assert (guest.stops, guest.resumes) == (1, 1)


# ---- cancel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
def test_cancel_while_the_destination_does_not_read(guest: Guest, return_path: bool) -> None:
    with streams.pair() as (mine, theirs):
        migration = mig.OutgoingMigration(
            guest.guest,
            capabilities={"return-path": return_path},
            parameters={"max-bandwidth": 0, "idle-timeout": 0},
        )
        migration.start(f"fd:{theirs.fileno()}")
        mine.recv(HEAD)
        migration.cancel()
        assert isinstance(streams.outcome(migration), CancelledError)
    assert migration.status == mig.Status.CANCELLED
    assert guest.resumes == guest.stops


def test_cancel_before_the_confirmation(guest: Guest) -> None:
    with streams.pair() as (mine, theirs):
        migration = mig.OutgoingMigration(
            guest.guest, capabilities={"return-path"}, parameters={"idle-timeout": 0}
        )
        migration.start(f"fd:{theirs.fileno()}")
        read_all_of(mine)
        migration.cancel()
        assert isinstance(streams.outcome(migration), CancelledError)
    assert (guest.stops, guest.resumes) == (1, 1)


def test_cancel_ends_the_wait_for_a_command() -> None:
    """The command has read everything and goes on for a while."""
    with Guest() as guest:
        migration = mig.OutgoingMigration(guest.guest)
        migration.start("exec:cat >/dev/null; exec sleep 15")
        deadline = time.monotonic() + 10
        while migration.status != mig.Status.DEVICE and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        migration.cancel()
        ended = True
        try:
            ended = migration.wait(5)
        except CancelledError:
            pass
        finally:
            with suppress(MigError):
                migration.wait(60)
        assert ended, "cancel() waits for the command"
        assert guest.resumes == guest.stops


def test_failing_command() -> None:
    with Guest() as guest:
        migration = mig.OutgoingMigration(guest.guest)
        migration.start("exec:cat >/dev/null; exit 3")
        error = streams.outcome(migration)
        assert isinstance(error, ChannelError)
        assert "status 3" in str(error)
        assert (guest.stops, guest.resumes) == (1, 1)


def test_memory_is_free_after_a_cancel_between_two_sends() -> None:
    """Pages that were queued and never sent must not stay pinned."""
    guest = Guest({"pc.ram": b"\x5a" * 64})
    kept: list[mig.OutgoingMigration] = []

    def cancel(event: Event) -> None:
        if isinstance(event, PassStarted):
            kept[0].cancel()

    with streams.pair() as (_, theirs):
        migration = mig.OutgoingMigration(guest.guest, on_event=cancel)
        kept.append(migration)
        migration.start(f"fd:{theirs.fileno()}")
        assert isinstance(streams.outcome(migration), CancelledError)
    guest.close()


def test_image_closes_after_a_cancel_between_two_sends(
    stream: streams.Pieces, tmp_path: Path
) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.encode())
    kept: list[mig.OutgoingMigration] = []

    def cancel(event: Event) -> None:
        if isinstance(event, PassStarted):
            kept[0].cancel()

    with streams.pair() as (_, theirs), mig.open_image(path) as image:
        migration = mig.OutgoingMigration(image, on_event=cancel)
        kept.append(migration)
        migration.start(f"fd:{theirs.fileno()}")
        assert isinstance(streams.outcome(migration), CancelledError)


# ---- the guest's own mistakes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_guest_that_cannot_stop(kind: type[BaseException]) -> None:
    """Whatever a guest's method raises: the migration failed, and nothing was handed over."""
    with Guest() as guest, streams.pair() as (mine, theirs):

        def stop() -> None:
            guest.stops += 1
            raise kind("no")

        guest.guest.stop = stop  # type: ignore[method-assign]
        migration = mig.OutgoingMigration(guest.guest)
        migration.start(f"fd:{theirs.fileno()}")
        with suppress(MigError):
            assert migration.wait(5), "the migration hangs"
        assert migration.status == mig.Status.FAILED
        assert guest.resumes == 1
        theirs.close()
        assert drain(mine) > 0


# ---- leaks --------------------------------------------------------------------------------------


def test_failures_leave_nothing() -> None:
    kept: list[MigError | None] = []
    before = streams.open_fds()
    with Guest() as guest:
        for answer in (b"", shut(1), message(9, b""), shut(0)[:3]) * 5:
            guest.stops = guest.resumes = 0

            def peer(sock: socket.socket, answer: bytes = answer) -> None:
                read_all_of(sock)
                sock.sendall(answer)
                sock.close()

            kept.append(send(guest, peer))
            for uri in ("unix:/nonexistent/socket", "file:/nonexistent/file", "fd:987"):
                migration = mig.OutgoingMigration(guest.guest)
                try:
                    migration.start(uri)
                except MigError as error:
                    kept.append(error)
                else:
                    kept.append(streams.outcome(migration))
    assert all(kept)
    for thread in streams.mig_threads():
        thread.join(10)
    assert streams.mig_threads() == []
    assert streams.open_fds().keys() == before.keys()


def test_migrations_that_never_start_leave_nothing(folder: Path) -> None:
    before = streams.open_fds()
    with Guest() as guest:
        for _ in range(5):
            with pytest.raises(mig.errors.UriError):
                mig.OutgoingMigration(guest.guest).start("nonsense")
            with pytest.raises(mig.errors.UriError):
                mig.IncomingMigration(guest.guest).listen("nonsense")
            with pytest.raises(ChannelError):
                mig.IncomingMigration(guest.guest).listen("unix:/nonexistent/socket")
            mig.IncomingMigration(guest.guest)
    assert streams.open_fds().keys() == before.keys()
