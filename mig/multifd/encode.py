"""Multifd's page encoder: pages go to the channels, zero pages perhaps to the main stream."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from mig import _core
from mig.multifd.dialect import Dialect
from mig.options import ZeroPageDetection
from mig.pages import PageIndex
from mig.ram.encode import PageEncoder, RecordWriter, ZeroFinder
from mig.ram.search import PageBatch, SourceBlock
from mig.stats import AdaptiveStats, MigrationInfo, RamCounters
from mig.wire import RamFlag, SectionType

_FLUSH = struct.pack(">Q", RamFlag.MULTIFD_FLUSH)


class Lanes(Protocol):
    """The channels of a source."""

    @property
    def nbytes(self) -> int:
        """Bytes sent."""

    @property
    def npages(self) -> tuple[int, int]:
        """Pages sent, with contents and zero."""

    @property
    def methods(self) -> tuple[int, int, int, int]:
        """Pages that went raw, as differences, by zstd, and not at all (compression adaptive)."""

    def send(self, block: SourceBlock, index: PageIndex, *, scan: bool, address: int) -> None:
        """Queue pages, which are read later, until `drain` or `sync`.

        scan:    look for zero pages
        address: of the block, when all lie one behind the other
        """

    def adapt(self, *, generation: int, caching: bool, last_stage: bool, link: float) -> None:
        """Say what compression adaptive chooses by, while nothing is queued."""

    def note_zeros(self, index: PageIndex, *, address: int) -> None:
        """Say that pages go as zero pages, but not over a channel (compression adaptive)."""

    def drain(self) -> None:
        """Wait until all is sent."""

    def sync(self) -> None:
        """Wait until all is sent, and put a SYNC behind it on every channel."""


class MultifdEncoder(PageEncoder):
    """Gives pages to the channels.

    Matches ram_save_multifd_page() and multifd_ram_flush_and_sync().

    detection:  who looks for zero pages now
    adaptive:   whether each page goes its own way (multifd-compression adaptive)
    last_stage: whether the guest stands still
    bandwidth:  bytes a second that one channel may send, 0: no limit
    """

    def __init__(
        self,
        lanes: Lanes,
        records: RecordWriter,
        zeros: ZeroFinder,
        counters: RamCounters,
        dialect: Dialect,
        detection: Callable[[], ZeroPageDetection],
        blocks: Sequence[SourceBlock],
        *,
        adaptive: bool,
        last_stage: Callable[[], bool],
        bandwidth: Callable[[], float],
    ) -> None:
        self._lanes = lanes
        self._records = records
        self._zeros = zeros
        self._counters = counters
        self._dialect = dialect
        self._detection = detection
        self._adaptive = adaptive
        self._last_stage = last_stage
        self._bandwidth = bandwidth
        self._sync_due = False
        self._passes = 0
        self._adapted: tuple[int, float] | None = None
        self._counted = (0, 0)
        self._addresses: dict[str, int] = {}
        address = 0
        for block in blocks:
            self._addresses[block.idstr] = address
            address += block.pages.npages * block.pages.page_size

    @property
    def nbytes_beside(self) -> int:
        """Bytes that the channels have sent."""
        return self._lanes.nbytes

    def encode(self, batch: PageBatch) -> None:
        """Queue the batch; zero pages that packets cannot name are records."""
        if self._sync_due:
            self._sync()
            # the channels of the destination wait for it
            self._records.writer.flush()
        self._adapt()
        block, index = batch.block, batch.index
        if self._detection() == ZeroPageDetection.MULTIFD and self._dialect.zero_in_packets:
            self._send(block, index, scan=block.detect_zero)
        else:
            rest = self._put_zeros(batch)
            self._send(block, rest, scan=False)
        self._count()

    def _send(self, block: SourceBlock, index: PageIndex, *, scan: bool) -> None:
        self._lanes.send(block, index, scan=scan, address=self._addresses[block.idstr])

    def _adapt(self) -> None:
        wanted = (self._passes, self._bandwidth())
        if self._adapted != wanted:
            self._adapted = wanted
            self._lanes.drain()
            self._lanes.adapt(
                generation=self._passes,
                caching=self._passes > 1,
                last_stage=self._last_stage(),
                link=wanted[1],
            )

    def _put_zeros(self, batch: PageBatch) -> PageIndex:
        """ZERO records of the zero pages; returns the others."""
        block, index = batch.block, batch.index
        zero, nzero = self._zeros.find(batch)
        if not nzero:
            return index
        if zero is None:
            zero = block.pages.without_storage(index)
        is_zero = np.zeros(len(index), dtype=bool)
        is_zero[zero.indexes()] = True
        self._records.put(block, index[is_zero], _core.Bitmap(nzero, fill=True))
        self._counters.add(nzero, nzero)
        if self._adaptive:
            # a later difference is to zeros
            self._lanes.note_zeros(index[is_zero], address=self._addresses[block.idstr])
        return index[~is_zero]

    def end_section(self, kind: SectionType) -> None:
        """Synchronise the channels where the dialect wants it."""
        if kind != SectionType.PART or self._dialect.sync_every_section:
            self._sync()

    def begin_pass(self) -> None:
        """What was sent before must arrive before what is sent from now on."""
        self._sync_due = not self._dialect.sync_every_section
        self._passes += 1

    def settle(self) -> None:
        """Wait until all is sent."""
        self._lanes.drain()
        self._count()

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Add how pages went, where each goes its own way. Any thread."""
        if not self._adaptive:
            return info
        return replace(info, adaptive=AdaptiveStats(*self._lanes.methods))

    def _sync(self) -> None:
        self._lanes.sync()
        self._sync_due = False
        self._count()
        if not self._dialect.sync_every_section:
            self._records.writer.put(_FLUSH)

    def _count(self) -> None:
        normal, zero = self._lanes.npages
        before_normal, before_zero = self._counted
        self._counted = (normal, zero)
        fresh = zero - before_zero
        self._counters.add(normal - before_normal + fresh, fresh)
