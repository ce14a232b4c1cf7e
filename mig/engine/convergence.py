"""When to stop the guest: policy of precopy, apart from its mechanics."""

from __future__ import annotations

import time
from collections.abc import Callable


class Convergence:
    """Decides by what is left and by the bandwidth that was reached.

    downtime_limit: milliseconds

    Matches QEMU: stop when the remaining dirty memory can be sent within the downtime limit.
    """

    def __init__(self, downtime_limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = downtime_limit / 1000
        self._clock = clock
        self._began = clock()
        self._bandwidth = 0.0

    def pass_started(self) -> None:
        """A pass over dirty memory begins."""
        self._began = self._clock()

    def pass_ended(self, nbytes: int) -> None:
        """The pass put ``nbytes`` bytes on the wire."""
        seconds = self._clock() - self._began
        if seconds > 0:
            self._bandwidth = nbytes / seconds

    def may_stop(self, remaining: int) -> bool:
        """Whether ``remaining`` bytes can be sent while the guest stands still."""
        return remaining <= self._bandwidth * self._limit


class RateLimit:
    """Spreads bytes over time: at most ``bandwidth`` bytes a second, in slices of 100 ms.

    bandwidth: bytes per second, 0 for no limit
    sleep:     waits so many seconds, or raises when the migration is cancelled
    """

    SLICE = 0.1

    def __init__(
        self,
        bandwidth: int,
        sleep: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = bandwidth * self.SLICE
        self._sleep = sleep
        self._clock = clock
        self._slice_end = clock() + self.SLICE
        self._used = 0

    def spend(self, nbytes: int) -> None:
        """Account for bytes sent, and wait when the slices they take are not over yet."""
        if not self._budget:
            return
        now = self._clock()
        if now >= self._slice_end:
            self._slice_end, self._used = now + self.SLICE, 0
        self._used += nbytes
        if self._used >= self._budget:
            over = self._slice_end + (self._used / self._budget - 1) * self.SLICE
            self._sleep(over - now)
            self._slice_end, self._used = over + self.SLICE, 0
