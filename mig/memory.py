"""Guest memory: RAM blocks, each one mapping."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mig import _core
from mig.pages import HOST_PAGE_SIZE, check_page_size
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
    buffer:      the caller's memory
    fd:          a file whose first bytes are mapped, shared; it may be closed afterwards
    shared:      whether the other side of a migration has the same memory, so that capability
                 x-ignore-shared leaves it out; default: memory of a file is
    address:     where it stands in guest-physical memory, which both sides must agree about then
    host_page_size: bytes of the pages the memory is made of; default: the file's if it is on
                 hugetlbfs, else the host's
    pages:       the memory as the kernels see it

    With neither buffer nor fd new memory is mapped, all zeros.
    """

    def __init__(
        self,
        idstr: str,
        used_length: int,
        page_size: int,
        buffer: Buffer | None = None,
        *,
        fd: int | None = None,
        shared: bool | None = None,
        address: int = 0,
        host_page_size: int | None = None,
    ) -> None:
        if not 0 < len(idstr) <= 255 or not (idstr.isascii() and idstr.isprintable()):
            raise ValueError(f"{idstr!r} cannot be the name of a block")
        if used_length <= 0 or used_length % page_size:
            raise ValueError(f"block '{idstr}' of {used_length} bytes, pages of {page_size}")
        if buffer is not None and fd is not None:
            raise ValueError(f"block '{idstr}' is either the caller's buffer or a file")
        if not 0 <= address < 1 << 64:
            raise ValueError(f"block '{idstr}' at address {address}: not a number of 64 bits")
        if host_page_size is None:
            host_page_size = HOST_PAGE_SIZE if fd is None else _core.fd_page_size(fd)
        elif host_page_size <= 0 or host_page_size & (host_page_size - 1):
            raise ValueError(f"host page size {host_page_size} is not a power of two")
        self.idstr = idstr
        self.used_length = used_length
        self.shared = fd is not None if shared is None else shared
        self.address = address
        self.host_page_size = host_page_size
        self._fresh = buffer is None and fd is None
        self._mapping: mmap.mmap | None = None
        if fd is not None:
            buffer = self._mapping = _map_file(idstr, fd, used_length, host_page_size)
        elif buffer is None:
            buffer = self._mapping = _map_anonymous(idstr, used_length)
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

    @property
    def wants_huge_pages(self) -> bool:
        """Whether the host was told to make huge pages of it."""
        return self._mapping is not None

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
                # Slices of a view are not seen by its release(), but by the mapping: it looks for
                # them before it looks at the size, and there is no such size.
                with contextlib.suppress(ValueError):
                    self._mapping.resize(-1)
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


def _map_anonymous(idstr: str, nbytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        reason = f"block '{idstr}' of {nbytes} bytes: {error.strerror}"
        raise OSError(error.errno, reason) from error
    # As QEMU does for its RAM: first touch of small pages is what loading would wait for.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _map_file(idstr: str, fd: int, nbytes: int, host_page_size: int) -> mmap.mmap:
    """Map a file that is as long, or empty: then it is made so long. Never cut short."""
    if nbytes % host_page_size:
        raise ValueError(f"block '{idstr}' of {nbytes} bytes, in pages of {host_page_size}")
    there = os.fstat(fd).st_size
    if there == 0:
        os.ftruncate(fd, nbytes)
    elif there < nbytes:
        raise ValueError(f"block '{idstr}' of {nbytes} bytes, but its file has {there}")
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)


class GuestMemory:
    """All RAM blocks of a guest, in the order of the block list.

    page_size: target page size in bytes
    """

    def __init__(self, page_size: int = 1 << DEFAULT_PAGE_BITS) -> None:
        self.page_size = check_page_size(page_size)
        self._blocks: dict[str, RamBlock] = {}

    def add(
        self,
        idstr: str,
        nbytes: int,
        buffer: Buffer | None = None,
        *,
        fd: int | None = None,
        path: str | os.PathLike[str] | None = None,
        shared: bool | None = None,
        address: int = 0,
        host_page_size: int | None = None,
    ) -> RamBlock:
        """Add a block of ``nbytes`` bytes: a new mapping of zeros, or what is given.

        path: file to map instead of ``fd``, made where it does not exist. An empty file is made
              as long as the block; ValueError for one that is shorter, OSError for one that
              cannot be opened or mapped.

        For everything else see `RamBlock`.
        """
        if idstr in self._blocks:
            raise ValueError(f"block '{idstr}' is there already")
        if path is not None and fd is not None:
            raise ValueError(f"block '{idstr}' is in the file of either fd or path")
        with contextlib.ExitStack() as stack:
            if path is not None:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, fd)
            block = RamBlock(
                idstr,
                nbytes,
                self.page_size,
                buffer,
                fd=fd,
                shared=shared,
                address=address,
                host_page_size=host_page_size,
            )
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
