"""The return path as the source sees it: a thread that reads what the destination says."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mig.channel import Channel
from mig.errors import ChannelError, MigError, PeerError, TruncatedError
from mig.records import ReturnMessage
from mig.stream.reader import StreamReader
from mig.wire import ReturnType

#: different values of PONGs that are remembered
_MOST_PONGS = 64


class ReturnPath:
    """Reads messages until SHUT.

    on_failure: told once, by the reading thread, when the destination reports failure or leaves
    before its SHUT
    """

    def __init__(self, channel: Channel, on_failure: Callable[[MigError], None]) -> None:
        self._channel = channel
        self._on_failure = on_failure
        self._ended = threading.Event()
        #: set before the last bytes are written: an earlier SHUT cannot be true
        self.may_confirm = False
        #: the destination has said that the switchover may come (capability switchover-ack)
        self.acked = False
        #: values of PONGs so far
        self.pongs: set[int] = set()
        self._ponged = threading.Condition()
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
        reader = StreamReader(self._channel, buffer_size=4096)
        while True:
            try:
                message = ReturnMessage.read(reader)
            except (TruncatedError, ChannelError) as error:
                raise PeerError(
                    f"the destination went away before it confirmed the migration ({error})"
                ) from error
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
            else:
                raise reader.error(f"{message.type.name} outside of postcopy")

    def _end(self) -> None:
        with self._ponged:
            self._ended.set()
            self._ponged.notify_all()

    def _note_pong(self, value: int) -> None:
        with self._ponged:
            # a destination may make values up
            if len(self.pongs) < _MOST_PONGS:
                self.pongs.add(value)
            self._ponged.notify_all()

    def wait_pong(self, value: int, timeout: float | None) -> None:
        """Wait until the destination has answered PING ``value``; PeerError when it does not."""
        with self._ponged:
            came = self._ponged.wait_for(
                lambda: value in self.pongs or self._ended.is_set(), timeout
            )
        if self.error is not None:
            raise self.error
        if not came or value not in self.pongs:
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
