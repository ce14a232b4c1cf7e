"""Guest memory: RAM blocks, each one mapping."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from mig import _core
from mig.pages import check_page_size
from mig.wire import DEFAULT_PAGE_BITS

# MAP_NORESERVE: a guest may be larger than the memory that is free, as long as it is mostly
# zeros. The mmap module names the flag from Python 3.13 on; this is its value on Linux.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


class RamBlock:
    """One block of guest memory.

    idstr:       name of the block on the wire
    used_length: bytes, a multiple of the page size
    fresh:       whether memory that was never received is known to read as zeros
    pages:       the pinned memory, for the kernels
    """

    def __init__(
        self, idstr: str, used_length: int, page_size: int, buffer: memoryview | None = None
    ) -> None:
        if used_length <= 0 or used_length % page_size:
            raise ValueError(f"block '{idstr}' of {used_length} bytes, pages of {page_size}")
        self.idstr = idstr
        self.used_length = used_length
        self.fresh = buffer is None
        self._mapping: mmap.mmap | None = None
        if buffer is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self._mapping = mmap.mmap(-1, used_length, flags=flags)
            buffer = memoryview(self._mapping)
        elif buffer.nbytes != used_length:
            raise ValueError(f"block '{idstr}': {buffer.nbytes} bytes, not {used_length}")
        self.view = buffer
        self.pages = _core.Pages(buffer, page_size, writable=True)

    def close(self) -> None:
        """Release the memory; BufferError while somebody still uses it."""
        self.pages.release()
        try:
            self.view.release()
        except BufferError:
            self.pages = _core.Pages(self.view, self.pages.page_size, writable=True)
            raise
        if self._mapping is not None:
            self._mapping.close()


class GuestMemory:
    """All RAM blocks of a guest, in the order of the block list.

    page_size: target page size in bytes
    """

    def __init__(self, page_size: int = 1 << DEFAULT_PAGE_BITS) -> None:
        self.page_size = check_page_size(page_size)
        self._blocks: dict[str, RamBlock] = {}

    def add(self, idstr: str, nbytes: int, buffer: memoryview | None = None) -> RamBlock:
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
        """Release all blocks; BufferError while somebody still has a view of one."""
        for block in self:
            block.close()
        self._blocks.clear()
