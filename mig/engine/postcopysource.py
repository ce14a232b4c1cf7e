"""PostcopySource: what a source does about postcopy, and about the connections it may need."""

from __future__ import annotations

import contextlib
import select
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable

from mig.channel import Channel
from mig.engine.encoding import Encoding
from mig.engine.goover import PostcopyPolicy
from mig.engine.outcheck import check_outgoing, check_recovery
from mig.engine.outlink import SourceLink
from mig.engine.outpostcopy import Link, PostcopyPhase
from mig.engine.preempt import UrgentLink
from mig.engine.recovery import Attempt, RecoveryPolicy
from mig.engine.requests import PageRequests
from mig.errors import (
    CancelledError,
    IdleTimeoutError,
    MigError,
    OptionError,
    PeerError,
    StateError,
    as_mig_error,
)
from mig.events import Event
from mig.guest import ReleasingGuest, SourceGuest
from mig.options import Capability, Options
from mig.postcopy.dialect import PreemptDialect, preempt_dialect
from mig.postcopy.faultorder import FaultLog
from mig.postcopy.release import Releaser
from mig.postcopy.source import discards, package
from mig.ram.save import RamSaver
from mig.ram.search import PageSearch
from mig.state import FINAL, Input, Status
from mig.stats import RamCounters
from mig.stream.writer import StreamWriter
from mig.wire import PING_SETUP

#: statuses in which the guest can still be made to run at the destination at once
_BEFORE_POSTCOPY = frozenset({Status.NONE, Status.SETUP, Status.WAIT_UNPLUG, Status.ACTIVE})


class PostcopySource(SourceLink):
    """A source that can go over to postcopy, and whose connection may then break and come again."""

    def __init__(
        self,
        guest: SourceGuest,
        options: Options,
        on_event: Callable[[Event], None] | None,
        *,
        goes_over: PostcopyPolicy | None,
        recovery: RecoveryPolicy | None,
    ) -> None:
        super().__init__(options, on_event)
        self._guest = guest
        self._goes_over = goes_over
        self._recovery = recovery
        self._resumes = False
        self._wants_postcopy = False
        self._background = True
        #: in which order pages are known to be wanted, and where it is noted; set before start()
        self.faults: FaultLog | None = None
        self._search: PageSearch | None = None
        self._encoding: Encoding | None = None
        # bytes sent before the guest may have run at the destination; None: it has not
        self._handed_over: int | None = None
        # bytes sent over connections that are gone
        self._sent_before = 0
        self._break: MigError | None = None
        self._link_error: MigError | None = None
        self._recovering = threading.Event()
        # what the policy wants to be done about the break; None: the owner sees to it
        self._attempt: Attempt | None = None
        self._phase: PostcopyPhase | None = None
        self._paused_by_owner = False

    # ---- for the owner; any thread ----------------------------------------------------------

    def start_postcopy(self) -> None:
        """Let the guest run at the destination now (QMP command migrate-start-postcopy).

        At any time, also before start(). StateError where it is too late, OptionError without
        capability postcopy-ram.
        """
        if Capability.POSTCOPY_RAM not in self.capabilities:
            raise OptionError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self.status not in _BEFORE_POSTCOPY:
            raise StateError(self.status, Input.POSTCOPY)
        self._wants_postcopy = True
        with self._lock:
            if self.status != Status.NONE:
                self._wake.set()

    def pause(self) -> None:
        """Break the connection of a postcopy (QMP command migrate-pause); StateError elsewhere.

        Also while the destination is asked what it has: it may not answer.
        """
        with self._lock:
            if self.status != Status.POSTCOPY_RECOVER:
                self._require_status(Status.POSTCOPY_ACTIVE, Input.INTERRUPT)
            # also where it breaks at this moment by itself: nobody but the owner ends this pause
            self._paused_by_owner = True
            if self._link_error is None:
                self._link_error = CancelledError("paused by migrate-pause")
            self._cut_off()
            self._wake.set()

    def recover(self, uri: str) -> None:
        """Go on with a postcopy that is paused, over another connection (migrate with resume).

        UriError, OptionError as of start(), and with capability release-ram; StateError in another
        status.
        """
        check_recovery(self.capabilities)
        check_outgoing(uri, self.capabilities, self.parameters, self._guest)
        with self._lock:
            self._require_status(Status.POSTCOPY_PAUSED, Input.RECOVER)
            self._uri = uri
            self._move(Input.RECOVER)
            self._recovering.set()

    def abandon(self) -> None:
        """Give a postcopy up: it fails, and what was not sent is lost to the destination.

        StateError outside of postcopy. The destination can be taken over with start(resume=True)
        as long as it is paused.
        """
        with self._lock:
            if self._handed_over is None or self.status in FINAL:
                raise StateError(self.status, Input.FAIL)
            self._abandoned = True
            self._break = self._break or self._link_error or CancelledError("by its owner")
            self._recovering.set()
            self._cancel.set()
            self._cut_off()

    @property
    def waits_for_owner(self) -> bool:
        """Whether it stands in status postcopy-paused until its owner does something."""
        with self._lock:
            return self.status == Status.POSTCOPY_PAUSED and self._attempt is None

    @property
    def background(self) -> bool:
        """Whether pages that nobody waits for are sent in postcopy, too; can change at any time."""
        return self._background

    @background.setter
    def background(self, value: bool) -> None:
        self._background = value
        with self._lock:
            if self.status != Status.NONE:
                self._wake.set()

    # ---- going over -------------------------------------------------------------------------

    def _check_postcopy(self, resume: bool) -> None:
        """OptionError when what is wanted of a postcopy is not possible."""
        if resume:
            check_recovery(self.capabilities)
        if self._recovery is not None:
            check_recovery(self.capabilities)
        wanted = {
            "a migration that is resumed": resume,
            "a policy for postcopy": self._goes_over is not None,
            "a policy for recovery": self._recovery is not None,
        }
        for what, needed in wanted.items():
            if needed and Capability.POSTCOPY_RAM not in self.capabilities:
                raise OptionError(f"{what} needs capability 'postcopy-ram'")

    def _consider_postcopy(self, passes: int, remaining: int) -> None:
        """A pass begins while the guest runs, and too much is dirty for it to be stopped."""
        policy = self._goes_over
        if policy is not None and not self._wants_postcopy and policy.goes_over(passes, remaining):
            self._wants_postcopy = True

    def _go_on_in_postcopy(
        self, channel: Channel, writer: StreamWriter, search: PageSearch
    ) -> None:
        assert self._return_path is not None
        urgent = self._link_urgent()
        for command in discards(search):
            writer.put(command)
        devices = package(self._guest.save_devices())
        writer.flush()
        with self._lock:
            if self._error is not None:
                raise self._error
            # whatever happens from here on, the guest may run at the destination
            self._handed_over = writer.offset
            try:
                self._move(Input.POSTCOPY)
            except BaseException:
                self._handed_over = None
                raise
        self._mark("handed over")
        link = Link(writer, channel.writes_to, self._return_path, urgent)
        self._postcopy(search).run(link, devices)

    def _postcopy(self, search: PageSearch) -> PostcopyPhase:
        assert self._requests is not None
        releases = Capability.RELEASE_RAM in self.capabilities
        guest = self._guest
        phase = self._phase = PostcopyPhase(
            self,
            search,
            self._requests,
            background=lambda: self._background,
            releaser=Releaser(guest) if releases and isinstance(guest, ReleasingGuest) else None,
            on_break=self._note_break,
        )
        return phase

    # ---- urgent pages -----------------------------------------------------------------------

    @property
    def _preempt(self) -> PreemptDialect | None:
        if Capability.POSTCOPY_PREEMPT not in self.capabilities:
            return None
        configuration = self._guest.configuration
        return preempt_dialect(configuration.machine if configuration else None)

    def _page_requests(self, search: PageSearch) -> PageRequests | None:
        if Capability.POSTCOPY_RAM not in self.capabilities:
            return None
        releases = Capability.RELEASE_RAM in self.capabilities
        return PageRequests(search, self.faults, tells_sent=releases)

    @property
    def _answered(self) -> RamCounters:
        """Pages that were sent because they were asked for."""
        if self._requests is None:
            return RamCounters()
        normal, fill, _ = self._requests.server.sent
        return RamCounters(normal=normal, fill=fill)

    @property
    def _remaining(self) -> int:
        """Bytes of pages that are still to be sent."""
        if self._phase is not None:
            return self._phase.remaining
        return self._search.remaining if self._search is not None else 0

    def _link_urgent_early(self) -> None:
        if self._preempt is not None and self._preempt.early:
            self._link_urgent()

    def _link_urgent(self) -> UrgentLink | None:
        """Connect for urgent pages, unless that was done or is not to be."""
        dialect, path = self._preempt, self._return_path
        if dialect is None or self._urgent is not None:
            return self._urgent
        if path is not None and not dialect.early and self._handed_over is None:
            # else the destination might take this connection for the main one
            path.wait_until(lambda: PING_SETUP in path.pongs, self.parameters.timeout)
        urgent = UrgentLink(self._connect_beside(), ends=dialect.ends)
        with self._lock:
            self._urgent = urgent
            self._check_wanted()
        return urgent

    def _close_requests(self) -> None:
        if self._requests is not None:
            self._requests.close()

    # ---- breaks -----------------------------------------------------------------------------

    def _note_break(self, error: MigError) -> None:
        """The reading thread cuts the connection off: what it has to say is the better error."""
        with self._lock:
            if self._link_error is not None:
                error = self._link_error
            if not self._abandoned or self._break is None:
                self._break = error
            if self._abandoned:
                raise PeerError(
                    f"postcopy was given up, the destination is paused ({self._break})"
                ) from error
            by_owner = self._paused_by_owner
        self._attempt = None if by_owner else self._next_attempt(error)

    def _next_attempt(self, error: MigError) -> Attempt | None:
        if self._recovery is None:
            return None
        try:
            return self._recovery.broken(self._uri, error)
        except Exception as mistake:
            # of the policy; the guest is half here all the same
            self._break = as_mig_error(mistake)
            return None

    def _unlink(self) -> None:
        writer, self._writer = self._writer, None
        self._sent_before += writer.offset if writer else 0
        self._close_channel()
        self._recovering.clear()

    def _relink(self) -> Link:
        # who abandons says so before he ends this wait
        if self.status == Status.POSTCOPY_PAUSED and not self._abandoned:
            self._await_recovery()
        self._recovering.clear()
        self._link_error = None
        self._paused_by_owner = False
        if self._abandoned:
            raise CancelledError("by its owner")
        channel = self._connect()
        self._break = None
        writer = self._writer = StreamWriter(channel)
        return_path = self._open_return_path(channel)
        self._link_urgent_early()
        self._move(Input.CONNECTED)
        return Link(writer, channel.writes_to, return_path, self._urgent)

    def _await_recovery(self) -> None:
        """Return when the owner wants it to go on, or the policy does."""
        if self._paused_by_owner:
            # after the policy was asked
            self._attempt = None
        attempt = self._attempt
        if self._recovering.wait(None if attempt is None else attempt.seconds):
            return
        assert attempt is not None
        with self._lock:
            if self._recovering.is_set():
                return
            self._uri = attempt.uri
            self._move(Input.RECOVER)
        check_outgoing(self._uri, self.capabilities, self.parameters, self._guest)

    def _resumed(self) -> None:
        self._move(Input.RESUMED)
        if self._recovery is not None:
            try:
                self._recovery.recovered()
            except Exception as mistake:
                # of the policy; the guest needs its memory all the same, also where warnings raise
                with contextlib.suppress(Warning):
                    warnings.warn(f"a recovery policy: {mistake!r}", RuntimeWarning, stacklevel=2)

    def _peer_failed(self, error: MigError) -> None:
        """Called by another thread: the first error is set before the channel ends."""
        with self._lock:
            if self._handed_over is not None:
                # nothing that went wrong before matters to a guest that lives elsewhere
                return
            self._fail(error)
        self._interrupt()

    def _sleep_until_woken(self, seconds: float | None, *, heedful: bool = True) -> None:
        wakes = [self._wake]
        if heedful and self._requests is not None:
            wakes.append(self._requests.bell)
        with contextlib.suppress(IdleTimeoutError):
            self._cancel.wait({wake.fd: select.POLLIN for wake in wakes}, seconds)
            for wake in wakes:
                wake.clear()
        if self._link_error is not None:
            raise self._link_error

    def _link_failed(self, error: MigError) -> None:
        """Called by the return path's thread."""
        with self._lock:
            if self._handed_over is None:
                self._peer_failed(error)
                return
            self._link_error = self._link_error or error
            self._wake.set()
            self._cut_off()

    # ---- what the whole source does ---------------------------------------------------------

    @abstractmethod
    def _postcopy_saver(self, writer: StreamWriter) -> RamSaver:
        """Return what writes the sections of a connection."""
