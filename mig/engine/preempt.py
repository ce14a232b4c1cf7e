"""The connection of a source for urgent pages (capability postcopy-preempt)."""

from __future__ import annotations

import contextlib
import struct

from mig import _core
from mig.channel import Channel
from mig.errors import ChannelError
from mig.stream.writer import StreamWriter
from mig.wire import RamFlag


class UrgentLink:
    """A connection with neither header nor section, only records. No bandwidth limits it.

    channel: owned from now on
    ends:    whether the destination is told when no more pages come
    """

    def __init__(self, channel: Channel, *, ends: bool) -> None:
        self._channel = channel
        self._writer = StreamWriter(channel)
        self._ends = ends

    @property
    def target(self) -> _core.Descriptor:
        """What pages are written to, until close()."""
        return self._channel.writes_to

    @property
    def nbytes(self) -> int:
        """Bytes sent that are not of pages. Any thread."""
        return self._writer.offset

    def finish(self) -> None:
        """Say that no more pages come, to who wants to know: all are sent."""
        if self._ends:
            self._writer.put(struct.pack(">Q", RamFlag.EOS))
            # who has all pages may have left; what else is wrong the return path tells
            with contextlib.suppress(ChannelError):
                self._writer.flush()

    def cancel(self) -> None:
        """End every wait. Any thread, until close()."""
        self._channel.cancel()

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()
