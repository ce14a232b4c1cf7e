"""Giving memory back that the destination has (capability release-ram)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mig import _core
from mig.dirty.track import is_anonymous
from mig.ram.search import PageBatch, PageSearch, SourceBlock

if TYPE_CHECKING:
    from mig.guest import ReleasingGuest
    from mig.memory import GuestMemory


class MemoryRelease:
    """Gives pages of a GuestMemory back: private ones, and those of a file, which gets a hole."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._anonymous: dict[str, bool] = {}

    def release(self, idstr: str, first: int, npages: int) -> None:
        """OSError, ValueError when this memory cannot be given back."""
        block = self._memory[idstr]
        if idstr not in self._anonymous:
            self._anonymous[idstr] = is_anonymous(block)
        _core.discard_memory(block.pages, first, npages, self._anonymous[idstr])


class Releaser:
    """Gives pages back once they are sent; matches ram_release_page().

    A block of which something cannot be given back is left alone from then on.
    """

    def __init__(self, guest: ReleasingGuest) -> None:
        self._guest = guest
        self._stuck: set[str] = set()
        #: pages given back
        self.npages = 0

    def sent(self, batch: PageBatch) -> None:
        """Give pages back that were sent in postcopy, host pages when their last page was."""
        block = batch.block
        breaks = np.flatnonzero(np.diff(batch.index) != 1) + 1
        for run in np.split(batch.index, breaks):
            first, end = int(run[0]), int(run[-1]) + 1
            self._release(block, *_whole(block, first, end))

    def release_clean(self, search: PageSearch) -> None:
        """Give everything back that was sent before and has not changed since."""
        for block in search.blocks:
            for first, end in list(_clean(block)):
                self._release(block, first, end)

    def _release(self, block: SourceBlock, first: int, end: int) -> None:
        if first >= end or block.idstr in self._stuck:
            return
        try:
            self._guest.release_pages(block.idstr, first, end - first)
            self.npages += end - first
        except (OSError, ValueError):
            self._stuck.add(block.idstr)


def _whole(block: SourceBlock, first: int, end: int) -> tuple[int, int]:
    """The host pages that end in these pages; they are sent from their first page to their last."""
    npages = max(1, block.host_page_size // block.pages.page_size)
    if end != block.pages.npages:
        end = end // npages * npages
    return first // npages * npages, end


def _clean(block: SourceBlock) -> Iterator[tuple[int, int]]:
    """The runs of pages that are not dirty; whole host pages, as those that are."""
    at = 0
    for first, end in block.dirty.runs(0, block.pages.npages):
        yield at, int(first)
        at = int(end)
    yield at, block.pages.npages
