"""multifd between two ends of mig, and octet by octet what its source says."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
import uuid

import numpy as np
import pytest
from reference import multifd
from unit.boxes import FOREVER, NPAGES, PAGE, Box, ended, error_of

from mig import (
    DeviceRegistry,
    GuestMemory,
    MemoryGuest,
    ProcessGuest,
    Status,
    StreamCapture,
    _core,
    open_image,
    wire,
)
from mig.engine.rate import RateLimit
from mig.errors import ChannelError, MigError, MismatchError, OptionError
from mig.events import PassStarted, StatusChanged
from mig.multifd.dialect import Dialect, dialect_of

COMPRESSIONS = ["none", "zlib", "zstd"]
DETECTIONS = ["none", "legacy", "multifd"]
#: one of each dialect
OLD, MIDDLE, NEW = "pc-i440fx-7.2", "pc-q35-8.2", "pc-q35-10.0"
MULTIFD = {"multifd"}
BOTH = {"multifd", "return-path"}


# ---- dialects --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "every_section", "zeros"),
    [
        ("pc-i440fx-2.4", True, False),
        ("pc-i440fx-7.2", True, False),
        ("pc-q35-8.0", True, False),
        ("pc-q35-8.1", False, False),
        ("pc-q35-8.2", False, False),
        ("pc-q35-9.0", False, True),
        ("pc-i440fx-10.0", False, True),
        ("virt-11.1", False, True),
        ("pc", False, True),
        ("microvm", False, True),
        ("box-8.0x", False, True),
        (None, False, True),
    ],
)
def test_the_machine_type_says_how_multifd_is_spoken(machine, every_section, zeros):
    assert dialect_of(machine) == Dialect(every_section, zeros)


def test_the_c_constants_are_those_of_wire():
    assert _core.MULTIFD["MAGIC"] == wire.MULTIFD_MAGIC == multifd.MAGIC
    assert _core.MULTIFD["VERSION"] == wire.MULTIFD_VERSION == multifd.VERSION
    assert _core.MULTIFD["INIT"] == wire.MULTIFD_INIT == len(multifd.init(0))
    assert _core.MULTIFD["HEADER"] == wire.MULTIFD_HEADER == multifd.HEADER
    assert _core.MULTIFD["DATA"] == wire.MULTIFD_DATA == multifd.DATA
    assert _core.MULTIFD["NAME"] == 256
    assert {flag.name: flag.value for flag in wire.MultifdFlag} == _core.MULTIFD_FLAGS
    assert multifd.CODEC_FLAG["zlib"] == wire.MultifdFlag.ZLIB
    assert multifd.CODEC_FLAG["zstd"] == wire.MultifdFlag.ZSTD


# ---- what the source says --------------------------------------------------------------------


class Tap:
    """A destination that writes down what comes on every connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._said: list[bytearray] = []
        self._threads: list[threading.Thread] = []

    def listen(self, count: int) -> None:
        self._accepting = threading.Thread(target=self._accept, args=(count,))
        self._accepting.start()

    def _accept(self, count: int) -> None:
        for _ in range(count):
            sock, _ = self._listener.accept()
            self._said.append(bytearray())
            self._threads.append(threading.Thread(target=self._read, args=(sock, self._said[-1])))
            self._threads[-1].start()
        self._listener.close()

    @staticmethod
    def _read(sock: socket.socket, said: bytearray) -> None:
        with sock:
            while data := sock.recv(1 << 20):
                said += data

    def result(self, page_size: int = PAGE):
        """The main stream, and the channels by their numbers."""
        self._accepting.join()
        for thread in self._threads:
            thread.join()
        main, rest = [], []
        for said in self._said:
            (main if said.startswith(b"QEVM") else rest).append(bytes(said))
        assert len(main) == 1
        channels = [multifd.decode(data, page_size) for data in rest]
        return main[0], sorted(channels, key=lambda channel: channel.number)


def ram_records(main: bytes) -> list[tuple[str, int]]:
    """(kind, page) of the records of `ram` behind the block list; kind EOS ends a section."""
    # the sections of `ram` stand between the block list and the first device
    at = main.index(b"\x03ram", 8) + 4 + 8
    (word,) = struct.unpack_from(">Q", main, at)
    left, at = word & ~0xFFF, at + 8
    while left:
        at += 1 + main[at]
        left -= struct.unpack_from(">Q", main, at)[0]
        at += 8
    out = []
    while True:
        (word,) = struct.unpack_from(">Q", main, at)
        at, flags = at + 8, word & 0xFFF & ~0x20
        if flags in (0x02, 0x08):
            at += 0 if word & 0x20 else 1 + main[at]
            at += 1 if flags == 0x02 else PAGE
        out.append(({0x02: "ZERO", 0x08: "PAGE", 0x10: "EOS", 0x200: "FLUSH"}[flags], word >> 12))
        if flags == 0x10:
            assert main[at] == 0x7E
            at += 5
            if main[at] not in (2, 3):
                return out
            at += 5


def tapped(made, box, channels=3, **parameters):
    """Migrate the box into a tap."""
    tap = Tap()
    tap.listen(1 + channels)
    out = made.outgoing(
        box.guest,
        capabilities=MULTIFD,
        parameters={
            "multifd-channels": channels,
            "max-bandwidth": 0,
            **{name.replace("_", "-"): value for name, value in parameters.items()},
        },
    )
    out.start(tap.uri)
    assert out.wait(FOREVER)
    return out, *tap.result()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("machine", [OLD, MIDDLE, NEW])
def test_octets(made, machine, compression):
    identity = uuid.UUID(int=0x1234567890ABCDEF1234567890ABCDEF)
    box = Box(1, machine=machine, uuid=identity)
    out, main, channels = tapped(made, box, multifd_compression=compression)
    records = ram_records(main)
    syncs = len([kind for kind, _ in records if kind == "FLUSH"])
    if machine == OLD:
        assert syncs == 0
        syncs = len([kind for kind, _ in records if kind == "EOS"])
    assert syncs >= 2
    zeros_on_main = {page for kind, page in records if kind == "ZERO"}
    assert bool(zeros_on_main) == (machine != NEW)
    assert not any(kind == "PAGE" for kind, _ in records)

    assert [channel.number for channel in channels] == [0, 1, 2]
    packets = [packet for channel in channels for packet in channel.packets]
    assert sorted(packet.number for packet in packets) == list(range(len(packets)))
    seen: dict[tuple[bytes, int], bytes] = {}
    for channel in channels:
        assert channel.uuid == identity.bytes
        assert [p.flags for p in channel.packets if p.flags & 1] == [1] * syncs
        # as a source of QEMU does, with nothing before the first and behind the last SYNC
        assert channel.packets[0].flags == channel.packets[-1].flags == multifd.SYNC
        for packet in channel.packets:
            if packet.flags & 1:
                assert [packet.normal, packet.zero, packet.block, packet.data] == [[], [], b"", b""]
            else:
                assert packet.flags == multifd.CODEC_FLAG[compression]
                assert packet.normal or packet.zero
                assert machine == NEW or not packet.zero
        for block, offset, contents in itertools.chain(*multifd.pages_of(channel, compression)):
            assert (block, offset) not in seen
            seen[block, offset] = contents
    for block in box.memory:
        for page in range(block.pages.npages):
            bytes_ = bytes(block.view[page * PAGE : (page + 1) * PAGE])
            at = (block.idstr.encode(), page * PAGE)
            assert seen[at] == bytes_ if at in seen else not any(bytes_)
    info = out.query().ram
    assert info.multifd_bytes == sum(
        64 + sum(len(packet.encode()) for packet in channel.packets) for channel in channels
    )
    assert info.transferred == info.multifd_bytes + len(main)


@pytest.mark.parametrize(
    ("machine", "detection", "where"),
    [
        (NEW, "none", "normal"),
        (NEW, "legacy", "main"),
        (NEW, "multifd", "packets"),
        (MIDDLE, "multifd", "main"),
        (OLD, "multifd", "main"),
        (OLD, "none", "normal"),
    ],
)
def test_zero_pages_go_where_they_are_to_go(made, machine, detection, where):
    box = Box(2, machine=machine)
    _, main, channels = tapped(made, box, zero_page_detection=detection)
    packets = [packet for channel in channels for packet in channel.packets]
    found = {
        "main": sum(kind == "ZERO" for kind, _ in ram_records(main)),
        "packets": sum(len(packet.zero) for packet in packets),
        "normal": sum(not any(contents) for c in channels
                      for _, _, contents in itertools.chain(*multifd.pages_of(c, "none"))),
    }
    if where == "packets":
        assert found["packets"] == found["normal"] > 0
        assert found["main"] == 0
    else:
        assert [name for name, count in found.items() if count] == [where]


def test_pages_of_a_pass_come_behind_all_of_the_pass_before(made):
    """Between them every channel says SYNC, and the main stream MULTIFD_FLUSH."""
    box, rounds = Box(3, machine=NEW), 3
    log = Rewriter(box, rounds)
    box.guest.dirty_log = lambda: log
    _, main, channels = tapped(made, box, downtime_limit=0)
    flushes = sum(kind == "FLUSH" for kind, _ in ram_records(main))
    seen: dict[int, list[int]] = {page: [] for page in range(rounds)}
    for channel in channels:
        runs = multifd.pages_of(channel, "none")
        assert len(runs) == flushes + 1
        for run, pages in enumerate(runs):
            for block, offset, contents in pages:
                if block == b"pc.ram" and offset < rounds * PAGE and contents[0] == log.MARK:
                    seen[offset // PAGE].append((run, contents[1]))
    for page, versions in seen.items():
        versions.sort()
        # each in a run of its own, the older first
        assert len({run for run, _ in versions}) == len(versions) > 0, page
        assert [version for _, version in versions] == sorted(v for _, v in versions)
        assert versions[-1][1] == rounds


class Rewriter:
    """A log of a guest that writes the same pages in every pass of the first few."""

    MARK = 0xEE
    chunk_pages = 0

    def __init__(self, box: Box, rounds: int) -> None:
        self._box, self._rounds, self._done = box, rounds, 0

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        if idstr != "pc.ram" or self._done == self._rounds:
            return 0
        self._done += 1
        fresh = 0
        for page in range(self._rounds):
            view = self._box.memory[idstr].view
            view[page * PAGE : page * PAGE + 2] = bytes([self.MARK, self._done])
            fresh += not dirty[page]
            dirty.set(page)
        return fresh


# ---- from mig to mig -------------------------------------------------------------------------


def moved(made, source, target, uri="tcp:127.0.0.1:0", *, capabilities=BOTH, both=None, **mine):
    """Migrate from guest to guest; returns the two migrations.

    both: parameters of both ends; mine: the source's alone
    """
    both = {"multifd-channels": 2, **(both or {})}
    incoming = made.incoming(
        target, capabilities=capabilities - {"return-path", "zero-copy-send"}, parameters=both
    )
    incoming.listen(uri)
    own = {name.replace("_", "-"): value for name, value in mine.items()}
    outgoing = made.outgoing(
        source, capabilities=capabilities, parameters={"max-bandwidth": 0, **both, **own}
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    return outgoing, incoming


SCHEMES = {"tcp": "tcp:127.0.0.1:0", "unix": "unix:{}/s"}


@pytest.mark.parametrize("machine", [OLD, NEW])
@pytest.mark.parametrize("detection", DETECTIONS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("channels", "scheme"), [(1, "unix"), (2, "tcp"), (5, "unix")])
def test_a_guest_arrives(made, tmp_path, channels, scheme, compression, detection, machine):
    source, target = Box(4, machine=machine), Box(machine=machine)
    both = {"multifd-channels": channels, "multifd-compression": compression}
    outgoing, incoming = moved(
        made,
        source.guest,
        target.guest,
        SCHEMES[scheme].format(tmp_path),
        both=both,
        zero_page_detection=detection,
    )
    assert target.same_as(source)
    sent, came = outgoing.query().ram, incoming.query().ram
    assert sent.multifd_bytes == came.multifd_bytes > 0
    assert (sent.normal, sent.duplicate) == (came.normal, came.duplicate)
    zeros = sum(not any(b.view[i : i + PAGE])
                for b in source.memory for i in range(0, b.used_length, PAGE))
    assert sent.duplicate == (0 if detection == "none" else zeros)
    assert sent.normal + sent.duplicate == NPAGES + 16


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("page_size", [1024, 16384, 1 << 20])
def test_other_page_sizes(made, page_size, compression):
    memory, guests = [], []
    for filled in (True, False):
        memory.append(GuestMemory(page_size))
        block = memory[-1].add("ram", 12 * page_size)
        if filled:
            block.view[:] = np.random.default_rng(5).bytes(12 * page_size)
            block.view[page_size : 3 * page_size] = bytes(2 * page_size)
        guests.append(MemoryGuest("box", memory[-1], DeviceRegistry()))
    moved(made, *guests, both={"multifd-compression": compression})
    assert bytes(memory[0]["ram"].view) == bytes(memory[1]["ram"].view)


@pytest.mark.parametrize("level", [0, 1, 9])
def test_levels_of_zlib(made, level):
    source, target = Box(6), Box()
    outgoing, _ = moved(
        made,
        source.guest,
        target.guest,
        both={"multifd-compression": "zlib"},
        multifd_zlib_level=level,
    )
    assert target.same_as(source)
    if level == 0:
        assert outgoing.query().ram.multifd_bytes > outgoing.query().ram.normal * PAGE


@pytest.mark.parametrize("level", [0, 1, 20])
def test_levels_of_zstd(made, level):
    source, target = Box(7), Box()
    both = {"multifd-compression": "zstd", "multifd-channels": 1}
    moved(made, source.guest, target.guest, both=both, multifd_zstd_level=level)
    assert target.same_as(source)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("machine", [OLD, NEW])
def test_a_captured_guest_is_the_same_however_it_came(made, tmp_path, machine, compression):
    source, target, path = Box(8, machine=machine), Box(machine=machine), tmp_path / "vm.mig"
    both = {"multifd-compression": compression, "multifd-channels": 4}
    moved(made, source.guest, StreamCapture(path), both=both)
    plain = made.outgoing(source.guest, parameters={"max-bandwidth": 0})
    plain.start(f"file:{tmp_path}/plain")
    assert plain.wait(FOREVER)
    with open_image(path) as image, open_image(tmp_path / "plain") as other:
        assert image.configuration == other.configuration
        assert [b.missing for b in image.blocks] == [0, 0]
        for mine, theirs in zip(image.blocks, other.blocks, strict=True):
            assert (mine.idstr, mine.used_length) == (theirs.idstr, theirs.used_length)
        assert image.save_devices() == other.save_devices()
        # and on: its pages lie anywhere in the file
        moved(made, image, target.guest, both=both)
    assert target.same_as(source)


def test_a_guest_without_a_channel_s_help_still_has_its_identity_checked(made):
    mine, other = uuid.uuid4(), uuid.uuid4()
    source, target = Box(9, uuid=mine), Box(uuid=other)
    incoming = made.incoming(target.guest, capabilities=MULTIFD)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities=BOTH)
    outgoing.start(incoming.uri)
    error = error_of(incoming)
    assert isinstance(error, MismatchError)
    assert str(mine) in str(error)
    assert str(other) in str(error)
    ended(outgoing)
    assert outgoing.status == Status.FAILED


@pytest.mark.parametrize("uuids", [(True, True), (True, False), (False, True)])
def test_a_guest_of_the_same_identity_or_of_none_is_taken(made, uuids):
    identity = uuid.uuid4()
    source = Box(9, uuid=identity if uuids[0] else None)
    target = Box(uuid=identity if uuids[1] else None)
    moved(made, source.guest, target.guest)
    assert target.same_as(source)


# ---- a guest that runs -----------------------------------------------------------------------


@pytest.fixture
def living():
    """Makes guests of threads, and ends them with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kw: stack.enter_context(ProcessGuest(*args, **kw))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_guest_that_writes_moves_from_place_to_place(made, living, compression):
    guest = living(4 << 20, rate=40 << 20, workers=2)
    guest.start()
    for _ in range(3):
        target = living(4 << 20)
        moved(made, guest, target, both={"multifd-compression": compression})
        report = target.verify()
        assert (report.ncorrupt, report.ledger_ok) == (0, True)
        guest.close()
        target.resume()
        guest = target
    guest.stop()


@pytest.mark.parametrize("end", ["cancel here", "cancel there"])
def test_a_migration_that_ends_early_leaves_a_guest_that_can_be_sent_again(made, living, end):
    guest, first, second = living(4 << 20, rate=200 << 20), living(4 << 20), living(4 << 20)
    guest.start()
    incoming = made.incoming(first, capabilities=MULTIFD)
    incoming.listen("tcp:127.0.0.1:0")

    def on_event(event) -> None:
        if isinstance(event, PassStarted) and event.number == 3:
            (outgoing if end == "cancel here" else incoming).cancel()

    outgoing = made.outgoing(
        guest,
        capabilities=BOTH,
        parameters={"max-bandwidth": 0, "downtime-limit": 0},
        on_event=on_event,
    )
    outgoing.start(incoming.uri)
    ended(outgoing)
    ended(incoming)
    assert outgoing.status == (Status.CANCELLED if end == "cancel here" else Status.FAILED)
    assert guest.running
    moved(made, guest, second)
    assert not second.running


# ---- MSG_ZEROCOPY ----------------------------------------------------------------------------


def test_pages_go_without_being_copied(made):
    source, target = Box(10), Box()
    outgoing, incoming = moved(
        made, source.guest, target.guest, capabilities=BOTH | {"zero-copy-send"}
    )
    assert target.same_as(source)
    info = outgoing.query().ram
    # a loopback always copies: once for every channel that sent pages before a SYNC
    assert 1 <= info.dirty_sync_missed_zero_copy <= 2 * 3
    assert info.multifd_bytes == incoming.query().ram.multifd_bytes


def test_unix_sockets_cannot_leave_out_the_copy(made, tmp_path):
    source, target = Box(11), Box()
    incoming = made.incoming(target.guest, capabilities=MULTIFD)
    incoming.listen(f"unix:{tmp_path}/s")
    outgoing = made.outgoing(source.guest, capabilities=BOTH | {"zero-copy-send"})
    outgoing.start(incoming.uri)
    error = error_of(outgoing)
    assert isinstance(error, ChannelError)
    assert "multifd channel" in str(error)
    assert source.calls.count("stop") == source.calls.count("resume")
    # the stream had begun
    assert isinstance(error_of(incoming), MigError)
    incoming = made.incoming(target.guest, capabilities=MULTIFD)
    incoming.listen(f"unix:{tmp_path}/s")
    again = made.outgoing(source.guest, capabilities=BOTH)
    again.start(incoming.uri)
    assert again.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)


@pytest.mark.parametrize(
    ("capabilities", "parameters"),
    [
        ({"zero-copy-send"}, {}),
        ({"zero-copy-send", "multifd"}, {"multifd-compression": "zlib"}),
        ({"xbzrle", "multifd"}, {}),
    ],
)
def test_what_does_not_go_together(made, capabilities, parameters):
    with pytest.raises(OptionError):
        made.outgoing(Box(12).guest, capabilities=capabilities, parameters=parameters)


# ---- max-bandwidth ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("machine", [OLD, NEW])
def test_all_channels_together_keep_to_max_bandwidth(made, monkeypatch, machine, channels):
    """By a clock that only goes while the source sleeps."""
    cap, now, seen = 1 << 20, [0.0], []
    source, target = Box(13, machine=machine), Box(machine=machine)
    log = Rewriter(source, 3)
    source.guest.dirty_log = lambda: log

    def sleep(seconds: float) -> None:
        seen.append((now[0], outgoing.query().ram.transferred))
        now[0] += seconds

    monkeypatch.setattr(
        "mig.engine.outgoing.RateLimit",
        lambda bandwidth, _: RateLimit(bandwidth, sleep, lambda: now[0]),
    )
    both = {"multifd-channels": channels}
    incoming = made.incoming(target.guest, capabilities=MULTIFD, parameters=both)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(
        source.guest,
        capabilities=BOTH,
        parameters={"max-bandwidth": cap, "downtime-limit": 0, **both},
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert target.same_as(source)
    assert len(seen) > 1
    for when, nbytes in seen:
        # the slice that is being slept through is spent already
        assert nbytes <= cap * (when + 0.1) + cap * 0.02


# ---- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["fd:0", "exec:cat", "file:/tmp/no"])
def test_channels_need_a_place_that_can_be_connected_to_more_than_once(made, uri):
    match = r"Migration requires multi-channel URIs \(e\.g\. tcp\)"
    with pytest.raises(OptionError, match=match):
        made.outgoing(Box(14).guest, capabilities=MULTIFD).start(uri)
    with pytest.raises(OptionError, match=match):
        made.incoming(Box().guest, capabilities=MULTIFD).listen(uri)


def test_a_guest_that_has_no_place_for_channels(made):
    class Plain:
        """A DestinationGuest that knows nothing of multifd."""

        def __getattr__(self, name):
            if name in ("open_lanes", "uuid"):
                raise AttributeError(name)
            return lambda *_: None

    with pytest.raises(OptionError, match="LaneTarget"):
        made.incoming(Plain(), capabilities=MULTIFD).listen("tcp:127.0.0.1:0")


@pytest.mark.parametrize("status", [Status.SETUP, Status.ACTIVE, Status.DEVICE])
def test_a_source_cancelled_in_any_status_runs_again(made, status):
    source, target = Box(15), Box()
    incoming = made.incoming(target.guest, capabilities=MULTIFD)
    incoming.listen("tcp:127.0.0.1:0")

    def on_event(event) -> None:
        if event == StatusChanged(status):
            outgoing.cancel()

    outgoing = made.outgoing(source.guest, capabilities=BOTH, on_event=on_event)
    outgoing.start(incoming.uri)
    ended(outgoing)
    incoming.cancel()
    ended(incoming)
    if outgoing.status == Status.CANCELLED:
        assert source.calls.count("stop") == source.calls.count("resume")
