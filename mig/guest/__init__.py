"""What a migration needs from a guest, and guests: a program's own, and threads that write."""

from mig.guest.base import (
    BalloonedGuest,
    DestinationGuest,
    LaneTarget,
    LockedGuest,
    PerVcpuGuest,
    PostcopyTarget,
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
    "CorruptPage",
    "DestinationGuest",
    "GuestCounters",
    "GuestReport",
    "KvmGuest",
    "LaneTarget",
    "LockedGuest",
    "MemoryGuest",
    "PerVcpuGuest",
    "PostcopyTarget",
    "ProcessGuest",
    "SharedMapping",
    "SourceGuest",
    "UnpluggingGuest",
    "VcpuThrottle",
]
