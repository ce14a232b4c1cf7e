"""PageRequests: what a destination in postcopy waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from mig import _core
from mig.channel import Channel
from mig.engine.wake import Wake
from mig.errors import StreamError
from mig.pages import HOST_PAGE_SIZE
from mig.postcopy.faultorder import FaultLog
from mig.ram.search import PageBatch, PageSearch

#: requests that may come before pages can be sent: those of a guest that has just begun to run
_MOST_EARLY = 1 << 16
#: seconds in which a guest that begins to run misses hundreds of pages one after the other, each
#: 0.1 to 0.2 ms after it has got the last one where nothing else is in its way
_START = 1.0
#: seconds after a request in which the next one is likely, while it begins and later
_QUIET = (0.02, 0.0005)
#: seconds that the background waits at most for a guest that never stops to ask
_PATIENCE = (0.1, 0.001)
#: seconds after a request in which others are to be expected
_RECENT = 0.1


class Courtesy:
    """Holds the background back while the guest asks for one page after the other.

    What it waits for would come behind bytes that nobody waits for, and the destination's
    processors would be busy with them. Later the background is held back less: it is what ends
    the waiting.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._requested = self._sent = -_START
        self._asked = -_RECENT

    def begin(self) -> None:
        """A connection is there, and somebody at its end who is about to ask."""
        self._began = self._requested = self._sent = self._clock()

    def requested(self) -> None:
        """A page was asked for."""
        self._requested = self._asked = self._clock()

    def sent(self) -> None:
        """Something went in the background."""
        self._sent = self._clock()

    @property
    def recent(self) -> bool:
        """Whether whoever asks next would have to wait for what is sent now."""
        return self._clock() < self._asked + _RECENT

    def left(self) -> float:
        """Return the seconds until the background may go on, 0 for now."""
        now = self._clock()
        later = now >= self._began + _START
        until = min(self._requested + _QUIET[later], self._sent + _PATIENCE[later])
        return max(0.0, until - now)


class PageRequests:
    """What a destination asks for; it is answered by the thread that reads it.

    log:        told of all requests
    tells_sent: pages that answers have sent are to be heeded, too
    """

    def __init__(
        self,
        search: PageSearch,
        log: FaultLog | None = None,
        *,
        tells_sent: bool = False,
    ) -> None:
        self._search = search
        self._lock = threading.Lock()
        self._early: list[tuple[int, int, int]] = []
        self._log = log
        #: number of each block in the block list
        self.numbers = {block.idstr: number for number, block in enumerate(search.listed)}
        page_size = search.listed[0].pages.page_size if search.listed else HOST_PAGE_SIZE
        #: set when there is something to be heeded
        self.bell = Wake()
        #: answers, and is had by turns with who sends the rest
        self.server = _core.PageServer(
            [
                (
                    block.idstr.encode("ascii"),
                    block.pages,
                    block.dirty,
                    max(1, block.host_page_size // page_size),
                    block.detect_zero,
                    search.ignores(block),
                )
                for block in search.listed
            ],
            page_size,
            wake_fd=self.bell.fd,
            tells_sent=tells_sent,
        )
        #: how long the background is to wait
        self.courtesy = Courtesy()

    @property
    def total(self) -> int:
        """Pages asked for and answered so far. Any thread."""
        return self.server.asked

    # ---- the thread of the return path -------------------------------------------------------

    def listen(self, channel: Channel) -> None:
        """The return path comes from there."""
        channel.read_by(self.server.listen)

    def add(self, idstr: str | None, start: int, length: int) -> None:
        """Answer a request, once that is possible; StreamError for one that cannot be.

        idstr:  block, None: that of the last request
        start, length: in bytes
        """
        number = self._find(idstr)
        block = self._search.listed[number]
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
        request = number, start // page_size, length // page_size
        with self._lock:
            if not self.server.attached:
                if len(self._early) >= _MOST_EARLY:
                    raise StreamError("the destination asks for more pages than it can wait for")
                self._early.append(request)
                return
        self.server.answer(*request)

    def bitmap_nbytes(self, idstr: str) -> int:
        """Bytes of the bitmap of a block on the return path; StreamError: no such block."""
        try:
            npages = self._search[idstr].pages.npages
        except KeyError:
            raise StreamError(f"the destination has a block '{idstr}', which is not here") from None
        return -(-npages // 64) * 8

    def _find(self, idstr: str | None) -> int:
        if idstr is not None:
            number = self.numbers.get(idstr)
            if number is None or self._search.ignores(self._search.listed[number]):
                raise StreamError(f"the destination asks for pages of '{idstr}': no such block")
            self.server.last = number
        if self.server.last is None:
            raise StreamError("the destination asks for pages of no block")
        return self.server.last

    # ---- the thread of the migration ---------------------------------------------------------

    def attach(
        self,
        target: _core.Descriptor,
        *,
        head: bytes = b"",
        tail: bytes = b"",
        beside: bool = False,
        detects: bool = True,
    ) -> None:
        """Answer over that from now on; see PageServer.attach() of `mig._core`."""
        with self._lock:
            self.server.attach(target, head, tail, beside=beside, detects=detects)
            early, self._early = self._early, []
        for request in early:
            self.server.answer(*request)

    def heed(self) -> list[PageBatch]:
        """Let what has been asked for say what goes next; returns what was sent, if that is told.

        For who has the pages.
        """
        batches = []
        for number, first, npages, sent in self.server.take_notes():
            block = self._search.listed[number]
            if sent:
                index = np.arange(first, first + npages, dtype=np.uint64)
                batches.append(PageBatch(block, index))
                continue
            self.courtesy.requested()
            if self._log is not None:
                self._log.note(number, first, npages, self._search.place)
            self._search.requested(block, first, first + npages)
        return batches

    def clear(self) -> None:
        """Answer nobody, and forget all: who asked is gone, and asks again when it is back."""
        self.server.detach()
        with self._lock:
            self._early.clear()

    def close(self) -> None:
        """Let go of the pages; nobody reads or writes any more."""
        self.server.close()
        self.bell.close()
