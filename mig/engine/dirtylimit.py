"""dirty-limit: the vCPUs that write faster than a quota are slowed down, the others are not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from mig.engine.convergence import Period, Trigger
from mig.errors import MigError, OptionError
from mig.guest.base import PerVcpuGuest, SourceGuest, VcpuThrottle
from mig.options import Parameters
from mig.stats import MigrationInfo

#: bytes in the unit of vcpu-dirty-limit
_MB = 1 << 20
#: seconds in which the rate of a vCPU that is slowed down is measured at least: it runs and stands
#: still in turns
_WINDOW = 0.3
#: the most of its time that is taken from a vCPU, as by QEMU
_MOST = 0.99
#: by how much its running time grows at once: what writes nothing for a moment is not let loose
_GROWTH = 2.0
#: the share of the quota by which a rate may differ from it
_TOLERANCE = 0.05


@dataclass(slots=True)
class _Vcpu:
    """What is known of one vCPU.

    pages, since: its count, and when that was
    rate:         bytes per second that it made dirty in the last window
    full:         the same, had it run all the time; 0: it has not written yet
    share:        of its time that it stands still
    """

    pages: int
    since: float
    rate: float = 0.0
    full: float = 0.0
    share: float = 0.0

    def measure(self, nbytes: int, seconds: float) -> None:
        self.rate = nbytes / seconds
        if nbytes:
            self.full = self.rate / (1 - self.share)

    def share_for(self, quota: float) -> float:
        """The share that brings the rate to the quota, in bytes per second."""
        running = 1 - self.share
        if abs(self.rate - quota) <= quota * _TOLERANCE:
            return self.share
        factor = quota / self.rate if self.rate else _GROWTH
        return 1 - max(1 - _MOST, min(1.0, running * min(factor, _GROWTH)))


class DirtyLimit:
    """Keeps each vCPU near ``vcpu-dirty-limit``, once precopy has been in trouble twice.

    vcpus:      the guest's
    parameters: read at each use, so that they can change meanwhile
    on_failure: told, by the thread that looks, when the guest's part of it fails

    Begins as QEMU's does, when more than ``throttle-trigger-threshold`` percent of what is sent
    became dirty in a period for the second time, and looks every ``x-vcpu-dirty-limit-period``.
    What it does then is another rule. QEMU adds to, or takes from, the time that a vCPU sleeps when
    its dirty ring is full, and rests within 25 MB/s of the quota; a vCPU whose ring is taken before
    it is full never sleeps. Here a vCPU stands still for a share of its time: the part that is left
    is multiplied by quota / rate. That leads to the quota in one step when the vCPU writes in
    proportion to its running time, and nearer to it with each step when not.
    """

    def __init__(
        self,
        vcpus: VcpuThrottle,
        parameters: Callable[[], Parameters],
        *,
        on_failure: Callable[[MigError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vcpus = vcpus
        self._parameters = parameters
        self._on_failure = on_failure
        self._clock = clock
        self._trigger = Trigger()
        self._known: list[_Vcpu] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        # seconds of standing still per round at most, seconds in which a ring gets full
        self._shown: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        guest: SourceGuest,
        parameters: Callable[[], Parameters],
        on_failure: Callable[[MigError], None],
    ) -> DirtyLimit:
        """Return one for the guest; OptionError when it cannot tell its vCPUs apart."""
        vcpus = guest.vcpu_throttle() if isinstance(guest, PerVcpuGuest) else None
        if vcpus is None:
            raise OptionError(
                "dirty-limit requires a guest that counts the dirty pages of each vCPU, "
                "like KVM with a dirty ring"
            )
        return cls(vcpus, parameters, on_failure=on_failure)

    # ---- for the migration's thread ---------------------------------------------------------

    def period_over(self, period: Period) -> None:
        """Begin when it is time to."""
        if self._thread is None and self._trigger.fires(period, self._parameters()):
            self.begin()
            self._thread = threading.Thread(target=self._run, name="mig-dirty-limit", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Let every vCPU run at full speed. Nothing is slowed down from now on."""
        self._over.set()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        with contextlib.ExitStack() as stack:
            for number, vcpu in enumerate(self._known):
                if vcpu.share:
                    vcpu.share = 0.0
                    stack.callback(self._vcpus.throttle_vcpu, number, 0.0)

    # ---- for any thread ---------------------------------------------------------------------

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Return the information with what query-migrate says of dirty-limit once it has begun."""
        shown = self._shown
        if shown is None:
            return info
        return replace(
            info,
            dirty_limit_throttle_time_per_round=shown[0],
            dirty_limit_ring_full_time=shown[1],
        )

    # ---- for its own thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._over.wait(self._parameters().x_vcpu_dirty_limit_period / 1000):
                self.look()
        except BaseException as error:
            wrapped = MigError(f"dirty-limit: {type(error).__name__}: {error}")
            self._on_failure(error if isinstance(error, MigError) else wrapped)

    def begin(self) -> None:
        """Count from now on."""
        now = self._clock()
        self._known = [_Vcpu(pages, now) for pages in self._vcpus.dirty_pages()]
        self._show()

    def look(self) -> None:
        """Measure, and slow down or let go."""
        quota = float(self._parameters().vcpu_dirty_limit * _MB)
        counts, now = self._vcpus.dirty_pages(), self._clock()
        for number, (vcpu, pages) in enumerate(zip(self._known, counts, strict=True)):
            seconds = now - vcpu.since
            if seconds > (_WINDOW if vcpu.share else 0):
                vcpu.measure((pages - vcpu.pages) * self._vcpus.page_size, seconds)
                vcpu.pages, vcpu.since = pages, now
                share = vcpu.share_for(quota)
                if share != vcpu.share:
                    self._vcpus.throttle_vcpu(number, share)
                    vcpu.share = share
        self._show()

    def _show(self) -> None:
        nbytes = self._vcpus.round_pages * self._vcpus.page_size
        rates = sum(vcpu.rate for vcpu in self._known)
        self._shown = (
            max((_standing(vcpu, nbytes) for vcpu in self._known), default=0.0),
            nbytes * len(self._known) / rates if rates else 0.0,
        )


def _standing(vcpu: _Vcpu, nbytes: int) -> float:
    """Seconds that it stands still for each ``nbytes`` that it makes dirty."""
    return nbytes / vcpu.full * vcpu.share / (1 - vcpu.share) if vcpu.full else 0.0
