"""Guests of two blocks and a device, and migrations that end with the test."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from mig import (
    DeviceRegistry,
    GuestMemory,
    IncomingMigration,
    MemoryGuest,
    OutgoingMigration,
    Status,
)
from mig.errors import MigError

PAGE = 4096
NPAGES = 512
#: nobody waits so long; a test that does has found a wait without an end
FOREVER = 10.0
ENDS = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


def ended(migration) -> None:
    """Wait for the end, whatever it is."""
    with contextlib.suppress(MigError):
        assert migration.wait(FOREVER), f"still {migration.status}"
    assert migration.status in ENDS


def error_of(migration) -> MigError:
    with pytest.raises(MigError) as caught:
        assert migration.wait(FOREVER), f"still {migration.status}"
    return caught.value


class Box:
    """A guest with two blocks and a device, which notes what happens to it."""

    def __init__(
        self, seed: int | None = None, *, machine: str = "box", dirty=None, uuid=None
    ) -> None:
        self.calls: list[str] = []
        self.memory = GuestMemory()
        self.memory.add("pc.ram", NPAGES * PAGE)
        self.memory.add("vga.vram", 16 * PAGE)
        self.state = b""
        if seed is not None:
            rng = np.random.default_rng(seed)
            self.state = rng.bytes(100)
            for block in self.memory:
                pages = np.frombuffer(block.view, dtype=np.uint8).reshape(-1, PAGE)
                pages[::3] = rng.integers(0, 256, pages[::3].shape, dtype=np.uint8)
        devices = DeviceRegistry()
        devices.register("core", save=lambda: self.state, load=self._load)
        self.guest = MemoryGuest(
            machine,
            self.memory,
            devices,
            dirty=dirty,
            uuid=uuid,
            on_stop=lambda: self.calls.append("stop"),
            on_resume=lambda: self.calls.append("resume"),
        )

    def _load(self, payload: bytes, version_id: int) -> None:
        self.state = payload

    def same_as(self, other: Box) -> bool:
        return self.state == other.state and all(
            bytes(mine.view) == bytes(theirs.view)
            for mine, theirs in zip(self.memory, other.memory, strict=True)
        )


class Pair:
    """A source and a destination that end with the test."""

    def __init__(self) -> None:
        self.migrations: list[OutgoingMigration | IncomingMigration] = []

    def outgoing(self, guest, **options) -> OutgoingMigration:
        self.migrations.append(OutgoingMigration(guest, **options))
        return self.migrations[-1]

    def incoming(self, guest, **options) -> IncomingMigration:
        self.migrations.append(IncomingMigration(guest, **options))
        return self.migrations[-1]

    def end(self) -> None:
        for migration in self.migrations:
            for end in (migration.cancel, migration.abandon):
                with contextlib.suppress(Exception):
                    end()
