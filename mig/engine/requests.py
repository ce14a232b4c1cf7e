"""PageRequests: what a destination in postcopy waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from mig.engine.wake import Wake
from mig.errors import StreamError
from mig.postcopy.faultorder import FaultLog
from mig.ram.search import PageSearch, SourceBlock

#: requests that may wait; a destination asks for each page once, so there can be one a page, but a
#: guest has no more vCPUs and devices that stand still than this
_MOST_WAITING = 1 << 16
#: seconds in which a guest that begins to run misses hundreds of pages one after the other, each
#: 0.1 to 0.2 ms after it has got the last one where nothing else is in its way
_START = 1.0
#: seconds after a request in which the next one is likely, while it begins and later
_QUIET = (0.02, 0.0005)
#: seconds that the background waits at most for a guest that never stops to ask
_PATIENCE = (0.1, 0.001)


class Courtesy:
    """Holds the background back while the guest asks for one page after the other.

    What it waits for would come behind bytes that nobody waits for, and the destination's
    processors would be busy with them. Later the background is held back less: it is what ends
    the waiting.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._requested = self._sent = -_START

    def begin(self) -> None:
        """A connection is there, and somebody at its end who is about to ask."""
        self._began = self._requested = self._sent = self._clock()

    def requested(self) -> None:
        """A page was asked for."""
        self._requested = self._clock()

    def sent(self) -> None:
        """Something went in the background."""
        self._sent = self._clock()

    def left(self) -> float:
        """Return the seconds until the background may go on, 0 for now."""
        now = self._clock()
        later = now >= self._began + _START
        until = min(self._requested + _QUIET[later], self._sent + _PATIENCE[later])
        return max(0.0, until - now)


class PageRequests:
    """A queue that the thread of the return path fills, and the one that sends empties.

    wake: set when there is something in the queue
    log:  told of all requests
    """

    def __init__(self, search: PageSearch, wake: Wake, log: FaultLog | None = None) -> None:
        self._search = search
        self._wake = wake
        self._lock = threading.Lock()
        self._queue: deque[tuple[SourceBlock, int, int]] = deque()
        self._last: SourceBlock | None = None
        self._log = log
        self._numbers = {id(block): number for number, block in enumerate(search.listed)}
        #: how long the background is to wait
        self.courtesy = Courtesy()
        #: pages asked for so far
        self.total = 0

    def add(self, idstr: str | None, start: int, length: int) -> None:
        """Queue a request; StreamError for one that cannot be.

        idstr:  block, None: that of the last request
        start, length: in bytes
        """
        block = self._find(idstr)
        page_size = block.pages.page_size
        if start % page_size or length % page_size or not length:
            raise StreamError(
                f"the destination asks for {length} bytes at {start:#x}: no whole pages",
                block=block.idstr,
            )
        if start + length > block.pages.npages * page_size:
            raise StreamError(
                f"the destination asks for {length} bytes at {start:#x}, past the end of the block",
                block=block.idstr,
            )
        with self._lock:
            if len(self._queue) >= _MOST_WAITING:
                raise StreamError("the destination asks for more pages than it can wait for")
            self._queue.append((block, start // page_size, length // page_size))
            self.total += length // page_size
        self.courtesy.requested()
        self._wake.set()
        if self._log is not None:
            npages = length // page_size
            place = self._search.place
            self._log.note(self._numbers[id(block)], start // page_size, npages, place)

    def bitmap_nbytes(self, idstr: str) -> int:
        """Bytes of the bitmap of a block on the return path; StreamError: no such block."""
        try:
            npages = self._search[idstr].pages.npages
        except KeyError:
            raise StreamError(f"the destination has a block '{idstr}', which is not here") from None
        return -(-npages // 64) * 8

    def _find(self, idstr: str | None) -> SourceBlock:
        if idstr is not None:
            try:
                block = self._search[idstr]
            except KeyError:
                block = None
            if block is None or self._search.ignores(block):
                raise StreamError(f"the destination asks for pages of '{idstr}': no such block")
            self._last = block
        if self._last is None:
            raise StreamError("the destination asks for pages of no block")
        return self._last

    def pop(self) -> tuple[SourceBlock, int, int] | None:
        """Return block, first page, number of pages of the oldest request; None: there is none."""
        with self._lock:
            return self._queue.popleft() if self._queue else None

    @property
    def pending(self) -> bool:
        """Whether somebody waits."""
        return bool(self._queue)

    def clear(self) -> None:
        """Forget all: who asked is gone, and asks again when it is back."""
        with self._lock:
            self._queue.clear()
            self._last = None
