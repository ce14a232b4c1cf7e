"""What a guest is told around a postcopy, at the moments at which QEMU does it for its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from mig.guest import BalloonedGuest, LockedGuest


class MemoryLock:
    """The memory of a guest that is locked (mlock), and must not be while pages are missing.

    A page that is locked cannot be missing: who locks it has it filled.
    """

    def __init__(self, guest: object) -> None:
        self._guest = guest if isinstance(guest, LockedGuest) else None
        self._unlocked = False

    def undo(self) -> None:
        """Have it unlocked, if it may be locked."""
        if self._guest is not None:
            self._guest.unlock_memory()
            self._unlocked = True

    def redo(self) -> None:
        """Have it locked again, once. That it cannot be is no failure: the guest is all there."""
        if self._guest is None or not self._unlocked:
            return
        self._unlocked = False
        try:
            self._guest.lock_memory()
        except Exception as error:
            warnings.warn(f"memory is not locked again: {error}", RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def balloon_inhibited(guest: object) -> Iterator[None]:
    """Keep the balloon from giving pages back: they would be taken for missing."""
    if not isinstance(guest, BalloonedGuest):
        yield
        return
    guest.inhibit_balloon(True)
    try:
        yield
    finally:
        guest.inhibit_balloon(False)
