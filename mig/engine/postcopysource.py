"""PostcopySource: what a source does about postcopy, and about the connections it may need."""

from __future__ import annotations

import contextlib
import select
import threading
from abc import abstractmethod
from collections.abc import Callable

from mig.channel import Channel, connect
from mig.engine.migration import Migration
from mig.engine.outcheck import check_outgoing
from mig.engine.outpostcopy import Link, PostcopyPhase
from mig.engine.requests import PageRequests
from mig.engine.returnpath import ReturnPath
from mig.errors import (
    CancelledError,
    IdleTimeoutError,
    MigError,
    OptionError,
    PeerError,
    StateError,
)
from mig.events import Event
from mig.guest import SourceGuest
from mig.options import Capability, Options
from mig.postcopy.faultorder import FaultLog
from mig.ram.save import RamSaver
from mig.ram.search import PageSearch
from mig.state import FINAL, Input, Status
from mig.stream.writer import StreamWriter

#: statuses in which the guest can still be made to run at the destination at once
_BEFORE_POSTCOPY = frozenset({Status.NONE, Status.SETUP, Status.WAIT_UNPLUG, Status.ACTIVE})


class PostcopySource(Migration):
    """A source that can go over to postcopy, and whose connection may then break and come again."""

    def __init__(
        self, guest: SourceGuest, options: Options, on_event: Callable[[Event], None] | None
    ) -> None:
        super().__init__(options, on_event)
        self._guest = guest
        self._uri = ""
        self._channel: Channel | None = None
        self._return_path: ReturnPath | None = None
        self._writer: StreamWriter | None = None
        self._resumes = False
        self._wants_postcopy = False
        self._background = True
        #: in which order pages are known to be wanted, and where it is noted; set before start()
        self.faults: FaultLog | None = None
        self._requests: PageRequests | None = None
        # bytes sent before the guest may have run at the destination; None: it has not
        self._handed_over: int | None = None
        # bytes sent over connections that are gone
        self._sent_before = 0
        self._break: MigError | None = None
        self._link_error: MigError | None = None
        self._recovering = threading.Event()
        self._abandoned = False

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
            self._link_error = self._link_error or CancelledError("paused by migrate-pause")
            self._cut_off()
            self._wake.set()

    def recover(self, uri: str) -> None:
        """Go on with a postcopy that is paused, over another connection (migrate with resume).

        UriError, OptionError as of start(); StateError in another status.
        """
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
    def background(self) -> bool:
        """Whether pages that nobody waits for are sent in postcopy, too; can change at any time."""
        return self._background

    @background.setter
    def background(self, value: bool) -> None:
        self._background = value
        with self._lock:
            if self.status != Status.NONE:
                self._wake.set()

    # ---- connections ------------------------------------------------------------------------

    def _postcopy(self, search: PageSearch) -> PostcopyPhase:
        assert self._requests is not None
        return PostcopyPhase(
            self,
            search,
            self._requests,
            background=lambda: self._background,
            on_break=self._note_break,
        )

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

    def _unlink(self) -> None:
        writer, self._writer = self._writer, None
        self._sent_before += writer.offset if writer else 0
        self._close_channel()
        self._recovering.clear()

    def _relink(self) -> Link:
        # who abandons says so before he ends this wait
        if self.status == Status.POSTCOPY_PAUSED and not self._abandoned:
            self._recovering.wait()
        self._recovering.clear()
        self._link_error = None
        if self._abandoned:
            raise CancelledError("by its owner")
        channel = self._connect()
        self._break = None
        writer = self._writer = StreamWriter(channel)
        return_path = self._open_return_path(channel)
        self._move(Input.CONNECTED)
        return writer, return_path

    def _sleep_until_woken(self, seconds: float | None) -> None:
        with contextlib.suppress(IdleTimeoutError):
            self._cancel.wait({self._wake.fd: select.POLLIN}, seconds)
            self._wake.clear()
        if self._link_error is not None:
            raise self._link_error

    def _open_return_path(self, channel: Channel) -> ReturnPath:
        takes = Capability.POSTCOPY_RAM in self.capabilities
        path = ReturnPath(channel, self._link_failed, self._requests if takes else None)
        self._return_path = path
        path.start()
        return path

    def _link_failed(self, error: MigError) -> None:
        """Called by the return path's thread."""
        with self._lock:
            if self._handed_over is None:
                self._peer_failed(error)
                return
            self._link_error = self._link_error or error
            self._wake.set()
            if self._channel is not None:
                self._channel.cancel()

    def _connect(self) -> Channel:
        channel = connect(self._uri, self._cancel, self.parameters.timeout)
        with self._lock:
            self._channel = channel
            if self.status == Status.CANCELLING or self._abandoned:
                # who cancelled has not seen the channel
                raise CancelledError("cancelled")
        return channel

    # ---- what the whole source does ---------------------------------------------------------

    @abstractmethod
    def _postcopy_saver(self, writer: StreamWriter) -> RamSaver:
        """Return what writes the sections of a connection."""

    @abstractmethod
    def _peer_failed(self, error: MigError) -> None:
        """Called by another thread before the guest was handed over: the migration fails."""

    @abstractmethod
    def _close_channel(self) -> None:
        """Let go of the connection."""

    @abstractmethod
    def _cut_off(self) -> None:
        """End every wait for the destination."""
