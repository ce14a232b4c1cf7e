"""A destination against sources that leave, stall, trickle, or send something else."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import streams
from faults.streams import Guest, Pieces, be32

import mig
from mig.errors import (
    CancelledError,
    IdleTimeoutError,
    MigError,
    StreamError,
    TruncatedError,
    UnsupportedError,
)

SHUT_OK = b"\0\1\0\4" + be32(0)
SHUT_FAILED = b"\0\1\0\4" + be32(1)
PONG = b"\0\2\0\4" + be32(1)


@contextmanager
def listening(folder: Path, **parameters: float) -> Iterator[mig.IncomingMigration]:
    """A capture that listens on a unix socket; it is cancelled if it still runs at the end."""
    migration = mig.IncomingMigration(
        mig.StreamCapture(folder / "vm.mig"),
        parameters={name.replace("_", "-"): value for name, value in parameters.items()},
    )
    migration.listen(f"unix:{folder.parent / 'socket'}")
    try:
        yield migration
    finally:
        migration.cancel()
        with suppress(MigError):
            assert migration.wait(30)


def connect(migration: mig.IncomingMigration) -> socket.socket:
    assert migration.uri is not None
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(migration.uri.removeprefix("unix:"))
    return sock


def rest(sock: socket.socket) -> bytes:
    """Everything that the other side still says until it closes."""
    out = b""
    with suppress(ConnectionResetError):
        while data := sock.recv(4096):
            out += data
    return out


# ---- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
def test_source_leaves(stream: Pieces, folder: Path, return_path: bool) -> None:
    pieces = streams.with_return_path(stream) if return_path else stream
    data = pieces.encode()
    for point in range(0, len(data), len(data) // 40):
        with listening(folder) as migration, connect(migration) as sock:
            sock.sendall(data[:point])
            sock.shutdown(socket.SHUT_WR)
            error = streams.outcome(migration)
            assert isinstance(error, StreamError), (point, error)
            assert error.offset is not None
            said = rest(sock)
        asked = return_path and point >= pieces.offset("start")
        assert said == (PONG + SHUT_FAILED if asked else b""), point
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("point", [0, 3, 8, 200, 2000, 3800])
def test_source_is_reset(stream: Pieces, folder: Path, point: int) -> None:
    """A TCP connection that breaks with RST instead of ending."""
    migration = mig.IncomingMigration(mig.StreamCapture(folder / "vm.mig"))
    migration.listen("tcp:127.0.0.1:0")
    assert migration.uri is not None
    port = int(migration.uri.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(stream.encode()[:point])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    error = streams.outcome(migration)
    assert isinstance(error, MigError)
    assert type(error) is not MigError
    assert list(folder.iterdir()) == []


def test_source_leaves_before_the_confirmation(stream: Pieces, folder: Path) -> None:
    """Nobody reads SHUT 0. A failure that keeps the file says so: only one may run the VM."""
    pieces = streams.with_return_path(stream)
    with streams.pair() as (mine, theirs):
        capture = mig.StreamCapture(folder / "vm.mig")
        commit = capture.commit

        def leave_and_commit() -> None:
            mine.close()
            commit()

        capture.commit = leave_and_commit  # type: ignore[method-assign]
        migration = mig.IncomingMigration(capture)
        migration.listen(f"fd:{theirs.fileno()}")
        mine.sendall(pieces.encode())
        error = streams.outcome(migration)
    kept = error is None or "kept" in str(error)
    assert (folder / "vm.mig").exists() == kept, error


def test_cancel_after_commit_is_too_late(stream: Pieces, tmp_path: Path) -> None:
    """commit() may have started the guest: the source must not be told that it failed."""
    aborted: list[bool] = []
    with Guest(empty=True) as guest, streams.pair() as (mine, theirs):
        migration = mig.IncomingMigration(guest.guest)
        commit, abort = guest.guest.commit, guest.guest.abort

        def commit_and_cancel() -> None:
            commit()
            migration.cancel()

        def note_abort() -> None:
            aborted.append(True)
            abort()

        guest.guest.commit = commit_and_cancel  # type: ignore[method-assign]
        guest.guest.abort = note_abort  # type: ignore[method-assign]
        migration.listen(f"fd:{theirs.fileno()}")
        mine.sendall(streams.with_return_path(stream).encode())
        error = streams.outcome(migration)
        theirs.close()
        said = rest(mine)
    assert aborted == []
    assert error is None
    assert said == PONG + SHUT_OK


# ---- stalling -----------------------------------------------------------------------------------


@dataclass
class Stalled:
    point: int
    migration: mig.IncomingMigration
    mine: socket.socket
    theirs: socket.socket


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
def test_source_stalls(stream: Pieces, folder: Path, return_path: bool) -> None:
    pieces = streams.with_return_path(stream) if return_path else stream
    data = pieces.encode()
    points = [0, 1, 7, 8, 30, pieces.offset("pc.ram part"), 1500, 3300, 3400, len(data) - 1]
    stalled = []
    for point in points:
        mine, theirs = socket.socketpair()
        capture = mig.StreamCapture(folder / f"{point}.mig")
        migration = mig.IncomingMigration(capture, parameters={"idle-timeout": 0.2})
        migration.listen(f"fd:{theirs.fileno()}")
        mine.sendall(data[:point])
        stalled.append(Stalled(point, migration, mine, theirs))
    for one in stalled:
        error = streams.outcome(one.migration)
        one.theirs.close()
        assert isinstance(error, IdleTimeoutError), (one.point, error)
        asked = return_path and one.point >= pieces.offset("start")
        assert rest(one.mine) == (PONG + SHUT_FAILED if asked else b""), one.point
        one.mine.close()
    assert list(folder.iterdir()) == []


def test_source_without_description_holds_on(stream: Pieces, folder: Path) -> None:
    """Some machine types send no description, and the connection stays open: it is the end."""
    pieces = streams.with_return_path(stream)
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(pieces.encode()[: pieces.end("eof")])
        assert streams.outcome(migration) is None
        assert rest(sock) == PONG + SHUT_OK
    with mig.open_image(folder / "vm.mig") as image:
        assert image.devices is None


def test_source_trickles(stream: Pieces, folder: Path) -> None:
    """Byte by byte, over TCP, so that every read ends somewhere else."""
    migration = mig.IncomingMigration(mig.StreamCapture(folder / "vm.mig"))
    migration.listen("tcp:127.0.0.1:0")
    assert migration.uri is not None
    port = int(migration.uri.rpartition(":")[2])
    data = streams.with_return_path(stream).encode()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(data)):
            sock.sendall(data[i : i + 1])
        assert streams.outcome(migration) is None
        assert rest(sock) == PONG + SHUT_OK
    with mig.open_image(folder / "vm.mig") as image:
        assert image.devices is not None
        assert {d.idstr: d.payload for d in image.devices} == streams.DEVICES
        for name, fills in streams.RAM.items():
            for i, fill in enumerate(fills):
                assert image.page(name, i) == bytes([fill]) * streams.PAGE


@pytest.mark.parametrize("nbytes", [1, 3, 7, 64, 1000])
def test_pieces_of_any_size_make_the_same_file(stream: Pieces, folder: Path, nbytes: int) -> None:
    data = stream.encode()
    path = folder / "vm.mig"
    assert streams.receive(data, path) is None
    whole = path.read_bytes()
    with streams.pair() as (mine, theirs):
        migration = mig.IncomingMigration(mig.StreamCapture(path))
        migration.listen(f"fd:{theirs.fileno()}")
        for at in range(0, len(data), nbytes):
            mine.sendall(data[at : at + nbytes])
        assert streams.outcome(migration) is None
    assert path.read_bytes() == whole


# ---- words to the source ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "data"),
    [
        ("pc.ram 0 word", b"\xff" * 8),
        ("end footer id", be32(99)),
        ("timer footer id", be32(99)),
        ("vga.vram record name", b"vga.nram"),
    ],
)
def test_failure_is_said(stream: Pieces, folder: Path, label: str, data: bytes) -> None:
    pieces = streams.with_return_path(stream.put(label, data))
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(pieces.encode())
        sock.shutdown(socket.SHUT_WR)
        assert isinstance(streams.outcome(migration), StreamError)
        assert rest(sock) == PONG + SHUT_FAILED
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("label", ["pc.ram part", "pc.ram 2 data", "timer section", "eof"])
def test_cancel_is_said(stream: Pieces, folder: Path, label: str) -> None:
    pieces = streams.with_return_path(stream)
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(pieces.encode()[: pieces.offset(label)])
        assert sock.recv(len(PONG), socket.MSG_WAITALL) == PONG
        migration.cancel()
        assert isinstance(streams.outcome(migration), CancelledError)
        assert rest(sock) == SHUT_FAILED
    assert migration.status == mig.Status.CANCELLED
    assert list(folder.iterdir()) == []


def test_failed_commit_is_said(stream: Pieces, folder: Path) -> None:
    """The folder is gone when the file should get its name."""
    pieces = streams.with_return_path(stream)
    gone = folder / "gone"
    gone.mkdir()
    with streams.pair() as (mine, theirs):
        migration = mig.IncomingMigration(mig.StreamCapture(gone / "vm.mig"))
        migration.listen(f"fd:{theirs.fileno()}")
        gone.rmdir()
        mine.sendall(pieces.encode())
        assert isinstance(streams.outcome(migration), mig.errors.ChannelError)
        theirs.close()
        assert rest(mine) == PONG + SHUT_FAILED


def test_a_source_that_never_reads(stream: Pieces, folder: Path) -> None:
    """A flood of PINGs fills the return path: the idle limit ends it."""
    pings = streams.command(2, be32(1)) * 100_000
    pieces = streams.with_return_path(stream).before("pc.ram part", pings)
    with listening(folder, idle_timeout=0.3) as migration, connect(migration) as sock:
        sock.settimeout(30)
        feeder = threading.Thread(target=streams.feed, args=(sock, pieces.encode()))
        feeder.start()
        assert isinstance(streams.outcome(migration), IdleTimeoutError)
        feeder.join(30)
        assert not feeder.is_alive()
    assert list(folder.iterdir()) == []


# ---- other connections --------------------------------------------------------------------------


def test_multifd_channel_first(folder: Path) -> None:
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(bytes.fromhex("11223344 00000001") + bytes(56))
        error = streams.outcome(migration)
    assert isinstance(error, UnsupportedError)
    assert error.capability == "multifd"
    assert "'multifd'" in str(error)


@pytest.mark.parametrize("label", ["magic", "start", "pc.ram 2 data", "timer payload"])
def test_multifd_channel_second(stream: Pieces, folder: Path, label: str) -> None:
    """The main connection is at ``label`` and silent when the channel comes."""
    pieces = streams.with_return_path(stream) if label != "magic" else stream
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(pieces.encode()[: pieces.offset(label)])
        if label != "magic":
            assert sock.recv(len(PONG), socket.MSG_WAITALL) == PONG
        with connect(migration) as extra:
            extra.sendall(bytes.fromhex("11223344 00000001") + bytes(56))
            error = streams.outcome(migration)
            assert isinstance(error, UnsupportedError)
            assert error.capability == "multifd"
        assert rest(sock).endswith(SHUT_FAILED if label != "magic" else b"")
    assert migration.status == mig.Status.FAILED
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("first", [b"", b"\x11", b"QEVM", b"GET / HTTP/1.0\r\n\r\n"])
def test_other_visitors_do_no_harm(stream: Pieces, folder: Path, first: bytes) -> None:
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(stream.encode()[:2000])
        with connect(migration) as visitor:
            visitor.sendall(first)
        with connect(migration) as visitor:
            visitor.sendall(first)
        sock.sendall(stream.encode()[2000:])
        assert streams.outcome(migration) is None
    assert (folder / "vm.mig").exists()


@pytest.mark.parametrize("how", ["complete", "cancel"])
def test_silent_visitor_does_not_delay_the_end(stream: Pieces, folder: Path, how: str) -> None:
    """A second connection that says nothing: the first one's end must not wait for it."""
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(stream.encode()[:2000])
        with connect(migration) as visitor:
            visitor.sendall(b"\x11\x22")
            # until the watcher has it: the visitor's data is read
            deadline = time.monotonic() + 10
            while not _is_read(visitor) and time.monotonic() < deadline:
                time.sleep(0.01)
            began = time.monotonic()
            if how == "complete":
                sock.sendall(stream.encode()[2000:])
            else:
                migration.cancel()
            streams.outcome(migration)
            took = time.monotonic() - began
    # the watcher's patience with the visitor is 5 s
    assert took < 3


def _is_read(sock: socket.socket) -> bool:
    queued: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return queued == 0


# ---- leaks --------------------------------------------------------------------------------------


def test_failures_leave_nothing(stream: Pieces, folder: Path) -> None:
    """Errors that are kept keep no descriptor or thread."""
    kept: list[MigError | None] = []
    before = streams.open_fds()
    data = streams.with_return_path(stream).encode()
    for point in range(0, len(data) - 1, 200):
        kept.append(streams.receive(data[:point], folder / "vm.mig"))
        with listening(folder) as migration:
            migration.cancel()
            kept.append(streams.outcome(migration))
        with listening(folder) as migration, connect(migration) as sock:
            sock.sendall(data[:point])
            migration.cancel()
            kept.append(streams.outcome(migration))
    assert all(kept)
    for thread in streams.mig_threads():
        thread.join(10)
    assert streams.mig_threads() == []
    assert streams.open_fds().keys() == before.keys()
    assert list(folder.iterdir()) == []


def test_images_that_fail_leave_no_descriptor(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    before = streams.open_fds()
    kept: list[MigError | None] = []
    for nbytes in range(100, 3000, 100):
        path.write_bytes(stream.encode()[:nbytes])
        kept.append(streams.image_error(path))
    assert all(isinstance(error, TruncatedError) for error in kept)
    assert streams.open_fds().keys() == before.keys()


# ---- places that cannot be ----------------------------------------------------------------------


def test_a_file_is_no_stale_socket(tmp_path: Path, folder: Path) -> None:
    """Listening on the path of somebody's file must not delete it."""
    path = tmp_path / "precious"
    path.write_bytes(b"data")
    capture = mig.StreamCapture(folder / "vm.mig")
    migration = mig.IncomingMigration(capture)
    try:
        with pytest.raises(MigError):
            migration.listen(f"unix:{path}")
    finally:
        migration.cancel()
        capture.abort()
    assert path.read_bytes() == b"data"


def test_stale_socket_is_replaced(stream: Pieces, tmp_path: Path, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "socket"))
    with listening(folder) as migration, connect(migration) as sock:
        sock.sendall(stream.encode())
        assert streams.outcome(migration) is None


def test_name_too_long_is_seen_before_it_is_too_late(stream: Pieces, folder: Path) -> None:
    """255 bytes are a good file name; if not for mig, then it says so before it listens."""
    path = folder / ("x" * 251 + ".mig")
    try:
        capture = mig.StreamCapture(path)
    except MigError:
        return
    with streams.pair() as (mine, theirs):
        migration = mig.IncomingMigration(capture)
        migration.listen(f"fd:{theirs.fileno()}")
        mine.sendall(stream.encode())
        assert streams.outcome(migration) is None
    assert path.exists()


@pytest.mark.parametrize("name", ["file/vm.mig", "x" * 300, "missing/vm.mig"])
def test_capture_that_cannot_be(name: str, folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(mig.errors.ChannelError):
        mig.StreamCapture(folder / name)


@pytest.mark.parametrize("uri", [f"tcp:{'a' * 64}.example:0", "tcp:a..b:0", "unix:/" + "x" * 200])
def test_address_that_cannot_be(uri: str, folder: Path) -> None:
    capture = mig.StreamCapture(folder / "vm.mig")
    migration = mig.IncomingMigration(capture)
    try:
        with pytest.raises(MigError):
            migration.listen(uri)
    finally:
        capture.abort()
