"""When to stop the guest: policy of precopy, apart from its mechanics."""

from __future__ import annotations

import time
from collections.abc import Callable


class Convergence:
    """Decides by what is left and by the bandwidth that was reached.

    downtime_limit: returns milliseconds, asked at each decision

    Matches QEMU: stop when the remaining dirty memory can be sent within the downtime limit.
    """

    def __init__(
        self, downtime_limit: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = downtime_limit
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
        return remaining <= self._bandwidth * self._limit() / 1000


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
