"""The connection of a source for urgent pages (capability postcopy-preempt)."""

from __future__ import annotations

import contextlib
import select
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np

from mig.channel import Channel
from mig.engine.requests import PageRequests
from mig.engine.wake import Wake
from mig.errors import ChannelError, MigError, PeerError, as_mig_error
from mig.ram.encode import PageEncoder
from mig.ram.search import PageBatch, PageSearch, SourceBlock
from mig.stream.writer import StreamWriter
from mig.wire import RamFlag


class SharedSearch:
    """One search that two threads take pages from; no page is taken by both.

    One walks over what is dirty, the other takes what is asked for. A host page that the walk has
    begun and not finished is left to it: the destination puts a host page together from one
    connection. As with QEMU's bitmap mutex and pss_overlap().
    """

    def __init__(self, search: PageSearch) -> None:
        self._search = search
        self._lock = threading.Lock()
        # the host page that the walk is in, (block, first page, end), None between host pages
        self._begun: tuple[SourceBlock, int, int] | None = None
        #: whether somebody waits for that host page
        self.hurries = False

    @property
    def listed(self) -> Sequence[SourceBlock]:
        """All blocks."""
        return self._search.listed

    @property
    def remaining(self) -> int:
        """Bytes of pages that nobody has taken."""
        return self._search.remaining

    @property
    def inside_host_page(self) -> bool:
        """Whether the walk has begun a host page, which comes next."""
        return self._begun is not None

    def next_batch(self, max_pages: int) -> PageBatch | None:
        """Take the next pages of the walk; see PageSearch.next_batch(). One thread alone."""
        with self._lock:
            return self._walked(self._search.next_batch(max_pages))

    def next_in_order(self, max_pages: int) -> PageBatch | None:
        """Take what is worth sending first; see PageSearch.next_in_order(). The same thread."""
        with self._lock:
            batch = self._search.next_in_order(max_pages)
            return batch if batch is None else self._walked(batch)

    def _walked(self, batch: PageBatch | None) -> PageBatch | None:
        """Note where the walk is now."""
        before, self._begun = self._begun, None
        if batch is not None and self._search.inside_host_page:
            block, last = batch.block, int(batch.index[-1])
            npages = block.host_page_size // block.pages.page_size
            self._begun = block, last // npages * npages, block.host_page_end(last)
        self.hurries = self.hurries and self._begun == before
        return batch

    def take(self, block: SourceBlock, first: int, npages: int) -> PageBatch | None:
        """Take what is dirty of these pages, and where the walk is not; host pages as a whole."""
        with self._lock:
            pieces = [(first, first + npages)]
            if self._begun is not None and self._begun[0] is block:
                _, begin, end = self._begun
                self.hurries = self.hurries or (first < end and begin < first + npages)
                pieces = [(first, min(first + npages, begin)), (max(first, end), first + npages)]
            found = [self._search.take(block, a, b - a) for a, b in pieces if a < b]
        index = [batch.index for batch in found if batch is not None]
        return PageBatch(block, np.concatenate(index)) if index else None


class UrgentSender:
    """Sends what is asked for over a connection of its own, by a thread of its own.

    There is neither header nor section, only records. No bandwidth limits it. The destination says
    nothing: when there is something to be read the connection is over.

    channel:  owned from now on
    bell:     set when there is something in ``requests``
    encoder:  makes what writes the records of the connection
    ends:     whether the destination is told when no more come
    on_sent:  told of each batch that was sent
    on_empty: told when the last page was taken
    on_error: told of what ended it before its time
    """

    def __init__(
        self,
        channel: Channel,
        search: PageSearch,
        requests: PageRequests,
        bell: Wake,
        encoder: Callable[[StreamWriter], PageEncoder],
        *,
        ends: bool,
        on_sent: Callable[[PageBatch], None],
        on_empty: Callable[[], None],
        on_error: Callable[[MigError], None],
    ) -> None:
        #: what the walk over the rest takes pages from
        self.search = SharedSearch(search)
        self._channel = channel
        self._requests = requests
        self._bell = bell
        self._writer = StreamWriter(channel)
        self._encoder = encoder(self._writer)
        self._ends = ends
        self._on_sent = on_sent
        self._on_empty = on_empty
        self._on_error = on_error
        self._ending = False
        self._cancelled = False
        self._error: MigError | None = None
        self._thread = threading.Thread(target=self._run, name="mig-preempt", daemon=True)

    def start(self) -> None:
        """Begin to send: the guest may run at the destination."""
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes sent. Any thread."""
        return self._writer.offset

    # ---- its thread -------------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        try:
            while not self._ending:
                self._serve()
                self._await(poll)
        except BaseException as error:
            self._error = as_mig_error(error)
            if not self._cancelled:
                self._on_error(self._error)

    def _await(self, poll: select.poll) -> None:
        ready = {fd for fd, _ in poll.poll()}
        self._bell.clear()
        # who has all pages may leave
        if self._channel.fileno() in ready and not self._ending:
            raise PeerError("the destination went away: the connection for urgent pages is over")

    def _serve(self) -> None:
        while not self._cancelled and (request := self._requests.pop()) is not None:
            batch = self.search.take(*request)
            # else it is on its way already
            if batch is not None:
                self._encoder.encode(batch)
                self._writer.flush()
                self._on_sent(batch)
            if not self.search.remaining:
                self._on_empty()

    # ---- the thread of the migration --------------------------------------------------------

    def drain(self) -> None:
        """All pages are taken: wait until they are sent; raises when they cannot be."""
        self._ending = True
        self._bell.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Say that no more pages come, to who wants to know. Follows drain()."""
        if self._ends:
            self._writer.put(struct.pack(">Q", RamFlag.EOS))
            # who has all pages may have left; what else is wrong the return path tells
            with contextlib.suppress(ChannelError):
                self._writer.flush()

    def cancel(self) -> None:
        """End every wait. Any thread, until close()."""
        self._cancelled = self._ending = True
        self._channel.cancel()
        self._bell.set()

    def close(self) -> None:
        """End it, and let go of the connection."""
        self.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        self._channel.close()
