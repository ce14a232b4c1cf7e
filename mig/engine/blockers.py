"""Reasons why a guest cannot be migrated, and who is told of the moments of a migration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

from mig.errors import BlockedError
from mig.options import MigMode


class Moment(StrEnum):
    """Moments of precopy that notifiers are told of (QEMU's PrecopyNotifyReason)."""

    SETUP = "setup"
    BEFORE_BITMAP_SYNC = "before-bitmap-sync"
    AFTER_BITMAP_SYNC = "after-bitmap-sync"
    COMPLETE = "complete"
    CLEANUP = "cleanup"


#: told by the migration's thread; what it raises makes the migration fail, but for CLEANUP
Notifier = Callable[[Moment], None]


#: every mode of a migration
ALL_MODES: Final = frozenset(MigMode)


class Blockers:
    """Reasons why a guest cannot be migrated now. Any thread.

    only_migratable: refuse every reason against mode normal, as QEMU's ``-only-migratable`` does

    Matches migrate_add_blocker_modes() and migrate_del_blocker(): while the guest migrates no
    reason can be added, and while there is one against its mode it does not begin to.
    """

    def __init__(self, *, only_migratable: bool = False) -> None:
        self.only_migratable = only_migratable
        self._lock = threading.Lock()
        self._reasons: list[tuple[str, frozenset[MigMode]]] = []
        self._migrations = 0

    @property
    def reasons(self) -> tuple[str, ...]:
        """What there is, whatever the mode; the oldest first."""
        with self._lock:
            return tuple(reason for reason, _ in self._reasons)

    def reasons_for(self, mode: MigMode) -> tuple[str, ...]:
        """What stands against a migration of this mode, the oldest first."""
        with self._lock:
            return self._against(mode)

    @contextmanager
    def blocked(self, reason: str, modes: Iterable[MigMode | str] = ALL_MODES) -> Iterator[None]:
        """Block migration inside of the context, as add() does."""
        self.add(reason, modes)
        try:
            yield
        finally:
            self.remove(reason)

    def add(self, reason: str, modes: Iterable[MigMode | str] = ALL_MODES) -> None:
        """Block migrations of these modes until remove().

        BlockedError while the guest migrates, and for mode normal with ``only_migratable``.
        ValueError: no such mode.
        """
        chosen = frozenset(MigMode(mode) for mode in modes)
        if self.only_migratable and MigMode.NORMAL in chosen:
            raise BlockedError(f"disallowing migration blocker (--only-migratable) for: {reason}")
        self._add(reason, chosen)

    def add_internal(self, reason: str) -> None:
        """Block migration until remove(), also with ``only_migratable``.

        For what passes by itself, as migrate_add_blocker_internal(). BlockedError while the guest
        migrates.
        """
        self._add(reason, ALL_MODES)

    def remove(self, reason: str) -> None:
        """Take a reason back, for all modes; ValueError when it is not there."""
        with self._lock:
            self._reasons.pop([known for known, _ in self._reasons].index(reason))

    def begin(self, mode: MigMode = MigMode.NORMAL) -> None:
        """A migration begins; BlockedError with the reasons when it must not."""
        with self._lock:
            if reasons := self._against(mode):
                raise BlockedError("; ".join(reasons))
            self._migrations += 1

    def end(self) -> None:
        """Undo begin(): it is over."""
        with self.ending():
            pass

    @contextmanager
    def ending(self) -> Iterator[None]:
        """As end(), for one who lets it be known inside: nobody can add a reason meanwhile."""
        with self._lock:
            try:
                yield
            finally:
                self._migrations -= 1

    def _add(self, reason: str, modes: frozenset[MigMode]) -> None:
        with self._lock:
            if self._migrations:
                raise BlockedError(
                    f"disallowing migration blocker (migration/snapshot in progress) for: {reason}"
                )
            self._reasons.append((reason, modes))

    def _against(self, mode: MigMode) -> tuple[str, ...]:
        return tuple(reason for reason, modes in self._reasons if mode in modes)
