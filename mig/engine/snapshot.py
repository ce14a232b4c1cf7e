"""The phase of a background snapshot: the moment, and saving memory as it was then."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from mig.channel.open import Cancel
from mig.engine.rate import RateLimit
from mig.engine.wake import Wake
from mig.errors import IdleTimeoutError
from mig.guest import SourceGuest
from mig.options import Parameters, ZeroPageDetection
from mig.ram.save import RamSaver
from mig.ram.search import MAX_BATCH, PageSearch
from mig.snapshot.memory import FrozenMemory
from mig.stats import MigrationInfo, SnapshotStats


class SnapshotPhase:
    """Saves the guest of one moment while it runs on; matches bg_migration_thread().

    parameters: read at each use; max-bandwidth is for pages that nobody wrote to: those that were
                written to are sent at once
    cancel, wake: end waits

    A context manager: at its end, however it comes, no memory is protected and nobody waits.
    """

    def __init__(
        self,
        guest: SourceGuest,
        search: PageSearch,
        saver: RamSaver,
        parameters: Callable[[], Parameters],
        *,
        cancel: Cancel,
        wake: Wake,
    ) -> None:
        self._guest = guest
        self._search = search
        self._saver = saver
        self._cancel = cancel
        self._wake = wake
        self._limit = RateLimit(lambda: parameters().max_bandwidth, self._sleep)
        self._page_size = search.listed[0].pages.page_size if search.listed else 1
        self._memory = FrozenMemory(
            search.blocks,
            detect_zero=parameters().zero_page_detection != ZeroPageDetection.NONE,
        )
        self._pause: float | None = None
        self._began = time.monotonic()
        self._ended: float | None = None
        self._before = (saver.nbytes, saver.npages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended = time.monotonic()
        self._memory.close()

    def freeze(self) -> bytes:
        """Have the guest stand still for the moment; returns its devices.

        It goes on then if it ran before, also when something fails.
        """
        guest, ran = self._guest, self._guest.running
        self._memory.arm()
        began = time.monotonic()
        try:
            guest.stop()
            devices = guest.save_devices()
            self._memory.freeze()
        finally:
            if ran:
                guest.resume()
            self._began = time.monotonic()
            self._pause = self._began - began
        return devices

    def save_memory(self) -> None:
        """Send every page as it was, in whatever order; all of them are unprotected then."""
        while True:
            self._send_copies()
            room = self._limit.room()
            batch = self._search.next_batch(MAX_BATCH if room is None else room // self._page_size)
            if batch is None:
                break
            saved = self._memory.save(batch)
            nbytes, npages = self._send_copies()
            # what was written to meanwhile went with it, and is not counted
            self._limit.spend(nbytes * saved // npages if npages else 0)

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Add what is known of it. Any thread."""
        memory, pause = self._memory, self._pause
        seconds = (self._ended or time.monotonic()) - self._began
        nbytes, npages = self._before
        ram = info.ram
        if pause is not None and seconds > 0:
            ram = replace(
                ram,
                bandwidth=(self._saver.nbytes - nbytes) / seconds,
                pages_per_second=round((self._saver.npages - npages) / seconds),
            )
        stats = SnapshotStats(pause=pause, faults=memory.faults, waits=memory.waits)
        return replace(info, downtime=pause, ram=ram, snapshot=stats)

    def _send_copies(self) -> tuple[int, int]:
        """Send all copies that there are; returns bytes and pages."""
        nbytes, npages = self._saver.nbytes, self._saver.npages
        for batch, cleared in self._memory.copies():
            self._search.remaining -= cleared * self._page_size
            self._saver.part(batch)
        return self._saver.nbytes - nbytes, self._saver.npages - npages

    def _sleep(self, seconds: float) -> None:
        """Wait, but not while much was written to, and no longer than until parameters change."""
        fds = {self._wake.fd: select.POLLIN, self._memory.fd: select.POLLIN}
        with contextlib.suppress(IdleTimeoutError):
            if self._memory.fd in self._cancel.wait(fds, max(seconds, 0)):
                self._send_copies()
            self._wake.clear()
