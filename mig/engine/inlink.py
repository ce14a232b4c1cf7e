"""DestinationLink: what connects a destination with its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from mig import _core
from mig.channel import Channel, Listener
from mig.channel.open import Cancel
from mig.engine.accept import Connections
from mig.engine.inlanes import IncomingLanes
from mig.engine.inpostcopy import IncomingPostcopy, Line
from mig.engine.migration import Migration
from mig.engine.uninvited import Uninvited
from mig.engine.urgent import UrgentChannel
from mig.errors import MigError
from mig.events import Event
from mig.guest import DestinationGuest
from mig.options import Capability, Options
from mig.postcopy.load import PostcopyLoader
from mig.records import ReturnMessage
from mig.state import Input
from mig.stream.reader import StreamReader
from mig.stream.writer import StreamWriter
from mig.wire import ReturnType

if TYPE_CHECKING:
    from mig.engine.inpostcopy import PostcopyGuest


class DestinationLink(Migration):
    """The main connection of a destination, its return path, and the connections beside it.

    In postcopy it breaks and is made again, which `IncomingPostcopy` sees to.
    """

    def __init__(
        self, guest: DestinationGuest, options: Options, on_event: Callable[[Event], None] | None
    ) -> None:
        super().__init__(options, on_event)
        self._guest = guest
        self._listener: Listener | None = None
        self._channel: Channel | None = None
        self._reader: StreamReader | None = None
        self._return: StreamWriter | None = None
        self._uninvited: Uninvited | None = None
        self._connections: Connections | None = None
        self._lanes: IncomingLanes | None = None
        self._requests = _core.PageRequests()
        self._urgent: UrgentChannel | None = None
        self._postcopy: IncomingPostcopy | None = None
        # bytes of the connections before this one
        self._before = 0

    def _open_return_path(self) -> None:
        assert self._channel is not None
        # a stream that was recorded on its way still has the command, but nobody listens
        if self._channel.bidirectional and self._return is None:
            self._return = StreamWriter(self._channel)
            if Capability.SWITCHOVER_ACK in self.capabilities:
                self._say(ReturnMessage(ReturnType.SWITCHOVER_ACK))

    def _say(self, message: ReturnMessage) -> None:
        self._say_bytes(message.encode())

    def _say_bytes(self, data: bytes) -> None:
        if self._postcopy is not None:
            self._requests.send(data)
        elif self._return is not None:
            self._return.put(data)
            self._return.flush()

    def _say_failure(self) -> None:
        """Tell the source, on a return path that may be the one that was interrupted."""
        if self._return is not None and self._channel is not None:
            self._channel.restore()
            if self._postcopy is not None:
                self._attach_requests()
            self._say(ReturnMessage.shut(1))

    def _stop_watching(self) -> None:
        with self._lock:
            self._cancel.set()
        if self._lanes is not None:
            self._lanes.cancel()
        if self._connections is not None:
            self._connections.close()
        if self._uninvited is not None:
            self._uninvited.close()

    def _interrupt(self) -> None:
        with self._lock:
            self._cancel.set()
            if self._channel is not None:
                self._channel.cancel()
            if self._lanes is not None:
                self._lanes.cancel()
            if self._connections is not None:
                self._connections.cancel()

    # ---- breaks of a postcopy ---------------------------------------------------------------

    def _line(self, loader: PostcopyLoader) -> Line:
        return _Line(self, loader)

    def _urgent_ended(self, error: MigError | None) -> None:
        """What is wrong with one connection is wrong with both."""
        guest = cast("PostcopyGuest", self._guest)
        if error is not None and self._postcopy is not None:
            self._postcopy.blame(error)
        server = guest.postcopy_server()
        if server is not None:
            server.interrupt()
        with self._lock:
            if error is not None and self._channel is not None:
                self._channel.cancel()

    def _abandon(self) -> None:
        if self._urgent is not None:
            self._urgent.close()
        with self._lock:
            if self._channel is not None:
                self._channel.cancel()

    def _disconnect(self) -> None:
        if self._urgent is not None:
            self._urgent.close()
            self._urgent = None
        with self._lock:
            channel, self._channel = self._channel, None
            reader, self._reader = self._reader, None
        if reader is not None:
            self._before += reader.offset
        if channel is not None:
            channel.cancel()
            self._requests.attach(None)
            self._return = None
            channel.close()
        if self._listener is not None:
            self._stop_watching()
            self._listener.close()
            self._listener = None

    def _reconnect(self, listener: Listener, cancel: Cancel) -> StreamReader:
        try:
            channel = listener.accept(cancel, self.parameters.timeout)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        reader = StreamReader(channel)
        with self._lock:
            self._channel, self._reader = channel, reader
        if Capability.POSTCOPY_PREEMPT in self.capabilities:
            self._urgent = UrgentChannel(listener, self._urgent_ended)
        if channel.bidirectional:
            self._return = StreamWriter(channel)
        self._attach_requests()
        return reader

    def _attach_requests(self) -> None:
        channel = self._channel if self._return is not None else None
        self._requests.attach(channel.writes_to if channel is not None else None)


class _Line:
    """The connection of a migration, as its postcopy sees it."""

    def __init__(self, migration: DestinationLink, loader: PostcopyLoader) -> None:
        self._migration = migration
        self._loader = loader

    def move(self, input_: Input) -> None:
        self._migration._move(input_)

    def say(self, data: bytes) -> None:
        self._migration._say_bytes(data)

    def serve_urgent(self) -> bool:
        urgent = self._migration._urgent
        if urgent is not None:
            urgent.serve(self._loader)
        return urgent is not None

    def drain_urgent(self) -> None:
        server = cast("PostcopyGuest", self._migration._guest).postcopy_server()
        if self._migration._urgent is not None and server is not None:
            server.drain()

    def end_urgent(self) -> None:
        urgent = self._migration._urgent
        if urgent is not None:
            urgent.end()

    def abandon(self) -> None:
        self._migration._abandon()

    def disconnect(self) -> None:
        self._migration._disconnect()

    def reconnect(self, listener: Listener, cancel: Cancel) -> StreamReader:
        return self._migration._reconnect(listener, cancel)
