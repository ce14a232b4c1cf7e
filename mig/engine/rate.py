"""max-bandwidth: how much may be sent when."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Spreads bytes over time: at most ``bandwidth`` bytes a second, in slices of 100 ms.

    bandwidth: returns bytes per second, 0 for no limit; a change takes effect at once
    sleep:     waits so many seconds, less when the bandwidth changes, or raises when the migration
               is cancelled
    """

    SLICE = 0.1
    #: what is left of a sleep that is not worth another one (seconds)
    _NOTHING = 1e-6

    def __init__(
        self,
        bandwidth: Callable[[], int],
        sleep: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bandwidth = bandwidth
        self._sleep = sleep
        self._clock = clock
        self._limit = bandwidth()
        self._start_slice(clock())

    def room(self) -> int | None:
        """Bytes that may be sent before the next wait, at least 1; None: any number."""
        bandwidth = self._bandwidth()
        if not bandwidth:
            return None
        budget = int(bandwidth * self.SLICE)
        used = self._used if self._clock() < self._slice_end else 0
        return max(1, budget - used)

    def spend(self, nbytes: int) -> None:
        """Account for bytes sent, and wait when the slices they take are not over yet."""
        now = self._clock()
        if self._changed() or now >= self._slice_end:
            self._start_slice(now)
        self._used += nbytes
        budget = self._limit * self.SLICE
        if budget and self._used >= budget:
            self._wait(self._slice_end + (self._used / budget - 1) * self.SLICE)

    def _start_slice(self, now: float) -> None:
        self._slice_end, self._used = now + self.SLICE, 0

    def _changed(self) -> bool:
        """Whether there is another limit; what went under the old one is settled then."""
        old, self._limit = self._limit, self._bandwidth()
        return self._limit != old

    def _wait(self, until: float) -> None:
        while (left := until - self._clock()) > self._NOTHING:
            self._sleep(left)
            if self._changed():
                self._start_slice(self._clock())
                return
        self._start_slice(until)
