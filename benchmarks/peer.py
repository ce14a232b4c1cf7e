# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a migration in a process of its own, as QEMU is: run by migrations.py.

    peer.py capture URI OPTIONS FILE [FORMAT]  be a destination that keeps the VM in FILE
    peer.py drop    URI OPTIONS       be one that reads everything and keeps nothing
    peer.py memory  URI OPTIONS FILE  be one with memory like that of the VM in FILE
    peer.py host    URI OPTIONS MIB   be a destination of a process guest, and let it run
    peer.py send    URI OPTIONS FILE  be the source of the VM in FILE, once a line comes from stdin
    peer.py restore OPTIONS FILE URI...  have the VM in FILE run at all URIs, once a line comes from
                                      stdin; another line: without limit on the background
    peer.py touched URI OPTIONS FILE TOUCH  be a destination with memory like that of the VM in
                                      FILE, whose guest is a thread that touches pages; TOUCH: JSON,
                                      library, seconds and pause
    peer.py guest   MIB WORKLOAD      be a process guest, and its source when a line from stdin
                                      says so; WORKLOAD: JSON, arguments of ProcessGuest
    peer.py sink    URI SECONDS       take what comes over any number of connections, and hang up
                                      after so many whole seconds
    peer.py warm    MIB               touch so much memory, once a line comes from stdin

OPTIONS is JSON: capabilities, a list, and parameters. Every one says "ready" when it is, and prints
a JSON object when it is done: seconds of the migration, of this process in user mode and in the
kernel meanwhile.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import json
import mmap
import os
import resource
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import mig
from mig import _core
from mig.records import BlockInfo, Configuration
from mig.savevm.devices import DeviceState


class _MemoryOnly(mig.MemoryGuest):
    """Takes any device state: the machine's devices are QEMU's."""

    def load_devices(self, state: DeviceState) -> None:
        """Leave the devices alone."""


class _Nothing:
    """Takes any VM as StreamCapture does, but into /dev/null: all that is left is to read it."""

    uuid = None

    def __init__(self) -> None:
        self._fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._log: _core.PageLog | None = None

    def _open_log(self, parser: _core.RamParser) -> _core.PageLog:
        self._log = self._log or _core.PageLog(self._fd, parser)
        return self._log

    def configure(self, configuration: Configuration | None) -> None:
        """Take any."""

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """Take any."""

    def ram_started(self, section_id: int, footers: bool) -> None:
        """Nothing."""

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Note where the pages would be."""
        if parser.npages:
            self._open_log(parser).put(data, start)

    def open_lanes(
        self, receiver: _core.MultifdReceiver, parser: _core.RamParser, section_id: int
    ) -> None:
        """The same for channels."""
        receiver.to_log(self._open_log(parser))

    def switchover_started(self) -> None:
        """Nothing."""

    def load_devices(self, state: DeviceState) -> None:
        """Nothing."""

    def commit(self) -> None:
        """Let go."""
        self._log = None
        os.close(self._fd)

    abort = commit


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


def _receive(uri: str, options: str, guest: mig.DestinationGuest) -> None:
    incoming = mig.IncomingMigration(guest, **json.loads(options))
    incoming.listen(uri)
    _ready()
    incoming.wait()


def capture(uri: str, options: str, file: str, form: str = "stream") -> None:
    capture = mig.StreamCapture if form == "stream" else mig.MappedCapture
    _receive(uri, options, capture(file))
    # at once: what is closed afterwards is not part of the migration
    _report(**_spent())


def drop(uri: str, options: str) -> None:
    _receive(uri, options, _Nothing())
    _report(**_spent())


def memory(uri: str, options: str, file: str) -> None:
    with mig.open_image(file) as image:
        machine, blocks = image.machine or "", image.blocks
        ram = mig.GuestMemory(image.page_size)
    for block in blocks:
        ram.add(block.idstr, block.used_length)
    _receive(uri, options, _MemoryOnly(machine, ram))
    _report(**_spent())


def host(uri: str, options: str, mib: str) -> None:
    guest = mig.ProcessGuest(int(mib) << 20)
    _receive(uri, options, guest)
    arrived = guest.counters().ticks
    guest.resume()
    spent = _spent()
    while guest.counters().ticks == arrived:
        time.sleep(0.001)
    report = guest.verify()
    if not report.ok:
        raise RuntimeError(f"the guest is corrupt: {report}")
    _report(gap=report.switchover_gap, **spent)


def _migrate(guest: mig.SourceGuest, uri: str, options: str, patience: float = 0) -> None:
    """Migrate; after `patience` seconds, if any, with whatever downtime that takes."""
    outgoing = mig.OutgoingMigration(guest, **json.loads(options))
    forced = threading.Event()

    def force() -> None:
        forced.set()
        outgoing.set_parameters({"downtime-limit": _ANY_DOWNTIME})

    timer = threading.Timer(patience, force)
    outgoing.start(uri)
    if patience:
        timer.start()
    outgoing.wait()
    timer.cancel()
    info = outgoing.query()
    _report(
        seconds=info.total_time,
        nbytes=info.ram.transferred,
        passes=info.ram.dirty_sync_count,
        downtime=info.downtime,
        forced=forced.is_set(),
        **_spent(),
    )


#: as many milliseconds as the parameter can have
_ANY_DOWNTIME = 2_000_000


def _stream(guest: mig.SourceGuest, uri: str, options: str) -> None:
    """Send until the other end hangs up."""
    outgoing = mig.OutgoingMigration(guest, **json.loads(options))
    outgoing.start(uri)
    with contextlib.suppress(mig.errors.ChannelError):
        outgoing.wait()
    _report()


def send(uri: str, options: str, file: str) -> None:
    with mig.open_image(file) as image:
        _ready()
        sys.stdin.readline()
        _migrate(image, uri, options)


def restore(options: str, file: str, *uris: str) -> None:
    # as mig send --postcopy does
    sys.setswitchinterval(0.0002)
    given = json.loads(options)
    with mig.open_image(file) as image:
        _ready()
        sys.stdin.readline()
        started = [mig.restore(image, uri, **given) for uri in uris]
        threading.Thread(target=_hurry, args=(started,), daemon=True).start()
        for restored in started:
            restored.wait()
        infos = [restored.query() for restored in started]
        _report(
            seconds=max(info.total_time or 0 for info in infos),
            requests=sum(info.ram.postcopy_requests for info in infos),
            **_spent(),
        )


def _hurry(restored: Sequence[mig.OutgoingMigration]) -> None:
    for _ in sys.stdin:
        for one in restored:
            one.set_parameters({"max-postcopy-bandwidth": 0})


class _Touching:
    """A thread that touches pages of the VM in a file, once each and at random."""

    def __init__(self, image: mig.StreamImage, touch: str) -> None:
        given = json.loads(touch)
        self._pause, self._seconds = given["pause"], given["seconds"]
        self._library = ctypes.CDLL(given["library"])
        block = max(image.source_blocks(), key=lambda b: b.used_length)
        self._idstr = block.idstr
        index = np.arange(block.pages.npages, dtype=np.uint64)
        zero, _ = _core.KERNELS.zero_pages(block.pages, index)
        zero.complement()
        data = zero.indexes()
        rng = np.random.default_rng(1)
        self._offsets = rng.permutation(data) * np.uint64(image.page_size)
        self._took = np.zeros(len(self._offsets), dtype=np.uint64)
        self._count = 0
        self._thread = threading.Thread(target=self._run)
        self._memory = 0

    def begin(self, memory: mig.GuestMemory) -> None:
        self._memory = memory[self._idstr].pages.hva
        self._thread.start()

    def _run(self) -> None:
        # without the GIL, which those who bring the page need
        touch = self._library.touch_pages
        touch.restype = ctypes.c_size_t
        self._count = touch(
            ctypes.c_void_p(self._memory),
            ctypes.c_void_p(self._offsets.ctypes.data),
            ctypes.c_size_t(len(self._offsets)),
            ctypes.c_uint64(int(self._pause * 1e9)),
            ctypes.c_uint64(int(self._seconds * 1e9)),
            ctypes.c_void_p(self._took.ctypes.data),
        )

    def end(self) -> list[float]:
        """Return microseconds of every touch."""
        self._thread.join()
        return [float(took) / 1000 for took in self._took[: self._count]]


def touched(uri: str, options: str, file: str, touch: str) -> None:
    with mig.open_image(file) as image:
        machine, blocks = image.machine or "", image.blocks
        ram = mig.GuestMemory(image.page_size)
        touching = _Touching(image, touch)
    for block in blocks:
        ram.add(block.idstr, block.used_length)
    guest = _MemoryOnly(machine, ram, on_resume=lambda: touching.begin(ram))
    incoming = mig.IncomingMigration(guest, **json.loads(options))
    incoming.listen(uri)
    _ready()
    incoming.wait()
    times = guest.postcopy_times()
    _report(
        touches=touching.end(),
        seen=[times.percentile(share) for share in (0.5, 0.99)],
        **_spent(),
    )


def guest(mib: str, workload: str) -> None:
    given = json.loads(workload)
    if given["dirty"] == "tracked":
        given["dirty"] = mig.WriteTracker
    with mig.ProcessGuest(int(mib) << 20, **given) as guest:
        guest.start()
        _ready()
        for line in sys.stdin:
            match line.split():
                case ["resume"]:
                    if not guest.running:
                        guest.resume()
                    _ready()
                case ["migrate", uri, options, patience]:
                    _migrate(guest, uri, options, float(patience))
                case ["stream", uri, options]:
                    _stream(guest, uri, options)


def sink(uri: str, seconds: str) -> None:
    path = uri.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        _ready()
        times, totals = _take(listener, int(seconds))
    _report(rates=_rates(times, totals, int(seconds)))


def _take(listener: socket.socket, seconds: int) -> tuple[list[float], list[int]]:
    """Return when bytes came, and how many had come by then, in a little more than ``seconds``.

    All connections count together. Nobody is answered: no source waits for it, without return path.
    """
    times, totals = [], []
    total = 0
    end = None
    with contextlib.ExitStack() as connections, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        for n in _arrivals(listener, selector, connections):
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


def _arrivals(
    listener: socket.socket, selector: selectors.BaseSelector, connections: contextlib.ExitStack
) -> Iterator[int]:
    """Accept connections and yield how many bytes come over them, until one of them ends."""
    buffer = bytearray(1 << 20)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection = connections.enter_context(listener.accept()[0])
                selector.register(connection, selectors.EVENT_READ)
                continue
            assert isinstance(key.fileobj, socket.socket)
            n = key.fileobj.recv_into(buffer)
            if not n:
                return
            yield n


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
    "drop": drop,
    "memory": memory,
    "host": host,
    "send": send,
    "restore": restore,
    "touched": touched,
    "guest": guest,
    "sink": sink,
    "warm": warm,
}


def main(role: str, *arguments: str) -> None:
    _ROLES[role](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
