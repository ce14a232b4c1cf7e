"""mapped-ram: where a file has the pages of each block, and what must not overlap there."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from mig import wire
from mig.errors import StreamError
from mig.stream.reader import StreamReader


@dataclass(frozen=True, slots=True)
class MappedRamHeader:
    """Where a block of a mapped-ram file has its pages, behind its entry of the block list.

    be32 version, be64 page_size, be64 bitmap_offset, be64 pages_offset

    page_size:     bytes, the target's
    bitmap_offset: of 64-bit little-endian words with a bit for each page that the file has; the
                   others are zero
    pages_offset:  of page 0, a multiple of page_size; the stream goes on behind the last page

    Offsets are the file's, also where the stream does not start with the file.
    """

    page_size: int
    bitmap_offset: int
    pages_offset: int
    version: int = wire.MAPPED_RAM_VERSION

    _FORMAT: ClassVar[struct.Struct] = struct.Struct(">IQQQ")

    @classmethod
    def lay_out(cls, at: int, used_length: int, page_size: int) -> MappedRamHeader:
        """Return the header for offset ``at`` of the file, of a block of so many bytes.

        As mapped_ram_setup_ramblock(): the bitmap follows the header.
        """
        bitmap_offset = at + cls._FORMAT.size
        end = bitmap_offset + cls.bitmap_nbytes(used_length // page_size)
        alignment = wire.MAPPED_RAM_ALIGNMENT
        return cls(page_size, bitmap_offset, -(-end // alignment) * alignment)

    @property
    def is_left_out(self) -> bool:
        """Whether the file has nothing of the block, as its memory is shared (x-ignore-shared).

        Newer QEMUs than 10.0 say so with two offsets of 0; the stream goes on behind the header.
        """
        return not (self.bitmap_offset or self.pages_offset)

    @staticmethod
    def bitmap_nbytes(npages: int) -> int:
        """Return the bytes of the bitmap of a block of so many pages."""
        return -(-npages // wire.MAPPED_RAM_WORD_BITS) * wire.MAPPED_RAM_WORD_BITS // 8

    def regions(self, used_length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (start, end) in the file of the bitmap and of the pages."""
        nbytes = self.bitmap_nbytes(used_length // self.page_size)
        return (
            (self.bitmap_offset, self.bitmap_offset + nbytes),
            (self.pages_offset, self.pages_offset + used_length),
        )

    def encode(self) -> bytes:
        """Return the 28 bytes."""
        return self._FORMAT.pack(
            self.version, self.page_size, self.bitmap_offset, self.pages_offset
        )

    @classmethod
    def read(cls, reader: StreamReader, page_size: int) -> MappedRamHeader:
        """Read and check what needs no other block; QEMU takes older versions, too."""
        what = "a header of mapped-ram"
        at = reader.offset
        version = reader.u32(what)
        if version > wire.MAPPED_RAM_VERSION:
            raise reader.error(f"mapped-ram of version {version}", offset=at)
        theirs, bitmap_offset, pages_offset = (reader.u64(what) for _ in range(3))
        if theirs != page_size:
            raise reader.error(
                f"mapped-ram with pages of {theirs} bytes, target pages have {page_size}",
                offset=at + 4,
            )
        if pages_offset % page_size:
            raise reader.error(
                f"pages at offset {pages_offset:#x} of the file, no multiple of {page_size}",
                offset=at + 20,
            )
        return cls(theirs, bitmap_offset, pages_offset, version)


@dataclass(frozen=True, slots=True)
class MappedFile:
    """The file of a stream with mapped-ram.

    start:  offset of the file where the stream starts
    nbytes: of the file
    """

    start: int
    nbytes: int


class Regions:
    """What is where in a mapped-ram file, while its block list is read."""

    def __init__(self, reader: StreamReader, file: MappedFile) -> None:
        self._reader = reader
        self._file = file
        # (start, end) in the file, what it is, block, and the stream offset that says so
        self._taken: list[tuple[int, int, str, str, int]] = []
        # what is before the stream belongs to somebody else
        self._from = 0

    def read(
        self, idstr: str, used_length: int, page_size: int, *, may_be_left_out: bool
    ) -> MappedRamHeader:
        """Read the header of a block and go on behind its pages."""
        reader, file = self._reader, self._file
        at = reader.offset
        try:
            header = MappedRamHeader.read(reader, page_size)
        except StreamError as error:
            raise type(error)(
                error.message, offset=error.offset, section=error.section, block=idstr
            ) from None
        if may_be_left_out and header.is_left_out:
            return header
        stream = file.start + reader.offset
        bitmap, pages = header.regions(used_length)
        self._take(self._from, stream, "the stream", idstr, at)
        self._take(*bitmap, "the bitmap", idstr, at + 12)
        self._take(*pages, "the pages", idstr, at + 20)
        if pages[0] < stream:
            message = "the pages are before the header of their block"
            raise self._error(message, idstr, at + 20)
        self._from = pages[1]
        reader.skip_to(pages[1] - file.start, f"the pages of block '{idstr}'")
        return header

    def _take(self, start: int, end: int, what: str, idstr: str, at: int) -> None:
        if end > self._file.nbytes:
            raise self._error(
                f"{what} from {start:#x} to {end:#x} in a file of {self._file.nbytes} bytes",
                idstr,
                at,
            )
        if end > start:
            self._taken.append((start, end, what, idstr, at))

    def check_overlaps(self) -> None:
        """StreamError when two things are in the same place."""
        taken = sorted(self._taken)
        for (_, end, what, idstr, _), (start, _, other, block, at) in pairwise(taken):
            if start < end:
                raise self._error(
                    f"{other} overlaps with {what} of block '{idstr}' at {start:#x} of the file",
                    block,
                    at,
                )

    def _error(self, message: str, block: str, at: int) -> StreamError:
        return StreamError(message, offset=at, section=self._reader.section, block=block)
