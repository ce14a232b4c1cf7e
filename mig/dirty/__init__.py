"""Dirty logs: who wrote which page since the last look."""

from mig.dirty.kvm import KvmDirtyLog, KvmDirtyRing
from mig.dirty.log import DirtyLog, SharedDirtyLog
from mig.dirty.track import WriteTracker

__all__ = ["DirtyLog", "KvmDirtyLog", "KvmDirtyRing", "SharedDirtyLog", "WriteTracker"]
