"""A destination with multifd-compression adaptive against data made by hand."""

from __future__ import annotations

import random
import struct

import pytest
import zstandard
from faults.streams import PAGE, RAM
from faults.test_multifd import (
    FIRST,
    FLUSHED,
    HEAD,
    HUGE,
    PACKET,
    PLACES,
    TAIL,
    destination,
    expected,
    failed,
    pages,
    sync,
)
from reference import adaptive, multifd
from reference.adaptive import DELTA, FLAG, RAW, ZSTD
from reference.multifd import Packet

from mig.errors import StreamError, TruncatedError

ADAPTIVE = {"multifd_compression": "adaptive"}
A, B = b"\x11" * PAGE, b"\x22" * PAGE
#: of a page of zeros, to another one
SMALL = b"\x03\x02AB"
#: zstd of one page
(Z,) = (multifd.Encoder("zstd").encode(A),)


def packet(data: bytes, of: str = "pc.ram", **fields) -> bytes:
    """A packet of the two normal pages of a block of two, or of one of one."""
    normal, _, _ = pages(of)
    given = {"block": of.encode(), "normal": normal, "page_size": PAGE, "flags": FLAG, **fields}
    return Packet(data=data, **given).encode()


def good(block: str, coder: multifd.Encoder, method: int) -> bytes:
    """A packet of a block, with all of its pages."""
    normal, zero, data = pages(block)
    bodies = [data[i : i + PAGE] for i in range(0, len(data), PAGE)]
    if method == DELTA:
        bodies = [difference(body) for body in bodies]
    given = {"normal": normal, "zero": zero}
    return packet(adaptive.encode([(method, body) for body in bodies], coder), block, **given)


def difference(page: bytes) -> bytes:
    """From zeros to a page without zeros."""
    return b"\0" + bytes([len(page) & 0x7F | 0x80, len(page) >> 7]) + page


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("methods", [[RAW, RAW], [DELTA, RAW], [ZSTD, DELTA], [ZSTD, ZSTD]])
def test_a_source_made_by_hand(folder, place, methods):
    with destination(place, folder, **ADAPTIVE) as there:
        for number, block in enumerate(RAM):
            coder = multifd.Encoder("zstd")
            first = good(block, coder, ZSTD)
            # what was written over since then comes back as zeros
            _, _, data = pages(block)
            clean = packet(b"", block, normal=[], zero=list(range(0, len(RAM[block]) * PAGE, PAGE)))
            said = first + clean + good(block, coder, methods[number])
            assert len(data) % PAGE == 0
            there.connect(multifd.init(number) + said + sync())
        there.connect(HEAD + FLUSHED + TAIL)
        assert there.outcome() is None
        assert there.contents() == expected()


def be16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def be32(value: int) -> bytes:
    return struct.pack(">I", value)


def delta(body: bytes) -> bytes:
    """Data of a DELTA and a RAW page."""
    return bytes([DELTA, RAW]) + be16(len(body)) + body + B


def coded(stream: bytes, announced: int | None = None) -> bytes:
    """Data of a ZSTD and a RAW page."""
    nbytes = len(stream) if announced is None else announced
    return bytes([ZSTD, RAW]) + be32(nbytes) + stream + B


def stream(plain: bytes) -> bytes:
    return multifd.Encoder("zstd").encode(plain)


SIZE, METHOD = "length of data does not fit", "not compressed as"
BROKEN, SHORT, LONG = "are damaged", "end before", "hold more"
#: data of two pages, and what is wrong with them
WRONG = {
    "a method 3": (bytes([3, RAW]) + A + B, METHOD),
    "a method 255": (bytes([RAW, 255]) + A + B, METHOD),
    "one method": (bytes([RAW]), SIZE),
    "methods alone": (bytes([RAW, RAW]), SIZE),
    "a raw page less": (bytes([RAW, RAW]) + A, SIZE),
    "a byte less of raw pages": (bytes([RAW, RAW]) + A + B[1:], SIZE),
    "a byte behind raw pages": (bytes([RAW, RAW]) + A + B + b"\0", SIZE),
    "a page behind raw pages": (bytes([RAW, RAW]) + A + B + A, SIZE),
    "no room for lengths": (bytes([DELTA, DELTA]) + b"\0", SIZE),
    "lengths past the end": (bytes([DELTA, DELTA]) + be16(4, 5) + SMALL + SMALL, SIZE),
    "lengths huge": (bytes([DELTA, DELTA]) + be16(0xFFFF, 0xFFFF) + SMALL, SIZE),
    "lengths into the raw page": (bytes([DELTA, RAW]) + be16(5) + SMALL + B, SIZE),
    "lengths short of the end": (bytes([DELTA, DELTA]) + be16(4, 3) + SMALL + SMALL, SIZE),
    "a difference cut in its length": (delta(b"\x83"), "ends within a run"),
    "a difference cut in its run": (delta(b"\x03\x02A"), "ends within a run"),
    "a difference without a run": (delta(b"\x03"), "ends within a run"),
    "a difference of an empty run": (delta(b"\x03\0A"), "cannot be"),
    "a difference that skips the page": (delta(b"\xff\x7f\x01A"), "past its page"),
    "a difference past the page": (delta(b"\xff\x07\x02AB"), "past its page"),
    "a difference longer than the page": (
        delta(b"\0" + bytes([PAGE + 1 & 0x7F | 0x80, PAGE + 1 >> 7]) + bytes(PAGE + 1)),
        "past its page",
    ),
    "a length of three bytes": (delta(b"\x80\x80\x01A"), "cannot be"),
    "no length of zstd": (bytes([ZSTD, RAW]) + B, SIZE),
    "half of a length of zstd": (bytes([ZSTD, RAW]) + b"\0\0" + B, SIZE),
    "zstd of no bytes": (coded(b""), SHORT),
    "zstd into the raw page": (coded(Z, len(Z) + 1), SIZE),
    "zstd short of the raw page": (coded(Z, len(Z) - 1), SIZE),
    "zstd huge": (coded(Z, HUGE), SIZE),
    "zstd cut": (coded(Z[:-3]), ""),
    "zstd of less than a page": (coded(stream(A[1:])), SHORT),
    "zstd of more than a page": (coded(stream(A + b"x")), LONG),
    "zstd of two pages": (coded(stream(A + B)), LONG),
    "a bomb": (coded(stream(bytes(64 << 20))), LONG),
    "a window of 2 GiB": (coded(bytes.fromhex("28b52ffd00a8") + Z), BROKEN),
    "no zstd": (coded(b"\xff" * 30), BROKEN),
    "zstd and what stands behind it": (coded(Z + b"\xff" * 9), ""),
    "zstd that ends and begins again": (coded(zstandard.compress(A) * 2), ""),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_data(folder, place, what):
    """After a packet that is right: the error names where the wrong one begins."""
    data, match = WRONG[what]
    with destination(place, folder, **ADAPTIVE) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        before = packet(adaptive.encode([(RAW, A), (DELTA, SMALL)]))
        # enough to be read, if anybody thinks that it belongs to the packet
        there.connect(multifd.init(0) + before + packet(data) + sync() * 9)
        error = failed(there, StreamError, match)
        assert (error.section, error.offset) == ("multifd channel 0", FIRST + len(before))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("excess", [-PAGE, -1, 1, PAGE, HUGE])
@pytest.mark.parametrize("methods", [(RAW, RAW), (DELTA, DELTA), (ZSTD, ZSTD), (ZSTD, DELTA)])
def test_a_length_that_is_not_that_of_the_data(folder, place, methods, excess):
    bodies = {RAW: A, DELTA: SMALL, ZSTD: A}
    data = adaptive.encode([(method, bodies[method]) for method in methods])
    nbytes = min(max(0, len(data) + excess), HUGE)
    with destination(place, folder, **ADAPTIVE) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect(multifd.init(0) + packet(data, next_size=nbytes) + sync() * 9)
        error = failed(there, StreamError, "")
        assert (error.section, error.offset) == ("multifd channel 0", FIRST)


@pytest.mark.parametrize("flags", [0, multifd.ZLIB, multifd.ZSTD, 8, 0x3C])
def test_another_codec(folder, flags):
    with destination("memory", folder, **ADAPTIVE) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect(multifd.init(0) + packet(bytes([RAW, RAW]) + A + B, flags=flags))
        failed(there, StreamError, METHOD)


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_adaptive_packets_for_somebody_else(folder, compression):
    with destination("memory", folder, multifd_compression=compression) as there:
        there.connect(HEAD + FLUSHED)
        there.connect(multifd.init(1) + sync())
        there.connect(multifd.init(0) + packet(bytes([RAW, RAW]) + A + B))
        failed(there, StreamError, METHOD)


def test_data_without_pages(folder):
    """Without normal pages there are none, whatever the length says, as with the other codecs."""
    with destination("memory", folder, channels=1, **ADAPTIVE) as there:
        zeros = packet(b"", "pc.ram", normal=[], zero=[0], next_size=5000)
        coder = multifd.Encoder("zstd")
        said = zeros + b"".join(good(block, coder, RAW) for block in RAM)
        there.connect(multifd.init(0) + said + sync())
        there.connect(HEAD + FLUSHED + TAIL)
        assert there.outcome() is None
        assert there.contents() == expected()


@pytest.mark.parametrize("place", PLACES)
def test_pages_that_are_named_twice_are_the_same_everywhere(folder, place):
    """Raw pages first, then the others in their order, then zeros."""
    with destination(place, folder, channels=1, **ADAPTIVE) as there:
        coder = multifd.Encoder("zstd")
        mixed = [(DELTA, SMALL), (RAW, A), (ZSTD, B), (DELTA, SMALL), (RAW, B)]
        twice = packet(adaptive.encode(mixed, coder), normal=[0, 0, PAGE, PAGE, PAGE])
        rest = packet(b"", normal=[], zero=[2 * PAGE, 3 * PAGE])
        last = good("vga.vram", coder, RAW)
        there.connect(multifd.init(0) + twice + rest + last + sync())
        there.connect(HEAD + FLUSHED + TAIL)
        assert there.outcome() is None
        first, second = bytearray(A), bytearray(B)
        first[3:5] = second[3:5] = b"AB"
        assert there.contents()["pc.ram"] == bytes(first + second) + bytes(2 * PAGE)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["raw", "mixed"])
def test_a_channel_that_dies_inside_the_data(folder, place, kind):
    pair = [(RAW, A), (RAW, B)] if kind == "raw" else [(ZSTD, A), (DELTA, SMALL)]
    data = adaptive.encode(pair)
    for at, point in enumerate(range(0, len(data), 1 + len(data) // 6)):
        here = folder / str(at)
        here.mkdir()
        with destination(place, here, **ADAPTIVE) as there:
            there.connect(HEAD + FLUSHED)
            there.connect(multifd.init(1) + sync())
            there.connect((multifd.init(0) + packet(data))[: FIRST + PACKET + point]).close()
            error = failed(there, StreamError, "ends inside")
            assert (error.section, error.offset) == ("multifd channel 0", FIRST)


@pytest.mark.parametrize("seed", range(16))
def test_a_wrong_bit(folder, seed):
    """An error that says where, or other pages; never anything else."""
    choose = random.Random(seed)
    mixed = [(DELTA, SMALL), (ZSTD, choose.randbytes(32) * 32)]
    data = bytearray(adaptive.encode(mixed[:: choose.choice((1, -1))]))
    data[choose.randrange(min(40, len(data)))] ^= 1 << choose.randrange(8)
    with destination("memory", folder, channels=1, **ADAPTIVE) as there:
        there.connect(HEAD + FLUSHED + TAIL)
        there.connect(multifd.init(0) + packet(bytes(data)) + sync()).close()
        error = there.outcome()
        assert error is None or isinstance(error, StreamError | TruncatedError)
