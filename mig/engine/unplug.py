"""Devices that must be gone before the guest migrates."""

from __future__ import annotations

import select
import threading
import time

from mig.channel.open import Cancel
from mig.engine.wake import Wake
from mig.errors import MigError
from mig.guest import UnpluggingGuest

#: seconds that a device may take to go once the migration is given up, as in QEMU: it can only be
#: plugged in again when it is gone
_PATIENCE = 30.0


class Unplugging:
    """The devices of one migration; matches qemu_savevm_wait_unplug() and what it waits for.

    cancel: ends wait()
    """

    def __init__(self, guest: UnpluggingGuest, cancel: Cancel) -> None:
        self._guest = guest
        self._cancel = cancel
        self._lock = threading.Lock()
        self._changed = Wake()

    def begin(self) -> None:
        """Ask them to go."""
        self._guest.unplug(self._wake_up)

    @property
    def pending(self) -> bool:
        """Whether a device is not gone yet."""
        return self._guest.unplug_pending

    def wait(self) -> None:
        """Return when all are gone; CancelledError when the migration is given up."""
        while self.pending:
            self._cancel.wait({self._changed.fd: select.POLLIN}, None)
            self._changed.clear()

    def undo(self) -> None:
        """Have them plugged in again. MigError when one was not gone in time."""
        end = time.monotonic() + _PATIENCE
        poll = select.poll()
        poll.register(self._changed.fd, select.POLLIN)
        while self.pending and (left := end - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self._changed.clear()
        partly = self.pending
        self._guest.replug()
        if partly:
            raise MigError("a device is partially unplugged: it did not go in time")

    def close(self) -> None:
        """Release the descriptor; the guest may still tell of changes."""
        with self._lock:
            self._changed.close()

    def _wake_up(self) -> None:
        with self._lock:
            self._changed.set()
