"""max-bandwidth: how much may be sent when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class RateLimit:
    """Spreads bytes over time: at most ``bandwidth`` bytes a second, a few milliseconds' at a time.

    bandwidth: returns bytes per second, 0 for no limit; a change takes effect at once
    sleep:     waits so many seconds, less when the bandwidth changes, or raises when the migration
               is cancelled

    In no second is more spent than the bandwidth and what one spend() was told at once, also where
    time that was lost is made up for. QEMU has slices of 100 ms: a second can have a tenth more,
    when it begins before one slice's burst and ends after another's, and a slice that its thread
    slept through is lost.
    """

    #: seconds' worth of bytes for which there is room at a time
    TURN = 0.005
    #: seconds in which nothing was sent, because the thread did not run or had nothing to send,
    #: that are made up for
    CARRY = 0.3
    #: the span of time that no more is spent in than the bandwidth allows for it (seconds)
    SPAN = 1.0
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
        # when all that was spent is paid for
        self._due = clock()
        # what was spent in the last SPAN, and when
        self._spent: deque[tuple[float, int]] = deque()
        self._total = 0

    def room(self) -> int | None:
        """Bytes that may be sent before the next wait, at least 1; None: any number."""
        bandwidth = self._bandwidth()
        return max(1, int(bandwidth * self.TURN)) if bandwidth else None

    def spend(self, nbytes: int) -> None:
        """Account for bytes sent, and wait until more may be."""
        now = self._clock()
        if self._changed():
            self._settle()
        if self._limit:
            self._due = max(self._due, now - self.CARRY) + nbytes / self._limit
            self._spent.append((now, nbytes))
            self._total += nbytes
            self._wait()

    def _settle(self) -> None:
        """Forget what was spent."""
        self._due = self._clock()
        self._spent.clear()
        self._total = 0

    def _changed(self) -> bool:
        """Whether there is another limit; what went under the old one is settled then."""
        old, self._limit = self._limit, self._bandwidth()
        return self._limit != old

    def _next(self, now: float) -> float:
        """When more may be spent."""
        while self._spent and self._spent[0][0] <= now - self.SPAN:
            self._total -= self._spent.popleft()[1]
        if not self._spent or self._total < self._limit * self.SPAN:
            return self._due
        return max(self._due, self._spent[0][0] + self.SPAN)

    def _wait(self) -> None:
        now = self._clock()
        while (left := self._next(now) - now) > self._NOTHING:
            self._sleep(left)
            if self._changed():
                self._settle()
            now = self._clock()
