"""Postcopies to destinations made by hand, which end with the test."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

from unit.boxes import FOREVER, NPAGES, PAGE, Box
from unit.far import Far, until

from mig import OutgoingMigration, Status
from mig.errors import MigError

RAM, VGA = "pc.ram", "vga.vram"
TOTAL = NPAGES + 16


class Lab:
    """Destinations by hand and sources, which are given up and closed with the test."""

    def __init__(self, folder, capabilities=()) -> None:
        self._folder = folder
        self._capabilities = {"postcopy-ram", *capabilities}
        self._numbers = itertools.count()
        self.fars: list[Far] = []
        self.sources: list[OutgoingMigration] = []

    @property
    def preempt(self) -> bool:
        """Whether urgent pages go over connections of their own."""
        return "postcopy-preempt" in self._capabilities

    def far(self, **options) -> Far:
        path = self._folder / f"far{next(self._numbers)}"
        self.fars.append(Far(path, preempt=self.preempt, **options))
        return self.fars[-1]

    def source(
        self, guest, *, background=True, at_once=True, capabilities=(), **options
    ) -> OutgoingMigration:
        wanted = {*self._capabilities, *capabilities}
        source = OutgoingMigration(guest, capabilities=wanted, **options)
        source.background = background
        if at_once:
            source.start_postcopy()
        self.sources.append(source)
        return source

    def started(self, box, *, background=True, limits=(), **options):
        """A postcopy of a box under way, and its destination."""
        far = self.far(limits=limits)
        source = self.source(box.guest, background=background, **options)
        source.start(far.uri)
        return source, far

    def paused(self, box, **options):
        """A postcopy whose first connection was cut when the destination had some pages."""
        source, far = self.started(box, background=False, **options)
        until(lambda: far.running)
        far.request(RAM, 0, 40 * PAGE)
        far.request(VGA, PAGE)
        until(lambda: far.has(VGA, 1))
        far.cut()
        is_paused(source)
        return source, far

    def close(self) -> None:
        for source in self.sources:
            with contextlib.suppress(MigError):
                source.cancel()
            with contextlib.suppress(MigError):
                source.abandon()
            if source.status != Status.NONE:
                with contextlib.suppress(MigError):
                    assert source.wait(FOREVER), source.status
        for far in self.fars:
            far.close()


def is_paused(source) -> None:
    until(lambda: source.status == Status.POSTCOPY_PAUSED, "the pause")


def stands(source) -> Status:
    """Wait until nothing happens without its owner; returns the status."""
    standing = (Status.COMPLETED, Status.FAILED, Status.POSTCOPY_PAUSED)
    until(lambda: source.status in standing, "an end or a pause")
    return source.status


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def ours() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mig-")]


@contextlib.contextmanager
def closed_lab(folder: Path, capabilities=()) -> Iterator[Lab]:
    """Nothing is left behind: no thread, no descriptor."""
    # a test before this one may not have waited for its own
    until(lambda: not ours(), f"the end of {ours()}")
    before = open_files()
    lab = Lab(folder, capabilities)
    try:
        yield lab
    finally:
        lab.close()
    until(lambda: not ours(), "the end of the threads")
    assert open_files() <= before


def box() -> Box:
    return Box(5)
