"""The return path as the source sees it: a thread that reads what the destination says."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from mig.channel import Channel
from mig.channel.base import LAST_WORDS
from mig.engine.requests import PageRequests
from mig.errors import (
    CancelledError,
    ChannelError,
    MigError,
    PeerError,
    StreamError,
    TruncatedError,
)
from mig.records import ReturnMessage
from mig.stream.reader import Source, StreamReader
from mig.wire import RECV_BITMAP_END, RESUME_ACK_READY, ReturnType

#: different values of PONGs that are remembered
_MOST_PONGS = 64


class ReturnPath:
    """Reads messages until SHUT.

    on_failure: told once, by the reading thread, when the destination reports failure or leaves
    before its SHUT
    requests: what the destination waits for is put into, None outside of postcopy
    """

    def __init__(
        self,
        channel: Channel,
        on_failure: Callable[[MigError], None],
        requests: PageRequests | None = None,
    ) -> None:
        self._channel = channel
        # where messages are read; the requests that can be answered are not seen there
        self._source: Source = channel
        self._on_failure = on_failure
        self._requests = requests
        self._ended = threading.Event()
        #: set before the last bytes are written: an earlier SHUT cannot be true
        self.may_confirm = False
        #: the destination has said that the switchover may come (capability switchover-ack)
        self.acked = False
        #: values of PONGs so far
        self.pongs: set[int] = set()
        #: bitmaps of received pages so far, little-endian, by block; a resumed postcopy has them
        self.bitmaps: dict[str, bytes] = {}
        #: blocks whose bitmaps were asked for and have not come
        self.awaited: set[str] = set()
        #: set before the destination is asked whether it is ready for the rest of a postcopy
        self.may_resume = False
        #: whether it is
        self.resumed = False
        self._news = threading.Condition()
        self.error: MigError | None = None
        self._thread = threading.Thread(target=self._run, name="mig-return-path", daemon=True)

    def start(self) -> None:
        """Begin to read. The destination may be silent as long as pages are on their way."""
        self._channel.timeout = None
        self._thread.start()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self.error = error if isinstance(error, MigError) else MigError(repr(error))
            self._end()
            self._on_failure(self.error)
        finally:
            self._end()

    def _read(self) -> None:
        if self._requests is not None:
            self._requests.listen(self._channel)
            self._source = self._requests.server
        reader = StreamReader(self._source, buffer_size=4096)
        while True:
            message = self._next(reader)
            if message.type == ReturnType.SHUT:
                if message.value:
                    raise PeerError(f"the destination reports failure ({message.value:#x})")
                if not self.may_confirm:
                    raise PeerError("the destination confirms what was not sent yet")
                return
            if message.type == ReturnType.SWITCHOVER_ACK:
                self.acked = True
            elif message.type == ReturnType.PONG:
                self._note_pong(message.value)
            elif self._requests is None:
                raise reader.error(f"{message.type.name} outside of postcopy")
            else:
                self._take(message, reader, self._requests)

    def _next(self, reader: StreamReader) -> ReturnMessage:
        """Answer requests until something else comes, and return that."""
        try:
            if self._requests is not None:
                self._requests.server.run()
            return ReturnMessage.read(reader)
        except (TruncatedError, ChannelError) as error:
            if (said := self._last_word(reader)) is not None:
                raise said from error
            if isinstance(error, PeerError):
                raise
            raise PeerError(
                f"the destination went away before it confirmed the migration ({error})"
            ) from error

    def _last_word(self, reader: StreamReader) -> PeerError | None:
        """Return what the destination has to say about a connection that is of no use any more."""
        end = time.monotonic() + LAST_WORDS
        with contextlib.suppress(StreamError, ChannelError, CancelledError):
            # a guest that still runs there goes on to ask
            while (left := end - time.monotonic()) > 0:
                self._source.timeout = left
                message = ReturnMessage.read(reader)
                if message.type == ReturnType.SHUT and message.value:
                    return PeerError(f"the destination reports failure ({message.value:#x})")
        return None

    def _take(self, message: ReturnMessage, reader: StreamReader, requests: PageRequests) -> None:
        try:
            if message.type in (ReturnType.REQ_PAGES, ReturnType.REQ_PAGES_ID):
                requests.add(*message.pages)
            elif message.type == ReturnType.RECV_BITMAP:
                self._take_bitmap(message.block, reader, requests)
            elif message.value != RESUME_ACK_READY:
                raise reader.error(f"RESUME_ACK of {message.value}")
            elif not self.may_resume or self.resumed:
                raise reader.error("RESUME_ACK that nobody asked for")
            else:
                with self._news:
                    self.resumed = True
                    self._news.notify_all()
        except (ValueError, UnicodeDecodeError) as error:
            raise reader.error(f"return-path message {message.type.name}: {error}") from error

    def _take_bitmap(self, idstr: str, reader: StreamReader, requests: PageRequests) -> None:
        """Be64 size, so many bytes, and a mark; matches ram_dirty_bitmap_reload()."""
        if idstr not in self.awaited:
            raise reader.error(f"a bitmap of block '{idstr}', which was not asked for")
        at, nbytes = reader.offset, reader.u64("the size of a bitmap")
        if nbytes != requests.bitmap_nbytes(idstr):
            raise reader.error(f"a bitmap of {nbytes} bytes for block '{idstr}'", offset=at)
        data = reader.read(nbytes, "a bitmap")
        if reader.u64("the end of a bitmap") != RECV_BITMAP_END:
            raise reader.error(f"the bitmap of block '{idstr}' has no end mark", offset=at)
        with self._news:
            self.bitmaps[idstr] = data
            self.awaited.discard(idstr)
            self._news.notify_all()

    def _end(self) -> None:
        with self._news:
            self._ended.set()
            self._news.notify_all()

    def _note_pong(self, value: int) -> None:
        with self._news:
            # a destination may make values up
            if len(self.pongs) < _MOST_PONGS:
                self.pongs.add(value)
            self._news.notify_all()

    def wait_until(self, came: Callable[[], bool], timeout: float | None) -> None:
        """Wait for something in `pongs`, `bitmaps` or `resumed`; PeerError when it does not come.

        timeout: seconds, None for ever
        """
        with self._news:
            self._news.wait_for(lambda: came() or self._ended.is_set(), timeout)
        if self.error is not None:
            raise self.error
        if not came():
            raise PeerError(f"the destination did not answer within {timeout} s")

    def wait_shut(self, timeout: float | None) -> None:
        """Wait until the destination has confirmed; PeerError when it does not.

        timeout: seconds, None for ever
        """
        if not self._ended.wait(timeout):
            raise PeerError(f"the destination did not confirm within {timeout} s")
        if self.error is not None:
            raise self.error

    def has_confirmed(self, timeout: float) -> bool:
        """Wait a little, and say whether the destination has confirmed."""
        return self._ended.wait(timeout) and self.error is None

    def join(self) -> None:
        """Wait for the thread to end; the channel is cancelled or SHUT has come."""
        self._thread.join()
