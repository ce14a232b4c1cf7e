"""The channels of a source with multifd."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from mig import _core
from mig.channel import Channel, connect
from mig.channel.open import Cancel
from mig.engine.inlanes import named
from mig.errors import CancelledError, MigError
from mig.options import MultiFDCompression, Parameters
from mig.pages import PageIndex
from mig.ram.search import SourceBlock

#: how long the channel that failed may take to say why (seconds)
_LAST_WORDS = 5.0


class OutgoingLanes:
    """The channels of a source, each with a thread that stays in C.

    channels: connected, in the order of their numbers
    sender:   their queue
    on_error: told of what ended a channel before its time, by that channel's thread
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        sender: _core.MultifdSender,
        on_error: Callable[[MigError], None],
    ) -> None:
        self._sender = sender
        self._channels = tuple(channels)
        # a channel that is closed must not be cancelled: its descriptors may be somebody else's
        self._lock = threading.Lock()
        self._closed = False
        self._on_error = on_error
        self._error: MigError | None = None
        self._failed = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(i, channel), name=f"mig-multifd-{i}", daemon=True
            )
            for i, channel in enumerate(self._channels)
        ]

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes sent."""
        return self._sender.nbytes

    @property
    def npages(self) -> tuple[int, int]:
        """Pages sent, with contents and zero."""
        return self._sender.normal, self._sender.zero

    @property
    def copied(self) -> int:
        """How often the kernel had copied all that it was not to copy, when a SYNC came."""
        return self._sender.copied

    def _run(self, number: int, channel: Channel) -> None:
        try:
            channel.write_by(lambda fd: self._sender.run(number, fd))
        except (_core.MultifdStoppedError, CancelledError):
            pass  # somebody else knows why
        except Exception as error:
            self._error = named(error, number)
            self._failed.set()
            self._on_error(self._error)

    @property
    def methods(self) -> tuple[int, int, int, int]:
        """Pages that went raw, as differences, by zstd, and not at all (compression adaptive)."""
        return self._sender.methods

    def adapt(self, *, generation: int, caching: bool, last_stage: bool, link: float) -> None:
        """Say what compression adaptive chooses by; see MultifdSender.adapt()."""
        self._sender.adapt(generation=generation, caching=caching, last_stage=last_stage, link=link)

    def note_zeros(self, index: PageIndex, *, address: int) -> None:
        """Say that pages go as zero pages, over the main stream."""
        self._sender.note_zeros(index, address)

    def send(self, block: SourceBlock, index: PageIndex, *, scan: bool, address: int) -> None:
        """Queue pages; they are read later, until the next sync."""
        self._do(
            lambda: self._sender.send(
                block.pages, block.idstr.encode("ascii"), index, scan, address
            )
        )

    def drain(self) -> None:
        """Wait until all is sent."""
        self._do(self._sender.drain)

    def sync(self) -> None:
        """Wait until all is sent, and put a mark behind it."""
        self._do(self._sender.sync)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _core.MultifdStoppedError:
            if self._failed.wait(_LAST_WORDS) and self._error is not None:
                raise self._error from None
            raise CancelledError("cancelled") from None

    def finish(self) -> None:
        """Nothing more will be sent."""
        self._sender.finish()

    def cancel(self) -> None:
        """End every wait. Any thread."""
        self._failed.set()
        self._sender.stop()
        with self._lock:
            if not self._closed:
                for channel in self._channels:
                    channel.cancel()

    def close(self) -> None:
        """Wait for the threads, which have been told to finish or are cut off, and let go."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        with self._lock:
            self._closed = True
            for channel in self._channels:
                channel.close()


def open_lanes(
    uri: str,
    cancel: Cancel,
    parameters: Parameters,
    page_size: int,
    uuid: bytes,
    *,
    zero_copy: bool,
    splice: bool,
    on_error: Callable[[MigError], None],
) -> OutgoingLanes:
    """Connect as many channels as the parameters say; they do not send yet.

    uuid:   of the guest, 16 bytes
    splice: pages may be read when the other end reads: it will say when it has all of them
    """
    level = {
        MultiFDCompression.ZLIB: parameters.multifd_zlib_level,
        MultiFDCompression.ZSTD: parameters.multifd_zstd_level,
        MultiFDCompression.ADAPTIVE: parameters.multifd_zstd_level,
    }
    sender = _core.MultifdSender(
        parameters.multifd_channels,
        page_size,
        compression=str(parameters.multifd_compression),
        level=level.get(parameters.multifd_compression, 0),
        cache_size=parameters.xbzrle_cache_size,
        uuid=uuid,
        zero_copy=zero_copy,
        splice=splice,
    )
    with contextlib.ExitStack() as undo:
        channels: list[Channel] = []
        for _ in range(parameters.multifd_channels):
            channels.append(connect(uri, cancel, parameters.timeout))
            undo.callback(channels[-1].close)
        lanes = OutgoingLanes(channels, sender, on_error)
        undo.pop_all()
    return lanes
