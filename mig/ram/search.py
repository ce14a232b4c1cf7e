"""Which pages to send next: a cursor over the dirty bitmaps of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mig import _core
from mig.dirty.log import DirtyLog
from mig.errors import OptionError
from mig.pages import HOST_PAGE_SIZE, PageIndex
from mig.postcopy.faultorder import FaultOrder
from mig.ram.order import PageOrder

#: pages of a batch at most: 4 MiB of small pages, so that a call is worth its overhead
MAX_BATCH = 1024
#: pages of a batch that ends with the host page that it would have ended in
_MAX_WHOLE_BATCH = 2 * MAX_BATCH
#: runs that are looked at for one batch, so that requests are not kept waiting by a long order of
#: pages that have been sent
_MOST_RUNS = 1024


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A RAM block as the sender sees it.

    pages:       where its pages are
    detect_zero: look for zero pages; False where all of them are known already
    dirty:       one bit per page that is still to be sent
    discarded:   (first page, number of pages) of parts that are not plugged in: they are neither
                 read nor sent, whatever the dirty log says (QEMU's RamDiscardManager)
    shared:      the destination has the same memory: not sent with capability x-ignore-shared
    address:     where it stands in guest-physical memory, None when unknown
    host_page_size: bytes, a power of two; what is dirty in a host page is sent in one go
    """

    idstr: str
    used_length: int
    pages: _core.Pages
    detect_zero: bool
    dirty: _core.Bitmap
    discarded: Sequence[tuple[int, int]] = field(default=())
    shared: bool = False
    address: int | None = None
    host_page_size: int = HOST_PAGE_SIZE

    def host_page_end(self, page_index: int) -> int:
        """Return the first page behind the host page that the page is in."""
        npages = max(1, self.host_page_size // self.pages.page_size)
        return min((page_index // npages + 1) * npages, self.pages.npages)

    def host_pages(self, first: int, end: int) -> tuple[int, int]:
        """Return the host pages that pages first..end are in, as pages of the block."""
        npages = max(1, self.host_page_size // self.pages.page_size)
        return first - first % npages, min(-(-end // npages) * npages, self.pages.npages)

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

    blocks: all that the guest has; afterwards those that are searched
    log:    told before pages are read whose writes it does not log any more (see DirtyLog.clear)
    ignore_shared: leave out shared blocks (capability x-ignore-shared); OptionError for blocks
            without address, which such a stream needs

    A batch's index array is reused by the next one.
    """

    def __init__(
        self,
        blocks: Sequence[SourceBlock],
        log: DirtyLog | None = None,
        *,
        ignore_shared: bool = False,
    ) -> None:
        homeless = [b.idstr for b in blocks if b.address is None and ignore_shared]
        if homeless:
            raise OptionError(
                "capability 'x-ignore-shared' is not possible: nobody knows the guest-physical "
                f"address of block '{homeless[0]}'"
            )
        #: those of the block list
        self.listed = blocks
        self.ignore_shared = ignore_shared
        self.blocks = [b for b in blocks if not self.ignores(b)]
        self._log = log
        self._by_idstr = {b.idstr: b for b in blocks}
        self._index = np.empty(_MAX_WHOLE_BATCH, dtype=np.uint64)
        self._uncleared = self._chunks(log.chunk_pages) if log is not None else {}
        for block in self.blocks:
            block.forget_discarded()
        #: bytes of pages that are dirty now; any thread may read it
        self.remaining = sum(b.dirty.count() * b.pages.page_size for b in self.blocks)
        #: whether the last batch has left dirty pages of the host page it ends in: they come next
        self.inside_host_page = False
        #: whether every page has been looked at once: the first full round is over
        self.wrapped = False
        # without blocks there is nothing to order
        self._order = PageOrder(blocks[0].pages.page_size if blocks else HOST_PAGE_SIZE)
        self.rewind()

    def __getitem__(self, idstr: str) -> SourceBlock:
        """Return the block of that name, searched or not; KeyError."""
        return self._by_idstr[idstr]

    def ignores(self, block: SourceBlock) -> bool:
        """Whether the block is listed, but none of its pages are looked at or sent."""
        return self.ignore_shared and block.shared

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

    def follow(self, order: FaultOrder) -> None:
        """Let pages go in this order first, host pages as a whole."""
        numbers = {id(block): number for number, block in enumerate(self.blocks)}
        of_listed = {n: numbers.get(id(block)) for n, block in enumerate(self.listed)}
        self._order.follow(order, {n: own for n, own in of_listed.items() if own is not None})

    @property
    def place(self) -> int:
        """How many runs of the order that it follows have been sent. Any thread."""
        return self._order.place

    def rewind(self) -> None:
        """Go on with the first page of the first block, or of the order."""
        self._order.rewind()
        # a host page that was begun is broken off: who goes on begins it anew, or not at all
        self.inside_host_page = False
        self._begin_walk()

    def _begin_walk(self) -> None:
        self._block = 0
        self._page = 0

    def next_batch(self, max_pages: int = MAX_BATCH) -> PageBatch | None:
        """Take the next dirty pages, clearing their bits; None when no page is dirty.

        max_pages: at least 1; a batch has MAX_BATCH at most, and then as many more as finish the
                   host page it ends in, unless that takes more than MAX_BATCH: the rest of so
                   large a page comes with the next ones (`inside_host_page`)
        """
        inside, self.inside_host_page = self.inside_host_page, False
        room = self._index[: min(max(max_pages, 1), MAX_BATCH)]
        if not self.remaining:
            self.wrapped = True
            return None
        if self._order.pending and not inside:
            batch = self._next_in_order(room)
            if batch is not None:
                return batch
        return self._walk(room)

    def _walk(self, room: PageIndex) -> PageBatch | None:
        """Take the next dirty pages from where it stands."""
        # the block that it begins in may have dirty pages before the one it begins with
        for _ in range(len(self.blocks) + 1):
            if self._block == len(self.blocks):
                self.wrapped = True
                self._begin_walk()
            block = self.blocks[self._block]
            n = block.dirty.take(self._page, room)
            if n:
                if block.host_page_size > block.pages.page_size:
                    n += self._finish_host_page(block, n)
                self._page = int(self._index[n - 1]) + 1
                return self._taken(block, self._index[:n])
            self._block += 1
            self._page = 0
        return None

    def _taken(self, block: SourceBlock, index: PageIndex) -> PageBatch:
        self.remaining -= len(index) * block.pages.page_size
        if self._uncleared:
            self._clear_log(block, index)
        return PageBatch(block, index)

    def next_in_order(self, max_pages: int = MAX_BATCH) -> PageBatch | None:
        """As next_batch(), but None also when what comes next is only the rest."""
        if self.inside_host_page or not (self.remaining and self._order.pending):
            return None
        return self._next_in_order(self._index[: min(max(max_pages, 1), MAX_BATCH)])

    def _next_in_order(self, room: PageIndex) -> PageBatch | None:
        """Take pages that are worth sending before the rest; None: there are none."""
        n, number = 0, None
        for _ in range(_MOST_RUNS):
            run = self._order.next()
            if n == len(room) or run is None or number not in (None, run.block):
                break
            block = self.blocks[run.block]
            first, end = block.host_pages(run.first, run.end)
            left = block.dirty.count(first, end - first) if first < end else 0
            fits = min(left, len(room) - n)
            if fits < left and block.host_page_size > block.pages.page_size:
                if n:
                    break
                # begun here it is finished, however long it is
                self._block, self._page = run.block, first
                return self._walk(room)
            if fits:
                n += block.dirty.take(first, room[n : n + fits])
                number = run.block
            self._order.took(run, run.end if fits == left else int(room[n - 1]) + 1)
        if number is None:
            return None
        # neighbours make one piece of what is sent, and the log wants them so
        room[:n].sort()
        return self._taken(self.blocks[number], room[:n])

    def requested(self, block: SourceBlock, first: int, end: int) -> None:
        """Pages first..end were asked for, and somebody else has sent what was dirty of them.

        What is near goes next, and the walk goes on behind them, it will be wanted, too; but not
        while the walk is inside a host page.
        """
        number = self.blocks.index(block)
        self._order.requested(number, first, end)
        if not self.inside_host_page:
            self._block, self._page = number, end

    def replace_dirty(self, idstr: str, dirty: _core.Bitmap) -> None:
        """Let these pages of a block be dirty, and no others."""
        block = self._by_idstr[idstr]
        before = block.dirty.count()
        block.dirty.clear(0, block.pages.npages)
        block.dirty.merge(dirty)
        block.forget_discarded()
        self.remaining += (block.dirty.count() - before) * block.pages.page_size

    def _finish_host_page(self, block: SourceBlock, n: int) -> int:
        """Add what is dirty in the host page that ``n`` pages end in; returns how many pages."""
        last = int(self._index[n - 1])
        end = block.host_page_end(last)
        left = block.dirty.count(last + 1, end - last - 1)
        if left > MAX_BATCH:
            # as much at once would be far more than was asked for
            self.inside_host_page = True
            return 0
        return block.dirty.take(last + 1, self._index[n : n + left])

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
        """Pages of which nobody needs what they hold: do not send them (free-page hints).

        Other pages of the same host page are sent nevertheless, as by QEMU.
        """
        block = self._by_idstr[idstr]
        if not self.ignores(block):
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
