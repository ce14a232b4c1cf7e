"""Saving the `ram` section: block list, then batches of page records."""

from __future__ import annotations

import struct
from collections.abc import Callable

from mig import _core
from mig.ram.search import PageBatch, PageSearch
from mig.records import BlockInfo, BlockList, SectionHeader, encode_continuation, encode_footer
from mig.stats import RamCounters
from mig.stream.writer import StreamWriter
from mig.wire import RAM_IDSTR, RAM_VERSION, RamFlag, SectionType

_EOS = struct.pack(">Q", RamFlag.EOS)


class RamSaver:
    """Writes the sections of `ram` into one stream; matches ram_save_setup/iterate/complete().

    The block that the stream is in is remembered over sections, as the receiver does.

    detects_zero: whether to look for zero pages now; those that are known to be are sent as such
    """

    def __init__(
        self,
        writer: StreamWriter,
        search: PageSearch,
        section_id: int,
        counters: RamCounters,
        detects_zero: Callable[[], bool] = lambda: True,
    ) -> None:
        self._writer = writer
        self._search = search
        self._section_id = section_id
        self._counters = counters
        self._detects_zero = detects_zero
        self._current: str | None = None
        #: whether sections end with footers
        self.footers = True

    def start(self) -> None:
        """SECTION_START with the block list, which also has the blocks that are not sent."""
        search = self._search
        header = SectionHeader(self._section_id, RAM_IDSTR, 0, RAM_VERSION)
        listed = BlockList(
            tuple(
                BlockInfo(b.idstr, b.used_length, b.address if search.ignore_shared else None)
                for b in search.listed
            )
        )
        self._counters.total = sum(b.used_length for b in search.blocks)
        self._writer.put(header.encode(SectionType.START))
        self._writer.put(listed.encode())
        self._end_section()

    def part(self, batch: PageBatch) -> None:
        """SECTION_PART with one batch."""
        self._writer.put(encode_continuation(SectionType.PART, self._section_id))
        self._put(batch)
        self._end_section()

    def end(self) -> None:
        """SECTION_END with every page that is still dirty."""
        self._writer.put(encode_continuation(SectionType.END, self._section_id))
        while batch := self._search.next_batch():
            self._put(batch)
        self._end_section()

    @property
    def npages(self) -> int:
        """Page records so far."""
        return self._counters.normal + self._counters.fill

    def _put(self, batch: PageBatch) -> None:
        block = batch.block
        zero, nzero = None, 0
        if block.detect_zero and self._detects_zero():
            zero, nzero = _core.KERNELS.zero_pages(block.pages, batch.index)
        else:
            nzero = len(batch.index) - block.pages.count_stored(batch.index)
        name = None if self._current == block.idstr else block.idstr.encode("ascii")
        self._writer.put_pages(block.pages, name, batch.index, zero)
        self._current = block.idstr
        self._counters.add(len(batch.index), nzero)

    def _end_section(self) -> None:
        self._writer.put(_EOS)
        if self.footers:
            self._writer.put(encode_footer(self._section_id))
