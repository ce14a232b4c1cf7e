"""Guests that are booted once: later tests start them from the file that they were saved in."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from workers import locked

from mig.selftest.qemu import GuestSpec, Qemu

#: of the guest before it is saved: it has begun to check its memory, and to write in dirty mode
_TICKS = 5
_FOREVER = 60.0


@dataclass(frozen=True)
class Kept:
    """A guest that stands still: the stream that QEMU saved, and what its console has said."""

    stream: Path
    console: str


def _save(qemu: Qemu, stream: Path) -> None:
    """Save a guest; it stands still meanwhile: 7.2 under TCG loses what is written."""
    qemu.command("stop")
    qemu.set_parameters({"max-bandwidth": 0})
    # QEMU is done before cat is
    qemu.migrate(f"exec:cat > {stream}.partial && mv {stream}.partial {stream}")
    assert qemu.wait_migration()["status"] == "completed"
    end = time.monotonic() + _FOREVER
    while not stream.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


class KeptBoots:
    """Saved guests in a folder, which pytest's workers share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, version: str, spec: GuestSpec, start: Callable[[], Qemu]) -> Kept:
        """Return the guest of this machine.

        start: starts a QEMU with it, where nobody has booted it yet
        """
        # each worker writes an initial file system, all the same
        machine = repr((version, replace(spec, initrd=Path())))
        name = hashlib.sha256(machine.encode()).hexdigest()[:16]
        stream, console = (self._folder / f"{name}.{kind}" for kind in ("stream", "console"))
        with locked(self._folder / f"{name}.lock"):
            if not stream.exists():
                with start() as qemu:
                    qemu.wait_ready()
                    qemu.wait_ticks(_TICKS, from_start=True)
                    _save(qemu, stream)
                    console.write_text(qemu.console(), newline="")
        with console.open(newline="") as file:
            return Kept(stream, file.read())
