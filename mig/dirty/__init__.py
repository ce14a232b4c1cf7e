"""Dirty logs: who wrote which page since the last look."""

from mig.dirty.kvm import KvmDirtyLog, KvmDirtyRing
from mig.dirty.log import DirtyLog, SharedDirtyLog

__all__ = ["DirtyLog", "KvmDirtyLog", "KvmDirtyRing", "SharedDirtyLog"]
