"""Reasons why a guest cannot be migrated, and who is told of the moments of a migration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from mig.errors import BlockedError


class Moment(StrEnum):
    """Moments of precopy that notifiers are told of (QEMU's PrecopyNotifyReason)."""

    SETUP = "setup"
    BEFORE_BITMAP_SYNC = "before-bitmap-sync"
    AFTER_BITMAP_SYNC = "after-bitmap-sync"
    COMPLETE = "complete"
    CLEANUP = "cleanup"


#: told by the migration's thread; what it raises makes the migration fail, but for CLEANUP
Notifier = Callable[[Moment], None]


class Blockers:
    """Reasons why a guest cannot be migrated now. Any thread.

    Matches migrate_add_blocker() and migrate_del_blocker(): while the guest migrates no reason can
    be added, and while there is a reason it does not begin to.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: list[str] = []
        self._migrations = 0

    @property
    def reasons(self) -> tuple[str, ...]:
        """What there is."""
        with self._lock:
            return tuple(self._reasons)

    @contextmanager
    def blocked(self, reason: str) -> Iterator[None]:
        """Block migration inside of the context. BlockedError while the guest migrates."""
        self.add(reason)
        try:
            yield
        finally:
            self.remove(reason)

    def add(self, reason: str) -> None:
        """Block migration until remove(). BlockedError while the guest migrates."""
        with self._lock:
            if self._migrations:
                raise BlockedError(
                    f"disallowing migration blocker (migration in progress) for: {reason}"
                )
            self._reasons.append(reason)

    def remove(self, reason: str) -> None:
        """Take a reason back; ValueError when it is not there."""
        with self._lock:
            self._reasons.remove(reason)

    def begin(self) -> None:
        """A migration begins; BlockedError with the reasons when it must not."""
        with self._lock:
            if self._reasons:
                raise BlockedError("; ".join(self._reasons))
            self._migrations += 1

    def end(self) -> None:
        """Undo begin(): it is over."""
        with self._lock:
            self._migrations -= 1
