"""SourceLink: what connects a source with its destination."""

from __future__ import annotations

import contextlib
import select
import threading
from abc import abstractmethod
from collections.abc import Callable

from mig.channel import Channel, connect
from mig.engine.migration import Migration
from mig.engine.outlanes import OutgoingLanes
from mig.engine.preempt import UrgentLink
from mig.engine.requests import PageRequests
from mig.engine.returnpath import ReturnPath
from mig.errors import CancelledError, ChannelError, IdleTimeoutError, MigError
from mig.events import Event
from mig.options import Capability, Options
from mig.state import Status
from mig.stream.writer import StreamWriter

#: seconds in which a destination that has everything may still confirm when it is cancelled
_LAST_CALL = 2.0


class SourceLink(Migration):
    """The main connection of a source, its return path, and the connections beside it."""

    def __init__(self, options: Options, on_event: Callable[[Event], None] | None) -> None:
        super().__init__(options, on_event)
        self._uri = ""
        self._channel: Channel | None = None
        self._return_path: ReturnPath | None = None
        self._writer: StreamWriter | None = None
        self._lanes: OutgoingLanes | None = None
        self._urgent: UrgentLink | None = None
        # bytes sent over connections for urgent pages that are gone, but for pages
        self._urgent_before = 0
        self._requests: PageRequests | None = None
        # nobody is to be called up any more
        self._abandoned = False
        self._all_said = False
        self._last_call: threading.Timer | None = None

    @property
    def _urgent_bytes(self) -> int:
        """Bytes of what was asked for, and of connections for it."""
        urgent, requests = self._urgent, self._requests
        answers = requests.server.sent[2] if requests is not None else 0
        return answers + self._urgent_before + (urgent.nbytes if urgent is not None else 0)

    def _connect(self) -> Channel:
        channel = connect(self._uri, self._cancel, self.parameters.timeout)
        with self._lock:
            self._channel = channel
            self._check_wanted()
        return channel

    def _connect_beside(self) -> Channel:
        """Open another connection to where the main one goes."""
        return connect(self._uri, self._cancel, self.parameters.timeout)

    def _check_wanted(self) -> None:
        """Raise if it was cancelled by somebody who has not seen the connection."""
        if self.status == Status.CANCELLING or self._abandoned:
            raise CancelledError("cancelled")

    def _open_return_path(self, channel: Channel) -> ReturnPath:
        takes = Capability.POSTCOPY_RAM in self.capabilities
        path = ReturnPath(channel, self._link_failed, self._requests if takes else None)
        self._return_path = path
        path.start()
        return path

    @abstractmethod
    def _link_failed(self, error: MigError) -> None:
        """Called by a thread of a connection that is of no use any more."""

    def _lane_failed(self, error: MigError) -> None:
        """Called by the channel's thread; the destination may be about to say the reason."""
        self._fail(error)
        if self._return_path is not None:
            with contextlib.suppress(MigError):
                self._return_path.wait_shut(1.0)
        self._interrupt()

    def _sleep(self, seconds: float) -> None:
        """Wait, but no longer than until parameters change."""
        if seconds > 0:
            with contextlib.suppress(IdleTimeoutError):
                self._cancel.wait({self._wake.fd: select.POLLIN}, seconds)
                self._wake.clear()

    def _close_channel(self) -> None:
        """Let go of all connections."""
        if self._last_call is not None:
            self._last_call.cancel()
        self._cut_off()
        if self._lanes is not None:
            self._lanes.close()
        if self._return_path is not None:
            self._return_path.join()
        with self._lock:
            channel, self._channel = self._channel, None
            urgent, self._urgent = self._urgent, None
        if urgent is not None:
            urgent.close()
            self._urgent_before += urgent.nbytes
        if channel is not None:
            channel.close()

    def _cut_off(self) -> None:
        """End every wait for the destination."""
        with self._lock:
            if self._channel is not None:
                self._channel.cancel()
            if self._lanes is not None:
                self._lanes.cancel()
            if self._urgent is not None:
                self._urgent.cancel()

    def _cut_off_soon(self) -> None:
        """Unless all is said: then the destination may own the guest already. Hear what it says."""
        with self._lock:
            if not self._all_said or self._error is not None:
                self._cut_off()
            elif self._last_call is None:
                self._last_call = threading.Timer(_LAST_CALL, self._cut_off)
                self._last_call.daemon = True
                self._last_call.start()

    def _prefer_peer_error(self, return_path: ReturnPath) -> None:
        """A write that failed because the destination gave up: what it said is the better error.

        Its last word may still be on its way to the reading thread.
        """
        error = self._error
        if isinstance(error, ChannelError) and not isinstance(error, IdleTimeoutError):
            try:
                return_path.wait_shut(1.0)
            except CancelledError:
                pass
            except MigError as said:
                if self._error is error and said is return_path.error:
                    self._error = said
