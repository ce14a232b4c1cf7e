"""What a migration needs from a guest, and guests: a program's own, and threads that write."""

from mig.guest.base import (
    BalloonedGuest,
    BlockingGuest,
    DestinationGuest,
    EarlyGuest,
    LaneTarget,
    LockedGuest,
    MappedTarget,
    PerVcpuGuest,
    PostcopyTarget,
    ReleasingGuest,
    SourceGuest,
    UnpluggingGuest,
    VcpuThrottle,
)
from mig.guest.kvm import KvmGuest
from mig.guest.memory import MemoryGuest
from mig.guest.process import CorruptPage, GuestCounters, GuestReport, ProcessGuest
from mig.guest.shared import SharedMapping

__all__ = [
    "BalloonedGuest",
    "BlockingGuest",
    "CorruptPage",
    "DestinationGuest",
    "EarlyGuest",
    "GuestCounters",
    "GuestReport",
    "KvmGuest",
    "LaneTarget",
    "LockedGuest",
    "MappedTarget",
    "MemoryGuest",
    "PerVcpuGuest",
    "PostcopyTarget",
    "ProcessGuest",
    "ReleasingGuest",
    "SharedMapping",
    "SourceGuest",
    "UnpluggingGuest",
    "VcpuThrottle",
]
