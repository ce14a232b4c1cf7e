# SPDX-License-Identifier: LGPL-2.1-or-later
"""Migrations between two processes of this machine, and what they are compared by.

A migration has a source, which can do it again and again, and a destination, which is a new one
each time. Each is a QEMU or a process of mig's (peer.py).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Protocol

from mig.selftest.initramfs import write_initramfs
from mig.selftest.kernel import find_kernel
from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary
from mig.selftest.qmp import QmpCommandError

_PEER = Path(__file__).with_name("peer.py")
_POLL_INTERVAL = 0.005
#: how long a destination may lag behind its source (seconds)
_END = 60
#: how long a source may take to be ready after a migration that failed (seconds)
_CLEARED = 60
#: the share of its memory that a guest of mig's writes
_WORKING_SET = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Settings:
    """What both ends are told, QEMU and mig alike, besides having a return path.

    capabilities: names of those that are on
    parameters:   values by QMP name
    """

    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)

    def to_json(self, *, return_path: bool = True) -> str:
        """As peer.py takes them: without a space."""
        capabilities = [*self.capabilities, *(["return-path"] if return_path else [])]
        parameters = {"max-bandwidth": 0, **self.parameters}
        given = {"capabilities": capabilities, "parameters": parameters}
        return json.dumps(given, separators=(",", ":"))

    def apply(self, qemu: Qemu, *, return_path: bool = True) -> None:
        """Tell a QEMU, which may have been told others before."""
        others = ("multifd", "postcopy-ram", "postcopy-preempt", "mapped-ram")
        # what QEMU 7.2 does not know it cannot have on either
        on = {"return-path": return_path, **dict.fromkeys(self._known(qemu, others), False)}
        qemu.set_capabilities(on | dict.fromkeys(self.capabilities, True))
        qemu.set_parameters({**_USUAL, **self.parameters})

    @staticmethod
    def _known(qemu: Qemu, names: Iterable[str]) -> list[str]:
        known = {c["capability"] for c in qemu.command("query-migrate-capabilities")}
        return [name for name in names if name in known]


#: QEMU's defaults of what some settings change, but for the limit on bandwidth
_USUAL = {
    "max-bandwidth": 0,
    "max-postcopy-bandwidth": 0,
    "multifd-channels": 2,
    "multifd-compression": "none",
}

PLAIN = Settings()


def multifd(channels: int, compression: str = "none", **parameters: object) -> Settings:
    """Return settings with so many channels; underscores in names stand for dashes."""
    named = {key.replace("_", "-"): value for key, value in parameters.items()}
    given = {"multifd-channels": channels, "multifd-compression": compression, **named}
    return Settings(("multifd",), given)


@dataclass(frozen=True)
class Usage:
    """Processor seconds of one process."""

    user: float
    system: float


@dataclass(frozen=True)
class Sent:
    """What the source says: seconds from start to end, bytes of stream, what it used."""

    total: float
    nbytes: int
    usage: Usage


@dataclass(frozen=True)
class Run:
    """One migration.

    machine: processor seconds of the whole machine meanwhile: what is beyond the two processes
             was somebody else, and disturbed
    """

    source: Sent
    destination: Usage
    machine: float

    @property
    def total(self) -> float:
        """The source's own time."""
        return self.source.total

    @property
    def throughput(self) -> float:
        """Bytes of stream per second."""
        return self.source.nbytes / self.source.total


class Source(Protocol):
    """Can migrate its guest, again and again."""

    def prepare(self, uri: str) -> None:
        """Get ready for one migration."""

    def migrate(self, uri: str) -> None:
        """Migrate; returns when the source is done."""

    def result(self) -> Sent:
        """Return the source's own figures."""

    def close(self) -> None:
        """End what belongs to the last migration."""


class Destination(Protocol):
    """Takes one guest."""

    def result(self) -> Usage:
        """Wait for the end; return what it used."""

    def close(self) -> None:
        """Release everything."""


# ---- processes of mig ------------------------------------------------------------------------


class Peer:
    """A process that runs peer.py."""

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_PEER), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.wait_ready()

    def _expect(self, what: str) -> str:
        line = self._out.readline()
        if not line.startswith(what):
            raise RuntimeError(
                f"{self._process.args!r} said {line!r}, ended {self._process.poll()}"
            )
        return line

    def wait_ready(self) -> None:
        """Wait until it is."""
        self._expect("ready")

    def order(self, text: str = "") -> None:
        """Let it do something."""
        self._in.write(f"{text}\n")
        self._in.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for what it has to say."""
        said: dict[str, Any] = json.loads(self._expect("{"))
        return said

    def sent(self) -> Sent:
        """Wait for what it has to say as a source."""
        return _sent(self.answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()


def _sent(said: Mapping[str, Any]) -> Sent:
    return Sent(said["seconds"], said["nbytes"], Usage(said["user"], said["system"]))


class MigImage:
    """Sends a file that holds a VM."""

    def __init__(self, image: Path, settings: Settings = PLAIN) -> None:
        self._image = image
        self._settings = settings
        self._peer: Peer | None = None
        self._sent = Sent(0, 0, Usage(0, 0))

    def prepare(self, uri: str) -> None:
        self._peer = Peer("send", uri, self._settings.to_json(), self._image)

    def migrate(self, uri: str) -> None:
        assert self._peer is not None
        self._peer.order()
        self._sent = self._peer.sent()

    def result(self) -> Sent:
        return self._sent

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


class MigGuest:
    """A running process guest that goes on after each migration, as if it had failed.

    rate:     bytes of memory that it dirties each second, in a quarter of its memory
    log:      'tracked' or 'marked'
    workload: more arguments of ProcessGuest
    settings: of the next migration; may be replaced
    patience: after so many seconds the next migration ends with whatever downtime; 0: never
    """

    def __init__(self, mib: int, *, rate: int, log: str, **workload: object) -> None:
        given = {"rate": rate, "dirty": log, "working_set": _WORKING_SET, **workload}
        self._peer = Peer("guest", mib, json.dumps(given))
        self._sent = Sent(0, 0, Usage(0, 0))
        self.settings = PLAIN
        self.patience = 0.0
        self.said: dict[str, Any] = {}

    def prepare(self, uri: str) -> None:
        self._peer.order("resume")
        self._peer.wait_ready()

    def migrate(self, uri: str) -> None:
        self._peer.order(f"migrate {uri} {self.settings.to_json()} {self.patience}")
        self.said = self._peer.answer()
        self._sent = _sent(self.said)

    def stream(self, uri: str) -> None:
        """Send until the other end hangs up, without a return path."""
        self._peer.order(f"stream {uri} {self.settings.to_json(return_path=False)}")
        self._peer.answer()

    def result(self) -> Sent:
        return self._sent

    def close(self) -> None:
        """Nothing: the guest stays for the next one."""

    def end(self) -> None:
        """End the guest."""
        self._peer.close()


class MigDestination:
    """Takes the guest in a process of mig's.

    role, uri, arguments: of peer.py
    kept: the file that it writes, if it does
    """

    def __init__(
        self,
        role: str,
        uri: str,
        *arguments: object,
        settings: Settings = PLAIN,
        kept: Path | None = None,
    ) -> None:
        self._peer = Peer(role, uri, settings.to_json(), *arguments)
        self._kept = kept
        self.said: dict[str, Any] = {}

    def result(self) -> Usage:
        self.said = self._peer.answer()
        return Usage(self.said["user"], self.said["system"])

    def close(self) -> None:
        self._peer.close()
        if self._kept is not None:
            self._kept.unlink(missing_ok=True)


# ---- processes of QEMU -----------------------------------------------------------------------


def qemu_name(binary: QemuBinary) -> str:
    """Return what the results call it."""
    return f"QEMU {'.'.join(map(str, binary.version))}"


def idle_guest(
    mib: int, folder: Path, pattern: Literal["random", "compressible"] = "random"
) -> GuestSpec:
    """Return a machine whose guest is idle and has so much memory.

    pattern: random: does not compress; compressible: by half
    """
    initrd = write_initramfs(folder / "initrd")
    memory = mib + mib // 16 + 96
    return GuestSpec(
        find_kernel(), initrd, memory_mib=memory, fill_mib=mib, mode="idle", pattern=pattern
    )


def _usage(qemu: Qemu) -> Usage:
    stat = Path(f"/proc/{qemu._process.pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return Usage(int(fields[11]) / _TICKS, int(fields[12]) / _TICKS)


def _machine_usage() -> float:
    """Processor seconds that all processors of the machine have been busy."""
    user, nice, system, _idle, _iowait, *rest = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + sum(rest)) / _TICKS


def _since(before: Usage, after: Usage) -> Usage:
    return Usage(after.user - before.user, after.system - before.system)


class QemuSource:
    """A running guest that goes on after each migration, as if it had failed.

    settings: of the next migration; may be replaced
    """

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self.settings = PLAIN
        self._before = Usage(0, 0)
        self._after = Usage(0, 0)

    def prepare(self, uri: str) -> None:
        if self._qemu.status() != "running":
            self._qemu.command("cont")
            self._qemu.wait_status("running")
        self.settings.apply(self._qemu)
        self._before = _usage(self._qemu)

    def _start(self, uri: str) -> None:
        """Migrate; QEMU 7.2 says that the last one failed before it has cleared up after it."""
        deadline = time.monotonic() + _CLEARED
        while True:
            try:
                return self._qemu.migrate(uri)
            except QmpCommandError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_INTERVAL)

    def migrate(self, uri: str) -> None:
        self._qemu.migrate(uri)
        while (status := self._qemu.query_migrate()["status"]) != "completed":
            if status in ("failed", "cancelled"):
                raise RuntimeError(f"migration {status}: {self._qemu.stderr}")
            time.sleep(_POLL_INTERVAL)
        self._after = _usage(self._qemu)

    def stream(self, uri: str) -> None:
        """Send until the other end hangs up, without a return path."""
        self.settings.apply(self._qemu, return_path=False)
        self._start(uri)
        self._qemu.wait_migration(until=("failed", "completed"))

    def result(self) -> Sent:
        info = self._qemu.wait_migration(_END)
        used = _since(self._before, self._after)
        return Sent(info["total-time"] / 1000, info["ram"]["transferred"], used)

    def close(self) -> None:
        """Nothing: the guest stays for the next one."""


class QemuDestination:
    """A fresh QEMU that waits for the guest."""

    def __init__(
        self,
        binary: QemuBinary,
        spec: GuestSpec,
        folder: Path,
        uri: str,
        settings: Settings = PLAIN,
    ) -> None:
        self._qemu = Qemu(binary, spec, folder, name="destination", incoming="defer")
        settings.apply(self._qemu)
        self._qemu.migrate_incoming(uri)
        self._before = _usage(self._qemu)

    def result(self) -> Usage:
        self._qemu.wait_migration(_END)
        return _since(self._before, _usage(self._qemu))

    def close(self) -> None:
        self._qemu.close()


# ---- the stage -------------------------------------------------------------------------------


def disk_rate(file: Path, nbytes: int) -> float:
    """Return how many bytes a second go into a new file around the page cache; 0: none can.

    nbytes: how many are written, a multiple of 1 MiB
    """
    try:
        fd = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        return 0.0
    try:
        with mmap.mmap(-1, _WRITE) as buffer:
            buffer.write(os.urandom(_WRITE))
            start = time.perf_counter()
            for _ in range(nbytes // _WRITE):
                os.write(fd, buffer)
            return nbytes / (time.perf_counter() - start)
    finally:
        os.close(fd)
        file.unlink()


#: bytes of one write of disk_rate()
_WRITE = 1 << 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stage:
    """Where one migration after the other is prepared, and run.

    folder:    for the socket
    mib:       memory that a destination takes
    transport: unix or tcp

    uri: where the next destination is to listen; another one each time with tcp
    """

    def __init__(self, folder: Path, mib: int, transport: str = "unix") -> None:
        self._warm_mib = mib + mib // 8 + 64
        self._socket = folder / "socket"
        self._transport = transport
        self.uri = f"unix:{self._socket}"
        self._busy = 0.0
        self._source: Source | None = None
        self._destination: Destination | None = None

    def clear(self) -> None:
        """End the last migration's processes, and free what it took."""
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._destination is not None:
            self._destination.close()
            self._destination = None
        self._socket.unlink(missing_ok=True)

    def prepare(self, source: Source, make_destination: Callable[[], Destination]) -> None:
        """Set the ends up; then have the host back the memory that the destination will take."""
        self.clear()
        if self._transport == "tcp":
            self.uri = f"tcp:127.0.0.1:{_free_port()}"
        self._source = source
        self._destination = make_destination()
        source.prepare(self.uri)
        with contextlib.closing(Peer("warm", self._warm_mib)) as warm:
            warm.order()
            warm.answer()

    def migrate(self) -> None:
        """Run the migration that was prepared."""
        assert self._source is not None
        before = _machine_usage()
        self._source.migrate(self.uri)
        self._busy = _machine_usage() - before

    def run(self) -> Run:
        """Return the figures of the migration that has run."""
        assert self._source is not None
        assert self._destination is not None
        return Run(self._source.result(), self._destination.result(), self._busy)


#: source of each migration that is compared, and what makes its destination
Ends = Mapping[str, tuple[Source, Callable[[], Destination]]]


def compare_migrations(
    compare: Any,
    stage: Stage,
    ends: Ends,
    *,
    mib: int,
    rounds: int,
    warmup: int = 0,
    file: str = "",
) -> None:
    """Compare the migration called mig with the other ones.

    mib:    MiB of the guest's memory that are not zero
    warmup: rounds before those that count
    file:   the type of the file system that a file is on, if there is one
    """
    runs: dict[str, list[Run]] = defaultdict(list)
    waiting: list[str] = []

    def collect() -> None:
        if waiting:
            runs[waiting.pop()].append(stage.run())

    def prepare(name: str) -> None:
        collect()
        stage.prepare(*ends[name])
        waiting.append(name)

    compare(
        stage.migrate,
        {name: stage.migrate for name in ends if name != "mig"},
        rounds=rounds,
        prepare=prepare,
        warmup=warmup,
        nbytes=mib << 20,
    )
    collect()
    compare.info["mib"] = mib
    compare.info["folder"] = file
    for name, some in runs.items():
        _note(compare.info, name, some[warmup:])
    for name in runs.keys() - {"mig"}:
        for figure, faster in (("total", -1), ("throughput", 1)):
            ratio = compare.info[f"{figure} mig"] / compare.info[f"{figure} {name}"]
            compare.info[f"ratio {figure} {name}"] = ratio**faster


def _note(info: dict[str, Any], name: str, runs: list[Run]) -> None:
    """Note the medians of one peer's migrations."""
    figures = {
        "total": "total",
        "throughput": "throughput",
        "cpu machine": "machine",
        "cpu source user": "source.usage.user",
        "cpu source system": "source.usage.system",
        "cpu destination user": "destination.user",
        "cpu destination system": "destination.system",
    }
    for figure, attribute in figures.items():
        kind, _, rest = figure.partition(" ")
        key = f"{kind} {name} {rest}".rstrip()
        info[key] = statistics.median(map(attrgetter(attribute), runs))
