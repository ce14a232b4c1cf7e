"""SharedSearch: the walk over what is dirty, while others take what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mig import _core
from mig.engine.requests import PageRequests
from mig.ram.search import PageBatch, PageSearch, SourceBlock


class SharedSearch:
    """One search that two threads take pages from; no page is taken by both.

    One walks over what is dirty, the other answers requests. A host page that the walk has begun
    and not finished is left to it: the destination puts a host page together from one connection.
    As with QEMU's bitmap mutex and pss_overlap().

    on_sent: told of what the other has sent, if the requests tell that
    """

    def __init__(
        self,
        search: PageSearch,
        requests: PageRequests,
        on_sent: Callable[[PageBatch], None] = lambda _: None,
    ) -> None:
        self._search = search
        self._requests = requests
        self._server = requests.server
        self._on_sent = on_sent
        self._page_size = search.listed[0].pages.page_size if search.listed else 1
        self._server.left = search.remaining // self._page_size
        self._server.begin(None)

    @property
    def listed(self) -> Sequence[SourceBlock]:
        """All blocks."""
        return self._search.listed

    @property
    def remaining(self) -> int:
        """Bytes of pages that nobody has taken. Any thread."""
        return self._server.left * self._page_size

    @property
    def inside_host_page(self) -> bool:
        """Whether the walk has begun a host page, which comes next."""
        return self._search.inside_host_page

    @property
    def hurries(self) -> bool:
        """Whether somebody waits for that host page."""
        return self._server.hurries

    def next_batch(self, max_pages: int) -> PageBatch | None:
        """Take the next pages of the walk; see PageSearch.next_batch()."""
        with self._pages():
            batch = self._search.next_batch(max_pages)
            self._begun(batch)
        return batch

    def next_in_order(self, max_pages: int) -> PageBatch | None:
        """Take what is worth sending first; see PageSearch.next_in_order()."""
        with self._pages():
            batch = self._search.next_in_order(max_pages)
            if batch is not None:
                self._begun(batch)
        return batch

    def heed(self) -> None:
        """Take note of what was asked for."""
        with self._pages():
            pass

    def replace_dirty(self, idstr: str, dirty: _core.Bitmap) -> None:
        """Let these pages of a block be dirty, and no others."""
        with self._pages():
            self._search.replace_dirty(idstr, dirty)

    def rewind(self) -> None:
        """Go on with the first page; a host page that was begun is broken off."""
        with self._pages():
            self._search.rewind()
            self._server.begin(None)

    @contextmanager
    def _pages(self) -> Iterator[None]:
        self._server.lock_pages()
        try:
            self._search.remaining = self.remaining
            sent = self._requests.heed()
            try:
                yield
            finally:
                # also of pages that were taken before something went wrong
                self._server.left = self._search.remaining // self._page_size
        finally:
            self._server.unlock_pages()
        for batch in sent:
            self._on_sent(batch)

    def _begun(self, batch: PageBatch | None) -> None:
        """Say which host page the walk is in now."""
        if batch is None or not self._search.inside_host_page:
            self._server.begin(None)
            return
        block, last = batch.block, int(batch.index[-1])
        npages = block.host_page_size // block.pages.page_size
        number = self._requests.numbers[block.idstr]
        self._server.begin(number, last // npages * npages, block.host_page_end(last))
