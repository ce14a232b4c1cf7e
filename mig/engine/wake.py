"""Ending a thread's sleep before its time."""

from __future__ import annotations

import contextlib
import os


class Wake:
    """A descriptor that becomes readable. Any thread may set it, until it is closed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """End the sleep, or the next one."""
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Let the next sleep last."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Close the descriptor; from now on set() does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
