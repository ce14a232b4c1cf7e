"""A source, made by hand, goes into postcopy while its guest is kept in a file."""

from __future__ import annotations

import random
import threading

import pytest
from reference import postcopy, ram, stream
from reference.postcopy import PAGE, Source
from unit.boxes import FOREVER, error_of

import mig
from mig.errors import ChannelError, MigError, MismatchError, OptionError, StateError, StreamError

BLOCKS = {"pc.ram": 64 * PAGE, "vga": 8 * PAGE}
CPU = [stream.Device("cpu", b"registers", 7), stream.Device("disk", b"\x7e\0\0", 9)]
RAM = b"pc.ram"


def page(seed: int) -> bytes:
    return bytes([seed]) * PAGE


def record(number: int, seed: int, block: bytes = RAM) -> ram.Record:
    return ram.Record(block, number, page(seed))


class Kept:
    """A capture that listens, and its source."""

    def __init__(self, made, folder, capabilities=("postcopy-ram",), **options):
        self.file = folder / "vm.mig"
        self.changed = threading.Condition()
        self.incoming = made.incoming(
            mig.StreamCapture(self.file), capabilities=capabilities, on_event=self._note, **options
        )
        self.incoming.listen(f"unix:{folder / 'in'}")
        self.source = Source.connect(self.incoming.uri)

    def _note(self, event) -> None:
        with self.changed:
            self.changed.notify_all()

    def reach(self, status) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.incoming.status == status, FOREVER)

    def begin(self, **options) -> None:
        """Pages 0..9 of precopy, of which 5..9 are discarded, and all that never came."""
        self.source.send(postcopy.head(BLOCKS, **options))
        self.source.send(postcopy.pages([record(i, 1 + i) for i in range(10)]))
        self.source.send(postcopy.discard("pc.ram", (5 * PAGE, 59 * PAGE)))
        self.source.send(postcopy.discard("vga", (0, 8 * PAGE)))

    def switch(self) -> None:
        self.source.send(postcopy.ping(2) + postcopy.package(CPU) + postcopy.ping(4))

    def rest(self) -> bytes:
        zero = [ram.Record(RAM, i, 0) for i in range(10, 64)]
        zero += [ram.Record(b"vga", i, 0) for i in range(8)]
        return postcopy.pages([record(i, 101 + i) for i in range(5, 10)] + zero) + postcopy.END

    def check(self) -> None:
        assert self.incoming.wait(FOREVER)
        with mig.open_image(self.file) as image:
            for i in range(10):
                assert image.page("pc.ram", i) == page(1 + i if i < 5 else 101 + i), i
            assert [b.missing for b in image.blocks] == [0, 0]
            assert [b.zero for b in image.blocks] == [54, 8]
            assert [(d.idstr, d.payload) for d in image.devices] == [
                (d.idstr, d.payload) for d in CPU
            ]


@pytest.fixture
def kept(made, tmp_path):
    return Kept(made, tmp_path)


def pongs(source: Source) -> list[int]:
    """What the destination says until it has loaded the package."""
    values = [int.from_bytes(source.hear()[1], "big") for _ in range(5)]
    # the listen thread answers 4 while the package is being loaded
    values.remove(4)
    return values


def test_every_page_is_in_the_file_once_as_it_was_last(kept):
    kept.begin()
    kept.switch()
    assert pongs(kept.source) == [1, 2, 3, 0x42]
    kept.source.send(kept.rest())
    kept.source.expect(postcopy.SHUT, 0)
    kept.check()
    assert kept.incoming.query().ram.duplicate == 62


def test_a_source_that_never_switches_is_an_ordinary_one(kept):
    kept.source.send(postcopy.head(BLOCKS))
    kept.source.send(postcopy.pages([record(0, 5)]) + postcopy.pages([], 3))
    kept.source.send(stream.device_state(CPU))
    kept.source.expect(postcopy.PONG, 1)
    kept.source.expect(postcopy.SHUT, 0)
    assert kept.incoming.wait(FOREVER)
    with mig.open_image(kept.file) as image:
        assert image.page("pc.ram", 0) == page(5)


def test_what_was_discarded_and_never_came_again_is_zero(kept):
    kept.begin()
    kept.switch()
    kept.source.send(postcopy.pages([record(5, 9)]) + postcopy.END)
    assert kept.incoming.wait(FOREVER)
    with mig.open_image(kept.file) as image:
        assert image.page("pc.ram", 4) == page(5)
        assert image.page("pc.ram", 5) == page(9)
        assert image.page("pc.ram", 6) == bytes(PAGE)
        assert image.page("pc.ram", 20) is None


def test_blocks_may_have_pages_of_their_own_size(made, tmp_path):
    kept = Kept(made, tmp_path)
    kept.begin(host_pages={"vga": 2 << 20}, advised={"summary": PAGE | 2 << 20})
    kept.switch()
    kept.source.send(kept.rest())
    kept.check()


@pytest.mark.parametrize("first", [True, False], ids=["setup", "switchover"])
def test_urgent_pages_come_on_a_second_connection(made, tmp_path, first):
    kept = Kept(made, tmp_path, ("postcopy-ram", "postcopy-preempt"))
    urgent = Source.connect(kept.incoming.uri) if first else None
    kept.begin()
    kept.switch()
    urgent = urgent or Source.connect(kept.incoming.uri)
    pongs(kept.source)
    urgent.send(ram.encode([record(7, 108), record(8, 109)], PAGE))
    # 7.2 ends it so
    urgent.send(ram.eos())
    while kept.incoming.query().ram.normal < 12:
        threading.Event().wait(0.001)
    kept.source.send(kept.rest())
    kept.source.expect(postcopy.SHUT, 0)
    kept.check()


def test_a_break_is_mended(kept, tmp_path):
    kept.begin()
    kept.switch()
    pongs(kept.source)
    kept.source.send(postcopy.pages([record(5, 106), ram.Record(b"vga", 3, 0)]))
    kept.source.send(postcopy.pages([record(6, 107)])[:-40])
    kept.source.close()
    kept.reach("postcopy-paused")
    assert "stream ends" in kept.incoming.query().to_qmp()["error-desc"]
    with pytest.raises(StateError):
        kept.incoming.cancel()
    for _ in range(2):
        kept.incoming.recover(f"unix:{tmp_path / 'again'}")
        with pytest.raises(StateError):
            kept.incoming.recover(f"unix:{tmp_path / 'third'}")
        source = Source.connect(kept.incoming.uri)
        assert source.bitmap("pc.ram") == [0, 1, 2, 3, 4, 5]
        assert source.bitmap("vga") == [3]
        assert kept.incoming.status == "postcopy-recover"
        # a second failure pauses again
        if _ == 0:
            source.close()
            kept.reach("postcopy-paused")
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    assert kept.incoming.status == "postcopy-active"
    source.send(kept.rest())
    source.expect(postcopy.SHUT, 0)
    kept.check()


def test_a_broken_urgent_connection_pauses_both(made, tmp_path):
    kept = Kept(made, tmp_path, ("postcopy-ram", "postcopy-preempt"))
    urgent = Source.connect(kept.incoming.uri)
    kept.begin()
    kept.switch()
    pongs(kept.source)
    urgent.send(b"nonsense")
    urgent.close()
    kept.reach("postcopy-paused")
    # not that the other one was cancelled because of that
    assert "ram" in kept.incoming.query().error
    kept.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(kept.incoming.uri)
    urgent = Source.connect(kept.incoming.uri)
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    urgent.send(ram.encode([record(5, 106)], PAGE))
    source.send(kept.rest())
    source.expect(postcopy.SHUT, 0)
    kept.check()


@pytest.mark.parametrize(
    "wrong",
    [
        b"\x05",
        postcopy.pages([record(1, 1)]),
        stream.command(99),
        postcopy.discard("vga", (0, PAGE)),
    ],
    ids=["subsection", "page", "unknown", "discard"],
)
def test_nonsense_while_it_recovers_pauses_again(kept, tmp_path, wrong):
    kept.begin()
    kept.switch()
    pongs(kept.source)
    kept.source.close()
    for data in (wrong, None):
        kept.reach("postcopy-paused")
        kept.incoming.recover(f"unix:{tmp_path / 'again'}")
        source = Source.connect(kept.incoming.uri)
        if data is not None:
            source.send(data)
            with pytest.raises(EOFError):
                source.hear()
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    source.send(kept.rest())
    kept.check()


def test_recovery_is_for_what_is_paused(kept, tmp_path):
    with pytest.raises(StateError):
        kept.incoming.recover(f"unix:{tmp_path / 'again'}")


H = postcopy.head(BLOCKS)
D = H + postcopy.discard("pc.ram", (0, PAGE))
LISTEN, RUN = stream.command(postcopy.LISTEN), stream.command(postcopy.RUN)
DEVICES = b"".join(device.encode() for device in CPU)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (stream.command(postcopy.ADVISE), "RAM postcopy is enabled but have 0 byte advise"),
        (stream.command(postcopy.ADVISE, b"12345678"), "ADVISE invalid length (8)"),
        (postcopy.advise(PAGE, 65536), "matching target page sizes (s=65536 d=4096)"),
        (postcopy.advise() * 2, "CMD_POSTCOPY_ADVISE in wrong postcopy state (1)"),
        (postcopy.discard("pc.ram"), "CMD_POSTCOPY_RAM_DISCARD in wrong postcopy state (0)"),
        (postcopy.package(CPU), "CMD_PACKAGED in wrong postcopy state (0)"),
    ],
)
def test_wrong_commands_before_the_block_list(kept, data, words):
    kept.source.send(stream.header() + stream.configuration() + data)
    assert words in str(error_of(kept.incoming))
    assert not kept.file.exists()


def discarding(data: bytes) -> bytes:
    return stream.command(postcopy.DISCARD, data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (H + discarding(b"\0\1"), "invalid length (2)"),
        (H + discarding(b"\1\1x\0"), "invalid version (1)"),
        (H + discarding(b"\0\0\0"), "Failed to read RAMBlock ID"),
        (H + discarding(b"\0\1x\1"), "missing nil (1)"),
        (H + discarding(b"\0\6pc.ram"), "missing nil (-1)"),
        (H + discarding(b"\0\6pc.ram\0" + bytes(15)), "invalid length (24)"),
        (H + postcopy.discard("none", (0, PAGE)), "no such block"),
        (H + postcopy.discard("vga", (0, 9 * PAGE)), "Overrun discard"),
        (H + postcopy.discard("vga", (1 << 63, 1 << 63)), "Overrun discard"),
        (H + postcopy.discard("vga", (1, PAGE)), "Unaligned discard"),
        (H + stream.command(postcopy.RECV_BITMAP, b"\3vga"), "RECV_BITMAP in wrong"),
        (H + stream.command(postcopy.RESUME), "POSTCOPY_RESUME in wrong postcopy state (1)"),
        (H + LISTEN, "outside of a package"),
        (H.replace(postcopy.advise(), b"") + postcopy.advise(), "ADVISE in wrong postcopy state"),
        (D + stream.command(postcopy.PACKAGED, b"\xff\xff\xff\xff"), "Unreasonably large"),
        (D + postcopy.packaged(b""), "without POSTCOPY_LISTEN"),
        (D + postcopy.packaged(LISTEN), "does not end with POSTCOPY_RUN"),
        (D + postcopy.packaged(RUN), "without POSTCOPY_LISTEN"),
        (D + postcopy.packaged(LISTEN + RUN + RUN), "POSTCOPY_RUN before the devices"),
        (D + postcopy.packaged(LISTEN + DEVICES), "does not end with POSTCOPY_RUN"),
        (D + postcopy.packaged(LISTEN + DEVICES[:-1] + RUN), "no whole device sections"),
        (D + postcopy.packaged(LISTEN + b"x" + postcopy.ping(3) + RUN), "no whole device"),
        (
            D + postcopy.packaged(LISTEN + DEVICES + postcopy.ping(3) * 9 + RUN),
            "no whole device sections",
        ),
    ],
)
def test_wrong_commands_before_the_switch(kept, data, words):
    kept.source.send(data)
    error = error_of(kept.incoming)
    assert words in str(error)
    assert isinstance(error, StreamError)
    assert not kept.file.exists()


@pytest.mark.parametrize("pings", [0, 1, 8])
def test_a_package_may_ask_more_than_once(kept, pings):
    kept.begin()
    last = b"".join(postcopy.ping(10 + i) for i in range(pings))
    kept.source.send(postcopy.package(CPU, last) + kept.rest())
    values = [1, *range(10, 10 + pings), 0x42]
    for value in values:
        kept.source.expect(postcopy.PONG, value)
    kept.check()


def test_the_capability_must_be_on(made, tmp_path):
    kept = Kept(made, tmp_path, ())
    kept.source.send(postcopy.head(BLOCKS))
    assert "postcopy-ram" in str(error_of(kept.incoming))


def test_a_guest_that_cannot_is_told_at_once(made):
    class Plain:
        """No postcopy_* here."""

    incoming = made.incoming(Plain(), capabilities={"postcopy-ram"})
    with pytest.raises(OptionError, match="not supported by this guest"):
        incoming.listen("tcp:127.0.0.1:0")


def test_preempt_needs_an_address_for_two(made, tmp_path):
    capture = mig.StreamCapture(tmp_path / "vm.mig")
    incoming = made.incoming(capture, capabilities={"postcopy-ram", "postcopy-preempt"})
    with pytest.raises(MigError):
        incoming.listen("exec:cat /dev/null")


class Refusing(mig.StreamCapture):
    """Cannot load the devices."""

    def load_devices(self, state) -> None:
        raise MismatchError("no such device")


def test_what_fails_before_the_guest_runs_is_a_failure(made, tmp_path):
    kept = Kept.__new__(Kept)
    kept.incoming = made.incoming(Refusing(tmp_path / "vm.mig"), capabilities={"postcopy-ram"})
    kept.incoming.listen(f"unix:{tmp_path / 'in'}")
    kept.source = Source.connect(kept.incoming.uri)
    kept.begin()
    kept.switch()
    assert isinstance(error_of(kept.incoming), MismatchError)
    assert not (tmp_path / "vm.mig").exists()


class Full(mig.StreamCapture):
    """Cannot write once."""

    tries = 0

    def put(self, parser, data, start) -> None:
        if parser.npages == 1 and self.tries == 0:
            self.tries = 1
            raise ChannelError("disk full")
        super().put(parser, data, start)


def test_a_full_disk_is_waited_for(made, tmp_path):
    kept = Kept(made, tmp_path)
    kept.incoming.cancel()
    kept.source.close()
    kept.changed = threading.Condition()
    kept.file = tmp_path / "full.mig"
    kept.incoming = made.incoming(
        Full(kept.file), capabilities={"postcopy-ram"}, on_event=kept._note
    )
    kept.incoming.listen(f"unix:{tmp_path / 'full'}")
    kept.source = Source.connect(kept.incoming.uri)
    kept.begin()
    kept.switch()
    kept.source.send(postcopy.pages([record(5, 106)]))
    kept.reach("postcopy-paused")
    kept.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(kept.incoming.uri)
    assert source.bitmap("pc.ram") == [0, 1, 2, 3, 4]
    source.send(stream.command(postcopy.RESUME) + kept.rest())
    kept.check()


@pytest.mark.parametrize("seed", range(12))
def test_damaged_streams_pause_or_fail(made, tmp_path, seed):
    """Whatever is wrong after the switch, the source can still bring it to an end."""
    rng = random.Random(seed)
    kept = Kept(made, tmp_path)
    kept.begin()
    kept.switch()
    pongs(kept.source)
    data = bytearray(kept.rest())
    for _ in range(3):
        data[rng.randrange(len(data) // 2)] ^= 1 << rng.randrange(8)
    kept.source.send(bytes(data[: rng.randrange(len(data))]))
    kept.source.close()
    kept.reach("postcopy-paused")
    kept.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(kept.incoming.uri)
    source.send(stream.command(postcopy.RESUME) + kept.rest())
    assert kept.incoming.wait(FOREVER)
