"""Ending a thread's sleep before its time."""

from __future__ import annotations

import contextlib
import os

from mig.channel.eventfd import EventFd


class Wake(EventFd):
    """Ends the sleep, or the next one, when it is set."""

    def clear(self) -> None:
        """Let the next sleep last."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
