# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that were kept, and what makes them run again: by mig in postcopy, or by QEMU alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mig
from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

from .migrations import MigDestination, Peer, QemuSource, Settings

#: how often it is looked whether a guest has said something (seconds)
_LOOK = 0.0005
#: how long that may take (seconds)
_LIMIT = 300.0

POSTCOPY = Settings(("postcopy-ram",))
MAPPED = Settings(("mapped-ram",))


@dataclass(frozen=True)
class Kept:
    """One guest in two files.

    stream: as mig has kept it, which is what QEMU writes to file:, too
    mapped: as QEMU has kept it with capability mapped-ram; None: it cannot
    """

    stream: Path
    mapped: Path | None


def keep(
    binary: QemuBinary, spec: GuestSpec, folder: Path, *, mapped: bool, running: Qemu | None = None
) -> Kept:
    """Boot a guest and keep it; it ends with that, unless it is the caller's."""
    stream, other = folder / "stream", folder / "mapped" if mapped else None
    with contextlib.ExitStack() as stack:
        qemu = running
        if qemu is None:
            qemu = stack.enter_context(Qemu(binary, spec, folder, name="kept"))
            qemu.wait_ready(1200)
        qemu.wait_ticks(2)
        source, uri = QemuSource(qemu), f"unix:{folder / 'keep'}"
        with contextlib.closing(MigDestination("capture", uri, stream)) as capture:
            source.prepare(uri)
            source.migrate(uri)
            capture.result()
        if other is not None:
            source.prepare("")
            # a file has no return path
            MAPPED.apply(qemu, return_path=False)
            source.migrate(f"file:{other}")
    return Kept(stream, other)


def read_into_cache(file: Path, *others: Path | None) -> None:
    """Have the page cache hold a file, and for its sake not the others."""
    for other in others:
        if other is not None:
            with other.open("rb") as opened:
                os.fdatasync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(1 << 20)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


class Waiting:
    """Fresh QEMUs that have nothing to run yet."""

    def __init__(
        self, binary: QemuBinary, spec: GuestSpec, folder: Path, settings: Settings, count: int = 1
    ) -> None:
        self._stack = contextlib.ExitStack()
        self.qemus: list[Qemu] = []
        self.uris: list[str] = []
        for number in range(count):
            name = f"waiting{number}"
            qemu = Qemu(binary, spec, folder, name=name, incoming="defer")
            self._stack.enter_context(qemu)
            settings.apply(qemu, return_path=False)
            self.qemus.append(qemu)
            self.uris.append(f"unix:{folder / name}")

    def listen(self) -> None:
        """Wait for a source."""
        for qemu, uri in zip(self.qemus, self.uris, strict=True):
            qemu.migrate_incoming(uri)

    def load(self, file: Path) -> None:
        """Begin to load a file."""
        for qemu in self.qemus:
            qemu.migrate_incoming(f"file:{file}")

    def wait_first_ticks(self) -> list[float]:
        """Wait until every guest has said that it ticks; return when that was."""
        ticked: dict[str, float] = {}
        deadline = time.perf_counter() + _LIMIT
        while len(ticked) < len(self.qemus):
            for qemu in self.qemus:
                if qemu.name not in ticked and qemu.ticks():
                    ticked[qemu.name] = time.perf_counter()
            if time.perf_counter() > deadline or any(q.exit_code is not None for q in self.qemus):
                raise RuntimeError(f"no tick: {[qemu.stderr for qemu in self.qemus]}")
            time.sleep(_LOOK)
        return list(ticked.values())

    def wait_completed(self) -> None:
        """Wait until all have all of their memory."""
        for qemu in self.qemus:
            status = qemu.wait_migration(_LIMIT)["status"]
            if status != "completed":
                raise RuntimeError(f"migration {status}: {qemu.stderr}")

    def close(self) -> None:
        self._stack.close()


def restoring(file: Path, uris: Sequence[str], settings: Settings, *, order: bool = False) -> Peer:
    """Return a process of mig that has opened the file, and waits to be told.

    order: let pages go in the order that record_order() has noted
    """
    given = {**json.loads(settings.to_json(return_path=False)), "order": order}
    return Peer("restore", json.dumps(given), file, *uris)


def record_order(binary: QemuBinary, spec: GuestSpec, folder: Path, file: Path) -> None:
    """Restore a guest, only to note which pages it wants up to its first tick."""
    with (
        contextlib.closing(Waiting(binary, spec, folder, POSTCOPY)) as waiting,
        mig.open_image(file) as image,
    ):
        waiting.listen()
        restored = mig.restore(image, waiting.uris[0], background=False, record=True)
        waiting.wait_first_ticks()
        restored.abandon()
        with contextlib.suppress(mig.MigError):
            restored.wait()


def start_command(file: Path, uri: str) -> subprocess.Popen[bytes]:
    """Start the command that a person would."""
    arguments = [
        sys.executable,
        "-P",
        "-m",
        "mig",
        "send",
        str(file),
        uri,
        "--postcopy",
        "--order",
        "off",
    ]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
