"""How long vCPUs wait for pages, as postcopy-blocktime defines it: plainly, moment by moment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Blocktime:
    """nvcpus vCPUs; all times in one unit.

    vcpus:   how long each has waited
    overlap: how long all of them have at the same time; counted when the page comes that ends it
    """

    nvcpus: int
    waiting: dict[int, int] = field(default_factory=dict)
    vcpus: list[int] = field(default_factory=list)
    overlap: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        self.vcpus = [0] * self.nvcpus

    def _go_on_to(self, now: int) -> None:
        passed, self.last = now - self.last, now
        for vcpu in self.waiting:
            self.vcpus[vcpu] += passed
        if len(self.waiting) == self.nvcpus:
            self.overlap += passed

    def begin(self, vcpu: int, address: int, now: int) -> None:
        self._go_on_to(now)
        self.waiting[vcpu] = address

    def end(self, address: int, now: int) -> None:
        self._go_on_to(now)
        self.waiting = {v: a for v, a in self.waiting.items() if a != address}
