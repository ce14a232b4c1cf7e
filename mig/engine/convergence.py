"""When to stop the guest, how far to slow it down: policy of precopy, apart from its mechanics."""

from __future__ import annotations

from collections import deque
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

    def synced(self, remaining: int) -> None:
        """A sync of the dirty bitmap is over; ``remaining`` bytes are dirty now."""

    def throttle(self, period: Period) -> int | None:
        """Percent of its time that the guest is to stand still from now on, None: no change."""


#: what makes a policy for a migration: called with its parameters, which can change meanwhile, and
#: with auto_converge, whether that capability is on
PolicyMaker = Callable[..., ConvergencePolicy]

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
        """Bytes that can be sent within the downtime limit; 0 until something was measured."""
        if not self.bandwidth:
            return 0.0
        return self._switchover_bandwidth * self._parameters().downtime_limit / 1000

    def synced(self, remaining: int) -> None:
        """Nothing to note: what is left now is all that counts."""

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


class Patient(Convergence):
    """Goes on as long as it is worth it; for who wants a short downtime rather than a short move.

    QEMU's policy stops the guest as soon as what is dirty can be sent within ``downtime-limit``,
    so on a fast link nearly every guest stands still for nearly the whole limit. This one sends
    each pass to its end, and stops the guest when it is within the limit and the last pass has not
    made what is dirty at least ``factor`` times smaller: the next one would not, either. A pass
    over a guest that writes at a steady rate makes it smaller by bandwidth over dirty rate, so this
    ends soon: in a pass as short as it takes to look at the dirty log.

    It counts on the lowest bandwidth of the last windows, where QEMU's takes the last: when that
    is an exception the guest stands still for longer than the limit.

    Measured with a process guest of 1 GiB that dirties 200 MiB/s, limit 300 ms, on two busy cores,
    ten moves each in turn: QEMU's policy stops it for 226 ms in the median and 499 at worst, three
    times for more than the limit; this one for 13 ms, 48 at worst, in moves of 3.1 instead of
    2.3 s. With passes=0, so by the slowest window alone, it is 160 ms, 289 at worst.

    factor: more than 1; how many times smaller a pass must make what is dirty to be worth another
    passes: so many of them at most, then QEMU's rule alone holds
    """

    #: windows of 100 ms that are looked back at
    WINDOWS = 5

    def __init__(
        self,
        parameters: Callable[[], Parameters],
        *,
        auto_converge: bool,
        factor: float = 1.5,
        passes: int = 30,
    ) -> None:
        super().__init__(parameters, auto_converge=auto_converge)
        if not factor > 1:
            raise ValueError(f"factor is {factor}: it must be more than 1")
        self._factor = factor
        self._left = passes
        self._remaining: int | None = None
        self._worth_it = passes > 0
        self._windows: deque[float] = deque(maxlen=self.WINDOWS)
        self._syncs = 0

    @property
    def threshold(self) -> float:
        """0 while another pass is worth it, so that a pass is sent to its end; then as QEMU."""
        return 0.0 if self._worth_it else super().threshold

    def measured(self, nbytes: int, seconds: float, remaining: int) -> None:
        """Take the bandwidth from the slowest of the last windows."""
        if seconds <= 0:
            return
        # many passes in one window: it tells how fast the guest writes, not how fast it is sent
        if self._syncs < 2 or not self._windows:
            self._windows.append(nbytes / seconds)
        self._syncs = 0
        super().measured(round(min(self._windows) * seconds), seconds, remaining)

    def synced(self, remaining: int) -> None:
        """Compare with what was left the last time."""
        before, self._remaining = self._remaining, remaining
        self._syncs += 1
        self._left -= 1
        smaller = before is None or remaining * self._factor <= before
        self._worth_it = smaller and self._left > 0


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
