"""What a migration needs from a guest, and guests: a program's own, and threads that write."""

from mig.guest.base import (
    DestinationGuest,
    LaneTarget,
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

__all__ = [
    "CorruptPage",
    "DestinationGuest",
    "GuestCounters",
    "GuestReport",
    "KvmGuest",
    "LaneTarget",
    "MappedTarget",
    "MemoryGuest",
    "PerVcpuGuest",
    "PostcopyTarget",
    "ProcessGuest",
    "ReleasingGuest",
    "SourceGuest",
    "UnpluggingGuest",
    "VcpuThrottle",
]
