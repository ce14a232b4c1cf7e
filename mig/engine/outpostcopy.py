"""The postcopy of a source: handing the guest over, sending the rest, surviving broken links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mig import _core
from mig.engine.postcopy import PostcopySender
from mig.engine.preempt import UrgentLink
from mig.engine.requests import PageRequests
from mig.engine.returnpath import ReturnPath
from mig.engine.sharedsearch import SharedSearch
from mig.errors import MigError, as_mig_error
from mig.options import Parameters, ZeroPageDetection
from mig.postcopy.release import Releaser
from mig.ram.save import RamSaver
from mig.ram.search import PageBatch, PageSearch
from mig.records import Command
from mig.state import Input
from mig.stream.writer import StreamWriter
from mig.wire import CommandType, SectionType

#: what a postcopy survives: somebody can do something about it, and nobody else has the guest's
#: memory. Anything else is a mistake of the program.
_BREAKS = (MigError, OSError)


@dataclass(slots=True)
class Link:
    """The connections of the moment.

    target:  what the writer writes to
    urgent: capability postcopy-preempt: what is asked for goes over it. A recovery may make it
            later than the others
    """

    writer: StreamWriter
    target: _core.Descriptor
    return_path: ReturnPath
    urgent: UrgentLink | None = None


class Owner(Protocol):
    """What the phase needs of its migration."""

    parameters: Parameters

    def _move(self, input_: Input) -> None: ...

    def _sleep_until_woken(self, seconds: float | None, *, heedful: bool = True) -> None:
        """Wait, but no longer than until there is news; raises when the connection broke.

        heedful: requests are news
        """

    def _relink(self) -> Link:
        """Wait for another URI, and connect to it."""

    def _link_urgent(self) -> UrgentLink | None:
        """Connect for urgent pages, unless that was done or is not to be."""

    def _unlink(self) -> None:
        """Let go of the connection."""

    def _postcopy_saver(self, writer: StreamWriter) -> RamSaver: ...

    def _resumed(self) -> None:
        """The destination goes on."""


class PostcopyPhase:
    """Runs from the switchover to the end.

    background: whether pages that nobody waits for are sent, too
    releaser:   gives memory back that is sent, None: it stays
    on_break:   told of what broke a connection, before the status says so; raises when the
                postcopy was given up
    """

    def __init__(
        self,
        owner: Owner,
        search: PageSearch,
        requests: PageRequests,
        *,
        background: Callable[[], bool],
        releaser: Releaser | None,
        on_break: Callable[[MigError], None],
    ) -> None:
        self._owner = owner
        self._search = search
        self._requests = requests
        self._walk = SharedSearch(search, requests, self._sent)
        self._background = background
        self._releaser = releaser
        self._on_break = on_break

    @property
    def remaining(self) -> int:
        """Bytes of pages that nobody has taken. Any thread."""
        return self._walk.remaining

    def run(self, link: Link | None, package: bytes = b"") -> None:
        """Send the rest, however often the connection breaks; return when all is confirmed.

        link:    None when another process left the destination in postcopy
        package: what has the destination run the guest, sent over `link`
        """
        while True:
            try:
                if link is None:
                    link = self._owner._relink()
                    self._resume(link)
                else:
                    link.writer.put(package)
                    link.writer.flush()
                    if self._releaser is not None:
                        self._releaser.release_clean(self._search)
                self._send_rest(link)
                return
            except _BREAKS as error:
                self._on_break(as_mig_error(error))
            self._owner._unlink()
            self._requests.clear()
            self._walk.heed()
            link = None
            self._owner._move(Input.INTERRUPT)

    def _send_rest(self, link: Link) -> None:
        writer, urgent = link.writer, link.urgent
        saver = self._owner._postcopy_saver(writer)
        self._answer(link, saver)
        PostcopySender(
            self._walk,
            self._requests,
            saver,
            shares=urgent is None,
            bandwidth=lambda: self._owner.parameters.max_postcopy_bandwidth,
            background=self._background,
            sleep=self._owner._sleep_until_woken,
            on_sent=self._sent,
        ).run()
        # all pages are taken: who had the last one has sent it when the turn is ours, or it is not
        self._requests.server.take_turn()
        self._requests.server.give_turn()
        self._walk.heed()
        link.return_path.may_confirm = True
        saver.end()
        writer.put(bytes([SectionType.EOF]))
        writer.flush()
        if urgent is not None:
            urgent.finish()
        # until then the connection for urgent pages stays open: later QEMUs end it themselves
        link.return_path.wait_shut(self._owner.parameters.timeout)

    def _answer(self, link: Link, saver: RamSaver) -> None:
        """What is asked for is sent from now on: the guest may run at the destination."""
        detects = self._owner.parameters.zero_page_detection != ZeroPageDetection.NONE
        if link.urgent is not None:
            self._requests.attach(link.urgent.target, beside=True, detects=detects)
        else:
            head, tail = saver.around_part
            self._requests.attach(link.target, head=head, tail=tail, detects=detects)

    def _sent(self, batch: PageBatch) -> None:
        """The kernel has these pages."""
        if self._releaser is not None:
            self._releaser.sent(batch)

    def _resume(self, link: Link) -> None:
        """Find out what the destination has, and go on; matches postcopy_do_resume()."""
        writer, return_path = link.writer, link.return_path
        timeout = self._owner.parameters.timeout
        names = [block.idstr for block in self._search.blocks]
        return_path.awaited.update(names)
        for idstr in names:
            writer.put(Command.recv_bitmap(idstr).encode())
        writer.flush()
        return_path.wait_until(lambda: not return_path.awaited, timeout)
        for block in self._search.blocks:
            received = _core.Bitmap.from_wire(block.pages.npages, return_path.bitmaps[block.idstr])
            received.complement()
            self._walk.replace_dirty(block.idstr, received)
        # the walk may have been broken off in the middle of a host page
        self._walk.rewind()
        # the destination has the main connection for sure
        link.urgent = self._owner._link_urgent()
        return_path.may_resume = True
        writer.put(Command(CommandType.POSTCOPY_RESUME).encode())
        writer.flush()
        return_path.wait_until(lambda: return_path.resumed, timeout)
        self._owner._resumed()
