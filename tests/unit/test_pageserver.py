"""PageServer: requests are answered by the thread that reads them."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading

import numpy as np
import pytest
from unit.answers import Answering
from unit.boxes import FOREVER, PAGE
from unit.far import until

from mig import _core
from mig.engine.requests import PageRequests
from mig.errors import CancelledError, ChannelError, IdleTimeoutError, PeerError
from mig.ram.search import PageSearch, SourceBlock


def search_of(**blocks: tuple[int, int]) -> PageSearch:
    """blocks: pages, and pages of a host page; page i holds i + 1, every third one zeros"""

    def contents(npages: int) -> np.ndarray:
        memory = np.zeros((npages, PAGE), np.uint8)
        memory[:, :8] = np.arange(1, npages + 1, dtype=">u8").view(np.uint8).reshape(-1, 8)
        memory[::3] = 0
        return memory

    return PageSearch(
        [
            SourceBlock(
                name,
                npages * PAGE,
                _core.Pages(contents(npages), PAGE),
                True,
                _core.Bitmap(npages, fill=True),
                host_page_size=group * PAGE,
            )
            for name, (npages, group) in blocks.items()
        ]
    )


def message(kind: int, data: bytes) -> bytes:
    return struct.pack(">HH", kind, len(data)) + data


def by_name(name: bytes, start: int, length: int = PAGE) -> bytes:
    return message(3, struct.pack(">QI", start, length) + bytes([len(name)]) + name)


def as_before(start: int, length: int = PAGE) -> bytes:
    return message(4, struct.pack(">QI", start, length))


class Talk:
    """A return path, and a thread that answers what comes over it."""

    def __init__(self, walk: Answering) -> None:
        self.server = walk.requests.server
        self.far, self._near = socket.socketpair()
        self.cancel, self._cancelled = socket.socketpair()
        fd = _core.Descriptor(
            self._near.fileno(), cancel_fd=self._cancelled.fileno(), is_socket=True
        )
        self.server.listen(fd)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error

    def ends(self) -> bytes:
        """Wait for the end of the answers; return what comes next on the return path."""
        if self.thread.ident is None:
            self.thread.start()
        self.thread.join(FOREVER)
        assert not self.thread.is_alive()
        self.far.shutdown(socket.SHUT_WR)
        rest = bytearray(1 << 16)
        return bytes(rest[: self.server.readinto(rest, 0, len(rest))])

    def close(self) -> None:
        for each in (self.far, self._near, self.cancel, self._cancelled):
            each.close()


@pytest.fixture
def talk():
    with contextlib.ExitStack() as stack:

        def begin(walk: Answering) -> Talk:
            return stack.enter_context(contextlib.closing(Talk(walk)))

        yield begin


def test_requests_are_answered_in_their_order_whatever_comes_in_pieces(talk):
    for cut in (1, 3, 16, 1000):
        with Answering(search_of(a=(100, 1), bb=(64, 8))) as walk:
            said = by_name(b"bb", 9 * PAGE) + as_before(0) + by_name(b"a", 7 * PAGE, 3 * PAGE)
            said += as_before(8 * PAGE) + as_before(99 * PAGE) + message(2, b"pong")
            spoken = talk(walk)
            spoken.thread.start()
            for at in range(0, len(said), cut):
                spoken.far.sendall(said[at : at + cut])
            assert spoken.ends() == message(2, b"pong")
            assert spoken.error is None
            expected = [("bb", n) for n in (*range(8, 16), *range(8))]
            expected += [("a", n) for n in (7, 8, 9, 99)]
            assert walk.came() == expected
            for (_, number), data in walk.contents.items():
                zero = number % 3 == 0
                assert data == (b"\0" if zero else struct.pack(">Q", number + 1).ljust(PAGE, b"\0"))
            nzero = sum(number % 3 == 0 for _, number in expected)
            assert walk.requests.server.sent[:2] == (len(expected) - nzero, nzero)
            assert walk.requests.total == 7
            assert walk.remaining == (164 - len(expected)) * PAGE


@pytest.mark.parametrize(
    "said",
    [
        message(2, b"\0\0\0\1"),
        message(1, b"\0\0\0\0"),
        message(4, b"\0" * 11),
        message(4, b"\0" * 13),
        message(3, b"\0" * 12),
        message(3, b"\0" * 11 + b"\x10\2a"),
        message(3, b"\0" * 12 + b"\1" + b"ab"),
        message(3, b"\0" * 400),
        by_name(b"c", 0),
        by_name(b"ignored", 0),
        by_name(b"a", 1),
        by_name(b"a", 0, 1),
        by_name(b"a", 0, 0),
        by_name(b"a", 100 * PAGE),
        by_name(b"a", 99 * PAGE, 2 * PAGE),
        by_name(b"a", (1 << 64) - PAGE, 2 * PAGE),
        by_name(b"a", 0, (1 << 32) - PAGE),
        as_before(0),
        b"",
        b"\0",
        by_name(b"a", 0)[:-1],
        message(9, b""),
        message(0xFFFF, b"\xff" * 5000),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_what_cannot_be_answered_is_left_to_the_reader(talk, said, behind):
    search = search_of(a=(100, 1), ignored=(10, 1))
    ignored = search["ignored"]
    search.ignores = lambda block: block is ignored
    with Answering(search) as walk:
        spoken = talk(walk)
        before = by_name(b"a", 5 * PAGE) if behind else b""
        if behind and said == as_before(0):
            said = message(8, b"")
        spoken.far.sendall(before + said)
        spoken.far.shutdown(socket.SHUT_WR)
        assert spoken.ends() == said
        assert spoken.error is None
        assert walk.came() == ([("a", 5)] if behind else [])


def test_nobody_is_answered_before_and_after(talk):
    with Answering(search_of(a=(100, 1))) as walk:
        walk.requests.clear()
        assert not walk.requests.server.attached
        spoken = talk(walk)
        spoken.far.sendall(by_name(b"a", 0))
        assert spoken.ends() == by_name(b"a", 0)
        assert walk.requests.server.last is None


def test_it_waits_until_it_is_cancelled(talk):
    with Answering(search_of(a=(100, 1))) as walk:
        spoken = talk(walk)
        spoken.thread.start()
        spoken.far.sendall(by_name(b"a", 3 * PAGE))
        until(lambda: walk.requests.total == 1)
        spoken.cancel.send(b"x")
        spoken.ends()
        assert isinstance(spoken.error, CancelledError)


@pytest.mark.parametrize("left", [True, False], ids=["with pages left", "with none left"])
def test_who_closes_the_connection_for_urgent_pages(talk, left):
    with Answering(search_of(a=(4, 1))) as walk:
        near, far = socket.socketpair()
        with near, far:
            walk.requests.clear()
            spoken = talk(walk)
            spoken.thread.start()
            # while it waits
            walk.requests.attach(_core.Descriptor(near.fileno(), is_socket=True), beside=True)
            spoken.far.sendall(by_name(b"a", 0, 4 * PAGE if not left else PAGE))
            until(lambda: walk.requests.total)
            far.close()
            if left:
                spoken.ends()
                assert isinstance(spoken.error, PeerError)
                assert "the connection for urgent pages is over" in str(spoken.error)
            else:
                spoken.far.sendall(message(1, bytes(4)))
                assert spoken.ends() == message(1, bytes(4))
                assert spoken.error is None


def test_between_answers_is_what_the_stream_needs():
    with Answering(search_of(a=(2000, 1), b=(10, 1))) as walk:
        walk.requests.clear()
        requests = walk.requests
        requests.attach(_core.Descriptor(walk.fd), head=b"HEAD", tail=b"TAIL", detects=False)
        server = requests.server
        server.answer(0, 0, 1000)
        server.answer(1, 3, 1)
        server.answer(1, 3, 1)
        server.answer(1, 4, 1)
        with open(walk.fd, "rb", closefd=False) as file:
            file.seek(0)
            data = file.read()
        expected = bytearray()
        for name, first, n in (("a", 0, 512), ("a", 512, 488), ("b", 3, 1), ("b", 4, 1)):
            expected += b"HEAD"
            for number in range(first, first + n):
                flags = 8 if number == first else 8 | 0x20
                expected += struct.pack(">Q", number * PAGE | flags)
                if number == first:
                    expected += bytes([1]) + name.encode()
                value = b"" if number % 3 == 0 else struct.pack(">Q", number + 1)
                expected += value.ljust(PAGE, b"\0")
            expected += b"TAIL"
        assert data == expected
        assert server.sent == (1002, 0, len(data))
        assert requests.total == 1003
        with pytest.raises(ValueError, match="bytes around an answer"):
            requests.attach(_core.Descriptor(walk.fd), head=bytes(33))


def test_what_was_sent_is_told_in_runs():
    with Answering(search_of(a=(2000, 4)), tells_sent=True) as walk:
        walk.listed[0].dirty.clear(100, 8)
        walk.take(walk.listed[0], 90, 40)
        runs = [(int(b.index[0]), len(b.index)) for b in walk.sent]
        assert runs == [(88, 12), (108, 24)]


def test_arguments_that_cannot_be():
    search = search_of(a=(10, 1))
    with Answering(search) as walk:
        server = walk.requests.server
        for block, first, npages in ((1, 0, 1), (0, 10, 1), (0, 9, 2), (0, 0, 0)):
            with pytest.raises(IndexError):
                server.answer(block, first, npages)
        with pytest.raises(IndexError):
            server.last = 1
        with pytest.raises(ValueError, match="no return path"):
            server.run()
        with pytest.raises(ValueError, match="no return path"):
            server.readinto(bytearray(1), 0, 1)
    with pytest.raises(IndexError):
        server.answer(0, 0, 1)
    pages, bits = search["a"].pages, search["a"].dirty
    for words, wrong in (
        ("name of 0", (b"", pages, bits, 1, True, False)),
        ("name of 256", (b"x" * 256, pages, bits, 1, True, False)),
        ("0 pages together", (b"a", pages, bits, 0, True, False)),
        ("do not fit", (b"a", pages, _core.Bitmap(9), 1, True, False)),
    ):
        with pytest.raises(ValueError, match=words):
            _core.PageServer([wrong], PAGE)
    with pytest.raises(ValueError, match="do not fit"):
        _core.PageServer([(b"a", pages, bits, 1, True, False)], 2 * PAGE)
    pages.release()


@pytest.mark.parametrize("seed", range(2))
def test_two_connections_and_a_walk_take_every_page_once(talk, seed):
    """As the background and the answers do, over one stream."""
    rng = random.Random(seed)
    blocks = {"a": (3000, 1), "b": (2048, 512), "c": (4096, 4096)}
    walk = Answering(search_of(**blocks))
    with walk:
        spoken = talk(walk)
        spoken.thread.start()
        server, walked = walk.requests.server, []

        def asks() -> None:
            while walk.remaining:
                name = rng.choice(list(blocks))
                first = rng.randrange(blocks[name][0])
                n = rng.randint(1, min(700, blocks[name][0] - first))
                spoken.far.sendall(by_name(name.encode(), first * PAGE, n * PAGE))
            spoken.far.sendall(message(1, bytes(4)))

        thread = threading.Thread(target=asks)
        thread.start()
        while walk.remaining:
            batch = walk.next_batch(rng.randint(1, 100))
            server.take_turn()
            if batch is not None:
                walked += [(batch.block.idstr, i) for i in batch.index.tolist()]
            server.give_turn()
        thread.join(FOREVER)
        assert spoken.ends() == message(1, bytes(4))
        came = walk.came()
    everything = {(name, i) for name, (npages, _) in blocks.items() for i in range(npages)}
    assert len(came) + len(walked) == len(everything)
    assert set(came) | set(walked) == everything
    for name, (npages, group) in blocks.items():
        for first in range(0, npages, group):
            pages = {(name, i) for i in range(first, first + group)} & everything
            assert pages <= set(came) or pages <= set(walked)


def test_nothing_follows_what_was_broken_off():
    """Whatever came behind half a record would be taken for the rest of it."""
    with Answering(search_of(a=(100, 1))) as walk:
        server = walk.requests.server
        server.take_turn()
        raised: list[BaseException] = []

        def asks() -> None:
            try:
                server.answer(0, 5, 1)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=asks)
        thread.start()
        until(lambda: server.waiting)
        server.give_turn(broken=True)
        thread.join(FOREVER)
        assert "broke off" in str(raised[0])
        with pytest.raises(ChannelError, match="broke off"):
            server.take_turn()
        assert not walk.came()
        assert walk.remaining == 100 * PAGE
        walk.requests.clear()
        walk.requests.attach(_core.Descriptor(walk.fd))
        server.take_turn()
        server.give_turn()
        server.answer(0, 5, 1)
        assert walk.came() == [("a", 5)]


def test_an_answer_that_fails_breaks_the_stream():
    near, far = socket.socketpair()
    with near, far, Answering(search_of(a=(3000, 1))) as walk:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        server = walk.requests.server
        for beside in (False, True):
            walk.requests.clear()
            target = _core.Descriptor(near.fileno(), is_socket=True, timeout=0.05)
            walk.requests.attach(target, beside=beside)
            with pytest.raises(IdleTimeoutError):
                server.answer(0, 0, 3000)
            with pytest.raises(IdleTimeoutError):
                server.take_turn()
            walk.replace_dirty("a", _core.Bitmap(3000, fill=True))


def test_pages_that_were_taken_before_an_error_are_not_counted_twice():
    class Log:
        chunk_pages = 64

        def clear(self, *_) -> None:
            raise OSError("once")

    walk = Answering(PageSearch(search_of(a=(1000, 1)).listed, Log()))
    with walk:
        with pytest.raises(OSError, match="once"):
            walk.next_batch(100)
        assert walk.remaining == walk.listed[0].dirty.count() * PAGE == 900 * PAGE
        walk.replace_dirty("a", _core.Bitmap(1000, fill=True))
        assert walk.remaining == 1000 * PAGE


def test_requests_hold_no_pages_when_they_are_closed():
    search = search_of(a=(10, 1))
    requests = PageRequests(search)
    with pytest.raises(BufferError):
        search["a"].pages.release()
    requests.close()
    search["a"].pages.release()
