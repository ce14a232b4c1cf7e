"""Connections: tells the main connection of a source from the channels beside it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from mig.channel import Channel, Listener
from mig.channel.open import Cancel
from mig.errors import CancelledError, ChannelError, MigError, StreamError
from mig.records import MultifdInit
from mig.stream.reader import StreamReader
from mig.wire import MULTIFD_INIT, MULTIFD_MAGIC

#: strangers that may be connected at a time without having said what they are
_MOST_STRANGERS = 64
#: bytes that the main stream is read ahead
_READ_AHEAD = 1 << 20


def _starts_with(reader: StreamReader, magic: int) -> bool:
    return int.from_bytes(bytes(reader.buffer[:4]), "big") == magic


class Connections:
    """Accepts all connections of one source, in any order, and asks each for its first bytes.

    serve:    is one channel of multifd until it ends, in a thread of its own
    timeout:  idle limit of every connection in seconds, None: none
    """

    def __init__(
        self,
        listener: Listener,
        timeout: float | None,
        serve: Callable[[Channel, MultifdInit], None],
    ) -> None:
        self._listener = listener
        self._timeout = timeout
        self._serve = serve
        self._lock = threading.Lock()
        self._closing = False
        self._channels: set[Channel] = set()
        self._threads: list[threading.Thread] = []
        self._strangers = threading.Semaphore(_MOST_STRANGERS)
        self._main: tuple[Channel, StreamReader] | None = None
        self._error: MigError | None = None
        # set when there is a main connection, or none can come
        self._decided = threading.Event()

    def main(self, cancel: Cancel) -> tuple[Channel, StreamReader]:
        """Begin to accept; return the main connection, of which only the reader has read."""
        self._spawn(self._accept, cancel)
        self._decided.wait()
        if self._main is None:
            raise self._error or CancelledError("cancelled")
        return self._main

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(
            target=work, args=arguments, name="mig-multifd-incoming", daemon=True
        )
        with self._lock:
            if not self._closing:
                self._threads.append(thread)
                thread.start()

    def _accept(self, cancel: Cancel) -> None:
        try:
            while True:
                channel = self._listener.accept(cancel, self._timeout)
                # who is too many waits in the listener's queue
                self._strangers.acquire()
                with self._lock:
                    self._channels.add(channel)
                self._spawn(self._meet, channel)
        except MigError as error:
            self._error = error
        finally:
            self._decided.set()

    def _meet(self, channel: Channel) -> None:
        """Find out what a connection is; a stranger that is neither is sent away."""
        reader = StreamReader(channel, buffer_size=MULTIFD_INIT)
        init = None
        with contextlib.suppress(CancelledError):
            init = self._introduced(channel, reader)
        self._strangers.release()
        if init is not None:
            self._serve(channel, init)
        with self._lock:
            mine = channel in self._channels
            self._channels.discard(channel)
        if mine:
            channel.close()

    def _introduced(self, channel: Channel, reader: StreamReader) -> MultifdInit | None:
        with contextlib.suppress(ChannelError):
            if reader.fill(4) and _starts_with(reader, MULTIFD_MAGIC):
                with contextlib.suppress(StreamError):
                    return MultifdInit.read(reader)
                return None
        with self._lock:
            # the first that is no channel is the stream; if it is none, its loader says why
            if self._main is None and not self._closing:
                reader.widen(_READ_AHEAD)
                self._main = (channel, reader)
                self._channels.discard(channel)
                self._decided.set()
        return None

    # ---- end --------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End every wait. Any thread."""
        with self._lock:
            self._closing = True
            for channel in self._channels:
                channel.cancel()
        for _ in range(_MOST_STRANGERS):
            self._strangers.release()

    def close(self) -> None:
        """Let go of every connection but the main one, which its taker closes.

        To be called when what `main` was told to give up by is set.
        """
        self.cancel()
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            channel.close()
