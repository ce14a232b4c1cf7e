# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a migration in a process of its own, as QEMU is: run by test_qemu.py.

    peer.py capture URI FILE    be a destination that keeps the VM in FILE
    peer.py memory  URI FILE    be a destination with memory like that of the VM in FILE
    peer.py send    URI FILE    be the source of the VM in FILE, once a line comes from stdin
    peer.py warm    MIB         touch so much memory, once a line comes from stdin

Every one says "ready" when it is, and prints a JSON object when it is done: seconds of the
migration, of this process in user mode and in the kernel meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import resource
import sys
from collections.abc import Callable

import numpy as np

import mig
from mig.savevm.devices import DeviceState


class _MemoryOnly(mig.MemoryGuest):
    """Takes any device state: the machine's devices are QEMU's."""

    def load_devices(self, state: DeviceState) -> None:
        """Leave the devices alone."""


def _used() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


#: processor time when the work began
_before = [0.0, 0.0]


def _ready() -> None:
    _before[:] = _used()
    print("ready", flush=True)


def _report(seconds: float) -> None:
    """Say the figures at once: what is closed afterwards is not part of the migration."""
    user, system = (after - before for after, before in zip(_used(), _before, strict=True))
    print(json.dumps({"seconds": seconds, "user": user, "system": system}), flush=True)


def _receive(uri: str, guest: mig.DestinationGuest) -> None:
    incoming = mig.IncomingMigration(guest)
    incoming.listen(uri)
    _ready()
    incoming.wait()
    _report(incoming.query().total_time or 0.0)


def capture(uri: str, file: str) -> None:
    _receive(uri, mig.StreamCapture(file))


def memory(uri: str, file: str) -> None:
    with mig.open_image(file) as image:
        machine, blocks = image.machine or "", image.blocks
        ram = mig.GuestMemory(image.page_size)
    for block in blocks:
        ram.add(block.idstr, block.used_length)
    _receive(uri, _MemoryOnly(machine, ram))


def send(uri: str, file: str) -> None:
    with mig.open_image(file) as image:
        outgoing = mig.OutgoingMigration(
            image, capabilities=["return-path"], parameters={"max-bandwidth": 0}
        )
        _ready()
        sys.stdin.readline()
        outgoing.start(uri)
        outgoing.wait()
        _report(outgoing.query().total_time or 0.0)


def warm(mib: str) -> None:
    """Have the host back free memory, so that who takes it next need not wait for that.

    Some peers take small pages and some huge ones, and these come from different free lists: so
    both are taken, and given back huge ones last.
    """
    nbytes = int(mib) << 20
    _ready()
    sys.stdin.readline()
    held = []
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE):
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # a kernel without huge pages does not know the advice
        with contextlib.suppress(OSError):
            mapping.madvise(advice)
        np.frombuffer(mapping, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
        held.append(mapping)
    while held:
        held.pop().close()
    _report(0.0)


_ROLES: dict[str, Callable[..., None]] = {
    "capture": capture,
    "memory": memory,
    "send": send,
    "warm": warm,
}


def main(role: str, *arguments: str) -> None:
    _ROLES[role](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
