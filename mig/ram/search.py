"""Which pages to send next: a cursor over the dirty bitmaps of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    idstr: str
    used_length: int
    pages: _core.Pages
    detect_zero: bool
    dirty: _core.Bitmap


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Pages of one block: uint64 indexes, ascending."""

    block: SourceBlock
    index: PageIndex


class PageSearch:
    """Takes dirty pages out of the bitmaps, block after block, in passes.

    A batch's index array is reused by the next one.
    """

    def __init__(self, blocks: Sequence[SourceBlock]) -> None:
        self.blocks = blocks
        self._index = np.empty(MAX_BATCH, dtype=np.uint64)
        #: bytes of pages that are dirty now; any thread may read it
        self.remaining = sum(b.dirty.count() * b.pages.page_size for b in blocks)
        self.rewind()

    def rewind(self) -> None:
        """Begin a new pass at the first page of the first block."""
        self._block = 0
        self._page = 0

    def next_batch(self) -> PageBatch | None:
        """Take the next dirty pages, clearing their bits; None at the end of the pass."""
        while self._block < len(self.blocks):
            block = self.blocks[self._block]
            n = block.dirty.take(self._page, self._index)
            if n:
                self._page = int(self._index[n - 1]) + 1
                self.remaining -= n * block.pages.page_size
                return PageBatch(block, self._index[:n])
            self._block += 1
            self._page = 0
        return None

    def sync(self, log: DirtyLog) -> int:
        """Take over what the log has; returns how many pages are newly dirty."""
        total = 0
        for block in self.blocks:
            fresh = log.sync(block.idstr, block.dirty)
            self.remaining += fresh * block.pages.page_size
            total += fresh
        return total
