"""multifd-compression adaptive: each page in its own way, between two ends of mig."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import numpy as np
import pytest
from reference import adaptive, multifd
from unit.boxes import FOREVER, PAGE, Box, ended, error_of

from mig import (
    DeviceRegistry,
    GuestMemory,
    MemoryGuest,
    ProcessGuest,
    Status,
    StreamCapture,
    open_image,
    wire,
)
from mig.errors import OptionError, PeerError
from mig.events import PassStarted

BOTH = {"multifd", "return-path"}
OLD, MIDDLE, NEW = "pc-i440fx-7.2", "pc-q35-8.2", "pc-q35-10.0"
ADAPTIVE = {"multifd-compression": "adaptive"}


# ---- in the middle -----------------------------------------------------------------------------


class Middle:
    """Passes on what both ends say, and writes down what the source does."""

    def __init__(self, count: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._count = count
        self.said: list[bytearray] = []
        self._threads: list[threading.Thread] = []

    def start(self, uri: str) -> None:
        host, port = uri.removeprefix("tcp:").rsplit(":", 1)
        self._accepting = threading.Thread(target=self._accept, args=((host, int(port)),))
        self._accepting.start()

    def _accept(self, there: tuple[str, int]) -> None:
        for _ in range(self._count):
            here, _ = self._listener.accept()
            other = socket.create_connection(there)
            self.said.append(bytearray())
            for pair in ((here, other, self.said[-1]), (other, here, bytearray())):
                self._threads.append(threading.Thread(target=self._pass_on, args=pair))
                self._threads[-1].start()
        self._listener.close()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket, said: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                said += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def result(self, page_size: int):
        """The main stream, and the channels by their numbers."""
        self._accepting.join()
        for thread in self._threads:
            thread.join()
        (main,) = [bytes(said) for said in self.said if said.startswith(b"QEVM")]
        rest = [bytes(said) for said in self.said if not said.startswith(b"QEVM")]
        channels = [multifd.decode(data, page_size) for data in rest]
        return main, sorted(channels, key=lambda channel: channel.number)


def zeros_on_main(main: bytes, *, every_section: bool) -> list[list[tuple[bytes, int]]]:
    """The ZERO records of `ram`, by the number of SYNCs before them."""
    at = main.index(b"\x03ram", 8) + 4 + 8
    (word,) = struct.unpack_from(">Q", main, at)
    left, at = word & ~0x3FF, at + 8
    while left:
        at += 1 + main[at]
        left -= struct.unpack_from(">Q", main, at)[0]
        at += 8
    runs: list[list[tuple[bytes, int]]] = [[]]
    block = b""
    while True:
        (word,) = struct.unpack_from(">Q", main, at)
        at, flags = at + 8, word & 0x3FF
        if flags & ~0x20 == 0x02:
            if not flags & 0x20:
                block = main[at + 1 : at + 1 + main[at]]
                at += 1 + len(block)
            assert main[at] == 0
            at += 1
            runs[-1].append((block, word & ~0x3FF))
        elif flags == 0x200:
            runs.append([])
        else:
            assert flags == 0x10
            if every_section:
                runs.append([])
            assert main[at] == 0x7E
            at += 5
            if main[at] not in (2, 3):
                return runs
            at += 5


# ---- a guest that writes whenever it is looked at ----------------------------------------------


class Writer:
    """A dirty log of a guest that changes some pages in each of some passes, and in the last."""

    chunk_pages = 0

    def __init__(self, memory: GuestMemory, page_size: int, seed: int, rounds: int) -> None:
        self._memory, self._size, self._rounds = memory, page_size, rounds
        self._rng = np.random.default_rng(seed)
        self._looked: dict[str, int] = {}
        self.stopped = False

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        done = self._looked.get(idstr, 0)
        if done == self._rounds and not self.stopped:
            return 0
        if not self.stopped:
            self._looked[idstr] = done + 1
        fresh, npages = 0, len(dirty)
        for page in self._rng.choice(npages, max(1, npages // 3), replace=False):
            self._write(self._memory[idstr].view, int(page))
            fresh += not dirty[int(page)]
            dirty.set(int(page))
        return fresh

    def _write(self, view, page: int) -> None:
        rng, size = self._rng, self._size
        here = view[page * size : (page + 1) * size]
        kind = rng.integers(6)
        if kind == 0:
            pass  # marked, and not changed
        elif kind == 1:
            at = int(rng.integers(size))
            here[at : at + 1] = rng.bytes(1)
        elif kind == 2:
            for at in rng.integers(0, size - 8, 8):
                here[int(at) : int(at) + 8] = rng.bytes(8)
        elif kind == 3:
            here[:] = bytes(size)
        elif kind == 4:
            here[:] = rng.bytes(size)
        else:
            here[:] = (rng.bytes(16) * size)[:size]


class Guests:
    """A source that writes, and an empty destination."""

    def __init__(self, page_size: int, npages: int, seed: int, rounds: int, machine: str) -> None:
        self.memories, guests = [], []
        for filled in (True, False):
            memory = GuestMemory(page_size)
            for name, n in (("pc.ram", npages), ("vga.vram", 7)):
                block = memory.add(name, n * page_size)
                if filled:
                    pages = np.frombuffer(block.view, dtype=np.uint8).reshape(n, -1)
                    rng = np.random.default_rng(seed)
                    pages[::3] = rng.integers(0, 256, pages[::3].shape, dtype=np.uint8)
                    pages[1::3] = np.arange(pages.shape[1], dtype=np.uint8) // 64
            self.memories.append(memory)
        self.log = Writer(self.memories[0], page_size, seed, rounds)

        def stopped() -> None:
            self.log.stopped = True

        for memory in self.memories:
            guests.append(MemoryGuest(machine, memory, DeviceRegistry(), on_stop=stopped))
        self.source, self.target = guests
        self.source.dirty_log = lambda: self.log

    def contents(self, of: int) -> dict[bytes, bytes]:
        return {b.idstr.encode(): bytes(b.view) for b in self.memories[of]}


def carried(made, guests, target, page_size, *, channels=2, **parameters):
    """Migrate by way of the middle; returns the source's migration, main stream and channels."""
    both = {**ADAPTIVE, "multifd-channels": channels}
    incoming = made.incoming(target, capabilities={"multifd"}, parameters=both)
    incoming.listen("tcp:127.0.0.1:0")
    middle = Middle(1 + channels)
    middle.start(incoming.uri)
    own = {name.replace("_", "-"): value for name, value in parameters.items()}
    outgoing = made.outgoing(
        guests.source,
        capabilities=BOTH,
        parameters={"downtime-limit": 0, "max-bandwidth": 0, **both, **own},
    )
    outgoing.start(middle.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    return outgoing, *middle.result(page_size)


CASES = [
    # page size, pages, channels, pages in the cache, bytes a second, detection, machine
    pytest.param(4096, 300, 2, 512, 0, "multifd", NEW, id="larger cache"),
    pytest.param(4096, 300, 3, 512, 40 << 20, "multifd", NEW, id="limited"),
    pytest.param(4096, 300, 4, 64, 40 << 20, "multifd", NEW, id="64 pages of cache"),
    pytest.param(4096, 300, 4, 128, 0, "multifd", NEW, id="128 pages of cache"),
    pytest.param(4096, 300, 2, 1, 40 << 20, "multifd", NEW, id="one page of cache"),
    pytest.param(4096, 300, 2, 512, 40 << 20, "none", NEW, id="no zero pages"),
    pytest.param(4096, 300, 2, 512, 40 << 20, "legacy", NEW, id="zero pages on the main stream"),
    pytest.param(4096, 300, 2, 512, 40 << 20, "multifd", MIDDLE, id="flush of 8.2"),
    pytest.param(4096, 300, 3, 512, 40 << 20, "legacy", OLD, id="sync of 7.2"),
    pytest.param(1024, 700, 2, 1024, 40 << 20, "multifd", NEW, id="pages of 1 KiB"),
    pytest.param(16384, 100, 1, 256, 80 << 20, "multifd", NEW, id="pages of 16 KiB"),
    pytest.param(65536, 70, 2, 128, 0, "multifd", NEW, id="pages of 64 KiB"),
    pytest.param(1 << 20, 9, 2, 64, 0, "multifd", NEW, id="pages of 1 MiB"),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("page_size", "npages", "channels", "cached", "bandwidth", "detection", "machine"), CASES
)
def test_what_goes_over_the_wire_makes_the_source_s_memory(
    made, page_size, npages, channels, cached, bandwidth, detection, machine, seed
):
    """Decoded by hand, and by a destination."""
    guests = Guests(page_size, npages, seed, 5, machine)
    outgoing, main, lanes = carried(
        made,
        guests,
        guests.target,
        page_size,
        channels=channels,
        max_bandwidth=bandwidth,
        zero_page_detection=detection,
        xbzrle_cache_size=cached * page_size,
    )
    model = adaptive.Model(
        {b.idstr.encode(): bytearray(b.used_length) for b in guests.memories[0]}, page_size
    )
    model.run(lanes, zeros_on_main(main, every_section=machine == OLD))
    assert model.memory == guests.contents(0)
    assert guests.contents(1) == guests.contents(0)

    stats, methods = outgoing.query().adaptive, model.methods
    assert (stats.raw, stats.delta, stats.zstd) == tuple(methods[n] for n in adaptive.NAMES)
    assert stats.raw
    if bandwidth:
        assert stats.zstd
    differs = cached >= 64 and page_size <= 65536
    assert bool(stats.delta) == bool(stats.unchanged) == differs
    assert bool(methods["main"]) == (detection == "legacy" or machine != NEW)
    assert bool(methods["zero"]) == (detection == "multifd" and machine == NEW)


@pytest.mark.parametrize(
    ("detection", "machine"),
    [("multifd", NEW), ("none", NEW), ("legacy", NEW), ("multifd", MIDDLE), ("multifd", OLD)],
)
def test_a_page_that_was_zero_in_between(made, detection, machine):
    """What it held before that must not be what its next difference is to."""
    guests, size = Guests(PAGE, 20, 1, 8, machine), PAGE
    page = guests.memories[0]["pc.ram"].view[:size]
    contents = [b"\1" * 600, b"\1" * 600 + b"\2", b"", b"\1" * 600, b"", b"\1" * 600 + b"\3"]
    todo = iter([*contents, *[b"\1" * 500 + b"\4"] * 20])

    def write(view, number: int) -> None:
        if view.obj is guests.memories[0]["pc.ram"].view.obj and number == 0:
            page[:] = next(todo).ljust(size, b"\0")

    guests.log._write = write
    guests.log._rng = Everything()
    outgoing, _, _ = carried(made, guests, guests.target, size, zero_page_detection=detection)
    assert outgoing.query().adaptive.delta
    assert guests.contents(1) == guests.contents(0)


class Everything:
    """Chooses all there is."""

    @staticmethod
    def choice(npages: int, count: int, *, replace: bool) -> range:
        return range(npages)


@pytest.mark.parametrize("machine", [OLD, NEW])
@pytest.mark.parametrize("cached", [0, 64, 1024])
def test_a_captured_guest(made, tmp_path, cached, machine):
    """Into a file, and from there on: its pages lie anywhere in it."""
    guests, path = Guests(PAGE, 300, 3, 5, machine), tmp_path / "vm.mig"
    given = {"max_bandwidth": 40 << 20, "xbzrle_cache_size": max(1, cached) * PAGE}
    outgoing, _, _ = carried(made, guests, StreamCapture(path), PAGE, channels=3, **given)
    assert bool(outgoing.query().adaptive.delta) == bool(cached)
    with open_image(path) as image:
        assert [block.missing for block in image.blocks] == [0, 0]
        incoming = made.incoming(guests.target, capabilities={"multifd"}, parameters=ADAPTIVE)
        incoming.listen("tcp:127.0.0.1:0")
        again = made.outgoing(image, capabilities=BOTH, parameters=ADAPTIVE)
        again.start(incoming.uri)
        assert again.wait(FOREVER)
        assert incoming.wait(FOREVER)
    assert guests.contents(1) == guests.contents(0)


# ---- a guest that runs -------------------------------------------------------------------------


def between(made, source, target, **parameters):
    """Migrate from guest to guest; returns the two migrations."""
    both = {**ADAPTIVE, "multifd-channels": 3}
    incoming = made.incoming(target, capabilities={"multifd"}, parameters=both)
    incoming.listen("tcp:127.0.0.1:0")
    own = {name.replace("_", "-"): value for name, value in parameters.items()}
    outgoing = made.outgoing(source, capabilities=BOTH, parameters={**both, **own})
    outgoing.start(incoming.uri)
    return outgoing, incoming


@pytest.fixture
def living():
    """Makes guests of threads, and ends them with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kw: stack.enter_context(ProcessGuest(*args, **kw))


@pytest.mark.parametrize("bandwidth", [0, 20 << 20], ids=["unlimited", "limited"])
@pytest.mark.parametrize(
    ("pattern", "fill"), [("words", "random"), ("full", "random"), ("full", "compressible")]
)
def test_a_guest_that_writes(made, living, pattern, fill, bandwidth):
    guest, target = (
        living(8 << 20, rate=40 << 20, workers=2, pattern=pattern, fill=fill) for _ in range(2)
    )
    guest.start()
    passes = []

    def enough(event) -> None:
        """Go on for some passes, whatever the link."""
        if isinstance(event, PassStarted):
            passes.append(event.number)
            if event.number == 5:
                outgoing.set_parameters({"downtime-limit": 2000})

    both = {**ADAPTIVE, "multifd-channels": 3}
    incoming = made.incoming(target, capabilities={"multifd"}, parameters=both)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(
        guest,
        capabilities=BOTH,
        parameters={**both, "max-bandwidth": bandwidth, "downtime-limit": 0},
        on_event=enough,
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(60)
    assert incoming.wait(FOREVER)
    report = target.verify()
    assert (report.ncorrupt, report.ledger_ok) == (0, True)
    info = outgoing.query()
    assert len(passes) >= 5
    assert info.ram.multifd_bytes == incoming.query().ram.multifd_bytes
    if pattern == "words":
        assert info.adaptive.delta
    if fill == "random":
        assert info.adaptive.raw
    if fill == "compressible" and bandwidth:
        assert info.adaptive.zstd > info.adaptive.raw


def test_what_is_chosen_when(made):
    """By a link of which only the limit counts: no differences to pages, without a first pass."""
    guests = Guests(PAGE, 300, 1, 0, NEW)
    guests.source.dirty_log = lambda: None
    outgoing, _, _ = carried(made, guests, guests.target, PAGE, max_bandwidth=20 << 20)
    stats = outgoing.query().adaptive
    assert (stats.delta, stats.unchanged) == (0, 0)
    # a third of the pages is of one pattern, a third random, the others zeros
    assert stats.zstd == 100 + 2
    assert stats.raw == 100 + 3


def test_other_compressions_have_no_such_statistics(made):
    source, target = Box(1), Box()
    incoming = made.incoming(target.guest, capabilities={"multifd"})
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities=BOTH)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert outgoing.query().adaptive is None


# ---- the agreement -----------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd", None])
def test_a_destination_that_does_not_do_it(made, compression):
    """No channel is opened, and the guest goes on; so it does elsewhere."""
    source, target = Box(2), Box()
    incoming = made.incoming(
        target.guest,
        capabilities={"multifd"} if compression else set(),
        parameters={"multifd-compression": compression} if compression else {},
    )
    incoming.listen("tcp:127.0.0.1:0")
    middle = Middle(1)
    middle.start(incoming.uri)
    outgoing = made.outgoing(source.guest, capabilities=BOTH, parameters=ADAPTIVE)
    outgoing.start(middle.uri)
    error = error_of(outgoing)
    assert isinstance(error, PeerError)
    assert "does not take multifd-compression adaptive" in str(error)
    assert outgoing.status == Status.FAILED
    assert source.calls.count("stop") == source.calls.count("resume")
    ended(incoming)
    assert incoming.status == Status.FAILED
    assert [bytes(said[:4]) for said in middle.said] == [b"QEVM"]

    outgoing, incoming = between(made, source.guest, target.guest)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


def answers(value: int) -> bytes:
    return struct.pack(">HHI", wire.ReturnType.PONG, 4, value)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ([wire.PING_SETUP, wire.PING_ADAPTIVE], "does not take"),
        ([wire.PING_ADAPTIVE, wire.ADAPTIVE_READY - 1], "does not take"),
        ([wire.ADAPTIVE_READY], "does not take"),  # it is not known what else it had to say
        ([], "does not take"),
        (None, "went away"),
    ],
    ids=["QEMU", "another", "no end", "silent", "gone"],
)
def test_a_destination_that_answers_something_else(made, said, match):
    source = Box(3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(FOREVER)
        outgoing = made.outgoing(
            source.guest, capabilities=BOTH, parameters={**ADAPTIVE, "idle-timeout": 0.5}
        )
        outgoing.start(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        sock, _ = listener.accept()
        with sock:
            sock.recv(1 << 16)
            for value in said or []:
                sock.sendall(answers(value))
            if said is None:
                sock.shutdown(socket.SHUT_RDWR)
            error = error_of(outgoing)
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert isinstance(error, PeerError)
    assert match in str(error)
    assert source.calls.count("stop") == source.calls.count("resume")


def test_it_cannot_be_without_a_return_path(made):
    with pytest.raises(OptionError, match="return-path"):
        made.outgoing(Box(4).guest, capabilities={"multifd"}, parameters=ADAPTIVE).start(
            "tcp:127.0.0.1:1"
        )


def test_nothing_of_it_is_said_without_it(made):
    """A destination of mig's that could is not answered, and one of QEMU's not asked."""
    guests = Guests(PAGE, 40, 1, 2, NEW)
    incoming = made.incoming(guests.target, capabilities={"multifd"})
    incoming.listen("tcp:127.0.0.1:0")
    middle = Middle(3)
    middle.start(incoming.uri)
    outgoing = made.outgoing(guests.source, capabilities=BOTH)
    outgoing.start(middle.uri)
    assert outgoing.wait(FOREVER)
    main, lanes = middle.result(PAGE)
    assert struct.pack(">I", wire.PING_ADAPTIVE) not in main
    assert all(p.flags & ~multifd.SYNC == 0 for lane in lanes for p in lane.packets)
