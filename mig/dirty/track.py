"""WriteTracker: which pages of this process's memory were written, without its writers' help."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from mig import _core
from mig.errors import DirtyLogError
from mig.memory import GuestMemory

#: the best first
METHODS: Final = ("pagemap-scan", "userfaultfd")

_PERMIT: Final = (
    "this process may not use userfaultfd: run it as root or with CAP_SYS_PTRACE, set "
    "vm.unprivileged_userfaultfd=1, or give it access to /dev/userfaultfd"
)
_WRONG: Final = {
    ("pagemap-scan", errno.EOPNOTSUPP): (
        "this kernel has no PAGEMAP_SCAN with asynchronous write protection: Linux 6.7 has it"
    ),
    ("userfaultfd", errno.EOPNOTSUPP): (
        "this kernel cannot write-protect by userfaultfd: Linux 5.7 can (5.19 for shared memory, "
        "6.10 on arm64)"
    ),
}


def _sentence(method: str, error: OSError) -> str:
    """Say what is missing for a method, and what to do."""
    if error.errno == errno.EPERM:
        return _PERMIT
    if error.errno == errno.ENOSYS:
        return "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD"
    return _WRONG.get((method, error.errno or 0)) or f"{method} does not work here: {error}"


def refusal(method: str, *, user_mode_only: bool = False) -> str | None:
    """Return why a method does not work here, and what to do; None when it does."""
    try:
        _core.probe_write_log(method, user_mode_only=user_mode_only)
    except OSError as error:
        return _sentence(method, error)
    return None


def _choose(demand: str | None, user_mode_only: bool) -> tuple[str, str | None]:
    """Return the method to use, and why not a better one."""
    if demand is not None and demand not in METHODS:
        raise ValueError(f"no method '{demand}': {', '.join(METHODS)}")
    refusals: list[str] = []
    for method in METHODS if demand is None else [demand]:
        reason = refusal(method, user_mode_only=user_mode_only)
        if reason is not None:
            refusals.append(reason)
        elif demand not in (None, METHODS[0]):
            return method, f"method '{demand}' was asked for"
        else:
            return method, "; ".join(refusals) or None
    raise DirtyLogError(f"writes to memory cannot be tracked: {'; '.join(dict.fromkeys(refusals))}")


def _mappings() -> Iterator[tuple[int, int, bool]]:
    """Yield the start and end of every mapping of this process, and if it is private, of no file.

    A line: 7f00-7f80 rw-p 00000000 00:00 0   [name]
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, inode = line.split(maxsplit=5)[:5]
        start, end = (int(address, 16) for address in span.split("-"))
        yield start, end, permissions.endswith("p") and inode == "0"


class Placed(Protocol):
    """A block of memory of this process, as RamBlock and SourceBlock are."""

    @property
    def idstr(self) -> str:
        """Its name."""

    @property
    def used_length(self) -> int:
        """Bytes."""

    @property
    def pages(self) -> _core.Pages:
        """Where it is."""


def _is_anonymous(block: Placed, mappings: list[tuple[int, int, bool]]) -> bool:
    first, last = block.pages.hva, block.pages.hva + block.used_length
    kinds = {anonymous for start, end, anonymous in mappings if start < last and end > first}
    if len(kinds) != 1:
        raise ValueError(f"block '{block.idstr}' lies in mappings of several kinds")
    return kinds.pop()


def is_anonymous(block: Placed) -> bool:
    """Whether a block is private memory of no file; ValueError when only a part of it is."""
    return _is_anonymous(block, list(_mappings()))


class WriteTracker:
    """Tracks writes to guest memory by any thread of this process, and by the kernel for it.

    memory: its pages are as large as the host's or larger; a block's memory begins at a page of
        the host. It may be private or shared (memfd, /dev/shm), and huge. Memory that nobody has
        touched stays so.
    method: 'pagemap-scan' (Linux 6.7) lets writers run, a system call tells what they wrote;
        'userfaultfd' stops the first writer of each page for some microseconds, until a thread
        has noted it. None takes the best that works.
    user_mode_only: 'userfaultfd' for a process without privileges. System calls that write to
        tracked memory, such as read(2), then fail with EFAULT.

    A bit means: written, or may have been. Beside the pages that were written, those of a huge
    page that the kernel gave for the first write to an untouched place are set. Not tracked are
    memory that is given back (MADV_DONTNEED), writes through other mappings of shared memory,
    writes of other processes, and of devices to memory that was pinned before (O_DIRECT reads
    that go on). No fork(): the child's memory is not tracked.

    ValueError: memory that is not like that, or an unknown method. DirtyLogError: neither method
    works, or not the one that was asked for.

    One thread at a time.
    """

    #: sync() clears
    chunk_pages = 0

    def __init__(
        self, memory: GuestMemory, *, method: str | None = None, user_mode_only: bool = False
    ) -> None:
        if memory.page_size < mmap.PAGESIZE:
            raise ValueError(
                f"pages of {memory.page_size} bytes are smaller than the host's, {mmap.PAGESIZE}"
            )
        self._memory = memory
        self._user_mode_only = user_mode_only
        self._method, self._reason = _choose(method, user_mode_only)
        self._log: _core.WriteLog | None = None
        self._numbers: dict[str, int] = {}

    @property
    def method(self) -> str:
        """The method in use."""
        return self._method

    @property
    def reason(self) -> str | None:
        """Why it is not a better one; None when it is the best."""
        return self._reason

    def start(self) -> None:
        """Begin to track the blocks that memory has now, with nothing dirty.

        Until stop() the blocks cannot be closed. ValueError and DirtyLogError: see the class;
        nothing is tracked then.
        """
        self.stop()
        blocks = list(self._memory)
        mappings = list(_mappings())
        pairs = [(block.pages, _is_anonymous(block, mappings)) for block in blocks]
        try:
            self._log = _core.WriteLog(self._method, pairs, user_mode_only=self._user_mode_only)
        except OSError as error:
            raise DirtyLogError(f"tracking does not start: {error}") from error
        self._numbers = {block.idstr: number for number, block in enumerate(blocks)}

    def sync(self, idstr: str, dirty: _core.Bitmap) -> int:
        """Move the bits of block ``idstr`` into ``dirty``; returns how many were not set there.

        A write that goes on meanwhile is in this sync or in the next. DirtyLogError: writes are
        not tracked, because of the kernel or because nobody called start().
        """
        if self._log is None:
            raise DirtyLogError("writes to memory are not tracked: start() was not called")
        try:
            return self._log.sync(self._numbers[idstr], dirty)
        except OSError as error:
            raise DirtyLogError(f"tracking has ended: {error}") from error

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        """Nothing to do: sync() clears."""

    def stop(self) -> None:
        """End tracking: memory is as it was before, and may be closed."""
        log, self._log = self._log, None
        if log is not None:
            log.close()
