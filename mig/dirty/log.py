"""The DirtyLog protocol, and a log that the guest's own writers fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mig import _core


class DirtyLog(Protocol):
    """What a migration needs to know about writes to guest memory."""

    @property
    def chunk_pages(self) -> int:
        """Pages that `clear` is called for at once, a power of two; 0 when it need not be called.

        Whoever sends memory calls it once for each aligned chunk of so many pages between two
        syncs, before it reads the first page of the chunk.
        """

    def start(self) -> None:
        """Begin to log; from now on every write to a page sets its bit."""

    def sync(self, idstr: str, dirty: _core.Bitmap) -> int:
        """Move the bits of block ``idstr`` into ``dirty``; returns how many were not set there."""

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        """These pages are about to be read and sent: log writes to them again from now on."""

    def stop(self) -> None:
        """End logging."""


class SharedDirtyLog:
    """A log of bitmaps, one bit per target page, that writers set themselves.

    npages: number of pages of each block, by idstr

    A writer calls `mark` *after* it has written: then a page that is sent in between is sent
    again.
    """

    #: sync() clears
    chunk_pages = 0

    def __init__(self, npages: Mapping[str, int]) -> None:
        self._bitmaps = {idstr: _core.Bitmap(n) for idstr, n in npages.items()}
        self._logging = False

    def mark(self, idstr: str, page_index: int) -> None:
        """Note that the page was written. May be called by any thread."""
        if self._logging:
            self._bitmaps[idstr].set_atomic(page_index)

    def bitmap(self, idstr: str) -> _core.Bitmap:
        """Return the bits of block ``idstr``, for writers that set them themselves, atomically.

        Such a writer need not know whether somebody logs: start() forgets what it set before.
        """
        return self._bitmaps[idstr]

    def start(self) -> None:
        """Begin to log, with nothing dirty."""
        for bitmap in self._bitmaps.values():
            bitmap.clear_atomic(0, len(bitmap))
        self._logging = True

    def sync(self, idstr: str, dirty: _core.Bitmap) -> int:
        """Move the bits of block ``idstr`` into ``dirty``; returns how many were not set there."""
        return dirty.drain(self._bitmaps[idstr])

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        """Nothing to do: sync() clears."""

    def stop(self) -> None:
        """End logging."""
        self._logging = False
