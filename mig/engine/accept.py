"""Connections: tells the main connection of a source from the channels beside it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from mig.channel import Channel, Listener
from mig.channel.open import Cancel
from mig.errors import CancelledError, ChannelError, IdleTimeoutError, MigError
from mig.records import MultifdInit
from mig.stream.reader import StreamReader
from mig.wire import MULTIFD_INIT, MULTIFD_MAGIC

#: connections that may be open at a time without having said what they are; the oldest has to go
_MOST_STRANGERS = 64
#: bytes that the main stream is read ahead
_READ_AHEAD = 1 << 20


def _starts_with(reader: StreamReader, magic: int) -> bool:
    return int.from_bytes(bytes(reader.buffer[:4]), "big") == magic


class Connections:
    """Accepts all connections of one source, in any order, and asks each for its first bytes.

    serve:    is one channel of multifd until it ends, in a thread of its own
    on_error: told of what keeps a channel from coming, by the thread that met it
    timeout:  idle limit of every connection in seconds, None: none

    Who leaves without having said anything, or says nothing for the idle limit, was a stranger.
    """

    def __init__(
        self,
        listener: Listener,
        timeout: float | None,
        serve: Callable[[Channel, MultifdInit], None],
        on_error: Callable[[MigError], None],
    ) -> None:
        self._listener = listener
        self._timeout = timeout
        self._serve = serve
        self._on_error = on_error
        self._lock = threading.Lock()
        self._closing = False
        self._channels: set[Channel] = set()
        # of them, who has not said anything yet, the oldest first
        self._strangers: dict[Channel, None] = {}
        self._threads: list[threading.Thread] = []
        self._main: tuple[Channel, StreamReader] | None = None
        self._taken = False
        self._error: MigError | None = None
        # set when the first connection has said that it is part of a migration, or none can come
        self._begun = threading.Event()
        # set when there is a main connection, or none can come
        self._decided = threading.Event()

    def main(self, cancel: Cancel) -> tuple[Channel, StreamReader]:
        """Begin to accept; return the main connection, of which only the reader has read."""
        self._spawn(self._accept, cancel)
        self._begun.wait()
        if not self._decided.wait(self._timeout):
            raise IdleTimeoutError("the source opened multifd channels, but no main connection")
        with self._lock:
            if self._main is None:
                raise self._error or CancelledError("cancelled")
            self._taken = True
            return self._main

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(
            target=work, args=arguments, name="mig-multifd-incoming", daemon=True
        )
        with self._lock:
            if not self._closing:
                # who came and went is to leave nothing behind
                self._threads = [other for other in self._threads if other.is_alive()]
                self._threads.append(thread)
                thread.start()

    def _accept(self, cancel: Cancel) -> None:
        try:
            while True:
                channel = self._listener.accept(cancel, self._timeout)
                with self._lock:
                    self._channels.add(channel)
                    self._strangers[channel] = None
                    if len(self._strangers) > _MOST_STRANGERS:
                        oldest = next(iter(self._strangers))
                        del self._strangers[oldest]
                        oldest.cancel()
                self._spawn(self._meet, channel)
        except CancelledError:
            pass
        except MigError as error:
            self._error = error
            self._on_error(error)
        finally:
            self._decided.set()
            self._begun.set()

    def _meet(self, channel: Channel) -> None:
        """Find out what a connection is; a stranger that is neither is sent away."""
        reader = StreamReader(channel, buffer_size=MULTIFD_INIT)
        init = None
        with contextlib.suppress(CancelledError):
            init = self._introduced(channel, reader)
        if init is not None:
            self._serve(channel, init)
        with self._lock:
            mine = channel in self._channels
            self._channels.discard(channel)
            self._strangers.pop(channel, None)
            if mine:
                channel.close()

    def _introduced(self, channel: Channel, reader: StreamReader) -> MultifdInit | None:
        try:
            known = reader.fill(4)
        except ChannelError:
            known = False
        if not known:
            return None
        if not _starts_with(reader, MULTIFD_MAGIC):
            self._stream_came(channel, reader)
            return None
        with self._lock:
            self._strangers.pop(channel, None)
        self._begun.set()
        reader.section = "multifd channel"
        try:
            # all of it at once, so that not a byte of what follows is read here
            reader.fill(MULTIFD_INIT)
            return MultifdInit.read(reader)
        except CancelledError:
            raise
        except MigError as error:
            self._on_error(error)
            return None

    def _stream_came(self, channel: Channel, reader: StreamReader) -> None:
        """The first that is no channel is the stream; if it is none, its loader says why."""
        with self._lock:
            if self._main is None and not self._closing:
                reader.widen(_READ_AHEAD)
                self._main = (channel, reader)
                self._channels.discard(channel)
                self._strangers.pop(channel, None)
                self._begun.set()
                self._decided.set()

    # ---- end --------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End every wait. Any thread."""
        with self._lock:
            self._closing = True
            for channel in self._channels:
                channel.cancel()

    def close(self) -> None:
        """Let go of every connection but the main one, which its taker closes.

        To be called when what `main` was told to give up by is set.
        """
        self.cancel()
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        if self._main is not None and not self._taken:
            self._main[0].close()
