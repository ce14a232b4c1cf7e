"""A destination in postcopy made by hand: it reads octets, notes what they say, and answers."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from unit.boxes import FOREVER

PAGE = 4096
MARK = 0x0123456789ABCDEF
NAMES = {1: "open", 2: "ping", 3: "advise", 4: "listen", 5: "run", 6: "discard", 7: "packaged"}
NAMES |= {9: "resume", 10: "recv-bitmap", 11: "switchover"}


class GoneError(Exception):
    """The stream has ended, or was cut off."""


def until(condition: Callable[[], object], what: str = "it") -> None:
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end, f"{what} never came about"
        time.sleep(0.001)


class Link:
    """One connection: reads whole things, writes messages of the return path."""

    def __init__(self, sock: socket.socket, limit: int | None) -> None:
        self.sock = sock
        self.left = limit
        self.nbytes = 0
        self.closed = False
        #: whether no more pages are read from it
        self.ended = False
        #: block of the last record
        self.last: str | None = None
        self._file = sock.makefile("rb")

    def read(self, n: int) -> bytes:
        if self.left is not None and n > self.left:
            raise GoneError("cut")
        try:
            data = self._file.read(n)
        except ConnectionResetError as error:
            raise GoneError("reset") from error
        if len(data) < n:
            raise GoneError("ended")
        self.nbytes += n
        if self.left is not None:
            self.left -= n
        return data

    def number(self, n: int) -> int:
        return int.from_bytes(self.read(n), "big")

    def name(self) -> str:
        return self.read(self.number(1)).decode()

    def say(self, kind: int, data: bytes = b"", more: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(struct.pack(">HH", kind, len(data)) + data + more)

    def is_urgent(self) -> bool:
        """Whether it begins with a record: others begin with a header or a command."""
        try:
            found = self.sock.recv(1, socket.MSG_PEEK)
        except ConnectionResetError as error:
            raise GoneError("reset") from error
        if not found:
            raise GoneError("nothing was said")
        return found == b"\0"

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Far:
    """Accepts one connection after the other; each is read by a thread of its own.

    heard:  everything in its order, as tuples that begin with a name; a page is
            ("page", block, number, contents)
    on:     what is done at a name instead of the usual answer, given the tuple
    limits: after how many bytes connections are cut, the first one first; None: never
    links:  main connections; with ``preempt`` others come beside them
    beside: those, once they have said something, and what came over them: ("page", block, number)
            and ("eos",)
    """

    def __init__(
        self, path: Path, *, limits: tuple[int | None, ...] = (), preempt: bool = False
    ) -> None:
        self.uri = f"unix:{path}"
        self.heard: list[tuple] = []
        self.on: dict[str, Callable[[tuple], None]] = {}
        self.limits = list(limits)
        self.blocks: dict[str, int] = {}
        self.host_pages: dict[str, int] = {}
        self.pages: dict[str, dict[int, bytes]] = {}
        self.running = False
        self.listening = False
        self.twice: list[tuple[str, int]] = []
        self.links: list[Link] = []
        self.beside: list[Link] = []
        self.urgent: list[tuple] = []
        self._preempt = preempt
        self._all: list[Link] = []
        self.errors: list[BaseException] = []
        self._ended = 0
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    # ---- what a test asks and says

    @property
    def link(self) -> Link:
        until(lambda: self.links, "a connection")
        return self.links[-1]

    def said(self, name: str) -> list[tuple]:
        return [x for x in self.heard if x[0] == name]

    def names(self) -> list[str]:
        """What was heard, the same thing once in a row."""
        names = [x[0] for x in self.heard]
        return [n for i, n in enumerate(names) if not i or names[i - 1] != n]

    def request(self, block: str | None, start: int, length: int = PAGE) -> None:
        data = struct.pack(">QI", start, length)
        if block is None:
            self.link.say(4, data)
        else:
            self.link.say(3, data + bytes([len(block)]) + block.encode())

    def has(self, block: str, number: int) -> bool:
        return number in self.pages.get(block, {})

    def bitmap(self, block: str) -> bytes:
        """What is received, as it goes over the return path."""
        n = self.blocks[block] // PAGE
        bits = np.zeros(-(-n // 64) * 64, np.uint8)
        bits[list(self.pages[block])] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def say_bitmap(
        self,
        block: str,
        data: bytes | None = None,
        *,
        size: int | None = None,
        mark: int = MARK,
        link: Link | None = None,
    ) -> None:
        """Over the last connection, unless it is another."""
        data = self.bitmap(block) if data is None else data
        size = len(data) if size is None else size
        more = struct.pack(">Q", size) + data + struct.pack(">Q", mark)
        (link or self.link).say(5, bytes([len(block)]) + block.encode(), more)

    @property
    def complete(self) -> bool:
        """Whether every page is there."""
        return all(len(self.pages[n]) * PAGE == nbytes for n, nbytes in self.blocks.items())

    def same_as(self, memory) -> bool:
        assert not self.errors, self.errors
        for block in memory:
            mine = self.pages.get(block.idstr, {})
            for number in range(block.used_length // PAGE):
                there = bytes(block.view[number * PAGE : (number + 1) * PAGE])
                if mine.get(number) != there:
                    return False
        return True

    def cut(self) -> None:
        self.link.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._all:
            link.close()
        for thread in self._threads:
            thread.join(FOREVER)
        for link in self._all:
            link._file.close()
            link.sock.close()
        self._path.unlink(missing_ok=True)

    # ---- reading

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            link = Link(sock, None)
            self._all.append(link)
            if not self._preempt:
                self._begin(link)
            thread = threading.Thread(target=self._serve, args=(link, len(self._all) == 1))
            self._threads.append(thread)
            thread.start()

    def _begin(self, link: Link) -> None:
        link.left = self.limits.pop(0) if self.limits else None
        self.links.append(link)

    def _serve(self, link: Link, first: bool) -> None:
        try:
            if self._preempt and link.is_urgent():
                self.beside.append(link)
                self._records(link)
                self.urgent.append(("eos",))
                # it stays open until the other end closes it
                assert not link._file.read(1)
                return
            if self._preempt:
                self._begin(link)
            if first:
                assert link.read(8) == b"QEVM\0\0\0\3"
            while self._thing(link):
                pass
        except GoneError:
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            link.close()
            link.ended = True

    def _hear(self, *what: object) -> None:
        self.heard.append(what)

    def _answer(self, what: tuple, usual: Callable[[], None]) -> None:
        if what[0] in self.on:
            self.on[what[0]](what)
        else:
            usual()

    def _thing(self, link: Link) -> bool:
        kind = link.number(1)
        if kind == 0:
            self._hear("eof")
            link.ended = True
            while self._preempt and not link.closed and not self.complete:
                # the last pages may be on the way on the other connection
                time.sleep(0.001)
            self._answer(("eof",), lambda: link.say(1, bytes(4)))
            # a description is not to follow
            with contextlib.suppress(GoneError):
                self._hear("after eof", link.read(1))
            return False
        if kind == 7:
            self._hear("configuration", link.read(link.number(4)))
        elif kind == 8:
            self._command(link, link.number(2), link.read(link.number(2)))
        elif kind == 1:
            link.read(4)
            assert link.name() == "ram"
            assert link.read(8) == struct.pack(">II", 0, 4)
            self._hear("start")
            self._ram(link)
        elif kind in (2, 3):
            link.read(4)
            self._hear({2: "part", 3: "end"}[kind])
            self._ram(link)
        else:
            raise AssertionError(f"section type {kind}")
        return True

    def _command(self, link: Link, number: int, data: bytes) -> None:
        name = NAMES[number]
        if name == "ping":
            value = int.from_bytes(data, "big")
            self._hear("ping", value)
            self._answer(("ping", value), lambda: link.say(2, data))
        elif name == "advise":
            self._hear(name, *struct.unpack(">QQ", data))
        elif name == "discard":
            self._discard(data)
        elif name == "packaged":
            self._package(link, link.read(int.from_bytes(data, "big")))
        elif name == "recv-bitmap":
            block = data[1:].decode()
            assert data[0] == len(block)
            self._hear(name, block)
            # what came over connections that are gone is received
            for before in self._all[: self._all.index(link)]:
                until(lambda before=before: before.ended, "the end of a connection")
            self._answer((name, block), lambda: self.say_bitmap(block, link=link))
        elif name == "resume":
            self._hear(name)
            self._answer((name,), lambda: link.say(6, bytes([0, 0, 0, 1])))
        else:
            self._hear(name)

    def _discard(self, data: bytes) -> None:
        assert data[0] == 0
        n = data[1]
        block = data[2 : 2 + n].decode()
        assert data[2 + n] == 0
        pairs = list(struct.iter_unpack(">QQ", data[3 + n :]))
        self._hear("discard", block, pairs)
        for start, length in pairs:
            assert start % PAGE == length % PAGE == 0
            assert start + length <= self.blocks[block]
            for number in range(start // PAGE, (start + length) // PAGE):
                self.pages[block].pop(number, None)

    def _package(self, link: Link, blob: bytes) -> None:
        listen, ping, run = (
            struct.pack(">BHH", 8, 4, 0),
            struct.pack(">BHHI", 8, 2, 4, 3),
            struct.pack(">BHH", 8, 5, 0),
        )
        assert blob.startswith(listen)
        assert blob.endswith(ping + run)
        devices = blob[len(listen) : -len(ping + run)]
        self.listening = True
        self._hear("package", devices)
        self._answer(("package",), lambda: link.say(2, bytes([0, 0, 0, 3])))
        self.running = True

    def _ram(self, link: Link) -> None:
        self._records(link)
        link.read(5)

    def _records(self, link: Link) -> None:
        while True:
            word = link.number(8)
            flags, at = word & (PAGE - 1), word & ~(PAGE - 1)
            if flags == 0x10:
                break
            if flags == 0x04:
                self._list(link, at)
                continue
            if not flags & 0x20:
                link.last = link.name()
            block = link.last
            assert block is not None
            if flags & ~0x20 == 0x08:
                contents = link.read(PAGE)
            else:
                assert flags & ~0x20 == 0x02
                assert link.read(1) == b"\0"
                contents = bytes(PAGE)
            if link in self.beside:
                self.urgent.append(("page", block, at // PAGE))
            self._place(block, at // PAGE, contents)

    def _list(self, link: Link, left: int) -> None:
        while left:
            name, length = link.name(), link.number(8)
            if name in self.host_pages:
                assert link.number(8) == self.host_pages[name]
            self.blocks[name] = length
            self.pages[name] = {}
            left -= length
        self._hear("blocks", dict(self.blocks))

    def _place(self, block: str, number: int, contents: bytes) -> None:
        self.heard.append(("page", block, number, contents))
        if self.listening and number in self.pages[block]:
            # a userfaultfd would not let it be placed
            self.twice.append((block, number))
            return
        self.pages[block][number] = contents
