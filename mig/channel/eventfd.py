"""EventFd: a descriptor that ends waits in poll()."""

from __future__ import annotations

import contextlib
import os


class EventFd:
    """A descriptor that becomes readable. Any thread may set it, until it is closed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Make every wait that watches ``fd`` end."""
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the descriptor; from now on set() does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
