"""When to stop the guest, how far to slow it down: policy of precopy, apart from its mechanics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mig.options import Parameters


@dataclass(frozen=True, slots=True)
class Period:
    """What happened between two syncs of the dirty bitmap, at least a second.

    dirty: bytes of pages that became dirty
    sent:  bytes of stream
    """

    seconds: float
    dirty: int
    sent: int


class Trigger:
    """Tells when a guest dirties too much: at every second period in which it does.

    Too much is more than ``throttle-trigger-threshold`` percent of what is sent.
    """

    def __init__(self) -> None:
        self._high = 0

    @staticmethod
    def allowed(period: Period, parameters: Parameters) -> int:
        """Return the bytes that may become dirty in the period."""
        return period.sent * parameters.throttle_trigger_threshold // 100

    def fires(self, period: Period, parameters: Parameters) -> bool:
        """Count the period, and say whether something is to be done."""
        self._high += period.dirty > self.allowed(period, parameters)
        if self._high < 2:
            return False
        self._high = 0
        return True


class ConvergencePolicy(Protocol):
    """What an outgoing migration asks while the guest runs. Called by its own thread."""

    @property
    def threshold(self) -> float:
        """Bytes of dirty memory below which the guest may be stopped; 0: only when all is sent."""

    @property
    def expected_downtime(self) -> float | None:
        """Seconds that the guest would stand still if it were stopped now, None when not known."""

    def measured(self, nbytes: int, seconds: float, remaining: int) -> None:
        """``nbytes`` of stream were sent in ``seconds``.

        remaining: bytes that the last sync left dirty; 0 while the guest is not known to write
        """

    def throttle(self, period: Period) -> int | None:
        """Percent of its time that the guest is to stand still from now on, None: no change."""


#: bytes that must be sent for a measurement to say something about the downtime
_ENOUGH = 10_000


class Convergence:
    """QEMU's policy.

    The guest may be stopped when what is dirty can be sent within ``downtime-limit``, at the
    bandwidth that was measured last or at ``avail-switchover-bandwidth`` if that is given. With
    ``auto_converge`` a guest that dirties more than ``throttle-trigger-threshold`` percent of what
    is sent, for the second time, is slowed down.

    parameters: read at each use, so that they can change meanwhile
    """

    def __init__(self, parameters: Callable[[], Parameters], *, auto_converge: bool) -> None:
        self._parameters = parameters
        self._auto_converge = auto_converge
        self._trigger = Trigger()
        self._throttle = 0
        #: bytes of stream per second, as it was measured last
        self.bandwidth = 0.0
        self.expected_downtime: float | None = None

    @property
    def _switchover_bandwidth(self) -> float:
        return self._parameters().avail_switchover_bandwidth or self.bandwidth

    @property
    def threshold(self) -> float:
        """Bytes that can be sent within the downtime limit."""
        return self._switchover_bandwidth * self._parameters().downtime_limit / 1000

    def measured(self, nbytes: int, seconds: float, remaining: int) -> None:
        """Take the bandwidth from what was sent."""
        if seconds > 0:
            self.bandwidth = nbytes / seconds
        if remaining and nbytes > _ENOUGH:
            self.expected_downtime = remaining / self._switchover_bandwidth

    def throttle(self, period: Period) -> int | None:
        """Slow the guest down at every second period in which it dirties too much."""
        parameters = self._parameters()
        if not self._auto_converge or not self._trigger.fires(period, parameters):
            return None
        if not self._throttle:
            step = parameters.cpu_throttle_initial
        elif parameters.cpu_throttle_tailslow:
            # no more than would bring the rate down to what is allowed
            running = 100 - self._throttle
            ideal = int(running * self._trigger.allowed(period, parameters) / period.dirty)
            step = min(running - ideal, parameters.cpu_throttle_increment)
        else:
            step = parameters.cpu_throttle_increment
        self._throttle = min(self._throttle + step, parameters.max_cpu_throttle)
        return self._throttle


class DirtyRate:
    """Adds up what syncs find until a period is over; matches migration_bitmap_sync()."""

    #: seconds that a period has at least
    PERIOD = 1.0

    def __init__(self, page_size: int, now: float, sent: int) -> None:
        self._page_size = page_size
        self._began, self._sent_before = now, sent
        self._fresh = 0
        #: pages per second, in the last period
        self.pages_per_second = 0.0

    def synced(self, fresh: int, now: float, sent: int) -> Period | None:
        """Count ``fresh`` pages; ``sent`` bytes are sent by now. Returns a period that is over."""
        self._fresh += fresh
        seconds = now - self._began
        if seconds < self.PERIOD:
            return None
        period = Period(seconds, self._fresh * self._page_size, sent - self._sent_before)
        self.pages_per_second = self._fresh / seconds
        self._began, self._sent_before, self._fresh = now, sent, 0
        return period
