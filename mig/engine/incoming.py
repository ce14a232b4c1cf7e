"""IncomingMigration: the destination."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from mig.channel import Channel, Listener, parse_uri, require_many_connections
from mig.channel.uri import TcpUri, UnixUri
from mig.engine.accept import Connections
from mig.engine.inhooks import MemoryLock, balloon_inhibited
from mig.engine.inlanes import IncomingLanes
from mig.engine.inlink import DestinationLink
from mig.engine.inpostcopy import IncomingPostcopy
from mig.engine.mapped import IncomingMapped, page_threads, require_mapped
from mig.engine.uninvited import Uninvited, multifd_refused
from mig.engine.urgent import UrgentChannel
from mig.errors import (
    ChannelError,
    MigError,
    OptionError,
    StateError,
)
from mig.events import Event, Listening
from mig.guest import DestinationGuest, LaneTarget, MappedTarget, PostcopyTarget
from mig.options import INCOMING_CAPABILITIES, Capability, MultiFDCompression, Options
from mig.postcopy.load import PostcopyLoader, PostcopyState
from mig.records import Command, ReturnMessage
from mig.savevm.load import StreamLoader
from mig.state import INCOMING, Input, Status, Table
from mig.stats import InetAddress, MigrationInfo, RamStats, UnixAddress
from mig.stream.reader import StreamReader
from mig.wire import (
    ADAPTIVE_READY,
    DEFAULT_PAGE_BITS,
    MULTIFD_MAGIC,
    PING_ADAPTIVE,
    CommandType,
)

if TYPE_CHECKING:
    from mig.engine.inpostcopy import PostcopyGuest


class IncomingMigration(DestinationLink):
    """Receives a guest; matches the destination side of QEMU's precopy.

    capabilities: names that are on, or a mapping of names to on/off; ``return-path`` needs none:
                  it is the source that opens it
    parameters:   values by QMP name
    page_size:    target page size in bytes where the stream does not name it
    exit_on_error: end this process with status 1 when it fails, as QEMU does by default
    on_event:     told of every event (see mig.events)

    When it fails with a return path the source is told so, fails too, and its guest goes on
    running. Without one the source sees the connection break, which it takes for a failure unless
    it has already sent everything.

    With capability postcopy-ram the source may have the guest run here while memory is still to
    come. If the connection breaks then, the status is postcopy-paused until recover() has it back.
    """

    table: ClassVar[Table] = INCOMING
    thread_name = "mig-incoming"
    supported = INCOMING_CAPABILITIES
    incoming = True

    def __init__(
        self,
        guest: DestinationGuest,
        *,
        capabilities: Iterable[str] | Mapping[str, bool] = (),
        parameters: Mapping[str, object] | None = None,
        page_size: int = 1 << DEFAULT_PAGE_BITS,
        exit_on_error: bool = False,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        super().__init__(guest, Options.choose(capabilities, parameters, self.supported), on_event)
        self._page_size = page_size
        self._exit_on_error = exit_on_error
        self._mapped: IncomingMapped | None = None
        self._committed = False
        self._memory_lock = MemoryLock(guest)
        self._loader: PostcopyLoader | None = None
        #: the address to connect to, once listen() has returned
        self.uri: str | None = None

    def listen(self, uri: str) -> None:
        """Begin to listen on ``uri``; UriError or ChannelError when that fails.

        Returns at once; `uri` then tells the address, with the port that was chosen for port 0.
        """
        self._require_status(Status.NONE, Input.START)
        if Capability.MAPPED_RAM in self.capabilities:
            require_mapped(uri, self.capabilities)
            if not isinstance(self._guest, MappedTarget):
                raise OptionError(
                    "Mapped-ram is not supported by this guest (it has no mapped_blocks)"
                )
        elif Capability.MULTIFD in self.capabilities:
            require_many_connections(uri)
            if not isinstance(self._guest, LaneTarget):
                raise OptionError("Multifd is not supported by this guest (it is no LaneTarget)")
        with contextlib.ExitStack() as undo:
            if Capability.POSTCOPY_RAM in self.capabilities:
                undo.callback(self._memory_lock.redo)
                self._require_postcopy(uri)
            self._listener = Listener(uri)
            undo.callback(self._listener.close)
            self.uri = self._listener.uri
            self._launch()
            undo.pop_all()

    def _require_postcopy(self, uri: str) -> None:
        if not isinstance(self._guest, PostcopyTarget):
            raise OptionError("Postcopy is not supported by this guest (it is no PostcopyTarget)")
        if Capability.POSTCOPY_PREEMPT in self.capabilities:
            require_many_connections(uri)
        try:
            self._memory_lock.undo()
        except OSError as error:
            raise OptionError(
                f"Postcopy is not supported: memory cannot be unlocked: {error}"
            ) from error
        reason = self._guest.postcopy_probe()
        if reason is not None:
            raise OptionError(f"Postcopy is not supported: {reason}")

    def recover(self, uri: str) -> None:
        """Listen on ``uri`` for the source of a postcopy that is paused; returns at once.

        As QEMU's migrate-recover. StateError when it is not paused, or listens already.
        """
        self._require_status(Status.POSTCOPY_PAUSED, Input.RECOVER)
        listener = Listener(uri)
        if self._postcopy is None or not self._postcopy.recover(listener):
            listener.close()
            raise StateError(self.status, Input.RECOVER)
        self.uri = listener.uri
        self._emit(Listening(listener.uri))

    def abandon(self) -> None:
        """Give a postcopy up: it fails, the guest here is stopped, and its memory is let go.

        What it has written since it runs here is lost with it; at the source it does not run
        again by itself. StateError outside of postcopy, and when every page is there.
        """
        with self._lock:
            channel = self._channel
            if self._postcopy is None or not self._postcopy.abandon():
                raise StateError(self.status, Input.FAIL)
            if channel is not None:
                channel.cancel()

    # ---- phases -----------------------------------------------------------------------------

    def _run(self) -> None:
        reader = self._reader = self._accept()
        self._load(reader)
        self._guest.commit()
        self._committed = True
        self._confirm()

    def _accept(self) -> StreamReader:
        assert self._listener is not None
        self._emit(Listening(self._listener.uri))
        # a file with mapped-ram has no channels: there multifd is several threads that read it
        if self.capabilities & {Capability.MULTIFD, Capability.MAPPED_RAM} == {Capability.MULTIFD}:
            channel, reader = self._accept_all(self._listener)
        else:
            channel = self._listener.accept(self._cancel, self.parameters.timeout)
            if Capability.MAPPED_RAM in self.capabilities:
                self._mapped = self._open_mapped(channel)
                # what is read ahead is mostly pages, which are read again to where they belong
                reader = StreamReader(channel, buffer_size=1 << 14)
            else:
                reader = StreamReader(channel)
            if Capability.POSTCOPY_PREEMPT in self.capabilities:
                # first: it may end at once, and then this one has to, too
                with self._lock:
                    self._channel = channel
                self._urgent = UrgentChannel(self._listener, self._urgent_ended)
            elif self._listener.accepts_more:
                self._uninvited = Uninvited(
                    self._listener, channel, self._lane_failed, self._postcopy_may_come
                )
        with self._lock:
            self._channel = channel
            if self._error is not None:
                # a channel failed before there was a connection to interrupt
                raise self._error
        self._move(Input.CONNECTED)
        self._mark("connected")
        return reader

    def _accept_all(self, listener: Listener) -> tuple[Channel, StreamReader]:
        assert isinstance(self._guest, LaneTarget)
        parameters = self.parameters
        self._lanes = IncomingLanes(
            self._guest,
            parameters.multifd_channels,
            str(parameters.multifd_compression),
            parameters.timeout,
            self._guest.uuid,
            self._lane_failed,
        )
        connections = Connections(
            listener, parameters.timeout, self._lanes.serve, self._lane_failed
        )
        with self._lock:
            self._connections = connections
        return connections.main(self._cancel)

    def _open_mapped(self, channel: Channel) -> IncomingMapped:
        assert isinstance(self._guest, MappedTarget)
        return IncomingMapped(
            self._guest,
            channel,
            nthreads=page_threads(self.capabilities, self.parameters),
            direct_io=self.parameters.direct_io,
        )

    def _lane_failed(self, error: MigError) -> None:
        self._fail(error)
        self._interrupt()

    def _load(self, reader: StreamReader) -> None:
        if reader.fill(4) and int.from_bytes(bytes(reader.buffer[:4]), "big") == MULTIFD_MAGIC:
            raise multifd_refused(offset=0)
        if Capability.POSTCOPY_RAM in self.capabilities:
            self._load_postcopy(reader)
        else:
            StreamLoader(reader, self._guest, **self._loader_options()).run()

    def _loader_options(self) -> dict[str, Any]:
        return {
            "on_command": self._on_command,
            "counters": self._counters,
            "page_size": self._page_size,
            "decompress_threads": self.parameters.decompress_threads,
            "lanes": self._lanes,
            "mapped": self._mapped,
            "capabilities": self.capabilities,
        }

    def _load_postcopy(self, reader: StreamReader) -> None:
        """A source with postcopy-ram may switch, or end as any other."""
        guest = cast("PostcopyGuest", self._guest)
        loader = self._loader = PostcopyLoader(reader, guest, **self._loader_options())
        loader.run()
        if loader.package is None:
            return
        if self._uninvited is not None:
            self._uninvited.settle()
        self._postcopy = IncomingPostcopy(self._line(loader), loader, guest)
        self._attach_requests()
        self._move(Input.POSTCOPY)
        guest.postcopy_listen(self._requests)
        with balloon_inhibited(guest):
            self._postcopy.run()

    def _postcopy_may_come(self) -> bool:
        return self._loader is not None and self._loader.state != PostcopyState.NONE

    def _on_command(self, command: Command) -> None:
        if self._postcopy is not None:
            self._postcopy.obey(command)
        if command.type == CommandType.OPEN_RETURN_PATH:
            self._open_return_path()
        elif command.type == CommandType.PING:
            if command.value == PING_ADAPTIVE and self._adapts:
                self._say(ReturnMessage.pong(ADAPTIVE_READY))
            self._say(ReturnMessage.pong(command.value))

    @property
    def _adapts(self) -> bool:
        compression = self.parameters.multifd_compression
        return self._lanes is not None and compression == MultiFDCompression.ADAPTIVE

    def _confirm(self) -> None:
        assert self._channel is not None
        if self._postcopy is not None:
            # the guest is here, with all of its memory, whatever the source hears of it
            self._channel.restore()
            self._attach_requests()
            with contextlib.suppress(ChannelError):
                self._say(ReturnMessage.shut(0))
            return
        try:
            # from here on a cancel comes too late
            self._channel.restore()
            self._say(ReturnMessage.shut(0))
        except ChannelError as error:
            raise ChannelError(f"all is received and kept, but the source left: {error}") from error

    # ---- ends -------------------------------------------------------------------------------

    def _cleanup(self, *, failed: bool) -> None:
        self._stop_watching()
        try:
            if failed and not self._committed:
                with contextlib.suppress(MigError):
                    self._say_failure()
                self._guest.abort()
        finally:
            self._memory_lock.redo()
            if self._urgent is not None:
                self._urgent.close()
            with self._lock:
                channel, self._channel = self._channel, None
            self._requests.attach(None)
            if channel is not None:
                channel.close()
            if self._listener is not None:
                self._listener.close()

    def query(self) -> MigrationInfo:
        """Return a snapshot of status and statistics.

        In postcopy-paused `error` tells why; capability postcopy-blocktime counts the waiting.
        """
        info = super().query()
        if info.status == Status.POSTCOPY_PAUSED and self._postcopy is not None:
            info = replace(info, error=str(self._postcopy.interruption))
        if Capability.POSTCOPY_BLOCKTIME in self.capabilities and isinstance(
            self._guest, PostcopyTarget
        ):
            times = self._guest.postcopy_times()
            info = replace(
                info,
                postcopy_blocktime=times.all_vcpus,
                postcopy_vcpu_blocktime=times.vcpus,
                postcopy_latencies=times.latencies,
            )
        return info

    def _socket_addresses(self) -> tuple[InetAddress | UnixAddress, ...]:
        uri = None if self.uri is None else parse_uri(self.uri)
        if isinstance(uri, TcpUri):
            return (InetAddress(uri.host, uri.port),)
        return (UnixAddress(uri.path),) if isinstance(uri, UnixUri) else ()

    def _ram_stats(self) -> RamStats:
        counters, reader = self._counters, self._reader
        normal, zero = self._lanes.npages if self._lanes else (0, 0)
        beside = self._lanes.nbytes if self._lanes else 0
        mapped = self._mapped.nbytes if self._mapped else 0
        return RamStats(
            transferred=beside + mapped + self._before + (reader.nread if reader else 0),
            remaining=None,
            total=counters.total,
            duplicate=counters.fill + zero,
            normal=counters.normal + normal,
            page_size=self._page_size,
            dirty_sync_count=None,
            multifd_bytes=beside,
        )
