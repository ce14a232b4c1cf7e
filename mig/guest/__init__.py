"""What a migration needs from a guest, and the guest that a program builds for itself."""

from mig.guest.base import DestinationGuest, SourceGuest
from mig.guest.kvm import KvmGuest
from mig.guest.memory import MemoryGuest

__all__ = ["DestinationGuest", "KvmGuest", "MemoryGuest", "SourceGuest"]
