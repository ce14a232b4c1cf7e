"""Postcopy at the source: the pages that nobody waits for, in between those that somebody does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mig.engine.rate import RateLimit
from mig.engine.requests import PageRequests
from mig.engine.sharedsearch import SharedSearch
from mig.ram.save import RamSaver
from mig.ram.search import PageBatch

#: bytes that are sent in the background at a time, and while others may be asked for behind them
_BACKGROUND, _BRIEF = 256 << 10, 64 << 10


class Sleep(Protocol):
    """How a PostcopySender waits."""

    def __call__(self, seconds: float | None, *, heedful: bool = True) -> None:
        """Wait; see PostcopySender."""


class PostcopySender:
    """Sends what is left while the guest runs at the destination; matches postcopy of ram.c.

    requests:   whose answers go first
    shares:     they go over the stream of the saver, and not over another connection
    saver:      the sections of the present connection
    bandwidth:  bytes a second for pages that nobody waits for, 0: no limit
    background: whether pages that nobody waits for are sent at all
    sleep:      waits so many seconds (None: for ever), less when something has changed, if heedful
                also when there are requests, or raises when it is over
    on_sent:    told of each batch that was sent
    """

    def __init__(
        self,
        search: SharedSearch,
        requests: PageRequests,
        saver: RamSaver,
        *,
        shares: bool = True,
        bandwidth: Callable[[], int],
        background: Callable[[], bool],
        sleep: Sleep,
        on_sent: Callable[[PageBatch], None] = lambda _: None,
    ) -> None:
        self._search = search
        self._requests = requests
        self._server = requests.server
        self._saver = saver
        self._shares = shares
        self._background = background
        self._sleep = sleep
        self._on_sent = on_sent
        self._bandwidth = bandwidth
        self._limit = RateLimit(self._rate, self._wait)
        self._page_size = search.listed[0].pages.page_size if search.listed else 1
        # it stays ours inside a host page: the destination puts that together
        self._has_turn = False

    def run(self) -> None:
        """Return when nothing is left to be taken."""
        self._requests.courtesy.begin()
        try:
            while self._search.remaining:
                self._step()
        except BaseException:
            self._give_turn(broken=True)
            raise
        self._give_turn()

    def _step(self) -> None:
        self._search.heed()
        if not self._background() and not self._search.inside_host_page:
            if self._search.remaining:
                self._sleep(None)
            return
        courtesy, most = self._requests.courtesy, self._most()
        batch = self._search.next_in_order(most)
        if batch is None:
            if not self._search.inside_host_page and (left := courtesy.left()):
                self._sleep(left)
                return
            batch = self._search.next_batch(most)
            courtesy.sent()
        if batch is not None:
            self._limit.spend(self._send(batch))

    def _most(self) -> int:
        """Pages that may go at a time."""
        nbytes = _BRIEF if self._requests.courtesy.recent else _BACKGROUND
        room = self._limit.room()
        return max(1, (nbytes if room is None else min(nbytes, room)) // self._page_size)

    def _rate(self) -> int:
        """The limit; none for a host page whose end somebody waits for."""
        waits = self._search.hurries or (self._shares and self._server.waiting)
        return 0 if waits and self._search.inside_host_page else self._bandwidth()

    def _wait(self, seconds: float) -> None:
        """For the limit, which concerns whoever waits for the end of a host page alone."""
        self._sleep(seconds, heedful=self._search.inside_host_page)

    def _send(self, batch: PageBatch) -> int:
        before = self._saver.nbytes
        if self._shares and not self._has_turn:
            self._server.take_turn()
            self._has_turn = True
        self._saver.part(batch)
        if not self._search.inside_host_page:
            self._give_turn()
        self._on_sent(batch)
        return self._saver.nbytes - before

    def _give_turn(self, *, broken: bool = False) -> None:
        if self._has_turn:
            self._has_turn = False
            self._server.give_turn(broken)
