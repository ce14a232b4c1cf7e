# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a migration in a process of its own, as QEMU is: run by migrations.py.

    peer.py capture URI FILE      be a destination that keeps the VM in FILE
    peer.py memory  URI FILE      be a destination with memory like that of the VM in FILE
    peer.py host    URI MIB       be a destination of a process guest, and let it run
    peer.py send    URI FILE      be the source of the VM in FILE, once a line comes from stdin
    peer.py guest   MIB RATE LOG  be a process guest that dirties RATE bytes a second, and the
                                  source of it when a line from stdin says so
    peer.py sink    URI SECONDS   take what comes, and hang up after so many whole seconds
    peer.py warm    MIB           touch so much memory, once a line comes from stdin

Every one says "ready" when it is, and prints a JSON object when it is done: seconds of the
migration, of this process in user mode and in the kernel meanwhile.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import mmap
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import mig
from mig.savevm.devices import DeviceState

#: the share of its memory that a guest writes
_WORKING_SET = 0.25


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


def _spent() -> dict[str, float]:
    """Processor time since _ready()."""
    user, system = (after - before for after, before in zip(_used(), _before, strict=True))
    return {"user": user, "system": system}


def _report(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def _receive(uri: str, guest: mig.DestinationGuest) -> None:
    incoming = mig.IncomingMigration(guest)
    incoming.listen(uri)
    _ready()
    incoming.wait()


def capture(uri: str, file: str) -> None:
    _receive(uri, mig.StreamCapture(file))
    # at once: what is closed afterwards is not part of the migration
    _report(**_spent())


def memory(uri: str, file: str) -> None:
    with mig.open_image(file) as image:
        machine, blocks = image.machine or "", image.blocks
        ram = mig.GuestMemory(image.page_size)
    for block in blocks:
        ram.add(block.idstr, block.used_length)
    _receive(uri, _MemoryOnly(machine, ram))
    _report(**_spent())


def host(uri: str, mib: str) -> None:
    guest = mig.ProcessGuest(int(mib) << 20)
    _receive(uri, guest)
    arrived = guest.counters().ticks
    guest.resume()
    spent = _spent()
    while guest.counters().ticks == arrived:
        time.sleep(0.001)
    report = guest.verify()
    if not report.ok:
        raise RuntimeError(f"the guest is corrupt: {report}")
    _report(gap=report.switchover_gap, **spent)


def _migrate(guest: mig.SourceGuest, uri: str) -> None:
    outgoing = mig.OutgoingMigration(
        guest, capabilities=["return-path"], parameters={"max-bandwidth": 0}
    )
    outgoing.start(uri)
    outgoing.wait()
    info = outgoing.query()
    _report(seconds=info.total_time, nbytes=info.ram.transferred, **_spent())


def _stream(guest: mig.SourceGuest, uri: str, bandwidth: int) -> None:
    """Send until the other end hangs up."""
    outgoing = mig.OutgoingMigration(guest, parameters={"max-bandwidth": bandwidth})
    outgoing.start(uri)
    with contextlib.suppress(mig.errors.ChannelError):
        outgoing.wait()
    _report()


def send(uri: str, file: str) -> None:
    with mig.open_image(file) as image:
        _ready()
        sys.stdin.readline()
        _migrate(image, uri)


def guest(mib: str, rate: str, log: str) -> None:
    dirty: Any = mig.WriteTracker if log == "tracked" else "marked"
    with mig.ProcessGuest(
        int(mib) << 20, rate=int(rate), working_set=_WORKING_SET, dirty=dirty
    ) as guest:
        guest.start()
        _ready()
        for line in sys.stdin:
            match line.split():
                case ["resume"]:
                    if not guest.running:
                        guest.resume()
                    _ready()
                case ["migrate", uri]:
                    _migrate(guest, uri)
                case ["stream", uri, bandwidth]:
                    _stream(guest, uri, int(bandwidth))


def sink(uri: str, seconds: str) -> None:
    path = uri.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        _ready()
        connection, _ = listener.accept()
    times, totals = _take(connection, int(seconds))
    _report(rates=_rates(times, totals, int(seconds)))


def _take(connection: socket.socket, seconds: int) -> tuple[list[float], list[int]]:
    """Return when bytes came, and how many had come by then, in a little more than ``seconds``."""
    buffer = bytearray(1 << 20)
    times, totals = [], []
    total = 0
    end = None
    with connection:
        while n := connection.recv_into(buffer):
            now = time.monotonic()
            total += n
            if end is None and total >= _PAGES_COME:
                end = now + seconds + _PHASE
            if end is not None:
                times.append(now)
                totals.append(total)
                if now > end:
                    break
    return times, totals


#: bytes of stream after which surely pages come
_PAGES_COME = 1 << 20
#: seconds of the start in which a pause is looked for
_PHASE = 0.25


def _rates(times: list[float], totals: list[int], seconds: int) -> list[float]:
    """Return the bytes of each whole second.

    A limiter sends in bursts, ten a second, and waits in between. A second that began or ended with
    a burst would have one more or less of them for a jitter of microseconds: so all seconds begin
    within a pause, in the middle of the longest at the start.
    """
    early = bisect.bisect(times, times[0] + _PHASE)
    _, before = max((times[i + 1] - times[i], i) for i in range(early))
    began = (times[before] + times[before + 1]) / 2

    def total_at(when: float) -> int:
        return totals[bisect.bisect(times, when) - 1]

    whole = int(times[-1] - began)
    marks = [total_at(began + second) for second in range(min(seconds, whole) + 1)]
    return [float(after - before) for before, after in itertools.pairwise(marks)]


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
    _report()


_ROLES: dict[str, Callable[..., None]] = {
    "capture": capture,
    "memory": memory,
    "host": host,
    "send": send,
    "guest": guest,
    "sink": sink,
    "warm": warm,
}


def main(role: str, *arguments: str) -> None:
    _ROLES[role](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
