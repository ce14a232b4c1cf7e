"""The encoder of mapped-ram: each page goes to its place in the file, and none into the stream."""

from __future__ import annotations

from typing import Protocol

from mig import _core
from mig.ram.encode import PageEncoder, ZeroFinder
from mig.ram.search import PageBatch
from mig.records import BlockList
from mig.stats import RamCounters
from mig.stream.writer import StreamWriter
from mig.wire import SectionType


class MappedSink(Protocol):
    """The file that the stream is written to."""

    @property
    def position(self) -> int:
        """Offset of the file that is written next."""

    def skip(self, nbytes: int) -> None:
        """Go forward and leave a hole."""

    def check_cancelled(self) -> None:
        """CancelledError when the migration is being cancelled."""


class MappedEncoder(PageEncoder):
    """Writes pages in place and zero pages not at all; bitmaps at the end say which is which.

    file:      what ``pages`` writes to
    page_size: of the target, in bytes

    A page that is sent again is rewritten, or its bit is cleared when it has become zero. A file
    without its end, which is written last, has bitmaps of zeros and is taken by nobody. Matches
    mapped_ram_setup_ramblock(), save_normal_page() and ram_save_file_bmap().
    """

    def __init__(
        self,
        file: MappedSink,
        pages: _core.PageFile,
        zeros: ZeroFinder,
        counters: RamCounters,
        page_size: int,
    ) -> None:
        self._page_size = page_size
        self._file = file
        self._pages = pages
        self._zeros = zeros
        self._counters = counters
        self._nbytes = 0
        # by block: offset of its pages, of its bitmap, and which pages the file has
        self._places: dict[str, tuple[int, int, _core.Bitmap]] = {}

    @property
    def nbytes_beside(self) -> int:
        """Bytes of pages and bitmaps."""
        return self._nbytes

    def put_block_list(self, writer: StreamWriter, listed: BlockList) -> None:
        """Write the list in pieces, with holes for the pages between them."""
        writer.flush()
        at = self._file.position
        listed = listed.laid_out(at, self._page_size)
        pieces, end = listed.pieces(at)
        for start, piece in pieces:
            self._file.skip(start - at)
            writer.put(piece)
            writer.flush()
            at = start + len(piece)
        self._file.skip(end - at)
        for block in listed.blocks:
            mapped = block.mapped
            assert mapped is not None
            stored = _core.Bitmap(block.npages(self._page_size))
            self._places[block.idstr] = (mapped.pages_offset, mapped.bitmap_offset, stored)

    def encode(self, batch: PageBatch) -> None:
        """Write the pages that are not zero to their places."""
        self._file.check_cancelled()
        zero, nzero = self._zeros.find(batch)
        offset, _, stored = self._places[batch.block.idstr]
        self._nbytes += self._pages.write(batch.block.pages, batch.index, zero, stored, offset)
        self._counters.add(len(batch.index), nzero)

    def end_section(self, kind: SectionType) -> None:
        """Before RAM ends, write the bitmaps."""
        if kind == SectionType.END:
            for _, offset, stored in self._places.values():
                bits = stored.to_wire()
                self._pages.put(bits, offset)
                self._nbytes += len(bits)
