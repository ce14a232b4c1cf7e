"""The channels of a destination with multifd."""

from __future__ import annotations

import threading
from collections.abc import Callable
from uuid import UUID

from mig import _core
from mig.channel import Channel
from mig.errors import (
    CancelledError,
    ChannelError,
    IdleTimeoutError,
    MigError,
    MismatchError,
    StreamError,
    TruncatedError,
    as_mig_error,
)
from mig.guest import LaneTarget
from mig.records import MultifdInit
from mig.wire import MULTIFD_INIT

#: how long the channel that failed may take to say why (seconds)
_LAST_WORDS = 5.0


def _section(channel: int) -> str:
    return f"multifd channel {channel}"


def named(error: BaseException, channel: int) -> MigError:
    """Return the error that ended a channel as one that says which."""
    if isinstance(error, _core.MultifdPacketError):
        return StreamError(
            str(error), offset=error.offset, section=_section(channel), block=error.block
        )
    if isinstance(error, ChannelError):
        wrapped = type(error)(f"{_section(channel)}: {error}")
        wrapped.__cause__ = error
        return wrapped
    return as_mig_error(error)


class IncomingLanes:
    """The channels of a destination, which may come in any order and at any time.

    target:   where pages go
    count:    how many channels there are (parameter multifd-channels)
    compression: none, zlib or zstd (parameter multifd-compression)
    timeout:  seconds that may pass without a packet while all wait for one, None for ever
    uuid:     of the guest, if it has one: the channels must be of the same machine
    on_error: told of what ended a channel before its time, by that channel's thread
    """

    def __init__(
        self,
        target: LaneTarget,
        count: int,
        compression: str,
        timeout: float | None,
        uuid: UUID | None,
        on_error: Callable[[MigError], None],
    ) -> None:
        self._target = target
        self._count = count
        self._compression = compression
        self._timeout = timeout
        self._uuid = uuid
        self._on_error = on_error
        self._lock = threading.Lock()
        self._seen: dict[int, MultifdInit] = {}
        # the channels that are being read; told when there are none
        self._serving: set[Channel] = set()
        self._idle = threading.Condition(self._lock)
        self._over = False
        self._receiver: _core.MultifdReceiver | None = None
        # set when there is a receiver, or none will come
        self._decided = threading.Event()
        self._error: MigError | None = None
        self._failed = threading.Event()

    @property
    def nbytes(self) -> int:
        """Bytes received, with those that introduce the channels."""
        packets = self._receiver.nbytes if self._receiver is not None else 0
        return packets + len(self._seen) * MULTIFD_INIT

    @property
    def npages(self) -> tuple[int, int]:
        """Pages received, with contents and zero."""
        receiver = self._receiver
        return (receiver.normal, receiver.zero) if receiver is not None else (0, 0)

    def serve(self, channel: Channel, init: MultifdInit) -> None:
        """Be one channel until it ends."""
        with self._lock:
            if self._over:
                return
            self._serving.add(channel)
        try:
            self._enter(init)
            self._decided.wait()
            receiver = self._receiver
            if receiver is not None:
                channel.read_by(lambda fd: receiver.run(init.channel, fd))
        except (_core.MultifdStoppedError, CancelledError):
            pass  # somebody else knows why
        except Exception as error:
            self._fail(named(error, init.channel))
        finally:
            with self._lock:
                self._serving.discard(channel)
                self._idle.notify_all()

    def _enter(self, init: MultifdInit) -> None:
        where = _section(init.channel)
        theirs = UUID(bytes=init.uuid)
        with self._lock:
            if init.channel >= self._count:
                raise StreamError(
                    f"the source has more multifd channels than {self._count} "
                    "(parameter multifd-channels)",
                    offset=0,
                    section=where,
                )
            if init.channel in self._seen:
                raise StreamError(f"{where} is there twice", offset=0, section=where)
            if any(other.uuid != init.uuid for other in self._seen.values()):
                raise StreamError(f"{where} is of another machine", offset=0, section=where)
            # a source whose guest has no UUID sends zeros
            if self._uuid is not None and theirs.int and theirs != self._uuid:
                raise MismatchError(
                    f"UUID received is {theirs} and local is {self._uuid}", offset=0, section=where
                )
            self._seen[init.channel] = init

    def _fail(self, error: MigError) -> None:
        with self._lock:
            if self._over:
                return  # RAM is complete: whatever it was, it was not needed
            if self._error is None:
                self._error = error
        self._failed.set()
        self._stop()
        self._on_error(error)

    # ---- for the main stream ----------------------------------------------------------------

    def open(self, parser: _core.RamParser, section_id: int) -> None:
        """The blocks are known: pages can come."""
        receiver = _core.MultifdReceiver(parser, self._count, compression=self._compression)
        self._target.open_lanes(receiver, parser, section_id)
        with self._lock:
            if not self._decided.is_set():
                self._receiver = receiver
        self._decided.set()

    def sync(self) -> None:
        """Wait until all channels have come to the same place."""
        receiver = self._receiver
        try:
            if receiver is None:
                raise _core.MultifdStoppedError
            receiver.sync(self._timeout)
        except _core.MultifdStoppedError:
            if self._failed.wait(_LAST_WORDS) and self._error is not None:
                raise self._error from None
            raise CancelledError("cancelled") from None
        except _core.MultifdGoneError as error:
            assert receiver is not None
            channel, offset = next(iter(receiver.ended.items()))
            raise TruncatedError(
                "stream ends before a SYNC that other channels came to",
                offset=offset,
                section=_section(channel),
            ) from error
        except IdleTimeoutError as error:
            missing = self._count - len(self._seen)
            if missing:
                raise IdleTimeoutError(
                    f"{missing} of {self._count} multifd channels did not come"
                ) from error
            raise

    def finish(self) -> None:
        """RAM is complete: when this returns no channel takes anything any more.

        Raises what a channel had been ended by before.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            self._over = True
            self._end()
            for channel in self._serving:
                channel.cancel()
            self._idle.wait_for(lambda: not self._serving)

    # ---- end --------------------------------------------------------------------------------

    def _end(self) -> None:
        """With the lock held."""
        self._decided.set()
        if self._receiver is not None:
            self._receiver.stop()

    def _stop(self) -> None:
        with self._lock:
            self._end()

    def cancel(self) -> None:
        """End every wait. Any thread."""
        self._failed.set()
        self._stop()
