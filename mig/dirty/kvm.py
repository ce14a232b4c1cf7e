"""KVM's dirty logs: the bitmap of memory slots, and the rings of vCPUs."""

from __future__ import annotations

from collections.abc import Sequence

from mig import _core
from mig.errors import KvmUnavailableError

#: pages that clear() is called for at once: 1 GiB, as by QEMU's clear_bitmap_shift
CHUNK_PAGES = 1 << 18
_WORD_BITS = 64


def choose_log(log: str | None, ring_entries: int) -> str:
    """Return the log to use: "bitmap", "manual", "ring", or the best bitmap for None.

    KvmUnavailableError when this machine's KVM does not have it.
    """
    entries, manual = _core.kvm_log_capabilities()
    if log is None:
        return "manual" if manual else "bitmap"
    if log not in ("bitmap", "manual", "ring"):
        raise ValueError(f"there is no dirty log '{log}': bitmap, manual or ring")
    if log == "manual" and not manual:
        raise KvmUnavailableError(
            "this machine's KVM has no manual clear (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)"
        )
    if log == "ring" and not entries:
        raise KvmUnavailableError("this machine's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)")
    if log == "ring" and ring_entries > entries:
        raise KvmUnavailableError(
            f"this machine's KVM has dirty rings of {entries} entries at most, not {ring_entries}"
        )
    return log


class _KvmLog:
    def __init__(self, vm: _core.KvmVm, blocks: Sequence[str]) -> None:
        self._vm = vm
        self._blocks = {idstr: number for number, idstr in enumerate(blocks)}

    def start(self) -> None:
        """Begin to log."""
        self._vm.start_log()

    def sync(self, idstr: str, dirty: _core.Bitmap) -> int:
        """Move the bits of block ``idstr`` into ``dirty``; returns how many were not set there."""
        return self._vm.sync(self._blocks[idstr], dirty)

    def stop(self) -> None:
        """End logging."""
        self._vm.stop_log()


class KvmDirtyLog(_KvmLog):
    """The bitmaps of KVM_GET_DIRTY_LOG; satisfies DirtyLog.

    vm:          a machine with log "bitmap" (chunk_pages is 0: sync() clears) or "manual"
    blocks:      idstr of each of its blocks
    chunk_pages: pages that clear() is called for at once, a power of two and at least 64

    Pages are logged once they are mapped writable, so one that was only read may be there too, and
    with manual clear every page until it is cleared for the first time. What the program itself
    writes to guest memory is not logged.
    """

    def __init__(
        self, vm: _core.KvmVm, blocks: Sequence[str], chunk_pages: int = CHUNK_PAGES
    ) -> None:
        super().__init__(vm, blocks)
        if chunk_pages and (chunk_pages < _WORD_BITS or chunk_pages & (chunk_pages - 1)):
            raise ValueError(f"chunks of {chunk_pages} pages: not a power of two of at least 64")
        self.chunk_pages = chunk_pages

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        """These pages are about to be read: log writes to them again from now on."""
        if self.chunk_pages:
            self._vm.clear(self._blocks[idstr], first_page, npages)


class KvmDirtyRing(_KvmLog):
    """The dirty rings of vCPUs; satisfies DirtyLog.

    A vCPU whose ring is full empties all rings itself before it runs on.
    """

    chunk_pages = 0

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        """Nothing: sync() has cleared them."""

    def pages(self, vcpu: int) -> int:
        """Return how many pages the vCPU has dirtied so far, each once between two syncs."""
        return self._vm.counters(vcpu)["logged"]
