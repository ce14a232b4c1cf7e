"""Which pages to send next: a cursor over the dirty bitmaps of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mig import _core
from mig.dirty import DirtyLog
from mig.pages import PageIndex

#: pages of a batch at most: 4 MiB of small pages, so that a call is worth its overhead
MAX_BATCH = 1024


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A RAM block as the sender sees it.

    pages:       where its pages are
    detect_zero: look for zero pages; False where all of them are known already
    dirty:       one bit per page that is still to be sent
    discarded:   (first page, number of pages) of parts that are not plugged in: they are neither
                 read nor sent, whatever the dirty log says (QEMU's RamDiscardManager)
    """

    idstr: str
    used_length: int
    pages: _core.Pages
    detect_zero: bool
    dirty: _core.Bitmap
    discarded: Sequence[tuple[int, int]] = field(default=())

    def forget_discarded(self) -> int:
        """Clear the dirty bits of discarded parts; returns how many were set."""
        forgotten = 0
        for first, npages in self.discarded:
            forgotten += self.dirty.count(first, npages)
            self.dirty.clear(first, npages)
        return forgotten


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Pages of one block: uint64 indexes, ascending."""

    block: SourceBlock
    index: PageIndex


class PageSearch:
    """Takes dirty pages out of the bitmaps, block after block, and begins again after the last.

    log: told before pages are read whose writes it does not log any more (see DirtyLog.clear)

    A batch's index array is reused by the next one.
    """

    def __init__(self, blocks: Sequence[SourceBlock], log: DirtyLog | None = None) -> None:
        self.blocks = blocks
        self._log = log
        self._index = np.empty(MAX_BATCH, dtype=np.uint64)
        self._uncleared = self._chunks(log.chunk_pages) if log is not None else {}
        for block in blocks:
            block.forget_discarded()
        #: bytes of pages that are dirty now; any thread may read it
        self.remaining = sum(b.dirty.count() * b.pages.page_size for b in blocks)
        #: whether every page has been looked at once: the first full round is over
        self.wrapped = False
        self.rewind()

    def _chunks(self, chunk_pages: int) -> dict[str, _core.Bitmap]:
        """A bit for each chunk of each block: synced, but writes are not logged again yet."""
        if not chunk_pages:
            return {}
        return {
            b.idstr: _core.Bitmap(-(-b.pages.npages // chunk_pages), fill=True) for b in self.blocks
        }

    @property
    def has_log(self) -> bool:
        """Whether pages can get dirty again."""
        return self._log is not None

    @property
    def clears_chunks(self) -> bool:
        """Whether the log only logs writes again when it is told to."""
        return bool(self._uncleared)

    def rewind(self) -> None:
        """Go on with the first page of the first block."""
        self._block = 0
        self._page = 0

    def next_batch(self, max_pages: int = MAX_BATCH) -> PageBatch | None:
        """Take the next dirty pages, clearing their bits; None when no page is dirty.

        max_pages: at least 1; a batch has MAX_BATCH at most
        """
        room = self._index[: min(max(max_pages, 1), MAX_BATCH)]
        # the block that it begins in may have dirty pages before the one it begins with
        if not self.remaining:
            self.wrapped = True
            return None
        for _ in range(len(self.blocks) + 1):
            if self._block == len(self.blocks):
                self.wrapped = True
                self.rewind()
            block = self.blocks[self._block]
            n = block.dirty.take(self._page, room)
            if n:
                index = room[:n]
                self._page = int(index[-1]) + 1
                self.remaining -= n * block.pages.page_size
                if self._uncleared:
                    self._clear_log(block, index)
                return PageBatch(block, index)
            self._block += 1
            self._page = 0
        return None

    def _clear_log(self, block: SourceBlock, index: PageIndex) -> None:
        """Before the first page of a chunk is read, writes to the chunk are logged again."""
        assert self._log is not None
        size = self._log.chunk_pages
        uncleared = self._uncleared[block.idstr]
        for chunk in range(int(index[0]) // size, int(index[-1]) // size + 1):
            if uncleared[chunk]:
                uncleared.clear(chunk)
                first = chunk * size
                self._log.clear(block.idstr, first, min(size, block.pages.npages - first))

    def forget(self, idstr: str, first: int, npages: int) -> None:
        """Pages of which nobody needs what they hold: do not send them (free-page hints)."""
        for block in self.blocks:
            if block.idstr == idstr:
                self.remaining -= block.dirty.count(first, npages) * block.pages.page_size
                block.dirty.clear(first, npages)

    def sync(self) -> int:
        """Take over what the log has; returns how many pages are newly dirty."""
        log, total = self._log, 0
        if log is None:
            return 0
        for block in self.blocks:
            fresh = log.sync(block.idstr, block.dirty)
            fresh -= block.forget_discarded()
            self.remaining += fresh * block.pages.page_size
            total += fresh
            if self._uncleared:
                uncleared = self._uncleared[block.idstr]
                uncleared.set(0, len(uncleared))
        return total
