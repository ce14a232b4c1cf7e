"""max-bandwidth: how much may be sent when."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Spreads bytes over time: so many a second, in slices of 100 ms.

    bandwidth: bytes per second, 0 for no limit; asked at each use, so that it can change meanwhile
    sleep:     waits so many seconds, or raises when the migration is cancelled
    """

    SLICE = 0.1

    def __init__(
        self,
        bandwidth: Callable[[], int],
        sleep: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bandwidth = bandwidth
        self._sleep = sleep
        self._clock = clock
        self._slice_end = clock() + self.SLICE
        self._used = 0

    def room(self) -> int | None:
        """Bytes that may be sent before the next wait, at least 1; None: any number."""
        budget = int(self._bandwidth() * self.SLICE)
        if not budget:
            return None
        used = self._used if self._clock() < self._slice_end else 0
        return max(1, budget - used)

    def spend(self, nbytes: int) -> None:
        """Account for bytes sent, and wait when the slices they take are not over yet."""
        budget = self._bandwidth() * self.SLICE
        if not budget:
            return
        now = self._clock()
        if now >= self._slice_end:
            self._slice_end, self._used = now + self.SLICE, 0
        self._used += nbytes
        if self._used >= budget:
            over = self._slice_end + (self._used / budget - 1) * self.SLICE
            self._sleep(over - now)
            self._slice_end, self._used = over + self.SLICE, 0
