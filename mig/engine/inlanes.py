"""The channels of a destination with multifd."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mig import _core
from mig.channel import Channel
from mig.errors import (
    CancelledError,
    ChannelError,
    IdleTimeoutError,
    MigError,
    StreamError,
    as_mig_error,
)
from mig.guest import LaneTarget
from mig.records import MultifdInit

#: how long the channel that failed may take to say why (seconds)
_LAST_WORDS = 5.0


class IncomingLanes:
    """The channels of a destination, which may come in any order and at any time.

    target:   where pages go
    count:    how many channels there are (parameter multifd-channels)
    compression: none, zlib or zstd (parameter multifd-compression)
    timeout:  seconds that may pass without a packet while all wait for one, None for ever
    on_error: told of what ended a channel before its time, by that channel's thread
    """

    def __init__(
        self,
        target: LaneTarget,
        count: int,
        compression: str,
        timeout: float | None,
        on_error: Callable[[MigError], None],
    ) -> None:
        self._target = target
        self._count = count
        self._compression = compression
        self._timeout = timeout
        self._on_error = on_error
        self._lock = threading.Lock()
        self._seen: dict[int, MultifdInit] = {}
        self._receiver: _core.MultifdReceiver | None = None
        # set when there is a receiver, or none will come
        self._decided = threading.Event()
        self._error: MigError | None = None
        self._failed = threading.Event()

    @property
    def nbytes(self) -> int:
        """Bytes of packets received."""
        return self._receiver.nbytes if self._receiver is not None else 0

    @property
    def npages(self) -> tuple[int, int]:
        """Pages received, with contents and zero."""
        receiver = self._receiver
        return (receiver.normal, receiver.zero) if receiver is not None else (0, 0)

    def serve(self, channel: Channel, init: MultifdInit) -> None:
        """Be one channel until it ends."""
        try:
            self._enter(init)
            self._decided.wait()
            receiver = self._receiver
            if receiver is not None:
                channel.read_by(lambda fd: receiver.run(init.channel, fd))
        except (_core.MultifdStoppedError, CancelledError):
            pass  # somebody else knows why
        except _core.MultifdPacketError as error:
            section = f"multifd channel {init.channel}"
            self._fail(
                StreamError(str(error), offset=error.offset, section=section, block=error.block)
            )
        except Exception as error:
            self._fail(as_mig_error(error))

    def _enter(self, init: MultifdInit) -> None:
        with self._lock:
            if init.channel >= self._count:
                raise StreamError(
                    f"the source has more multifd channels than {self._count} "
                    "(parameter multifd-channels)",
                    offset=0,
                    section=f"multifd channel {init.channel}",
                )
            others = self._seen.values()
            if init.channel in self._seen or any(other.uuid != init.uuid for other in others):
                what = "is there twice" if init.channel in self._seen else "is of another machine"
                raise StreamError(
                    f"multifd channel {init.channel} {what}",
                    offset=0,
                    section=f"multifd channel {init.channel}",
                )
            self._seen[init.channel] = init

    def _fail(self, error: MigError) -> None:
        with self._lock:
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
            raise ChannelError(str(error)) from error
        except IdleTimeoutError as error:
            missing = self._count - len(self._seen)
            if missing:
                raise IdleTimeoutError(
                    f"{missing} of {self._count} multifd channels did not come"
                ) from error
            raise

    # ---- end --------------------------------------------------------------------------------

    def _stop(self) -> None:
        with self._lock:
            self._decided.set()
            if self._receiver is not None:
                self._receiver.stop()

    def cancel(self) -> None:
        """End every wait. Any thread."""
        self._failed.set()
        self._stop()
