"""Memory of this process that a postcopy fills while it is used."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mig import _core
from mig.dirty.track import is_anonymous
from mig.errors import MigError, MismatchError
from mig.pages import HOST_PAGE_SIZE
from mig.postcopy.commands import Advise
from mig.postcopy.times import PostcopyTimes

if TYPE_CHECKING:
    from mig.memory import GuestMemory, RamBlock

_WHY = {
    errno.EPERM: (
        "this process may not use userfaultfd: run it as root or with CAP_SYS_PTRACE, set "
        "vm.unprivileged_userfaultfd=1, or give it access to /dev/userfaultfd"
    ),
    errno.ENOSYS: "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD",
    errno.EOPNOTSUPP: "this kernel's userfaultfd is too old: Linux 4.14 has what is needed",
}


class MemoryFaults:
    """One postcopy of one GuestMemory, from ADVISE to its end."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._blocks: list[tuple[RamBlock, _core.Bitmap, bool]] = []
        self._server: _core.FaultServer | None = None
        self._times = PostcopyTimes()

    @staticmethod
    def probe(memory: GuestMemory) -> str | None:
        """Return why this cannot be done here, None when it can."""
        try:
            _core.probe_page_faults()
        except OSError as error:
            return _WHY.get(error.errno or 0, str(error))
        for block in memory:
            if block.pages.hva % HOST_PAGE_SIZE:
                return f"block '{block.idstr}' does not begin at a page of the host"
            if block.used_length % unit_of(block):
                return (
                    f"block '{block.idstr}' of {block.used_length} bytes is not made of pages of "
                    f"{unit_of(block)}"
                )
        return None

    def advise(self, advise: Advise) -> None:
        """MismatchError unless both sides have memory of the same sizes of pages."""
        mine = 0
        for block in self._memory:
            mine |= block.host_page_size
        if advise.page_sizes != mine:
            raise MismatchError(
                f"Postcopy needs matching RAM page sizes (s={advise.page_sizes:x} d={mine:x})"
            )

    def open_block(self, block: RamBlock, received: _core.Bitmap) -> None:
        """Give the block's memory back: what comes from now on is all that it holds."""
        try:
            anonymous = is_anonymous(block)
        except ValueError as error:
            raise MigError(str(error)) from error
        self._blocks.append((block, received, anonymous))
        self._discard(block, 0, block.pages.npages, anonymous)

    @staticmethod
    def _discard(block: RamBlock, first: int, npages: int, anonymous: bool) -> None:
        try:
            _core.discard_memory(block.pages, first, npages, anonymous)
        except OSError as error:
            raise MigError(f"block '{block.idstr}' cannot be given back: {error}") from error

    def discard(self, idstr: str, start: int, nbytes: int) -> None:
        """Forget these bytes of a block; MismatchError for half a page of the host."""
        block, received, anonymous = self._find(idstr)
        unit = unit_of(block)
        if start % unit or nbytes % unit:
            raise MismatchError(
                f"discard of {nbytes} bytes at {start:#x}, in pages of {unit}", block=idstr
            )
        size = block.pages.page_size
        self._discard(block, start // size, nbytes // size, anonymous)
        received.clear(start // size, nbytes // size)

    def _find(self, idstr: str) -> tuple[RamBlock, _core.Bitmap, bool]:
        for entry in self._blocks:
            if entry[0].idstr == idstr:
                return entry
        raise KeyError(idstr)

    def listen(self, requests: _core.PageRequests) -> None:
        """Serve accesses from now on."""
        blocks = [
            (b.idstr.encode(), b.pages, unit_of(b), received, anonymous, b.wants_huge_pages)
            for b, received, anonymous in self._blocks
        ]
        try:
            self._server = _core.FaultServer(blocks, self._memory.page_size, requests)
        except OSError as error:
            raise MigError(f"page faults cannot be served: {error}") from error

    @property
    def server(self) -> _core.FaultServer | None:
        """What serves them; between listen() and end()."""
        return self._server

    def count_waits(self, vcpus: Sequence[int]) -> None:
        """Count how long these threads wait; 0: the next one that waits."""
        if self._server is not None:
            self._server.set_vcpus(vcpus)

    def ask_again(self) -> None:
        """Ask for what is missing on another connection."""
        if self._server is not None:
            self._server.ask_again()

    def received(self, idstr: str) -> _core.Bitmap:
        """Return which pages of a block are there."""
        return self._find(idstr)[1]

    def times(self) -> PostcopyTimes:
        """Return how long was waited up to now."""
        if self._server is not None:
            vcpus, together, latencies = self._server.times()
            asked = self._server.asked
            self._times = PostcopyTimes(tuple(vcpus), together, tuple(latencies), asked)
        return self._times

    def end(self) -> None:
        """Memory is as any other from now on; more than once is the same."""
        if self._server is not None:
            self.times()
            self._server.close()
            self._server = None


def unit_of(block: RamBlock) -> int:
    """Bytes that are placed at once."""
    return max(block.host_page_size, block.pages.page_size, HOST_PAGE_SIZE)
