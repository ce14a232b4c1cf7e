"""The block list of a mapped-ram file: laid out as QEMU does, and every field at its edges."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from mig import wire
from mig.errors import StreamError, TruncatedError
from mig.mapped import MappedFile, MappedRamHeader
from mig.records import BlockInfo, BlockList
from mig.stream.reader import StreamReader

MIB = 1 << 20
PAGE = 4096
LISTED = BlockList((BlockInfo("pc.ram", 3 * MIB), BlockInfo("vga.vram", 2 * PAGE)))
#: bytes of the word, and of an entry's name and length
WORD, ENTRY = 8, 1 + 6 + 8


def file_of(blocks: BlockList, start: int = 0, tail: bytes = b"tail") -> bytearray:
    pieces, end = blocks.pieces(start)
    data = bytearray(end)
    for at, piece in pieces:
        data[at : at + len(piece)] = piece
    return data + tail


def read(data: bytes | bytearray, start: int = 0) -> tuple[BlockList, StreamReader]:
    view = memoryview(data)[start:]
    reader = StreamReader(data=view)
    total = reader.u64("word") & ~(PAGE - 1)
    return BlockList.read(reader, total, PAGE, mapped=MappedFile(start, len(data))), reader


def refused(data: bytes | bytearray, match: str, offset: int, block: str = "pc.ram") -> None:
    with pytest.raises(StreamError, match=match) as caught:
        read(data)
    assert caught.value.offset == offset
    assert caught.value.block == block


def with_header(**changes: int) -> bytearray:
    """The file of LISTED, with fields of the first block's header changed."""
    listed = LISTED.laid_out(0, PAGE)
    data = file_of(listed)
    header = replace(listed.blocks[0].mapped, **changes)
    data[WORD + ENTRY : WORD + ENTRY + 28] = header.encode()
    return data


def test_a_list_is_laid_out_as_qemu_does_it():
    first, second = LISTED.laid_out(0, PAGE).blocks
    # the bitmap of 768 pages is 12 words long
    at = WORD + ENTRY
    assert first.mapped == MappedRamHeader(PAGE, at + 28, MIB)
    at = 4 * MIB + 1 + len("vga.vram") + 8
    assert second.mapped == MappedRamHeader(PAGE, at + 28, 5 * MIB)
    assert LISTED.laid_out(0, PAGE).pieces(0)[1] == 5 * MIB + 2 * PAGE


def test_pages_are_aligned_in_the_file_whatever_the_stream_starts_at():
    for start in (1, PAGE, MIB - 1, MIB, 3 * MIB + 5):
        for block in LISTED.laid_out(start, PAGE).blocks:
            assert block.mapped.pages_offset % wire.MAPPED_RAM_ALIGNMENT == 0
            assert block.mapped.bitmap_offset > start


def test_a_bitmap_that_just_fits_or_just_does_not():
    fits = MIB - 28 - 8
    assert MappedRamHeader.lay_out(fits, 64 * PAGE, PAGE).pages_offset == MIB
    assert MappedRamHeader.lay_out(fits, 65 * PAGE, PAGE).pages_offset == 2 * MIB
    assert MappedRamHeader.bitmap_nbytes(0) == 0
    assert MappedRamHeader.bitmap_nbytes(1) == MappedRamHeader.bitmap_nbytes(64) == 8


def test_the_octets_of_a_header():
    header = MappedRamHeader(PAGE, 0x1122334455667788, 0x0102030405060000)
    assert header.encode() == struct.pack(">IQQQ", 1, PAGE, 0x1122334455667788, 0x0102030405060000)


@pytest.mark.parametrize("start", [0, 7, MIB + 3])
def test_what_is_laid_out_is_read_again(start):
    listed = LISTED.laid_out(start, PAGE)
    found, reader = read(file_of(listed, start), start)
    assert found == listed
    assert reader.read(4, "tail") == b"tail"


def test_an_entry_with_an_address_has_the_header_behind_it():
    listed = BlockList((BlockInfo("a", PAGE, address=1 << 32),)).laid_out(0, PAGE)
    data = file_of(listed)
    reader = StreamReader(data=data)
    reader.u64("word")
    found = BlockList.read(reader, PAGE, PAGE, addresses=True, mapped=MappedFile(0, len(data)))
    assert found == listed


def test_an_older_version_is_read_and_a_newer_one_refused():
    assert read(with_header(version=0))[0].blocks[0].mapped.version == 0
    refused(with_header(version=2), "mapped-ram of version 2", WORD + ENTRY)


@pytest.mark.parametrize("page_size", [0, 1, PAGE - 1, 2 * PAGE, 1 << 63, (1 << 64) - 1])
def test_another_page_size_is_refused(page_size):
    refused(with_header(page_size=page_size), "target pages have 4096", WORD + ENTRY + 4)


@pytest.mark.parametrize("offset", [MIB + 1, MIB + 512, (1 << 64) - 1])
def test_pages_that_are_not_aligned_are_refused(offset):
    refused(with_header(pages_offset=offset), "no multiple of 4096", WORD + ENTRY + 20)


@pytest.mark.parametrize("offset", [1 << 40, 1 << 63, (1 << 64) - PAGE])
def test_pages_beyond_the_file_are_refused(offset):
    refused(with_header(pages_offset=offset), "in a file of", WORD + ENTRY + 20)


@pytest.mark.parametrize("offset", [5 * MIB + 2 * PAGE - 90, 1 << 63, (1 << 64) - 1])
def test_a_bitmap_that_reaches_beyond_the_file_is_refused(offset):
    refused(with_header(bitmap_offset=offset), "the bitmap from .* in a file of", WORD + ENTRY + 12)


def test_pages_before_their_header_are_refused():
    refused(with_header(pages_offset=0), "pages are before the header", WORD + ENTRY + 20)


@pytest.mark.parametrize("offset", [0, WORD + ENTRY, WORD + ENTRY + 27])
def test_a_bitmap_over_the_stream_is_refused(offset):
    refused(with_header(bitmap_offset=offset), "overlaps", WORD + ENTRY + 12)


def test_a_bitmap_among_the_pages_is_refused():
    refused(with_header(bitmap_offset=2 * MIB), "overlaps with the pages", WORD + ENTRY + 12)


def test_a_bitmap_in_the_next_blocks_pages_is_refused():
    refused(with_header(bitmap_offset=5 * MIB + 8), "overlaps with the pages", WORD + ENTRY + 12)


def test_a_bitmap_may_be_anywhere_else():
    header = read(with_header(bitmap_offset=MIB - 96))[0].blocks[0].mapped
    assert header.bitmap_offset == MIB - 96


def test_every_cut_is_noticed():
    data = file_of(LISTED.laid_out(0, PAGE), tail=b"")
    for cut in [*range(8, 60), MIB, 4 * MIB, *range(4 * MIB - 1, 4 * MIB + 60), len(data) - 1]:
        with pytest.raises(StreamError):
            read(data[:cut])


class NoFile:
    timeout = None

    def __init__(self, data: bytes) -> None:
        self.data = data

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        n = min(len(data) - start, len(self.data))
        data[start : start + n], self.data = self.data[:n], self.data[n:]
        return n


class SomeFile(NoFile):
    def skip(self, nbytes: int) -> None:
        self.data = self.data[nbytes:]


@pytest.mark.parametrize("buffer_size", [16, 64, 4 << 20, 16 << 20])
def test_a_file_is_passed_over_without_reading(buffer_size):
    data = file_of(LISTED.laid_out(0, PAGE))
    reader = StreamReader(SomeFile(bytes(data)), buffer_size=buffer_size)
    total = reader.u64("word") & ~(PAGE - 1)
    found = BlockList.read(reader, total, PAGE, mapped=MappedFile(0, len(data)))
    assert found == LISTED.laid_out(0, PAGE)
    assert reader.offset == len(data) - 4
    assert reader.read(4, "tail") == b"tail"


def test_a_connection_cannot_be_passed_over():
    data = bytes(file_of(LISTED.laid_out(0, PAGE)))
    reader = StreamReader(NoFile(data), buffer_size=64)
    reader.u64("word")
    with pytest.raises(StreamError, match="only be passed over in a file"):
        BlockList.read(reader, LISTED.total, PAGE, mapped=MappedFile(0, len(data)))


def test_the_cursor_goes_forward_only():
    reader = StreamReader(data=b"12345678")
    reader.skip_to(4, "it")
    assert reader.read(1, "it") == b"5"
    with pytest.raises(ValueError, match="behind the cursor"):
        reader.skip_to(1, "it")
    with pytest.raises(TruncatedError, match="inside it"):
        reader.skip_to(9, "it")
