"""Postcopy at the source: pages that the destination waits for first, the others in between."""

from __future__ import annotations

from collections.abc import Callable

from mig.engine.rate import RateLimit
from mig.engine.requests import PageRequests
from mig.ram.save import RamSaver
from mig.ram.search import PageBatch, PageSearch

#: bytes that are sent in the background before the next look at requests
_BACKGROUND = 256 << 10


class PostcopySender:
    """Sends what is left while the guest runs at the destination; matches postcopy of ram.c.

    saver:      the sections of the present connection
    bandwidth:  bytes a second for pages that nobody waits for, 0: no limit
    background: whether pages that nobody waits for are sent at all
    sleep:      waits so many seconds (None: for ever), less when there are requests or something
                has changed, or raises when it is over
    """

    def __init__(
        self,
        search: PageSearch,
        requests: PageRequests,
        saver: RamSaver,
        *,
        bandwidth: Callable[[], int],
        background: Callable[[], bool],
        sleep: Callable[[float | None], None],
    ) -> None:
        self._search = search
        self._requests = requests
        self._saver = saver
        self._background = background
        self._sleep = sleep
        self._limit = RateLimit(bandwidth, self._wait)
        page_size = search.listed[0].pages.page_size if search.listed else 1
        self._page_size = page_size
        self._most = max(1, _BACKGROUND // page_size)

    def run(self) -> None:
        """Return when nothing is left to be sent."""
        self._requests.courtesy.begin()
        while self._search.remaining:
            self._serve()
            if not self._background() and not self._search.inside_host_page:
                # the last page may have gone just now
                if self._search.remaining and not self._requests.pending:
                    self._sleep(None)
                continue
            room = self._limit.room()
            most = self._most if room is None else min(self._most, room // self._page_size)
            batch = self._search.next_in_order(most)
            if batch is None:
                if not self._search.inside_host_page and (left := self._requests.courtesy.left()):
                    self._sleep(left)
                    continue
                batch = self._search.next_batch(most)
                self._requests.courtesy.sent()
            if batch is not None:
                self._limit.spend(self._send(batch))

    def _wait(self, seconds: float) -> None:
        """Who waits for a page does not wait for the limit."""
        self._sleep(seconds)
        self._serve()

    def _serve(self) -> None:
        """Send what was asked for, unless it is on its way already.

        A host page that has been begun is finished first: the destination puts it together.
        """
        while not self._search.inside_host_page and (request := self._requests.pop()) is not None:
            batch = self._search.take(*request)
            if batch is not None:
                self._send(batch)

    def _send(self, batch: PageBatch) -> int:
        before = self._saver.nbytes
        self._saver.part(batch)
        return self._saver.nbytes - before
