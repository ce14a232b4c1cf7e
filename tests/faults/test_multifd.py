"""A destination with multifd against sources made by hand: fields, orders, deaths."""

from __future__ import annotations

import random
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import zstandard
from faults import streams
from faults.streams import MACHINE, PAGE, RAM, Guest, be32, be64, part
from reference import multifd
from reference.multifd import DEVICE_STATE, SYNC, Packet
from unit.far import until

import mig
from mig.errors import (
    IdleTimeoutError,
    MigError,
    StreamError,
    TruncatedError,
)

FLUSH = be64(0x200)
SAMPLE = streams.sample()
HEAD = SAMPLE.encode()[: SAMPLE.offset("pc.ram part")]
TAIL = SAMPLE.encode()[SAMPLE.offset("end") :]
FLUSHED = part(FLUSH)
SHUT_FAILED = b"\0\1\0\4" + be32(1)
PACKET = multifd.HEADER + 8 * multifd.max_pages(PAGE)
#: where the first packet of a channel starts
FIRST = 64
PLACES = ["memory", "capture"]
COMPRESSIONS = ["none", "zlib", "zstd"]


def pages(block: str) -> tuple[list[int], list[int], bytes]:
    """Offsets of the block's normal and zero pages, and the contents of the former."""
    fills = RAM[block]
    normal = [i * PAGE for i, fill in enumerate(fills) if fill]
    zero = [i * PAGE for i, fill in enumerate(fills) if not fill]
    return normal, zero, b"".join(bytes([fill]) * PAGE for fill in fills if fill)


def packet(of: str = "pc.ram", /, *, coder: multifd.Encoder | None = None, **fields) -> bytes:
    """A packet with all pages of a block; fields override it."""
    normal, zero, data = pages(of)
    given = {"block": of.encode(), "normal": normal, "zero": zero, "page_size": PAGE, **fields}
    return Packet(**{"data": data if coder is None else coder.encode(data), **given}).encode()


def sync(**fields) -> bytes:
    return multifd.sync(PAGE, **fields)


class Destination:
    """A mig that waits for channels, and the sockets that were connected to it."""

    def __init__(self, place: str, folder: Path, channels: int, **parameters: object) -> None:
        self.guest = Guest(empty=True)
        self.file = folder / "vm.mig"
        self.migration = mig.IncomingMigration(
            self.guest.guest if place == "memory" else mig.StreamCapture(self.file),
            capabilities={"multifd"},
            parameters={
                "multifd-channels": channels,
                "idle-timeout": 20,
                **{name.replace("_", "-"): value for name, value in parameters.items()},
            },
        )
        self.migration.listen(f"unix:{folder.parent / 'socket'}")
        self._sockets = ExitStack()

    def connect(self, said: bytes = b"") -> socket.socket:
        sock = self._sockets.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(30)
        assert self.migration.uri is not None
        sock.connect(self.migration.uri.removeprefix("unix:"))
        if said:
            sock.sendall(said)
        return sock

    def outcome(self) -> MigError | None:
        return streams.outcome(self.migration)

    def contents(self) -> dict[str, bytes]:
        if not self.file.exists():
            return self.guest.contents()
        with mig.open_image(self.file) as image, Guest(empty=True) as copy:
            incoming = mig.IncomingMigration(copy.guest)
            incoming.listen(f"unix:{self.file.parent.parent / 'again'}")
            outgoing = mig.OutgoingMigration(image)
            outgoing.start(incoming.uri)
            assert streams.outcome(outgoing) is None
            assert streams.outcome(incoming) is None
            return copy.contents()

    def close(self) -> None:
        self._sockets.close()
        self.migration.cancel()
        with suppress(MigError):
            assert self.migration.wait(30)
        self.guest.close()


@contextmanager
def destination(
    place: str, folder: Path, channels: int = 2, **parameters: object
) -> Iterator[Destination]:
    made = Destination(place, folder, channels, **parameters)
    try:
        yield made
    finally:
        made.close()


def expected() -> dict[str, bytes]:
    return {name: b"".join(bytes([f]) * PAGE for f in fills) for name, fills in RAM.items()}


# ---- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_source_made_by_hand(folder, place, compression):
    with destination(place, folder, multifd_compression=compression) as there:
        flag = multifd.CODEC_FLAG[compression]
        for number, block in enumerate(RAM):
            coder = multifd.Encoder(compression)
            # the same page again: one stream of the codec over all packets
            said = packet(block, coder=coder, flags=flag) + packet(block, coder=coder, flags=flag)
            there.connect(multifd.init(number) + said + sync() + sync())
        there.connect(HEAD + part(FLUSH + FLUSH) + TAIL)
        assert there.outcome() is None
        assert there.contents() == expected()
        info = there.migration.query().ram
        assert (info.normal, info.duplicate) == (6, 6)


@pytest.mark.parametrize("order", ["main first", "main last", "main between", "main slow"])
def test_connections_come_in_any_order(folder, order):
    with destination("memory", folder) as there:
        lanes = [multifd.init(i) + packet(block) + sync() for i, block in enumerate(RAM)]
        main = HEAD + FLUSHED + TAIL
        said = {
            "main first": [main, *lanes],
            "main last": [lanes[1], lanes[0], main],
            "main between": [lanes[1], main, lanes[0]],
            "main slow": [b"", *lanes],
        }[order]
        socks = [there.connect(data) for data in said]
        if order == "main slow":
            time.sleep(0.1)
            for i in range(0, len(main), 7):
                socks[0].sendall(main[i : i + 7])
        assert there.outcome() is None
        assert there.contents() == expected()


@pytest.mark.parametrize("step", [1, 3, 50, 63, 65, 100])
def test_a_channel_that_trickles(folder, step):
    """However it is cut: not a byte of the first packet is lost with the introduction."""
    with destination("memory", folder, channels=1) as there:
        there.connect(HEAD + FLUSHED + TAIL)
        sock = there.connect()
        said = multifd.init(0) + b"".join(map(packet, RAM)) + sync()
        for i in range(0, 200, step):
            sock.sendall(said[i : min(200, i + step)])
            if i < 130:
                time.sleep(0.002)
        sock.sendall(said[200:])
        assert there.outcome() is None
        assert there.contents() == expected()


def test_sync_with_pages_and_a_stale_length_without(folder):
    """QEMU 7.2 does both."""
    with destination("memory", folder) as there:
        there.connect(HEAD + part(FLUSH + FLUSH) + TAIL)
        for i, block in enumerate(RAM):
            stale = Packet(flags=SYNC, next_size=5000, block=b"pc.ram", page_size=PAGE).encode()
            there.connect(multifd.init(i) + packet(block, flags=SYNC) + stale)
        assert there.outcome() is None
        assert there.contents() == expected()


def test_the_old_dialect_syncs_where_sections_end(folder):
    """Without a word on the main stream, for a machine type of its time."""
    old = "fault-box-7.2"
    head = HEAD.replace(be32(len(MACHINE)) + MACHINE.encode(), be32(len(old)) + old.encode())
    with destination("capture", folder) as there:
        there.connect(head + part(b"") + part(b"") + TAIL)
        for i, block in enumerate(RAM):
            # the sections: START, two PARTs, END
            there.connect(multifd.init(i) + sync() + packet(block) + sync() * 3)
        assert there.outcome() is None


def test_strangers_do_not_disturb(folder):
    with destination("memory", folder) as there:
        there.connect()  # says nothing
        there.connect().close()
        there.connect(b"\x11\x22").close()
        main = there.connect(HEAD)
        # who comes later is a stranger
        until(lambda: there.migration.status == mig.Status.ACTIVE)
        there.connect(b"GET / HTTP/1.0\r\n\r\n")
        there.connect(HEAD)
        for i, block in enumerate(RAM):
            there.connect(multifd.init(i) + packet(block) + sync())
        there.connect()
        main.sendall(FLUSHED + TAIL)
        assert there.outcome() is None
        assert there.contents() == expected()


def test_more_strangers_than_anybody_needs(folder):
    """The oldest have to go; memory and descriptors have a bound, and the source is let in."""
    with destination("memory", folder) as there:
        before = len(streams.open_fds())
        crowd = [there.connect() for _ in range(150)]
        for i, block in enumerate(RAM):
            there.connect(multifd.init(i) + packet(block) + sync())
        there.connect(HEAD + FLUSHED + TAIL)
        assert there.outcome() is None
        assert len(streams.open_fds()) - before < len(crowd) + 90


def test_many_who_come_and_go_leave_nothing(folder):
    with destination("memory", folder) as there:
        for _ in range(300):
            there.connect().close()
        time.sleep(0.1)
        assert len(there.migration._connections._threads) < 70
        there.connect(HEAD + FLUSHED + TAIL)
        for i, block in enumerate(RAM):
            there.connect(multifd.init(i) + packet(block) + sync())
        assert there.outcome() is None


def test_sync_storm(folder):
    storm = 300
    with destination("memory", folder) as there:
        main = there.connect(HEAD)
        socks = [there.connect(multifd.init(i)) for i in range(2)]
        feeders = [threading.Thread(target=streams.feed, args=(s, sync() * storm)) for s in socks]
        for thread in feeders:
            thread.start()
        main.sendall(part(FLUSH * storm) + part(b"".join(b"" for _ in range(9))))
        main.sendall(TAIL)
        assert there.outcome() is None
        for thread in feeders:
            thread.join(30)


# ---- what is wrong ------------------------------------------------------------------------------


def failed(there: Destination, kind: type[MigError], match: str = "") -> MigError:
    error = there.outcome()
    assert isinstance(error, kind), repr(error)
    assert match in str(error)
    assert there.migration.status == mig.Status.FAILED
    assert not there.file.exists()
    return error


HUGE = 0xFFFFFFFF
WRONG = {
    "magic": (packet(magic=0x11223345), "no multifd packet"),
    "magic of a stream": (packet(magic=0x5145564D), "no multifd packet"),
    "version 0": (packet(version=0), "version"),
    "version 2": (packet(version=2), "version"),
    "version huge": (packet(version=HUGE), "version"),
    "flag of device state": (packet(flags=DEVICE_STATE), "flags"),
    "flag 31": (packet(flags=1 << 31), "flags"),
    "flag 31 with sync": (sync(block=b"") [:8] + be32(1 << 31 | SYNC) + sync()[12:], "flags"),
    "zlib": (packet(flags=multifd.ZLIB), "compress"),
    "zstd": (packet(flags=multifd.ZSTD), "compress"),
    "qpl": (packet(flags=8), "compress"),
    "uadk": (packet(flags=16), "compress"),
    "qatzip": (packet(flags=32), "compress"),
    "two codecs": (packet(flags=6), "compress"),
    "more room than there is": (packet(pages_alloc=513), "more pages"),
    "room huge": (packet(pages_alloc=HUGE), "more pages"),
    "normal 513": (packet(nnormal=513), "more pages"),
    "normal huge": (packet(nnormal=HUGE), "more pages"),
    "zero 511": (packet(nzero=511), "more pages"),
    "zero huge": (packet(nzero=HUGE), "more pages"),
    "both huge": (packet(nnormal=1 << 31, nzero=1 << 31), "more pages"),
    "length 0": (packet(next_size=0), "length"),
    "length less": (packet(next_size=2 * PAGE - 1), "length"),
    "length more": (packet(next_size=2 * PAGE + 1), "length"),
    "length huge": (packet(next_size=HUGE), "length"),
    "no name": (packet(block=b""), "names a block"),
    "another name": (packet(block=b"pc.rom"), "names a block"),
    "longer name": (packet(block=b"pc.ramX"), "names a block"),
    "name without end": (packet(block=b"x" * 256), "names a block"),
    "behind the block": (packet(normal=[0, 4 * PAGE]), "outside"),
    "zero page behind the block": (packet(zero=[4 * PAGE]), "outside"),
    "far": (packet(normal=[0, (1 << 64) - PAGE]), "outside"),
    "unaligned": (packet(normal=[0, PAGE + 1]), "outside"),
    "zero page unaligned": (packet(zero=[512]), "outside"),
    "offset of another block": (packet("vga.vram", normal=[2 * PAGE]), "outside"),
    "what stands behind a short packet": (packet()[:-1] + sync() * 2, "no multifd packet"),
    "what stands behind a long packet": (packet() + b"\0" + sync(), "no multifd packet"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_packet(folder, place, what):
    said, match = WRONG[what]
    with destination(place, folder) as there:
        main = there.connect(streams.with_return_path(SAMPLE).encode()[: len(HEAD) + 14] + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect(multifd.init(0) + said)
        error = failed(there, StreamError, match)
        assert error.section == "multifd channel 0"
        behind = what.startswith("what stands")
        assert error.offset == FIRST + (len(packet()) if behind else 0)
        answers = b""
        while data := main.recv(100):
            answers += data
        assert answers.endswith(SHUT_FAILED)


@pytest.mark.parametrize("flags", [0, 2, 4, 6, 32, 62])
def test_packets_without_contents_may_say_any_codec(folder, flags):
    """QEMU 10 says it, QEMU 9.0 does not, and there is nothing to decode."""
    with destination("memory", folder, channels=1) as there:
        zeros = b"".join(
            packet(b, normal=[], zero=[i * PAGE for i in range(len(RAM[b]))], data=b"", flags=flags)
            for b in RAM
        )
        there.connect(multifd.init(0) + zeros + sync())
        there.connect(HEAD + FLUSHED + TAIL)
        assert there.outcome() is None


def coded(compression: str, *datas: bytes) -> list[bytes]:
    coder = multifd.Encoder(compression)
    return [coder.encode(data) for data in datas]


def broken_streams(compression: str) -> dict[str, bytes]:
    """Data that are announced as the two pages of pc.ram."""
    _, _, plain = pages("pc.ram")
    (right,) = coded(compression, plain)
    ended = zlib.compress(plain) if compression == "zlib" else zstandard.compress(plain)
    out = {
        "nothing": b"",
        "its first byte": right[:1],
        "damaged at its start": b"\xff" + right[1:],
        "plain": plain,
        "of fewer pages": coded(compression, plain[:PAGE])[0],
        "of a byte less": coded(compression, plain[:-1])[0],
        "of a byte more": coded(compression, plain + b"x")[0],
        "of more pages": coded(compression, plain + plain)[0],
        "a bomb": coded(compression, bytes(64 << 20))[0],
        "twice": right + right,
        "behind it the next": b"".join(coded(compression, plain, plain)),
    }
    if compression == "zlib":
        out["a stream that ends"] = ended
    else:
        out["a window of 2 GiB"] = bytes.fromhex("28b52ffd00a8") + right
        out["a frame that ends, and another"] = ended + ended
    return out


BROKEN = [
    pytest.param(compression, what, id=f"{compression} {what}")
    for compression in ("zlib", "zstd")
    for what in broken_streams(compression)
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("compression", "what"), BROKEN)
def test_broken_compressed_data(folder, place, compression, what):
    data = broken_streams(compression)[what]
    flag = multifd.CODEC_FLAG[compression]
    with destination(place, folder, multifd_compression=compression) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect(multifd.init(0) + packet(flags=flag, data=data) + sync())
        error = failed(there, StreamError)
        assert "data" in str(error)
        assert (error.section, error.offset) == ("multifd channel 0", FIRST)


@pytest.mark.parametrize("what", ["a byte too many", "no end"])
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_wrong_end_of_compressed_data_is_seen_in_the_next_packet(folder, compression, what):
    """All pages had come out of it before."""
    _, _, plain = pages("pc.ram")
    first, second = coded(compression, plain, plain)
    if what == "no end" and compression == "zstd":
        first = first[:1]  # its blocks have no end apart from their contents
    elif what == "no end":
        first = first[:-6]
    else:
        first += b"\x01"
    flag = multifd.CODEC_FLAG[compression]
    with destination("memory", folder, channels=1, multifd_compression=compression) as there:
        there.connect(HEAD + FLUSHED)
        said = [packet(flags=flag, data=data) for data in (first, second)]
        there.connect(multifd.init(0) + b"".join(said) + sync())
        error = failed(there, StreamError, "data")
        assert error.offset == FIRST + (len(said[0]) if len(first) > 1 else 0)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_data_of_a_length_that_cannot_be(folder, compression):
    flag = multifd.CODEC_FLAG[compression]
    with destination("memory", folder, multifd_compression=compression) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(0) + packet(flags=flag, next_size=HUGE))
        failed(there, StreamError, "length")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("seed", range(8))
def test_compressed_data_with_a_wrong_bit(folder, compression, seed):
    """An error or other pages, as a checksum is not on the wire; never anything else."""
    choose = random.Random(seed)
    plain = choose.randbytes(2 * PAGE)
    data = bytearray(coded(compression, plain)[0])
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    flag = multifd.CODEC_FLAG[compression]
    with destination("memory", folder, channels=1, multifd_compression=compression) as there:
        there.connect(HEAD + FLUSHED + TAIL)
        there.connect(multifd.init(0) + packet(flags=flag, data=bytes(data)) + sync())
        error = there.outcome()
        assert error is None or isinstance(error, StreamError)


# ---- introductions ------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True], ids=["with the block list", "before it"])
@pytest.mark.parametrize(
    ("said", "match"),
    [
        ([multifd.init(2)], "more multifd channels than 2"),
        ([multifd.init(255)], "more multifd channels than 2"),
        ([multifd.init(0), multifd.init(0)], "is there twice"),
        ([multifd.init(0, b"\1" * 16), multifd.init(1, b"\2" * 16)], "another machine"),
        ([multifd.init(0, version=2)], "version 2"),
    ],
)
def test_a_wrong_introduction(folder, said, match, early):
    with destination("memory", folder) as there:
        if not early:
            there.connect(HEAD + FLUSHED)
        for data in said:
            there.connect(data)
        error = failed(there, StreamError, match)
        assert error.section.startswith("multifd channel")


@pytest.mark.parametrize("nbytes", [4, 5, 24, 63])
def test_a_channel_that_dies_while_it_introduces_itself(folder, nbytes):
    with destination("memory", folder) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(0)[:nbytes]).close()
        failed(there, TruncatedError, "multifd channel")


@pytest.mark.parametrize("count", [0, 1])
def test_channels_that_never_come(folder, count):
    with destination("memory", folder, idle_timeout=0.3) as there:
        there.connect(HEAD + FLUSHED)
        for i in range(count):
            there.connect(multifd.init(i) + sync())
        failed(there, IdleTimeoutError)


def test_channels_without_a_main_connection(folder):
    with destination("memory", folder, idle_timeout=0.3) as there:
        there.connect(multifd.init(0))
        there.connect(multifd.init(1))
        failed(there, IdleTimeoutError, "no main connection")


def test_a_first_word_that_nobody_knows(folder):
    with destination("memory", folder) as there:
        there.connect(b"GET / HTTP/1.0\r\n\r\n")
        failed(there, StreamError)


def test_pages_before_the_block_list_wait_for_it(folder):
    with destination("memory", folder) as there:
        for i, block in enumerate(RAM):
            there.connect(multifd.init(i) + packet(block) + sync())
        main = there.connect(HEAD[:30])
        time.sleep(0.05)
        main.sendall(HEAD[30:] + FLUSHED + TAIL)
        assert there.outcome() is None
        assert there.contents() == expected()


# ---- deaths -------------------------------------------------------------------------------------

POINTS = [FIRST + 1, FIRST + 319, FIRST + PACKET - 1, FIRST + PACKET, FIRST + PACKET + PAGE + 7]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("point", POINTS)
def test_a_channel_that_dies_inside_a_packet(folder, place, point):
    with destination(place, folder) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect((multifd.init(0) + packet())[:point]).close()
        error = failed(there, StreamError, "ends inside")
        assert (error.section, error.offset) == ("multifd channel 0", FIRST)


@pytest.mark.parametrize("packets", [0, 1])
@pytest.mark.parametrize("syncs", [0, 1])
def test_a_channel_that_dies_between_packets(folder, packets, syncs):
    """At a SYNC that the others have come to, or not yet."""
    said = multifd.init(0) + packet() * packets + sync() * syncs
    with destination("memory", folder) as there:
        there.connect(said).close()
        other = there.connect(multifd.init(1) + sync() * syncs)
        there.connect(HEAD + part(FLUSH) + part(FLUSH))
        other.sendall(sync())
        error = failed(there, TruncatedError, "SYNC")
        assert (error.section, error.offset) == ("multifd channel 0", len(said))


def test_all_channels_die_and_the_main_one_goes_on(folder):
    with destination("memory", folder) as there:
        there.connect(HEAD + FLUSHED + TAIL)
        for i in range(2):
            there.connect(multifd.init(i)).close()
        failed(there, TruncatedError, "SYNC")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("point", [len(HEAD), len(HEAD) + 3, len(HEAD + FLUSHED)])
def test_the_main_connection_dies(folder, point, compression):
    with destination("memory", folder, multifd_compression=compression) as there:
        for i in range(2):
            there.connect(multifd.init(i) + sync())
        there.connect((HEAD + FLUSHED + FLUSHED)[:point]).close()
        failed(there, TruncatedError)


def test_a_channel_may_be_silent_for_longer_than_the_idle_limit(folder):
    """As long as the others and the main connection are not."""
    with destination("memory", folder, idle_timeout=0.4) as there:
        main = there.connect(HEAD)
        lanes = [there.connect(multifd.init(i)) for i in range(2)]
        for _ in range(8):
            time.sleep(0.1)
            main.sendall(part(b""))
            lanes[0].sendall(packet())
        lanes[0].sendall(sync())
        lanes[1].sendall(packet("vga.vram") + sync())
        main.sendall(FLUSHED + TAIL)
        assert there.outcome() is None
        assert there.contents() == expected()


def test_a_channel_that_stalls_inside_a_packet(folder):
    with destination("memory", folder, idle_timeout=0.3) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect((multifd.init(0) + packet())[:-5])
        error = failed(there, IdleTimeoutError)
        assert error is not None


@pytest.mark.parametrize(
    "lane", [b"", multifd.init(0)[:20], multifd.init(0), multifd.init(0) + packet()[:700],
             multifd.init(0) + packet()[:-7], multifd.init(0) + packet() + sync()]
)  # fmt: skip
@pytest.mark.parametrize("main", [b"", HEAD[:20], HEAD, HEAD + FLUSHED])
def test_cancelled_anywhere(folder, main, lane):
    with destination("capture", folder) as there:
        there.connect(lane)
        there.connect(main)
        time.sleep(0.02)
        there.migration.cancel()
        assert isinstance(there.outcome(), mig.errors.CancelledError)
        assert not there.file.exists()


@pytest.mark.parametrize("place", PLACES)
def test_cancelled_while_a_channel_never_pauses(folder, place):
    """A channel that always has bytes to read would never look at anything else."""
    with destination(place, folder, channels=1) as there:
        there.connect(HEAD)
        sock = there.connect(multifd.init(0))
        stop = threading.Event()

        def flood() -> None:
            some = packet() * 50
            with suppress(OSError):
                while not stop.is_set():
                    sock.sendall(some)

        thread = threading.Thread(target=flood)
        thread.start()
        time.sleep(0.1)
        there.migration.cancel()
        try:
            assert isinstance(there.outcome(), mig.errors.CancelledError)
        finally:
            stop.set()
            thread.join(30)


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_taken_when_ram_has_ended(folder, place):
    """What a channel says behind the last SYNC must not reach a guest that may run already."""
    spoiled = packet(data=b"\x99" * 2 * PAGE)
    with destination(place, folder) as there:
        end = SAMPLE.end("end footer id") - SAMPLE.offset("end")
        main = there.connect(HEAD + FLUSHED + TAIL[:end])
        lanes = [there.connect(multifd.init(i) + packet(block) + sync())
                 for i, block in enumerate(RAM)]
        time.sleep(0.1)
        with suppress(OSError):
            for lane in lanes:
                lane.sendall(spoiled * 3)
        main.sendall(TAIL[end:])
        assert there.outcome() is None
        assert there.contents() == expected()
