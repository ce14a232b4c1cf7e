"""Dirty logs: who wrote which page since the last look."""

from mig.dirty.log import DirtyLog, SharedDirtyLog
from mig.dirty.track import WriteTracker

__all__ = ["DirtyLog", "SharedDirtyLog", "WriteTracker"]
