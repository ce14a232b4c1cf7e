"""Page encoders: what becomes of a batch of dirty pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from mig import _core
from mig.pages import PageIndex
from mig.ram.search import PageBatch, SourceBlock
from mig.records import BlockList
from mig.stats import MigrationInfo, RamCounters
from mig.stream.writer import StreamWriter
from mig.wire import SectionType


class PageEncoder(ABC):
    """Sends batches of pages, on the main stream or beside it."""

    @abstractmethod
    def encode(self, batch: PageBatch) -> None:
        """Send the batch; a section of `ram` is open."""

    def put_block_list(self, writer: StreamWriter, listed: BlockList) -> None:
        """Append the block list, which comes before everything else."""
        writer.put(listed.encode())

    @property
    def nbytes_beside(self) -> int:
        """Bytes sent over other connections than the main stream's."""
        return 0

    def end_section(self, kind: SectionType) -> None:
        """The section that is open, a START, PART or END, is about to end."""

    def begin_pass(self) -> None:
        """The dirty log was synced: pages that were sent before may be sent again."""

    def settle(self) -> None:
        """Wait until what was given is counted in `nbytes_beside`, or on the main stream."""

    def end_period(self) -> None:
        """A second or so is over, for which rates may be computed."""

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Add statistics of this encoding. Any thread."""
        return info


class RecordWriter:
    """Writes the page records of one stream, which remembers its block over sections.

    shared: others write records into it, too, between these: each batch names its block
    """

    def __init__(self, writer: StreamWriter, *, shared: bool = False) -> None:
        self.writer = writer
        self._shared = shared
        self._current: str | None = None

    def name(self, block: SourceBlock) -> bytes | None:
        """Return what the next record has to name: the block, or None when the stream is in it."""
        if self._current == block.idstr and not self._shared:
            return None
        self._current = block.idstr
        return block.idstr.encode("ascii")

    def put_deltas(
        self,
        block: SourceBlock,
        index: PageIndex,
        zero: _core.Bitmap | None,
        cache: _core.XbzrleCache,
        *,
        address: int,
        generation: int,
        last_stage: bool,
    ) -> None:
        """XBZRLE records, too, of pages that are in the cache; see OutQueue.encode_deltas()."""
        before, current = self.writer.offset, self._current
        self.writer.put_deltas(
            cache,
            block.pages,
            self.name(block),
            index,
            zero,
            address=address,
            generation=generation,
            last_stage=last_stage,
        )
        if self.writer.offset == before:
            # nothing has changed, so no record has named the block
            self._current = current

    def put_compressed(
        self,
        block: SourceBlock,
        index: PageIndex,
        zero: _core.Bitmap | None,
        compressor: _core.Compressor,
        *,
        skip: bool,
    ) -> None:
        """COMPRESS_PAGE records, too, of finished pages; see OutQueue.encode_compressed()."""
        before, current = self.writer.offset, self._current
        self.writer.put_compressed(
            compressor, block.pages, self.name(block), index, zero, skip=skip
        )
        if self.writer.offset == before:
            self._current = current

    def put(self, block: SourceBlock, index: PageIndex, zero: _core.Bitmap | None) -> None:
        """PAGE and ZERO records of pages ``index``; bit i of ``zero``: page index[i] is zero."""
        self.writer.put_pages(block.pages, self.name(block), index, zero)


class ZeroFinder:
    """Finds the zero pages of a batch.

    enabled: whether to look for them now; pages that are known to be zero are always found
    """

    def __init__(self, enabled: Callable[[], bool]) -> None:
        self._enabled = enabled

    def find(self, batch: PageBatch) -> tuple[_core.Bitmap | None, int]:
        """Return a bit for each page of the batch (None: not looked at), and how many are zero."""
        block = batch.block
        if block.detect_zero and self._enabled():
            return _core.KERNELS.zero_pages(block.pages, batch.index)
        return None, len(batch.index) - block.pages.count_stored(batch.index)


class PlainEncoder(PageEncoder):
    """Whole pages and zero pages; matches save_zero_page() and save_normal_page()."""

    def __init__(self, records: RecordWriter, zeros: ZeroFinder, counters: RamCounters) -> None:
        self._records = records
        self._zeros = zeros
        self._counters = counters

    def encode(self, batch: PageBatch) -> None:
        """PAGE and ZERO records."""
        zero, nzero = self._zeros.find(batch)
        self._records.put(batch.block, batch.index, zero)
        self._counters.add(len(batch.index), nzero)
