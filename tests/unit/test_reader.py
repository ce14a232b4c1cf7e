"""StreamReader: how the source cuts its bytes never changes what is read."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mig.errors import IdleTimeoutError, StreamError, TruncatedError
from mig.stream.reader import StreamReader


class CutSource:
    """Gives the bytes in pieces of random sizes, as a socket does."""

    timeout = None

    def __init__(self, data: bytes, seed: int = 0, longest: int = 50) -> None:
        self._data, self._at = data, 0
        self._rng, self._longest = random.Random(seed), longest
        self.reads = 0

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        self.reads += 1
        room = len(data) - start
        assert 0 < at_least <= room
        wanted = min(room, at_least + self._rng.randint(0, self._longest))
        piece = self._data[self._at : self._at + wanted]
        data[start : start + len(piece)] = piece
        self._at += len(piece)
        return len(piece)


ITEMS = st.one_of(
    st.tuples(st.just("u8"), st.integers(0, 255)),
    st.tuples(st.just("u16"), st.integers(0, 2**16 - 1)),
    st.tuples(st.just("u32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("u64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("counted"), st.binary(max_size=255)),
    st.tuples(st.just("read"), st.binary(max_size=600)),
    st.tuples(st.just("peek"), st.just(None)),
)
FORMATS = {"u8": ">B", "u16": ">H", "u32": ">I", "u64": ">Q"}


def encode(kind: str, value: object) -> bytes:
    if kind in FORMATS:
        return struct.pack(FORMATS[kind], value)
    if kind == "counted":
        return bytes([len(value)]) + value
    return value if kind == "read" else b""


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(ITEMS, max_size=30),
    seed=st.integers(0, 2**32),
    longest=st.sampled_from([0, 1, 7, 1000]),
    buffer_size=st.sampled_from([1, 2, 9, 64, 4096]),
)
def test_any_cut_gives_the_same_items(items, seed, longest, buffer_size):
    stream = b"".join(encode(kind, value) for kind, value in items)
    readers = [
        StreamReader(CutSource(stream, seed, longest), buffer_size=buffer_size),
        StreamReader(data=stream),
        StreamReader(data=memoryview(bytearray(stream))),
    ]
    for reader in readers:
        at = 0
        for kind, value in items:
            assert reader.offset == at
            if kind == "peek":
                following = stream[at] if at < len(stream) else None
                assert reader.peek() == following
            elif kind == "read":
                assert reader.read(len(value), "bytes") == value
            else:
                assert getattr(reader, kind)("an item") == value
            at += len(encode(kind, value))
        assert reader.peek() is None
        assert reader.offset == len(stream)


@settings(max_examples=100, deadline=None)
@given(
    stream=st.binary(max_size=300),
    seed=st.integers(0, 2**32),
    data=st.data(),
    buffer_size=st.sampled_from([1, 8, 64]),
)
def test_window_and_advance_walk_through_the_stream(stream, seed, data, buffer_size):
    reader = StreamReader(CutSource(stream, seed), buffer_size=buffer_size)
    seen = b""
    while len(seen) < len(stream):
        need = data.draw(st.integers(1, len(stream) - len(seen)))
        assert reader.fill(need)
        start, end = reader.window
        assert reader.available == end - start >= need
        step = data.draw(st.integers(1, need))
        seen += bytes(reader.buffer[start : start + step])
        reader.advance(step)
        assert reader.offset == len(seen)
    assert seen == stream
    assert not reader.fill(1)


@settings(max_examples=100, deadline=None)
@given(
    stream=st.binary(min_size=1, max_size=100),
    seed=st.integers(0, 2**32),
    missing=st.integers(1, 50),
    data=st.data(),
)
def test_truncation_names_where_the_item_starts_and_how_long_the_stream_is(
    stream, seed, missing, data
):
    for reader in (StreamReader(CutSource(stream, seed), buffer_size=8), StreamReader(data=stream)):
        first = data.draw(st.integers(0, len(stream)))
        reader.read(first, "the first part")
        reader.section = "ram"
        with pytest.raises(TruncatedError) as caught:
            reader.read(len(stream) - first + missing, "a thing")
        assert caught.value.offset == first
        assert caught.value.section == "ram"
        assert f"after {len(stream)} bytes, inside a thing" in str(caught.value)


@pytest.mark.parametrize("kind", ["u8", "u16", "u32", "u64", "counted", "text"])
def test_every_item_can_be_truncated(kind):
    whole = {"u8": b"", "u16": b"a", "u32": b"abc", "u64": b"abcdefg", "counted": b"\x05abcd"}
    with pytest.raises(TruncatedError, match="inside an item"):
        getattr(StreamReader(data=whole.get(kind, b"\x05abcd")), kind)("an item")


def test_the_rest_can_be_read_after_a_truncation():
    reader = StreamReader(CutSource(b"abc"))
    with pytest.raises(TruncatedError):
        reader.u32("a number")
    assert reader.read(3, "the rest") == b"abc"
    assert reader.peek() is None


def test_a_source_that_ended_is_not_asked_again():
    source = CutSource(b"abc", longest=0)
    reader = StreamReader(source)
    assert not reader.fill(4)
    reads = source.reads
    assert not reader.fill(4)
    assert source.reads == reads


def test_what_is_there_is_read_without_asking_the_source():
    source = CutSource(b"abcdefgh", longest=1000)
    reader = StreamReader(source)
    reader.u8("a byte")
    assert source.reads == 1
    assert reader.take(100) == b"bcdefgh"
    assert (source.reads, reader.offset, reader.available) == (1, 8, 0)
    assert reader.take(100) == b""


def test_an_item_longer_than_the_buffer_is_read():
    data = bytes(range(256)) * 4
    reader = StreamReader(CutSource(data, longest=0), buffer_size=4)
    assert reader.u16("a number") == 1
    assert reader.read(1000, "a long item") == data[2:1002]
    assert reader.offset == 1002


def test_errors_of_the_source_pass_through_and_the_stream_goes_on():
    class Stuck(CutSource):
        stuck = True

        def readinto(self, data, start, at_least):
            if self.stuck:
                raise IdleTimeoutError("stuck")
            return super().readinto(data, start, at_least)

    source = Stuck(b"abcd")
    reader = StreamReader(source)
    with pytest.raises(IdleTimeoutError):
        reader.u32("a number")
    source.stuck = False
    assert reader.u32("a number") == 0x61626364


def test_advance_does_not_pass_what_is_there():
    reader = StreamReader(data=b"abc")
    with pytest.raises(ValueError, match="4 bytes of 3"):
        reader.advance(4)
    reader.advance(3)
    assert reader.offset == 3


def test_source_and_data_exclude_each_other():
    with pytest.raises(ValueError, match="not from both"):
        StreamReader(CutSource(b""), b"abc")


@pytest.mark.parametrize("raw", [b"", b"\x07", b"caf\xc3\xa9", b"a\nb", b"\xff", b"a\0"])
def test_text_refuses_what_is_no_name_and_says_where(raw):
    reader = StreamReader(data=b"xy" + bytes([len(raw)]) + raw)
    reader.read(2, "the start")
    with pytest.raises(StreamError, match="is not a name") as caught:
        reader.text("idstr")
    assert caught.value.offset == 2


@pytest.mark.parametrize("raw", [b"a", b"pc.ram", b"/rom@etc/acpi tables", b"x" * 255])
def test_text_reads_printable_ascii(raw):
    assert StreamReader(data=bytes([len(raw)]) + raw).text("idstr") == raw.decode()


def test_error_names_this_place_or_the_given_one():
    reader = StreamReader(data=b"abcd")
    reader.u16("a number")
    reader.section = "ram"
    assert (reader.error("bad").offset, reader.error("bad").section) == (2, "ram")
    assert reader.error("bad", offset=0).offset == 0
