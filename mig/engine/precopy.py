"""Precopy: the guest runs, and its memory is sent again and again until the rest is small."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mig.engine.blockers import Moment
from mig.engine.convergence import ConvergencePolicy, DirtyRate, Period
from mig.engine.rate import RateLimit
from mig.ram.save import RamSaver
from mig.ram.search import MAX_BATCH, PageSearch

#: seconds that the loop sends before it looks around, as ram_save_iterate() does
SLICE = 0.05
#: seconds over which bandwidth is measured at least
WINDOW = 0.1


class Precopy:
    """One run of the phase; matches migration_iteration_run() and migration_update_counters().

    policy:    says when the guest may be stopped, and how far it is slowed down
    throttle:  slows the guest down to a percentage of its time
    may_leave: whether the destination agrees to the switchover
    leave_now: whether the owner wants the switchover whatever is left (postcopy)
    notify:    told of each sync of the bitmap
    on_period: told of each period of a second or more that a sync ends, and whether the guest runs
    on_pass:   told the number of each pass over dirty memory, before it begins
    sleep:     waits so many seconds, or raises when the migration is cancelled
    """

    def __init__(
        self,
        search: PageSearch,
        saver: RamSaver,
        limit: RateLimit,
        policy: ConvergencePolicy,
        *,
        throttle: Callable[[int], None],
        may_leave: Callable[[], bool],
        leave_now: Callable[[], bool],
        notify: Callable[[Moment], None],
        on_period: Callable[[Period, bool], None],
        on_pass: Callable[[int], None],
        sleep: Callable[[float], None],
    ) -> None:
        self._search = search
        self._saver = saver
        self._limit = limit
        self._policy = policy
        self._throttle_guest = throttle
        self._may_leave = may_leave
        self._leave_now = leave_now
        self._notify = notify
        self._on_period = on_period
        self._on_pass = on_pass
        self._sleep = sleep
        self._page_size = search.listed[0].pages.page_size if search.listed else 1
        self._dirty_at_sync = search.remaining
        self._hints: list[tuple[str, int, int]] = []
        self._hints_lock = threading.Lock()
        now = time.monotonic()
        self._dirty_rate = DirtyRate(self._page_size, now, saver.nbytes)
        self._window = (now, saver.nbytes, saver.npages)
        #: passes over dirty memory, also the one at the start (QEMU's dirty-sync-count)
        self.passes = 0
        #: bytes of stream per second, pages per second, in the last window
        self.bandwidth = 0.0
        self.pages_per_second = 0.0
        #: percent of its time that the guest is made to stand still
        self.throttle = 0

    @property
    def dirty_pages_per_second(self) -> float:
        """How fast the guest makes pages dirty, in the last period of a second or more."""
        return self._dirty_rate.pages_per_second

    @property
    def expected_downtime(self) -> float | None:
        """Seconds; None when the policy does not know."""
        return self._policy.expected_downtime

    def run(self) -> None:
        """Return when what is left may be sent while the guest stands still."""
        self._begin_pass()
        while not (self._leave_now() or self._may_stop_guest()):
            self._send_slice()

    def sync(self, *, guest_runs: bool = True) -> None:
        """Take over the dirty log, and act on what it says of the last second."""
        if not self._search.has_log:
            return
        self._notify(Moment.BEFORE_BITMAP_SYNC)
        with self._hints_lock:
            self._apply_hints()
            fresh = self._search.sync()
        self._dirty_at_sync = self._search.remaining
        self._policy.synced(self._dirty_at_sync)
        self._notify(Moment.AFTER_BITMAP_SYNC)
        self._begin_pass()
        period = self._dirty_rate.synced(fresh, time.monotonic(), self._saver.nbytes)
        if period is None:
            return
        self._on_period(period, guest_runs)
        if not guest_runs:
            return
        percent = self._policy.throttle(period)
        if percent is not None and percent != self.throttle:
            self.throttle = percent
            self._throttle_guest(percent)

    def hint_free(self, idstr: str, first: int, npages: int) -> None:
        """Note that nobody needs what these pages hold now. Any thread.

        What is written to them from now on is sent, as all that is written. ValueError: no such
        pages.
        """
        try:
            end = self._search[idstr].pages.npages
        except KeyError:
            end = -1
        if first < 0 or npages < 0 or first + npages > end:
            raise ValueError(f"there are no pages {first} to {first + npages} of block '{idstr}'")
        # with manual clear a write before the chunk is cleared would be in nobody's log
        if not self._search.clears_chunks:
            with self._hints_lock:
                self._hints.append((idstr, first, npages))

    def _apply_hints(self) -> None:
        for hint in self._hints:
            self._search.forget(*hint)
        self._hints.clear()

    def _begin_pass(self) -> None:
        self.passes += 1
        self._saver.begin_pass()
        self._on_pass(self.passes)

    def _may_stop_guest(self) -> bool:
        """Estimate first: the log is only asked when that may make a difference."""
        if self._left_too_much():
            return False
        self.sync()
        return not self._left_too_much() and self._may_leave()

    def _left_too_much(self) -> bool:
        remaining = self._search.remaining
        return remaining > 0 and remaining >= self._policy.threshold

    def _send_slice(self) -> None:
        """Send until the slice and the host page are over, or until nothing is dirty."""
        end = time.monotonic() + SLICE
        while (now := time.monotonic()) < end or self._search.inside_host_page:
            if self._hints:
                with self._hints_lock:
                    self._apply_hints()
            room = self._limit.room()
            batch = self._search.next_batch(MAX_BATCH if room is None else room // self._page_size)
            if batch is None:
                self._measure(nothing_left=True)
                # without log, or without leave to go, there is nothing to do before the next look
                if not self._may_leave():
                    self._sleep(end - now)
                return
            before = self._saver.nbytes
            self._saver.part(batch)
            if room is not None:
                self._saver.settle()
            self._limit.spend(self._saver.nbytes - before)
            self._measure()

    def _measure(self, *, nothing_left: bool = False) -> None:
        """Close the window when it is long enough; a short first one is better than none."""
        began, offset, npages = self._window
        now, sent = time.monotonic(), self._saver.nbytes
        seconds = now - began
        enough = seconds >= WINDOW or (nothing_left and not self.bandwidth and seconds > 0)
        if not enough:
            return
        self._window = (now, sent, self._saver.npages)
        if sent == offset:
            return  # waiting is no measurement
        self.bandwidth = (sent - offset) / seconds
        self.pages_per_second = (self._saver.npages - npages) / seconds
        remaining = self._dirty_at_sync if self.dirty_pages_per_second else 0
        self._policy.measured(sent - offset, seconds, remaining)
