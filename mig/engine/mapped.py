"""mapped-ram: what it needs, and the pages of a file on their way into a guest's memory."""

from __future__ import annotations

from collections.abc import Sequence

from mig.channel import Channel, require_seekable
from mig.errors import OptionError
from mig.guest import MappedTarget
from mig.mapped import MappedFile
from mig.options import Capability, Parameters
from mig.records import BlockInfo

#: bytes of a block that are read between two looks whether the migration is cancelled
_AT_ONCE = 64 << 20


def require_mapped(uri: str, capabilities: frozenset[Capability]) -> None:
    """OptionError when there cannot be a mapped-ram file at ``uri``, at either end."""
    require_seekable(uri)
    if Capability.X_IGNORE_SHARED in capabilities:
        # QEMU 10.0 writes such a file, but does not read it: it looks for addresses too late
        raise OptionError("capability 'x-ignore-shared' is not possible with 'mapped-ram'")
    if Capability.ZERO_COPY_SEND in capabilities:
        raise OptionError(f"capability 'zero-copy-send' is not possible over {uri}")


def page_threads(capabilities: frozenset[Capability], parameters: Parameters) -> int:
    """Return how many threads work on the pages of a mapped-ram file."""
    return parameters.multifd_channels if Capability.MULTIFD in capabilities else 1


class IncomingMapped:
    """Loads all pages when the block list has been read; satisfies MappedPages.

    channel:   the file, at the start of the stream
    nthreads:  that read
    direct_io: around the page cache where the file system can
    """

    def __init__(
        self, target: MappedTarget, channel: Channel, *, nthreads: int, direct_io: bool
    ) -> None:
        self._target = target
        self._channel = channel
        self._pages = channel.page_file(nthreads=nthreads, direct_io=direct_io)
        self._file = MappedFile(channel.position, channel.nbytes)
        #: bytes of pages that were read; any thread may look
        self.nbytes = 0

    @property
    def file(self) -> MappedFile:
        """The file."""
        return self._file

    def load(self, blocks: Sequence[BlockInfo], page_size: int) -> tuple[int, int]:
        """Read every page to where it belongs; returns how many there are, and how many are zero.

        ChannelError, CancelledError.
        """
        npages = nstored = 0
        step = max(1, _AT_ONCE // page_size)
        for block, (memory, fresh) in zip(blocks, self._target.mapped_blocks(), strict=True):
            mapped = block.mapped
            assert mapped is not None
            n = block.npages(page_size)
            stored = self._pages.read_bitmap(n, mapped.bitmap_offset)
            npages, nstored = npages + n, nstored + stored.count()
            for first in range(0, n, step):
                self._channel.check_cancelled()
                self.nbytes += self._pages.read(
                    memory,
                    stored,
                    first,
                    min(first + step, n),
                    mapped.pages_offset,
                    fresh=fresh,
                )
        return npages, npages - nstored
