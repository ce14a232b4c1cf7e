"""Dirty logs: who wrote which page since the last look."""

from mig.dirty.log import DirtyLog, SharedDirtyLog

__all__ = ["DirtyLog", "SharedDirtyLog"]
