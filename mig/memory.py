"""Guest memory: RAM blocks, each one mapping."""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mig import _core
from mig.pages import check_page_size
from mig.wire import DEFAULT_PAGE_BITS

if TYPE_CHECKING:
    from typing_extensions import Buffer

# MAP_NORESERVE: a guest may be larger than the memory that is free, as long as it is mostly
# zeros. The mmap module names the flag from Python 3.13 on; this is its value on Linux.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MADV_POPULATE_WRITE = 23


class RamBlock:
    """One block of guest memory.

    idstr:       name of the block on the wire: printable ASCII, 255 characters at most
    used_length: bytes, a multiple of the page size
    buffer:      the caller's memory; None maps new memory, all zeros
    pages:       the memory as the kernels see it
    """

    def __init__(
        self, idstr: str, used_length: int, page_size: int, buffer: Buffer | None = None
    ) -> None:
        if not 0 < len(idstr) <= 255 or not (idstr.isascii() and idstr.isprintable()):
            raise ValueError(f"{idstr!r} cannot be the name of a block")
        if used_length <= 0 or used_length % page_size:
            raise ValueError(f"block '{idstr}' of {used_length} bytes, pages of {page_size}")
        self.idstr = idstr
        self.used_length = used_length
        self._fresh = buffer is None
        self._mapping: mmap.mmap | None = None
        if buffer is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            buffer = self._mapping = mmap.mmap(-1, used_length, flags=flags)
            # As QEMU does for its RAM: first touch of small pages is what loading would wait for.
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(buffer)
        self._buffer = buffer
        if self._view.nbytes != used_length:
            raise ValueError(f"block '{idstr}': {self._view.nbytes} bytes, not {used_length}")
        self.pages = _core.Pages(self._view, page_size, writable=True)

    @property
    def view(self) -> memoryview:
        """The memory. Who has asked for it may write it: from then on it is not `take_fresh`."""
        self._fresh = False
        return self._view

    def populate(self) -> None:
        """Have the host give all of the memory now, zeros where nothing was written.

        Otherwise it is given page by page as it is written first, which loading would wait for.
        OSError when it cannot be had (MADV_POPULATE_WRITE: Linux 5.14), or when the memory is the
        caller's own.
        """
        if self._mapping is None:
            raise OSError(errno.EINVAL, f"block '{self.idstr}' is not mapped by mig")
        self._mapping.madvise(_MADV_POPULATE_WRITE)

    def take_fresh(self) -> bool:
        """Whether the memory was never handed out, so that it still reads as zeros; once."""
        fresh, self._fresh = self._fresh, False
        return fresh

    def close(self) -> None:
        """Release the memory; BufferError while a migration or a view still uses it."""
        self.detach()
        self.free()

    def detach(self) -> None:
        """Let go of the memory, for free(); BufferError, and nothing done, while it is in use."""
        self.pages.release()
        try:
            self._view.release()
            if self._mapping is not None:
                # slices of a view are not seen by its release(), but by the mapping
                self._mapping.resize(self.used_length)
        except BufferError:
            self.attach()
            raise

    def attach(self) -> None:
        """Undo detach()."""
        self._view = memoryview(self._buffer)
        self.pages = _core.Pages(self._view, self.pages.page_size, writable=True)

    def free(self) -> None:
        """Unmap the memory that was let go."""
        if self._mapping is not None:
            self._mapping.close()


class GuestMemory:
    """All RAM blocks of a guest, in the order of the block list.

    page_size: target page size in bytes
    """

    def __init__(self, page_size: int = 1 << DEFAULT_PAGE_BITS) -> None:
        self.page_size = check_page_size(page_size)
        self._blocks: dict[str, RamBlock] = {}

    def add(self, idstr: str, nbytes: int, buffer: Buffer | None = None) -> RamBlock:
        """Add a block of ``nbytes`` bytes: a new mapping of zeros, or the caller's ``buffer``."""
        if idstr in self._blocks:
            raise ValueError(f"block '{idstr}' is there already")
        block = RamBlock(idstr, nbytes, self.page_size, buffer)
        self._blocks[idstr] = block
        return block

    def __getitem__(self, idstr: str) -> RamBlock:
        return self._blocks[idstr]

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(self._blocks.values())

    def __len__(self) -> int:
        return len(self._blocks)

    def close(self) -> None:
        """Release all blocks; BufferError, and nothing done, while one of them is in use."""
        detached: list[RamBlock] = []
        try:
            for block in self:
                block.detach()
                detached.append(block)
        except BufferError:
            for block in detached:
                block.attach()
            raise
        for block in detached:
            block.free()
        self._blocks.clear()
