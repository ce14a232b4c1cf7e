"""StreamLoader: whole streams, in the order that QEMU writes them, and all that can be wrong."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram, stream
from reference.ram import Record
from reference.stream import Device

from mig.errors import (
    IdleTimeoutError,
    MismatchError,
    StreamError,
    TruncatedError,
    UnsupportedError,
)
from mig.records import Configuration
from mig.savevm.load import END_SILENCE, StreamLoader
from mig.stream.reader import StreamReader

PAGE = 4096
BLOCKS = {"pc.ram": 3 * PAGE, "rom": PAGE}
BURSTS = [
    [Record(b"pc.ram", 0, b"\x01" * PAGE), Record(b"pc.ram", 2, 0), Record(b"rom", 0, 0)],
    [Record(b"rom", 0, b"\x02" * PAGE), Record(b"pc.ram", 2, b"\x03" * PAGE)],
]
DEVICES = [Device("uart", b"abc\x00\x06", 5), Device("rtc", b"", 6)]
CONTENTS = {
    ("pc.ram", 0): b"\x01" * PAGE,
    ("pc.ram", 2): b"\x03" * PAGE,
    ("rom", 0): b"\x02" * PAGE,
}


class Target:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.pages: dict[tuple[str, int], bytes | int] = {}
        self.blocks = ()
        self._page_size = 0

    def configure(self, configuration):
        self.calls.append(("configure", configuration))

    def open_blocks(self, blocks, page_size):
        self.blocks, self._page_size = blocks, page_size
        self.calls.append(("open_blocks", {b.idstr: b.used_length for b in blocks}, page_size))

    def put(self, parser, data, start):
        for page, source in parser.records():
            key = (self.blocks[parser.current].idstr, page)
            if source < 0:
                self.pages[key] = -1 - source
            else:
                at = start + source
                self.pages[key] = bytes(data[at : at + self._page_size])

    def ram_started(self, section_id, footers):
        self.calls.append(("ram_started", section_id, footers))

    def switchover_started(self):
        self.calls.append(("switchover_started",))

    def load_devices(self, state):
        names = None if state.sections is None else [s.idstr for s in state.sections]
        self.calls.append(("load_devices", names))


class Pieces:
    """A source that gives its bytes in pieces; silent at the end or closed."""

    def __init__(self, data: bytes, seed: int, *, silent: bool = False) -> None:
        self._data, self._at, self._rng = data, 0, random.Random(seed)
        self._silent = silent
        self.timeout: float | None = 60.0
        self.waited: list[float | None] = []

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        wanted = min(len(data) - start, at_least + self._rng.choice([0, 0, 3, 9000]))
        piece = self._data[self._at : self._at + wanted]
        data[start : start + len(piece)] = piece
        self._at += len(piece)
        if len(piece) < at_least and self._silent:
            self.waited.append(self.timeout)
            raise IdleTimeoutError("silence")
        return len(piece)


def load(data: bytes, target: Target | None = None, **options: object) -> Target:
    return load_from(StreamReader(data=data), target, **options)


def load_from(reader: StreamReader, target: Target | None = None, **options: object) -> Target:
    target = target or Target()
    commands: list[object] = []
    loader = StreamLoader(reader, target, on_command=commands.append, **options)
    loader.run()
    target.commands = commands
    return target


def calls(footers: bool = True, *, configured: bool = True) -> list[tuple[object, ...]]:
    return [
        ("configure", Configuration("box") if configured else None),
        ("open_blocks", BLOCKS, PAGE),
        ("ram_started", 2, footers),
        ("load_devices", ["uart", "rtc"]),
    ]


@pytest.mark.parametrize("footers", [False, True])
def test_a_stream_is_loaded(footers):
    target = load(stream.whole(BLOCKS, BURSTS, DEVICES, footers=footers))
    assert target.calls == calls(footers)
    assert target.pages == CONTENTS


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    footers=st.booleans(),
    buffer_size=st.sampled_from([64, 5000, 1 << 20]),
)
def test_how_the_bytes_come_changes_nothing(seed, footers, buffer_size):
    source = Pieces(stream.whole(BLOCKS, BURSTS, DEVICES, footers=footers), seed)
    target = load_from(StreamReader(source, buffer_size=buffer_size))
    assert target.calls == calls(footers)
    assert target.pages == CONTENTS


def snapshot_of_qemu(footers: bool = True) -> bytes:
    """Without SECTION_END: all pages are in PARTs, then come the devices."""
    end = stream.footer(2) if footers else b""
    out = stream.header() + stream.configuration() + stream.ram_start(2, BLOCKS) + end
    current = None
    for burst in BURSTS:
        out += stream.ram_more(2, 2, ram.encode(burst, PAGE, current)) + end
        current = burst[-1].block
    return out + stream.device_state(DEVICES, footers=footers)


@pytest.mark.parametrize("footers", [False, True])
def test_a_background_snapshot_of_qemu_has_no_end_of_ram(footers):
    data = snapshot_of_qemu(footers)
    for source in (StreamReader(data=data), StreamReader(Pieces(data, 3), buffer_size=64)):
        target = load_from(source)
        assert target.calls == calls(footers)
        assert target.pages == CONTENTS


def test_a_stream_need_not_have_a_configuration():
    target = load(stream.whole(BLOCKS, BURSTS, DEVICES, config=b""))
    assert target.calls == calls(configured=False)


def test_the_stream_s_page_size_counts_and_where_it_has_none_the_caller_s():
    blocks = {"a": 65536}
    records = [[Record(b"a", 0, b"x" * 65536)]]
    data = stream.whole(
        blocks, records, [], page_size=65536, config=stream.configuration("box", 16)
    )
    assert ("open_blocks", blocks, 65536) in load(data).calls
    data = stream.whole(blocks, records, [], page_size=65536)
    assert ("open_blocks", blocks, 65536) in load(data, page_size=65536).calls


def test_commands_are_handed_on():
    commands = stream.command(1) + stream.command(2, b"\0\0\0\7")
    data = stream.whole(BLOCKS, BURSTS, DEVICES, config=stream.configuration() + commands)
    assert [(int(c.type), c.data) for c in load(data).commands] == [(1, b""), (2, b"\0\0\0\7")]


def test_the_switchover_is_announced_in_order():
    data = stream.whole(BLOCKS, BURSTS, DEVICES, before_end=stream.command(11))
    target = load(data)
    assert target.calls[3:] == [("switchover_started",), ("load_devices", ["uart", "rtc"])]
    assert target.commands == []


def test_errors_of_the_target_pass_through_with_the_place_of_the_devices():
    class Refusing(Target):
        def load_devices(self, state):
            raise MismatchError("no uart", section="uart")

    data = stream.whole(BLOCKS, BURSTS, DEVICES)
    with pytest.raises(MismatchError, match="no uart") as caught:
        load(data, Refusing())
    assert caught.value.offset == len(data) - len(stream.device_state(DEVICES))
    assert caught.value.section == "uart"


# ---- the end of the stream -------------------------------------------------------------------


def test_without_description_the_end_of_the_stream_ends_it():
    target = load(stream.whole(BLOCKS, BURSTS, DEVICES, with_description=False))
    assert target.calls[-1] == ("load_devices", None)


def test_without_description_silence_after_a_proper_end_ends_it():
    data = stream.whole(BLOCKS, BURSTS, DEVICES, with_description=False)
    source = Pieces(data, 1, silent=True)
    target = load_from(StreamReader(source))
    assert target.calls[-1] == ("load_devices", None)
    assert source.waited == [END_SILENCE]
    assert source.timeout == 60.0


def test_silence_anywhere_else_is_a_timeout():
    data = stream.whole(BLOCKS, BURSTS, DEVICES)
    for cut in (4, 60, 5000, len(data) - 300, len(data) - 1):
        with pytest.raises(IdleTimeoutError):
            load_from(StreamReader(Pieces(data[:cut], 1, silent=True)))


def test_with_a_description_nobody_waits_for_the_end():
    source = Pieces(stream.whole(BLOCKS, BURSTS, DEVICES), 1, silent=True)
    assert load_from(StreamReader(source)).calls == calls()
    assert source.waited == []


def cuts(data: bytes) -> list[int]:
    """Every place but those in the middle of pages."""
    places, at = set(range(len(data))), 0
    for value in (b"\x01", b"\x02", b"\x03"):
        at = data.index(value * PAGE)
        places -= set(range(at + 2, at + PAGE - 2))
    return sorted(places)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("footers", [False, True])
def test_a_stream_cut_anywhere_is_a_truncation(footers, background):
    data = stream.whole(BLOCKS, BURSTS, DEVICES, footers=footers)
    if background:
        data = snapshot_of_qemu(footers)
    devices = stream.device_state(DEVICES, footers=footers)
    end = len(data) - len(stream.description(DEVICES))
    for cut in cuts(data):
        if cut == end or (not footers and cut > len(data) - len(devices) and data[cut - 1] == 0):
            continue  # complete but for its description
        with pytest.raises(TruncatedError) as caught:
            load(data[:cut])
        assert f"after {cut} bytes" in str(caught.value), cut
        assert caught.value.offset <= cut


# ---- what is refused -------------------------------------------------------------------------


def refuse(data: bytes, kind: type[StreamError] = StreamError, **more: object) -> StreamError:
    with pytest.raises(kind) as caught:
        load(data, **more)
    return caught.value


HEAD = stream.header() + stream.configuration()
STARTED = HEAD + stream.ram_start(2, BLOCKS) + stream.footer(2)


@pytest.mark.parametrize(
    ("number", "data", "capability"),
    [
        (3, bytes(16), "postcopy-ram"),
        (4, b"", "postcopy-ram"),
        (5, b"", "postcopy-ram"),
        (6, bytes(20), "postcopy-ram"),
        (7, bytes(4), "postcopy-ram"),
        (8, b"", "x-colo"),
        (9, b"", "postcopy-ram"),
        (10, b"\x01a", "postcopy-ram"),
    ],
)
def test_commands_of_other_features_name_the_capability(number, data, capability):
    for before in (HEAD, STARTED):
        error = refuse(before + stream.command(number, data), UnsupportedError)
        assert (error.capability, error.offset) == (capability, len(before))


@pytest.mark.parametrize(
    ("idstr", "capability"), [("dirty-bitmap", "dirty-bitmaps"), ("block", "block"), ("x", None)]
)
def test_sections_of_other_features_name_the_capability(idstr, capability):
    error = refuse(HEAD + stream.section(1, 9, idstr, 0, 1), UnsupportedError)
    assert (error.capability, error.offset, error.section) == (capability, len(HEAD), idstr)


def test_a_device_before_ram_is_not_supported():
    error = refuse(HEAD + Device("early", b"abc", 1).encode(), UnsupportedError)
    assert (error.section, error.offset) == ("early", len(HEAD))


def test_a_capability_that_the_stream_needs_may_not_be_supported():
    config = Configuration("box", None, ("mapped-ram",)).encode()
    error = refuse(stream.header() + config, UnsupportedError)
    assert (error.capability, error.offset) == ("mapped-ram", 8)
    assert error.section == "configuration"


@pytest.mark.parametrize("name", ["unheard-of", "X-ignore-shared", "x-ignore-share"])
def test_a_capability_that_nobody_knows_is_refused(name):
    config = Configuration("box", None, ("x-ignore-shared", name)).encode()
    error = refuse(stream.header() + config, StreamError)
    assert error.message == f"Received unknown capability {name}"
    assert (error.offset, error.section) == (8, "configuration")


def shared_stream(addresses: bool, *names: str) -> bytes:
    """A whole stream whose configuration names capabilities, with or without addresses."""
    config = Configuration("box", None, names).encode()
    data = stream.whole(BLOCKS, BURSTS, DEVICES, config=config)
    at = {name: 0x1000 * i for i, name in enumerate(BLOCKS, 1)}
    return data.replace(ram.block_list(BLOCKS), ram.block_list(BLOCKS, at)) if addresses else data


def test_addresses_are_read_where_both_sides_ignore_shared_memory():
    data = shared_stream(True, "x-ignore-shared", "xbzrle")  # of others nobody needs to agree
    target = load(data, capabilities={"x-ignore-shared"})
    assert target.pages == CONTENTS
    assert [b.address for b in target.blocks] == [0x1000 * i for i in range(1, len(BLOCKS) + 1)]
    assert load(data, capabilities=None).pages == CONTENTS


def test_without_configuration_the_own_capability_says_how_the_block_list_is_read():
    data = shared_stream(True).replace(Configuration("box", None, ()).encode(), b"")
    assert load(data, capabilities={"x-ignore-shared"}).blocks[0].address == 0x1000
    plain = shared_stream(False).replace(Configuration("box", None, ()).encode(), b"")
    assert load(plain, capabilities=None).blocks[0].address is None


@pytest.mark.parametrize(("mine", "theirs"), [("off", "on"), ("on", "off")])
@pytest.mark.parametrize("subsection", [True, False])
def test_a_capability_that_only_one_side_has_is_refused_in_qemu_s_words(mine, theirs, subsection):
    names = ("x-ignore-shared",) if theirs == "on" else () if subsection else None
    data = stream.header() + Configuration("box", None, names).encode()
    own = {"x-ignore-shared"} if mine == "on" else set()
    error = refuse(data, MismatchError, capabilities=own)
    words = f"Capability x-ignore-shared is {mine}, but received capability is {theirs}"
    assert (error.message, error.offset, error.section) == (words, 8, "configuration")


def test_an_empty_list_of_capabilities_is_fine():
    config = Configuration("box", None, ()).encode()
    assert load(stream.whole(BLOCKS, BURSTS, DEVICES, config=config)).pages == CONTENTS


@pytest.mark.parametrize(
    ("data", "match", "offset"),
    [
        (HEAD + b"\x00", "before the end of RAM", len(HEAD)),
        (STARTED + b"\x00", "before the end of RAM", len(STARTED)),
        (STARTED + b"\x05", "0x05 is SUBSECTION in the wrong place", len(STARTED)),
        (HEAD + b"\x07", "0x07 is CONFIGURATION in the wrong place", len(HEAD)),
        (HEAD + b"\x99", "0x99 is unknown", len(HEAD)),
        (HEAD + stream.ram_more(2, 2, b""), "section 2 was never started", len(HEAD)),
        (STARTED + stream.ram_more(2, 3, b""), "section 3 was never started", len(STARTED)),
        (STARTED + stream.ram_start(2, BLOCKS), "started twice", len(STARTED)),
        (HEAD + stream.section(1, 2, "ram", 0, 3), "version 3", len(HEAD)),
        (HEAD + stream.section(1, 2, "ram", 0, 5), "version 5", len(HEAD)),
        (STARTED[:-1] + b"\x03", "footer of section 3 where 2 ends", len(STARTED) - 5),
    ],
    ids=range(11),
)
def test_what_cannot_stand_there_is_refused(data, match, offset):
    error = refuse(data + bytes(50))
    assert match in str(error)
    assert error.offset == offset


@pytest.mark.parametrize("footers", [False, True])
def test_sections_have_footers_all_or_none(footers):
    start = HEAD + stream.ram_start(2, BLOCKS) + (stream.footer(2) if footers else b"")
    part = stream.ram_more(2, 2, b"")
    error = refuse(start + part + (b"" if footers else stream.footer(2)) + bytes(9))
    assert "footer of section 2 is missing" in str(error)
    assert error.offset == len(start + part)
    assert error.section == "ram"


def test_a_wrong_device_state_names_its_place_in_the_stream():
    whole = stream.whole(BLOCKS, BURSTS, DEVICES)
    at = len(whole) - len(stream.device_state(DEVICES))
    data = whole[:at] + whole[at:].replace(stream.footer(5), stream.footer(9))
    error = refuse(data)
    assert error.section == "uart"
    assert error.offset == at + len(DEVICES[0].encode()) - 5


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_streams_are_loaded_or_refused_but_nothing_else(data):
    """The peer is hostile: whatever comes, the answer is a StreamError."""
    whole = bytearray(stream.whole(BLOCKS, BURSTS, DEVICES))
    interesting = list(itertools.chain(range(150), range(len(whole) - 400, len(whole))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.sampled_from(interesting), st.integers(0, len(whole) - 1)))
        whole[at] = data.draw(st.sampled_from([0, 1, 2, 4, 6, 0x20, 0x7E, 0x7F, 0x80, 0xFF]))
    offset = 0
    try:
        load(bytes(whole))
    except StreamError as error:
        offset = error.offset
    assert 0 <= offset <= len(whole)
