"""How long a guest waited for pages in postcopy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PostcopyTimes:
    """How long the guest waited for pages, in seconds.

    vcpus:     each vCPU
    all_vcpus: all of them at the same time
    latencies: of single faults, from the moment the fault was seen: (below so many, how many)
    requests:  how many pages, of the size that is placed at once, the source was asked for
    """

    vcpus: tuple[float, ...] = ()
    all_vcpus: float = 0.0
    latencies: tuple[tuple[float, int], ...] = ()
    requests: int = 0

    @property
    def faults(self) -> int:
        """Number of faults that had to wait."""
        return sum(count for _, count in self.latencies)

    def percentile(self, share: float) -> float | None:
        """Return what this share of the faults (0 to 1) did not exceed; None without faults."""
        left = share * self.faults
        for limit, count in self.latencies:
            left -= count
            if left <= 0:
                return limit
        return None
