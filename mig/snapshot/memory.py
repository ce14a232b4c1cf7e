"""FrozenMemory: the pages of a guest as they were at one moment, copied before they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from mig import _core
from mig.dirty.track import is_anonymous, refusal
from mig.errors import MigError, OptionError
from mig.ram.search import MAX_BATCH, PageBatch, SourceBlock

#: bytes of copies that wait to be sent before those who write wait for room
LIMIT = 64 << 20


def require_write_protection() -> None:
    """OptionError when this kernel cannot protect memory, or does not let this process."""
    why = refusal("userfaultfd")
    if why is not None:
        raise OptionError(f"Background-snapshot is not supported by host kernel: {why}")


class FrozenMemory:
    """Blocks of memory that are frozen at one moment, and written on.

    blocks:      their dirty pages are those that are wanted; all of them in this process
    detect_zero: note zero pages, and keep no copies of them
    limit:       bytes of copies that wait to be sent before those who write wait for room; None:
                 LIMIT
    populate:    have all memory be there first, as kernels before Linux 6.4 need it

    A page is copied when somebody writes to it, or by save(), whatever comes first, and is as any
    other from then on. Who writes waits for the copy, which needs nobody but a thread of its own;
    where too many copies wait, also until some are sent, but not when none is for a second: it may
    be who writes that the sender waits for, with Python's lock. The copies take as much memory as
    the guest has at most.

    Not seen are memory that is given back (MADV_DONTNEED), and writes to it by devices that have
    it pinned.

    OptionError: memory that cannot be protected. One thread at a time.
    """

    def __init__(
        self,
        blocks: Sequence[SourceBlock],
        *,
        detect_zero: bool = True,
        limit: int | None = None,
        populate: bool = False,
    ) -> None:
        self._numbers = {block.idstr: number for number, block in enumerate(blocks)}
        self._index = np.empty(MAX_BATCH, dtype=np.uint64)
        try:
            self._core = _core.Snapshot(
                [(b.pages, b.host_page_size, is_anonymous(b), b.dirty) for b in blocks],
                blocks[0].pages.page_size if blocks else 1,
                limit=LIMIT if limit is None else limit,
                detect_zero=detect_zero,
                populate=populate,
            )
        except (OSError, ValueError) as error:
            raise OptionError(
                f"Background-snapshot is not compatible with guest memory configuration: {error}"
            ) from error
        self._blocks = tuple(blocks)
        # zero pages are known
        self._copies = tuple(
            replace(block, pages=pages, detect_zero=False)
            for block, pages in zip(blocks, self._core.copies, strict=True)
        )

    @property
    def fd(self) -> int:
        """Becomes readable when much waits to be sent, without anybody's doing; -1 when closed."""
        return self._core.fd

    @property
    def populates(self) -> bool:
        """Whether all memory had to be there first. Any thread."""
        return self._core.populates

    @property
    def faults(self) -> int:
        """Pages that were copied because somebody wrote to them. Any thread."""
        return self._core.faults

    @property
    def waits(self) -> int:
        """How often who wrote had to wait for room. Any thread."""
        return self._core.waits

    def arm(self) -> None:
        """Do most of the work of freeze() while the memory is written to. MigError."""
        self._protect(self._core.arm)

    def freeze(self) -> None:
        """This is the moment; nobody is to write until it returns. MigError: it did not work."""
        self._protect(self._core.protect)

    def _protect(self, protect: Callable[[], None]) -> None:
        try:
            protect()
        except OSError as error:
            raise MigError(f"memory cannot be protected: {error.strerror}") from error

    def save(self, batch: PageBatch) -> int:
        """Copy those pages of the batch that are not copied yet; returns how many they were."""
        try:
            return self._core.save(self._numbers[batch.block.idstr], batch.index)
        except OSError as error:
            raise _spoilt(error) from error

    def copies(self) -> Iterator[tuple[PageBatch, int]]:
        """Yield batches of copies until none is left, and how many of their pages were dirty.

        Their dirty bits are cleared. A batch's copies are there until the next one is asked for.
        """
        for number, (block, copy) in enumerate(zip(self._blocks, self._copies, strict=True)):
            while True:
                try:
                    n, cleared = self._core.take(number, self._index, block.dirty)
                except OSError as error:
                    raise _spoilt(error) from error
                if not n:
                    break
                index = self._index[:n]
                yield PageBatch(copy, index), cleared
                self._core.free(number, index)

    def close(self) -> None:
        """Memory is as any other again, nobody waits; more than once is the same."""
        self._core.close()


def _spoilt(error: OSError) -> MigError:
    return MigError(f"memory cannot be copied before it changes: {error.strerror}")
