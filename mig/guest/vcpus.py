"""VcpuGuest: a MemoryGuest whose vCPUs are its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mig.errors import MigError
from mig.guest.memory import MemoryGuest
from mig.records import BlockInfo, Configuration


class VcpuGuest(MemoryGuest, ABC):
    """A MemoryGuest that is not loaded while it runs, and does not run while it is loaded.

    Who derives from it has resume() refuse while it is incomplete.
    """

    #: a stream is being loaded, or its load was given up
    _incomplete = False

    @property
    @abstractmethod
    def _nvcpus(self) -> int:
        """How many vCPUs it has, those of the stream once its devices are loaded."""

    def configure(self, configuration: Configuration | None) -> None:
        """MismatchError unless the stream is of such a guest; MigError while this one runs."""
        if self._running:
            raise MigError("this guest runs: its memory cannot be loaded")
        super().configure(configuration)

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """MismatchError unless the blocks are this guest's. What it held before is given up."""
        super().open_blocks(blocks, page_size)
        self._incomplete = True

    def postcopy_run(self) -> None:
        """Let the vCPUs run, whose memory comes when they touch it."""
        self._incomplete = False
        # who waits first is the first vCPU
        self.vcpu_threads = [0] * self._nvcpus
        super().postcopy_run()

    def postcopy_abandon(self) -> None:
        """Stop the vCPUs; what is there of their memory does not run."""
        super().postcopy_abandon()
        self._incomplete = True

    def commit(self) -> None:
        """The guest is all here: resume() may be called."""
        super().commit()
        self._incomplete = False
