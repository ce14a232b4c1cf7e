"""DeviceTail: where the device state ends, and how it is cut, whatever stands in it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import stream
from reference.stream import Device

from mig import wire
from mig.errors import StreamError, TruncatedError
from mig.savevm import devices as devices_module
from mig.savevm.devices import DeviceState, DeviceTail, footer_walk

OFFSET = 1000
#: payload that looks like every thing that a tail is searched for
NASTY = st.sampled_from(
    [
        b"\x00\x06",
        b"\x00\x06\x00\x00\x00\x02{}",
        b"\x00\x06\x00\x00\x00\x03{x}",
        b"\x00\x06\x00\x00\x00\x09{\"a\": [1",
        b"\x00\x06\x00\x00\xff\xff{",
        b"\x00\x06\x04\x00\x00\x00{",
        b"\x00\x06\xff\xff\xff\xff{",
        b"\x00\x00\x06\x00\x00\x00\x00\x7b",
        b"\x00",
        b"\x7e\x00\x00\x00\x05",
        b"\x04\x00\x00\x00\x09\x01d",
        b"{",
    ]
)
PAYLOADS = st.lists(st.one_of(NASTY, st.binary(max_size=8)), max_size=6).map(b"".join)


@st.composite
def device_lists(draw: st.DrawFn, max_size: int = 5) -> list[Device]:
    ids = draw(st.lists(st.integers(0, 20), max_size=max_size, unique=True))
    return [
        Device(f"d{section_id}", draw(PAYLOADS), section_id, instance_id=i, version_id=i + 1)
        for i, section_id in enumerate(ids)
    ]


def chunks(data: bytes, seed: int, longest: int) -> list[bytes]:
    rng, out, at = random.Random(seed), [], 0
    while at < len(data):
        n = rng.randint(1, longest)
        out.append(data[at : at + n])
        at += n
    return out


def feed_all(tail: DeviceTail, pieces: list[bytes]) -> DeviceState:
    """Feed until the state is found; else the end of the stream decides."""
    for i, piece in enumerate(pieces):
        state = tail.feed(piece)
        if state is not None:
            assert i == len(pieces) - 1, "found before all of it was there"
            return state
    return tail.finish()


def whole(data: bytes, *, footers: bool = True) -> DeviceState:
    return feed_all(DeviceTail(OFFSET, footers=footers), [data])


def as_devices(state: DeviceState) -> list[Device]:
    assert state.sections is not None
    return [
        Device(s.idstr, s.payload, s.section_id, s.instance_id, s.version_id)
        for s in state.sections
    ]


def assert_one_piece(state: DeviceState, data: bytes) -> None:
    assert (state.offset, state.raw) == (OFFSET, data)
    assert (state.sections, state.description) == (None, b"")


@settings(max_examples=200, deadline=None)
@given(
    made=device_lists(),
    footers=st.booleans(),
    seed=st.integers(0, 2**32),
    longest=st.sampled_from([1, 2, 7, 1000]),
)
def test_devices_are_cut_by_the_description_however_the_bytes_come(made, footers, seed, longest):
    data = stream.device_state(made, footers=footers)
    tail = DeviceTail(OFFSET, footers=footers)
    state = feed_all(tail, chunks(data, seed, longest))
    assert state.raw == data
    assert state.description == stream.description(made)[5:]
    assert as_devices(state) == made
    at = 0
    for section, device in zip(state.sections, made, strict=True):
        assert section.offset == at
        at += len(device.encode(footers=footers))


@settings(max_examples=100, deadline=None)
@given(made=device_lists(), extra=st.binary(min_size=1, max_size=50))
def test_what_follows_the_description_does_not_belong_to_it(made, extra):
    data = stream.device_state(made)
    state = DeviceTail(OFFSET).feed(data + extra)
    assert state is not None
    assert state.raw == data


def test_nothing_but_the_end_and_an_empty_description():
    state = whole(stream.device_state([]))
    assert (state.sections, state.raw) == ((), stream.device_state([]))


def test_devices_saved_before_ram_are_described_but_not_here():
    made = [Device("early", b"abc", 1), Device("late", b"de", 2)]
    data = made[1].encode() + b"\0" + stream.description(made)
    assert as_devices(whole(data)) == made[1:]


def test_two_instances_of_a_device_are_told_apart():
    made = [Device("d", b"abc", 1, instance_id=0), Device("d", b"de", 2, instance_id=1)]
    assert as_devices(whole(stream.device_state(made))) == made


# ---- descriptions that are none --------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_whole_description_inside_a_payload_is_payload(n):
    """A guest can write what it likes into its devices' buffers: it must stay migratable."""
    fake = b"\x00" + stream.description([Device("x", b"12", 9)]) * n
    made = [Device("d", b"before" + fake + b"after", 1), Device("e", b"x", 2)]
    data = stream.device_state(made)
    for longest in (1, 10_000):
        assert as_devices(feed_all(DeviceTail(OFFSET), chunks(data, 1, longest))) == made


def test_a_description_without_devices_inside_a_payload_is_payload():
    made = [Device("d", b"\x00" + stream.described({"devices": []}), 1)]
    assert as_devices(whole(stream.device_state(made))) == made


def test_a_fake_description_longer_than_the_stream_does_not_hide_the_real_one():
    made = [Device("d", b"\x00\x06\x03\xff\xff\xff{", 1)]
    assert as_devices(whole(stream.device_state(made))) == made


def test_json_that_is_no_description_is_read_once_only(monkeypatch):
    """Otherwise a payload full of it costs its length squared."""
    parsed = []
    original = devices_module.Description.parse

    def parse(text: bytes) -> object:
        parsed.append(text)
        return original(text)

    monkeypatch.setattr(devices_module.Description, "parse", parse)
    made = [Device("d", b"\x00\x06\x00\x00\x00\x02{}" + bytes(50), 1)]
    tail = DeviceTail(OFFSET)
    for piece in chunks(stream.device_state(made), 1, 1):
        tail.feed(piece)
    assert parsed.count(b"{}") == 1


# ---- sizes that are wrong --------------------------------------------------------------------


def wrongly_described(made: list[Device], extra: int) -> bytes:
    """A description that says of each device that it is longer, or shorter, than it is."""
    payloads = [d.payload + bytes(extra) if extra > 0 else d.payload[:extra] for d in made]
    described = [Device(d.idstr, p, d.section_id) for d, p in zip(made, payloads, strict=True)]
    return stream.description(described)


@pytest.mark.parametrize("extra", [-1, 1, 100])
def test_wrong_sizes_with_right_footers_keep_the_state_as_one_piece(extra):
    made = [Device("d", b"abc", 1), Device("e", b"", 2)]
    data = b"".join(d.encode() for d in made) + b"\0" + wrongly_described(made, extra)
    for longest in (1, 1000):
        state = feed_all(DeviceTail(OFFSET), chunks(data, 3, longest))
        assert state.sections is None
        assert state.raw == data
        assert state.description == wrongly_described(made, extra)[5:]


@pytest.mark.parametrize("extra", [-1, 1])
def test_wrong_sizes_without_footers_are_an_error(extra):
    made = [Device("d", b"abc", 1), Device("e", b"fgh", 2)]
    data = b"".join(d.encode(footers=False) for d in made) + b"\0" + wrongly_described(made, extra)
    with pytest.raises(StreamError) as caught:
        whole(data, footers=False)
    assert caught.value.offset >= OFFSET


def test_a_wrong_footer_is_an_error_with_its_place():
    made = [Device("d", b"abc", 1)]
    good = stream.device_state(made)
    footer = stream.footer(1)
    for wrong in (stream.footer(2), b"\x7f" + footer[1:], bytes(5)):
        data = good.replace(footer, wrong)
        with pytest.raises(StreamError, match="footer of section 1 is missing after 3 bytes") as e:
            whole(data)
        assert e.value.offset == OFFSET + good.index(footer)
        assert e.value.section == "d"


def test_a_device_that_is_not_described_is_an_error_unless_the_footers_lead_on():
    made = [Device("d", b"abc", 1)]
    other = stream.description([Device("e", b"abc", 1)])
    assert whole(made[0].encode() + b"\0" + other).sections is None
    with pytest.raises(StreamError, match="not in the description") as caught:
        whole(made[0].encode(footers=False) + b"\0" + other, footers=False)
    assert (caught.value.section, caught.value.offset) == ("d", OFFSET)


def test_what_is_no_section_is_an_error():
    data = b"\x99junk" + stream.device_state([])
    with pytest.raises(StreamError) as caught:
        whole(data)
    assert caught.value.offset == OFFSET


# ---- without a description -------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    payloads=st.lists(st.binary(max_size=20).filter(lambda p: b"\x7e" not in p), max_size=4),
    longest=st.sampled_from([1, 5, 1000]),
)
def test_without_description_the_footers_tell_the_end(payloads, longest):
    made = [Device(f"d{i}", payload, i + 3) for i, payload in enumerate(payloads)]
    data = stream.device_state(made, with_description=False)
    tail = DeviceTail(OFFSET)
    for piece in chunks(data, 1, longest):
        assert not tail.ends_here()
        assert tail.feed(piece) is None
    assert len(tail) == len(data)
    assert tail.ends_here()
    assert_one_piece(tail.finish(), data)


def test_footers_inside_of_a_payload_do_not_end_it():
    payload = b"x" + stream.footer(5) + b"y" + stream.footer(5) + b"\x04junk"
    made = [Device("d", payload, 5), Device("e", stream.footer(5) + b"\x00more", 6)]
    data = stream.device_state(made, with_description=False)
    assert footer_walk(data) == len(data)
    assert whole(data).raw == data


def test_without_footers_only_the_last_byte_is_checked():
    made = [Device("d", b"abc", 5)]
    data = stream.device_state(made, footers=False, with_description=False)
    tail = DeviceTail(OFFSET, footers=False)
    assert tail.feed(data) is None
    assert not tail.ends_here()
    assert_one_piece(tail.finish(), data)


@pytest.mark.parametrize("filler", range(0, 600, 50))
def test_a_footer_inside_of_the_last_payload_does_not_hide_the_real_one(filler):
    """Whatever follows it: little, or so much that a whole header would have fitted."""
    data = stream.device_state(
        [Device("d", b"a" + stream.footer(5) + b"b" * filler, 5)], with_description=False
    )
    for longest in (1, 1000):
        tail = DeviceTail(OFFSET)
        for piece in chunks(data, 1, longest):
            assert tail.feed(piece) is None
        assert tail.ends_here()
        assert_one_piece(tail.finish(), data)


def test_a_state_full_of_what_looks_like_descriptions_is_refused(monkeypatch):
    """Each is a place to come back to: there must not be as many as the peer likes."""
    monkeypatch.setattr(devices_module, "MAX_CANDIDATES", 3)
    mark = b"\x00\x06\x00\x00\xff\xff{"
    assert DeviceTail(OFFSET).feed(mark * 3) is None
    with pytest.raises(StreamError, match="full of what looks like") as caught:
        DeviceTail(OFFSET).feed(mark * 4)
    assert caught.value.offset == OFFSET


# ---- truncation and limits -------------------------------------------------------------------


@pytest.mark.parametrize("footers", [False, True])
def test_a_described_tail_cut_at_every_byte_is_a_truncation(footers):
    made = [Device("d", b"abc\x00\x06", 1), Device("e", b"\x01" * 10, 2)]
    data = stream.device_state(made, footers=footers)
    eof = data.index(b"\x00\x06\x00\x00\x00", 10) + 1
    if footers:
        eof = len(data) - len(stream.description(made))
    for cut in range(len(data)):
        tail = DeviceTail(OFFSET, footers=footers)
        assert tail.feed(data[:cut]) is None
        if cut == eof and footers:
            # just the description is missing: QEMU takes that for complete, and so do we
            assert tail.finish().sections is None
            continue
        if not footers and data[:cut].endswith(b"\0"):
            continue
        with pytest.raises(TruncatedError) as caught:
            tail.finish()
        assert OFFSET <= caught.value.offset <= OFFSET + cut
        assert f"after {OFFSET + cut} bytes" in str(caught.value)


def test_a_truncation_names_the_section_it_is_in():
    made = [Device("first", b"abc", 1), Device("second", b"defg", 2)]
    data = made[0].encode() + made[1].encode()[:-6]
    with pytest.raises(TruncatedError) as caught:
        whole(data)
    assert caught.value.section == "second"
    assert caught.value.offset == OFFSET + len(made[0].encode())


def test_a_truncation_in_the_description_says_so():
    data = stream.device_state([Device("d", b"abc", 1)])
    with pytest.raises(TruncatedError, match="inside the description"):
        whole(data[:-1])


def test_nothing_at_all_is_a_truncation():
    with pytest.raises(TruncatedError):
        DeviceTail(OFFSET).finish()
    with pytest.raises(TruncatedError):
        DeviceTail(OFFSET, footers=False).finish()


def test_device_state_up_to_the_limit_is_taken_and_one_byte_more_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "MAX_DEVICE_STATE", 100)
    tail = DeviceTail(OFFSET)
    assert tail.feed(b"\x04" * 60) is None
    assert tail.feed(b"\x04" * 40) is None
    with pytest.raises(StreamError, match="past the limit") as caught:
        tail.feed(b"\x04")
    assert caught.value.offset == OFFSET
    assert len(tail) == 100


def test_a_description_up_to_the_limit_is_taken_and_a_longer_one_is_not(monkeypatch):
    made = [Device("d", b"abc", 1)]
    data = stream.device_state(made)
    length = len(stream.description(made)) - 5
    monkeypatch.setattr(wire, "MAX_DESCRIPTION", length)
    assert as_devices(whole(data)) == made
    monkeypatch.setattr(wire, "MAX_DESCRIPTION", length - 1)
    with pytest.raises(StreamError):
        whole(data)
