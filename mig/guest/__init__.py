"""What a migration needs from a guest, and guests: a program's own, and threads that write."""

from mig.guest.base import (
    BlockingGuest,
    DestinationGuest,
    EarlyGuest,
    LaneTarget,
    MappedTarget,
    PerVcpuGuest,
    PostcopyTarget,
    SourceGuest,
    UnpluggingGuest,
    VcpuThrottle,
)
from mig.guest.kvm import KvmGuest
from mig.guest.memory import MemoryGuest
from mig.guest.process import CorruptPage, GuestCounters, GuestReport, ProcessGuest

__all__ = [
    "BlockingGuest",
    "CorruptPage",
    "DestinationGuest",
    "EarlyGuest",
    "GuestCounters",
    "GuestReport",
    "KvmGuest",
    "LaneTarget",
    "MappedTarget",
    "MemoryGuest",
    "PerVcpuGuest",
    "PostcopyTarget",
    "ProcessGuest",
    "SourceGuest",
    "UnpluggingGuest",
    "VcpuThrottle",
]
