"""SourceMemory: the memory of a guest while it is sent."""

from __future__ import annotations

import contextlib

from mig.dirty import DirtyLog
from mig.guest import SourceGuest
from mig.options import Capability
from mig.ram.search import PageSearch, SourceBlock


class SourceMemory:
    """A guest's blocks, pinned, and the log of writes to them, from take() to release()."""

    def __init__(self, guest: SourceGuest, capabilities: frozenset[Capability]) -> None:
        self._guest = guest
        self._capabilities = capabilities
        self._pinned: list[SourceBlock] = []
        self._log: DirtyLog | None = None

    def take(self) -> PageSearch:
        """Pin the blocks and log what is written from now on; OptionError as of PageSearch."""
        blocks = self._guest.source_blocks()
        for block in blocks:
            block.pages.pin()
            self._pinned.append(block)
        # a snapshot sends each page once, as it was
        if Capability.BACKGROUND_SNAPSHOT not in self._capabilities:
            self._log = self._guest.dirty_log()
        if self._log is not None:
            self._log.start()
        elif Capability.POSTCOPY_RAM in self._capabilities:
            # a page that was never sent is asked for like any other
            for block in blocks:
                block.dirty.set(0, block.pages.npages)
        ignore_shared = Capability.X_IGNORE_SHARED in self._capabilities
        return PageSearch(blocks, self._log, ignore_shared=ignore_shared)

    def release(self) -> None:
        """Undo it, whatever of that fails; more or less of it may have been done."""
        with contextlib.ExitStack() as stack:
            if self._log is not None:
                stack.callback(self._log.stop)
            for block in self._pinned:
                stack.callback(block.pages.unpin)
