"""The guests that can be shown."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from mig.dirty import DirtyLog, WriteTracker
from mig.errors import DirtyLogError
from mig.guest import KvmGuest, MemoryGuest, ProcessGuest
from mig.memory import GuestMemory
from mig.zero import zero_pages

GUESTS = ("process", "kvm")
#: dirty logs of the process guest
LOGS = ("tracked", "marked")


@dataclass(frozen=True, slots=True)
class Options:
    """What to show; names as in ProcessGuest.

    guest: 'process' or 'kvm'
    log:   who notes writes: the kernel ('tracked'), KVM ('kvm', 'ring': for each vCPU), or the
           guest itself ('marked')
    """

    guest: str
    nbytes: int
    rate: int
    workers: int
    pattern: str
    working_set: float
    log: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo to_json()."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the options for another process."""
        return json.dumps(asdict(self))


def best_log(wanted: str | None) -> tuple[str, str | None]:
    """Return the log to use, and why not a better one; DirtyLogError for one that cannot be had."""
    if wanted == "marked":
        return "marked", None
    try:
        return "tracked", WriteTracker(GuestMemory()).reason
    except DirtyLogError as error:
        if wanted is not None:
            raise
        return "marked", str(error)


class Show(Protocol):
    """A guest that is shown, at either end."""

    @property
    def guest(self) -> MemoryGuest:
        """What is migrated."""

    @property
    def resumed_at(self) -> float | None:
        """When it was resumed first, by the clock of all processes (time.monotonic())."""

    def start(self) -> None:
        """Let a new guest run."""

    def verify(self) -> dict[str, Any]:
        """Check all of its memory, whether it runs or stands still; return what there is to say.

        ok, npages (checked), corrupt (a list of words), ticks (how far it has come), rest (a digest
        of what it does not write and cannot check, None: there is nothing), switchover_gap (seconds
        between its last tick at the source and its first one here, None: not known)
        """

    def close(self) -> None:
        """End it and release its memory."""


class _Process(ProcessGuest):
    resumed_at: float | None = None

    def resume(self) -> None:
        super().resume()
        self.resumed_at = self.resumed_at or time.monotonic()


class _Kvm(KvmGuest):
    resumed_at: float | None = None

    def resume(self) -> None:
        super().resume()
        self.resumed_at = self.resumed_at or time.monotonic()


class ProcessShow:
    """Threads of this process that write its memory."""

    def __init__(self, options: Options) -> None:
        log: Callable[[GuestMemory], DirtyLog] = WriteTracker
        self.guest = _Process(
            options.nbytes,
            workers=options.workers,
            rate=options.rate,
            pattern=options.pattern,
            working_set=options.working_set,
            dirty=log if options.log == "tracked" else "marked",
        )

    @property
    def resumed_at(self) -> float | None:
        """When it was resumed first."""
        return self.guest.resumed_at

    def start(self) -> None:
        """Fill the memory and let the threads write."""
        self.guest.start()

    def verify(self) -> dict[str, Any]:
        """Check; it goes on as it was."""
        report = self.guest.verify()
        corrupt = [str(page) for page in (*report.corrupt, *report.first_refused)]
        if not report.ledger_ok:
            corrupt.append("the ledger is not the one that the workers keep")
        return {
            "ok": report.ok,
            "npages": report.npages,
            "corrupt": corrupt,
            "ticks": report.ticks,
            "writes": report.writes,
            "rest": None,
            "switchover_gap": report.switchover_gap,
        }

    def close(self) -> None:
        """End the threads."""
        self.guest.close()


class KvmShow:
    """vCPUs of /dev/kvm that write their memory, as fast as KVM lets them."""

    def __init__(self, options: Options) -> None:
        memory = GuestMemory()
        memory.add("ram", options.nbytes)
        self._working_set = int(options.nbytes * options.working_set)
        log = "ring" if options.log == "ring" else None
        self.guest = _Kvm(memory, vcpus=options.workers, dirty_log=log)

    @property
    def resumed_at(self) -> float | None:
        """When it was resumed first."""
        return self.guest.resumed_at

    def start(self) -> None:
        """Boot the program."""
        self.guest.boot(working_set=self._working_set)
        self.guest.resume()

    def verify(self) -> dict[str, Any]:
        """Check while it stands still; it runs again if it did."""
        running = self.guest.running
        if running:
            self.guest.stop()
        corrupt = [f"page {page}" for page in self.guest.verify()]
        if self.guest.first_corrupt_page is not None:
            corrupt.append(f"the guest reports page {self.guest.first_corrupt_page}")
        progress = [self.guest.progress(vcpu) for vcpu in self.guest.vcpus]
        written = sum(vcpu.pages_written for vcpu in progress)
        if running:
            self.guest.resume()
        return {
            "ok": not corrupt,
            "npages": max(vcpu.end for vcpu in progress),
            "corrupt": corrupt,
            "ticks": written,
            "writes": written,
            "rest": self._digest(min(vcpu.first for vcpu in progress)),
            "switchover_gap": self.guest.switchover_gap,
        }

    def _digest(self, npages: int) -> str:
        """Of the pages before those that are written: the program, and what it leaves alone."""
        (block,) = self.guest.memory
        size = block.pages.page_size
        with block.view[: npages * size] as memory:
            # most of them are zero, and to find these is much faster
            pages, _ = zero_pages(memory, size)
            digest = hashlib.sha256(pages.to_wire())
            pages.complement()
            for page in pages.indexes():
                digest.update(memory[int(page) * size : (int(page) + 1) * size])
        return digest.hexdigest()

    def close(self) -> None:
        """End the vCPUs."""
        self.guest.close()
        self.guest.memory.close()


def make_show(options: Options) -> Show:
    """Make the guest; the one that is to be received is made of the same options."""
    return KvmShow(options) if options.guest == "kvm" else ProcessShow(options)
