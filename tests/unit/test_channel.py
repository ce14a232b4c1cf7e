"""Channels over sockets, pipes, files and commands; every wait ends."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import numpy as np
import pytest

from mig import _core
from mig.channel import Channel, Listener, connect
from mig.channel.open import Cancel
from mig.errors import CancelledError, ChannelError, IdleTimeoutError, UriError

#: nobody waits so long; a test that does has found a wait without an end
FOREVER = 10.0
BIG = 8 << 20


@pytest.fixture
def cancel():
    cancel = Cancel()
    yield cancel
    cancel.close()


@pytest.fixture
def pair():
    """Two connected channels over a socket pair."""
    a, b = socket.socketpair()
    with Channel(a.detach(), "a") as left, Channel(b.detach(), "b") as right:
        yield left, right


def queue(data: bytes) -> _core.OutQueue:
    out = _core.OutQueue(arena_size=max(1024, len(data)))
    assert out.put(data)
    return out


def read(channel: Channel, at_least: int, room: int | None = None) -> bytes:
    data = bytearray(room or at_least)
    return bytes(data[: channel.readinto(data, 0, at_least)])


class Background:
    """Runs a call in a thread and keeps what it raised."""

    def __init__(self, call) -> None:
        self.error: BaseException | None = None
        self.result: object = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(FOREVER)
        assert not self._thread.is_alive(), "this wait never ended"

    def outcome(self) -> object:
        self.join()
        if self.error is not None:
            raise self.error
        return self.result


# ---- reading and writing ---------------------------------------------------------------------


def test_a_socket_carries_both_directions(pair):
    left, right = pair
    assert left.bidirectional
    assert left.send(queue(b"hello")) == 5
    assert read(right, 5) == b"hello"
    right.send(queue(b"back"))
    assert read(left, 4) == b"back"


def test_a_read_takes_what_is_there_and_waits_for_what_it_must_have(pair):
    left, right = pair
    left.send(queue(b"abcdef"))
    assert read(right, 2, room=100) == b"abcdef"
    reader = Background(lambda: read(right, 4, room=100))
    left.send(queue(b"ab"))
    left.send(queue(b"cd"))
    assert reader.outcome() == b"abcd"


def test_fewer_bytes_than_wanted_mean_the_end(pair):
    left, right = pair
    left.send(queue(b"abc"))
    left.finish()
    assert read(right, 10) == b"abc"
    assert read(right, 10) == b""


def test_after_finish_the_other_direction_still_works(pair):
    left, right = pair
    left.finish()
    right.send(queue(b"x"))
    assert read(left, 1) == b"x"


def test_more_than_the_buffers_hold_arrives(pair):
    left, right = pair
    data = np.random.default_rng(1).bytes(BIG)
    sender = Background(lambda: left.send(queue(data)))
    assert read(right, BIG) == data
    assert sender.outcome() == BIG


def test_many_pieces_arrive_in_order(pair):
    """More than one system call takes (IOV_MAX is 1024), and none starts at a round place."""
    left, right = pair
    page_size, n = 64, 3000
    memory = np.random.default_rng(2).bytes(page_size * n)
    out = _core.OutQueue(max_iov=2 * n + 10, arena_size=1 << 20)
    order = np.arange(n, dtype=np.uint64)[::-1].copy()
    assert out.encode(_core.Pages(memory, page_size), b"a", order) == n
    expected = out.tobytes()
    sender = Background(lambda: left.send(out))
    assert read(right, len(expected)) == expected
    sender.join()
    assert out.nbytes == 0


def test_a_queue_can_be_kept_short(cancel, pair):
    """A TCP socket takes little more than its peer does; nothing is lost, others do not mind."""
    with (
        Listener("tcp:127.0.0.1:0") as listener,
        connect(listener.uri, cancel, FOREVER) as source,
        listener.accept(cancel, FOREVER) as end,
    ):
        fd = source._fd
        source.keep_queue_short()
        with socket.socket(fileno=os.dup(fd)) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, 25) == 128 << 10
        data = os.urandom(BIG)
        sender = Background(lambda: source.send(queue(data)))
        assert read(end, BIG) == data
        assert sender.outcome() == BIG
    # a unix socket says so in its own way
    left, right = pair
    left.keep_queue_short()
    with socket.socket(fileno=os.dup(left.fileno())) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 256 << 10
    sender = Background(lambda: left.send(queue(data)))
    assert read(right, BIG) == data
    assert sender.outcome() == BIG
    reading, writing = os.pipe()
    with Channel(reading, "r") as a, Channel(writing, "w"):
        a.keep_queue_short()


def test_a_pipe_is_read_and_written():
    receiving, sending = os.pipe()
    with Channel(receiving, "r") as reader, Channel(sending, "w") as writer:
        assert not reader.bidirectional
        data = bytes(range(256)) * 4096
        sender = Background(lambda: writer.send(queue(data)))
        assert read(reader, len(data)) == data
        assert sender.outcome() == len(data)


def test_a_peer_that_is_gone_is_a_channel_error(pair):
    left, right = pair
    right.close()
    with pytest.raises(ChannelError, match="Broken pipe"):
        left.send(queue(b"x"))


def test_a_pipe_that_nobody_reads_is_a_channel_error():
    receiving, sending = os.pipe()
    os.close(receiving)
    with Channel(sending, "w") as writer, pytest.raises(ChannelError, match="Broken pipe"):
        writer.send(queue(b"x"))


def test_a_queue_is_empty_after_a_failure_and_lets_go_of_its_pages(pair):
    left, right = pair
    right.close()
    pages, out = _core.Pages(bytes(64), 64), _core.OutQueue()
    out.encode(pages, b"a", np.array([0], dtype=np.uint64))
    with pytest.raises(ChannelError):
        left.send(out)
    assert out.nbytes == 0
    pages.release()


def test_ranges_outside_of_the_buffer_are_refused(pair):
    for start, at_least in ((0, 11), (11, 0), (5, 6)):
        with pytest.raises(IndexError):
            pair[0].readinto(bytearray(10), start, at_least)


# ---- waits -----------------------------------------------------------------------------------


def test_silence_past_the_idle_limit_is_a_timeout(pair):
    left, _ = pair
    left.timeout = 0.01
    with pytest.raises(IdleTimeoutError):
        read(left, 1)


@pytest.mark.parametrize("seconds", [0.25, 1.5, 60.0, None])
def test_the_idle_limit_can_be_read_back(pair, seconds):
    """Who changes it for a moment puts back what it was."""
    pair[0].timeout = seconds
    assert pair[0].timeout == seconds


def test_a_reader_that_does_not_read_is_a_timeout():
    a, b = socket.socketpair()
    with b, Channel(a.detach(), "a", timeout=0.01) as left, pytest.raises(IdleTimeoutError):
        left.send(queue(bytes(BIG)))


def test_no_idle_limit_is_the_default(pair):
    assert pair[0].timeout is None


def ends_of(kind: str) -> tuple[int, int]:
    if kind == "pipe":
        return os.pipe()
    a, b = socket.socketpair()
    return a.detach(), b.detach()


@pytest.mark.parametrize("kind", ["socket", "pipe"])
def test_cancel_ends_a_blocked_read(kind):
    receiving, sending = ends_of(kind)
    try:
        with Channel(receiving, "r") as channel:
            entered = threading.Event()

            def wait() -> bytes:
                entered.set()
                return read(channel, 1)

            reader = Background(wait)
            entered.wait()
            channel.cancel()
            with pytest.raises(CancelledError):
                reader.outcome()
    finally:
        os.close(sending)


@pytest.mark.parametrize("kind", ["socket", "pipe"])
def test_cancel_ends_a_blocked_write(kind):
    receiving, sending = ends_of(kind)
    try:
        with Channel(sending, "w") as channel:
            writer = Background(lambda: channel.send(queue(bytes(BIG))))
            os.read(receiving, 1)  # it has begun, and cannot end
            channel.cancel()
            with pytest.raises(CancelledError):
                writer.outcome()
    finally:
        os.close(receiving)


def test_after_cancel_nothing_is_read_or_written_even_if_it_could(pair):
    left, right = pair
    left.send(queue(b"x"))
    right.cancel()
    right.cancel()
    with pytest.raises(CancelledError):
        read(right, 1)
    with pytest.raises(CancelledError):
        right.send(queue(b"x"))


def test_restore_allows_last_words(pair):
    left, right = pair
    left.cancel()
    left.restore()
    left.send(queue(b"bye"))
    assert read(right, 3) == b"bye"


def test_last_words_do_not_wait_for_a_peer_that_does_not_read(pair):
    left, _ = pair
    left.cancel()
    left.restore()
    with pytest.raises(IdleTimeoutError):
        left.send(queue(bytes(BIG)))


def test_cancel_and_close_after_close_do_nothing(pair):
    left, _ = pair
    left.close()
    left.close()
    left.cancel()


# ---- tcp and unix ----------------------------------------------------------------------------


def exchange(listener: Listener, uri: str, cancel: Cancel) -> None:
    with connect(uri, cancel) as out, listener.accept(cancel) as inc:
        out.send(queue(b"ping"))
        assert read(inc, 4) == b"ping"
        inc.send(queue(b"pong"))
        assert read(out, 4) == b"pong"


def test_tcp_with_port_0_tells_the_port(cancel):
    with Listener("tcp:127.0.0.1:0") as listener:
        assert not listener.uri.endswith(":0")
        assert listener.accepts_more
        exchange(listener, listener.uri, cancel)
        exchange(listener, listener.uri, cancel)


def test_a_port_that_is_taken_is_a_channel_error():
    with Listener("tcp:127.0.0.1:0") as listener, pytest.raises(ChannelError, match="in use"):
        Listener(listener.uri)


def test_nobody_listening_is_a_channel_error(cancel, tmp_path):
    with Listener("tcp:127.0.0.1:0") as listener:
        uri = listener.uri
    with pytest.raises(ChannelError, match="refused"):
        connect(uri, cancel)
    with pytest.raises(ChannelError, match="No such file"):
        connect(f"unix:{tmp_path}/none", cancel)


def test_a_host_that_is_no_address_is_a_channel_error(cancel):
    with pytest.raises(ChannelError):
        connect("tcp:300.300.300.300:1", cancel)


def test_unix_sockets_come_and_go_with_their_listener(cancel, tmp_path):
    path = tmp_path / "s"
    with Listener(f"unix:{path}") as listener:
        assert path.is_socket()
        exchange(listener, f"unix:{path}", cancel)
    assert not path.exists()


def test_a_socket_that_was_left_behind_is_replaced(cancel, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    assert path.is_socket()
    with Listener(f"unix:{path}") as listener:
        exchange(listener, f"unix:{path}", cancel)


def test_a_socket_in_use_is_not_replaced(tmp_path):
    uri = f"unix:{tmp_path}/s"
    with Listener(uri):
        with pytest.raises(ChannelError, match="in use"):
            Listener(uri)
        assert (tmp_path / "s").is_socket()


def test_listening_at_a_regular_file_keeps_the_file(tmp_path):
    path = tmp_path / "vm.img"
    path.write_bytes(b"precious")
    with pytest.raises(ChannelError), Listener(f"unix:{path}"):
        pass
    assert path.read_bytes() == b"precious"


def test_looking_for_a_stale_socket_does_not_use_up_a_connection(cancel, tmp_path):
    """Whoever listens there must still meet its own source, not a stranger who left at once."""
    uri = f"unix:{tmp_path}/s"
    with Listener(uri) as listener:
        with contextlib.suppress(ChannelError):
            Listener(uri)
        with connect(uri, cancel) as out, listener.accept(cancel) as inc:
            out.send(queue(b"x"))
            assert read(inc, 1) == b"x"


def test_cancel_ends_waiting_for_a_connection(cancel):
    with Listener("tcp:127.0.0.1:0") as listener:
        waiting = Background(lambda: listener.accept(cancel))
        cancel.set()
        with pytest.raises(CancelledError):
            waiting.outcome()


def test_a_wait_of_any_length_can_be_cancelled(cancel):
    cancel.set()
    for seconds in (0.0, 1.0, 1e6, 5e6, 1e12):
        with pytest.raises(CancelledError):
            cancel.wait({}, seconds)


def test_waiting_for_nothing_times_out(cancel):
    with pytest.raises(IdleTimeoutError):
        cancel.wait({}, 0.001)


def test_what_is_no_uri_is_refused_at_once(cancel):
    with pytest.raises(UriError):
        connect("nonsense", cancel)
    with pytest.raises(UriError):
        Listener("nonsense")


# ---- files -----------------------------------------------------------------------------------


def test_a_file_is_written_and_read(cancel, tmp_path):
    uri = f"file:{tmp_path}/f"
    with connect(uri, cancel) as out:
        assert not out.bidirectional
        out.send(queue(b"hello"))
        out.finish()
    with Listener(uri) as listener:
        assert not listener.accepts_more
        with listener.accept(cancel) as inc:
            assert read(inc, 9) == b"hello"


def test_with_an_offset_what_stands_before_stays_and_what_stood_after_goes(cancel, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    uri = f"file:{path},offset=4"
    with connect(uri, cancel) as out:
        out.send(queue(b"ab"))
    assert path.read_bytes() == b"0123ab"
    with Listener(uri) as listener, listener.accept(cancel) as inc:
        assert read(inc, 9) == b"ab"


def test_an_offset_past_the_end_makes_a_hole(cancel, tmp_path):
    path = tmp_path / "f"
    with connect(f"file:{path},offset=3", cancel) as out:
        out.send(queue(b"ab"))
    assert path.read_bytes() == b"\0\0\0ab"


def test_files_that_cannot_be_opened_are_channel_errors(cancel, tmp_path):
    with pytest.raises(ChannelError, match="No such file"):
        connect(f"file:{tmp_path}/none/f", cancel)
    with pytest.raises(ChannelError, match="Is a directory"):
        connect(f"file:{tmp_path}", cancel)
    with Listener(f"file:{tmp_path}/none") as listener, pytest.raises(ChannelError):
        listener.accept(cancel)


def test_a_full_device_is_a_channel_error():
    fd = os.open("/dev/full", os.O_WRONLY)
    with Channel(fd, "full") as channel, pytest.raises(ChannelError, match="No space left"):
        channel.send(queue(b"x"))


# ---- commands --------------------------------------------------------------------------------


def test_a_command_gets_the_stream_and_is_waited_for(cancel, tmp_path):
    with connect(f"exec:sleep 0.05; cat > {tmp_path}/f", cancel) as out:
        out.send(queue(b"hello"))
        out.finish()
    assert (tmp_path / "f").read_bytes() == b"hello"


@pytest.mark.parametrize("command", ["exit 3", "cat > /dev/null; exit 3"])
def test_a_command_that_fails_is_a_channel_error(cancel, command):
    with connect(f"exec:{command}", cancel) as out, pytest.raises(ChannelError, match="status 3"):
        out.finish()


def test_a_command_that_is_killed_is_a_channel_error(cancel):
    with connect("exec:kill -9 $$", cancel) as out, pytest.raises(ChannelError, match="-9"):
        out.finish()


def test_a_command_that_does_not_exist_is_a_channel_error(cancel):
    uri = "exec:/nonexistent/command 2> /dev/null"
    with connect(uri, cancel) as out, pytest.raises(ChannelError, match="127"):
        out.finish()


def test_a_command_gives_the_stream(cancel):
    with Listener("exec:printf hello") as listener, listener.accept(cancel) as inc:
        assert read(inc, 9) == b"hello"


def test_closing_kills_a_command_that_is_still_running(cancel):
    out = connect("exec:exec sleep 1000", cancel)
    closing = Background(out.close)
    closing.outcome()


def test_cancel_ends_waiting_for_a_command(cancel):
    out = connect("exec:exec sleep 1000", cancel)
    try:
        finishing = Background(out.finish)
        out.cancel()
        with pytest.raises(CancelledError):
            finishing.outcome()
    finally:
        out.close()


# ---- inherited descriptors -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["socket", "pipe"])
@pytest.mark.parametrize("blocking", [True, False])
def test_an_inherited_descriptor_stays_the_caller_s_as_it_was(cancel, kind, blocking):
    receiving, sending = ends_of(kind)
    try:
        os.set_blocking(sending, blocking)
        os.set_blocking(receiving, blocking)
        with connect(f"fd:{sending}", cancel) as out:
            out.send(queue(b"hello"))
        with Listener(f"fd:{receiving}") as listener, listener.accept(cancel) as inc:
            assert read(inc, 5) == b"hello"
        assert os.get_blocking(sending) == os.get_blocking(receiving) == blocking
        os.write(sending, b"more")
        assert os.read(receiving, 4) == b"more"
    finally:
        os.close(receiving)
        os.close(sending)


def test_a_descriptor_that_is_not_open_is_a_channel_error(cancel):
    receiving, sending = os.pipe()
    os.close(receiving)
    os.close(sending)
    with pytest.raises(ChannelError, match="Bad file descriptor"):
        connect(f"fd:{sending}", cancel)


@pytest.mark.parametrize("number", [2**31, 2**70])
def test_a_number_that_is_no_descriptor_is_a_mig_error(cancel, number):
    with pytest.raises((ChannelError, UriError)):
        connect(f"fd:{number}", cancel)


def test_an_offset_that_no_file_has_is_a_mig_error(cancel, tmp_path):
    with pytest.raises((ChannelError, UriError)):
        connect(f"file:{tmp_path}/f,offset={2**70}", cancel)
