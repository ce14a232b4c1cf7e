"""PageOrder: which pages are worth sending before the rest, while the guest runs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mig.postcopy.faultorder import FaultOrder, split

#: bytes that are sent around a page that was asked for, and how many they become at most while
#: what was asked for goes on where they end
_LEAST_AHEAD = 64 << 10
_MOST_AHEAD = 4 << 20
#: neighbourhoods that are known at a time: a guest has more places it works at than vCPUs
_MOST_NEIGHBOURHOODS = 16


class Run(NamedTuple):
    """Pages of a block, which is named by its number among those that are searched."""

    block: int
    first: int
    end: int


@dataclass(slots=True)
class _Neighbourhood:
    """Around a page that was asked for.

    ahead, behind: what is still to be sent, ascending; the first goes first
    window:        pages ahead of the last request
    start, limit:  a request in here, or one window further, belongs to it
    """

    block: int
    start: int
    limit: int
    window: int
    ahead: Run
    behind: Run

    def meets(self, block: int, first: int) -> bool:
        return block == self.block and self.start <= first <= self.limit + self.window


class PageOrder:
    """Recorded faults first, then what is near to the last requests; the rest is not its business.

    page_size: bytes
    """

    def __init__(self, page_size: int) -> None:
        self._least = max(1, _LEAST_AHEAD // page_size)
        self._most = max(self._least, _MOST_AHEAD // page_size)
        # the last one that was asked for first
        self._near: list[_Neighbourhood] = []
        self._numbers: Mapping[int, int] = {}
        self._recorded = split(np.empty(0, dtype=np.uint64))
        self._nrecorded = 0
        self._left: Run | None = None
        #: how many recorded runs have been sent; any thread may read it
        self.place = 0

    def follow(self, order: FaultOrder, numbers: Mapping[int, int]) -> None:
        """Begin with what was recorded.

        numbers: of the blocks that are searched, by their numbers in the block list
        """
        self._recorded, self._nrecorded = split(order.runs), len(order.runs)
        self._numbers = numbers
        self.rewind()

    def rewind(self) -> None:
        """Begin anew: pages that were sent may have been lost."""
        self.place = 0
        self._left = None
        self._near.clear()

    @property
    def pending(self) -> bool:
        """Whether next() may have something."""
        return self.place < self._nrecorded or bool(self._near)

    def requested(self, block: int, first: int, end: int) -> None:
        """Pages first..end have been asked for, and are sent."""
        known = next((near for near in self._near if near.meets(block, first)), None)
        if known is None:
            window = self._least
            behind = Run(block, max(0, first - window // 2), first)
            known = _Neighbourhood(block, first, end, window, behind, behind)
            del self._near[_MOST_NEIGHBOURHOODS - 1 :]
        else:
            self._near.remove(known)
            known.window = min(2 * known.window, self._most)
        known.limit = max(known.limit, end + known.window)
        known.ahead = Run(block, end, known.limit)
        self._near.insert(0, known)

    def next(self) -> Run | None:
        """Return what is to be sent next, dirty or not; None when there is nothing to say.

        It stays the same until took() is called.
        """
        while self.place < self._nrecorded:
            if self._left is not None:
                return self._left
            block, first, count = (int(column[self.place]) for column in self._recorded)
            if block in self._numbers:
                return Run(self._numbers[block], first, first + count)
            self.place += 1
        for near in self._near:
            for run in (near.ahead, near.behind):
                if run.first < run.end:
                    return run
        return None

    def took(self, run: Run, end: int) -> None:
        """What next() has returned was sent up to page ``end``."""
        left = run._replace(first=end)
        if self.place < self._nrecorded:
            self._left = left if end < run.end else None
            self.place += end >= run.end
            return
        for near in self._near:
            if run is near.ahead:
                near.ahead = left
                return
            if run is near.behind:
                near.behind = left
                return
