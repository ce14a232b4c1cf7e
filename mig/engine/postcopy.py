"""Postcopy at the source: pages that the destination waits for first, the others in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mig.engine.rate import RateLimit
from mig.engine.requests import PageRequests
from mig.ram.save import RamSaver
from mig.ram.search import PageBatch, SourceBlock

#: bytes that are sent in the background before the next look at requests
_BACKGROUND = 64 << 10


class Walk(Protocol):
    """What pages are taken from: a PageSearch, or one that is shared with another thread."""

    @property
    def listed(self) -> Sequence[SourceBlock]:
        """All blocks."""

    @property
    def remaining(self) -> int:
        """Bytes that nobody has taken."""

    @property
    def inside_host_page(self) -> bool:
        """Whether the next batch goes on with a host page that was begun."""

    @property
    def hurries(self) -> bool:
        """Whether somebody waits for that host page, who is not among the requests."""

    def next_batch(self, max_pages: int) -> PageBatch | None:
        """Take the next pages."""

    def next_in_order(self, max_pages: int) -> PageBatch | None:
        """Take the next pages that are worth sending before the rest."""

    def take(self, block: SourceBlock, first: int, npages: int) -> PageBatch | None:
        """Take these pages, if nobody has."""


class PostcopySender:
    """Sends what is left while the guest runs at the destination; matches postcopy of ram.c.

    requests:   what goes first
    serves:     False: that goes over another connection
    saver:      the sections of the present connection
    bandwidth:  bytes a second for pages that nobody waits for, 0: no limit
    background: whether pages that nobody waits for are sent at all
    sleep:      waits so many seconds (None: for ever), less when there are requests or something
                has changed, or raises when it is over
    on_sent:    told of each batch that was sent
    """

    def __init__(
        self,
        search: Walk,
        requests: PageRequests,
        saver: RamSaver,
        *,
        serves: bool = True,
        bandwidth: Callable[[], int],
        background: Callable[[], bool],
        sleep: Callable[[float | None], None],
        on_sent: Callable[[PageBatch], None] = lambda _: None,
    ) -> None:
        self._search = search
        self._requests = requests
        self._saver = saver
        self._serves = serves
        self._background = background
        self._sleep = sleep
        self._on_sent = on_sent
        self._bandwidth = bandwidth
        self._limit = RateLimit(self._rate, self._wait)
        page_size = search.listed[0].pages.page_size if search.listed else 1
        self._page_size = page_size
        self._most = max(1, _BACKGROUND // page_size)

    def run(self) -> None:
        """Return when nothing is left to be taken."""
        self._requests.courtesy.begin()
        while self._search.remaining:
            self._serve()
            if not self._background() and not self._search.inside_host_page:
                # the last page may have gone just now
                if self._search.remaining and not (self._serves and self._requests.pending):
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

    def _rate(self) -> int:
        """The limit; none for a host page whose end somebody waits for."""
        waits = self._search.hurries or (self._serves and self._requests.pending)
        return 0 if waits and self._search.inside_host_page else self._bandwidth()

    def _wait(self, seconds: float) -> None:
        """Who waits for a page does not wait for the limit."""
        # what came inside a host page has ended a sleep already
        self._serve()
        self._sleep(seconds)
        self._serve()

    def _serve(self) -> None:
        """Send what was asked for, unless it is on its way already.

        A host page that has been begun is finished first: the destination puts it together.
        """
        if not self._serves:
            return
        while not self._search.inside_host_page and (request := self._requests.pop()) is not None:
            batch = self._search.take(*request)
            if batch is not None:
                self._send(batch)

    def _send(self, batch: PageBatch) -> int:
        before = self._saver.nbytes
        self._saver.part(batch)
        self._on_sent(batch)
        return self._saver.nbytes - before
