# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU process running the self-test guest, and its remote control."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mig.selftest.console import READY, Console, Tick, parse_ticks, slow_touches
from mig.selftest.errors import SelftestError
from mig.selftest.packages import run
from mig.selftest.qmp import QmpConnection, QmpConnectionError

_PROGRAM = "qemu-system-x86_64"
_POLL_INTERVAL = 0.025
# QEMU 7.2 says `completed` a moment before it fills in the times.
_TOTALS_TIMEOUT = 5.0
# The last two shorten the boot; the guest has nothing to protect.
_KERNEL_PARAMETERS = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"
_TROUBLE = re.compile(r"mig-guest: (corrupt|error)|Kernel panic|BUG:|Oops")


@dataclass(frozen=True)
class QemuBinary:
    """A QEMU program, its version, and the arguments and modules it needs where it lies."""

    path: Path
    version: tuple[int, int, int]
    args: tuple[str, ...] = ()
    modules: Path | None = None

    @classmethod
    def installed(cls) -> QemuBinary:
        """Return $MIG_QEMU (a program or an unpacked root), or the one in the path."""
        named = os.environ.get("MIG_QEMU") or _PROGRAM
        if Path(named).is_dir():
            return cls.unpacked(Path(named))
        found = shutil.which(named)
        if found is None:
            raise SelftestError(f"there is no {named}: apt-get install qemu-system-x86")
        return cls.at(Path(found))

    @classmethod
    def at(cls, path: Path) -> QemuBinary:
        """Return the program at `path`."""
        if not os.access(path, os.X_OK):
            raise SelftestError(f"{path} is not a program")
        return cls(path, _version(path))

    @classmethod
    def unpacked(cls, root: Path) -> QemuBinary:
        """Return the QEMU of Debian packages unpacked into `root`."""
        root = root.resolve()
        program = root / "usr/bin" / _PROGRAM
        if not os.access(program, os.X_OK):
            raise SelftestError(f"{root} holds no unpacked QEMU: {program} is missing")
        args: list[str] = []
        for data in ("qemu", "seabios"):
            args += ["-L", str(root / "usr/share" / data)]
        modules = next(root.glob("usr/lib/*/qemu"), None)
        return cls(program, _version(program), tuple(args), modules)

    def environment(self) -> dict[str, str]:
        """Return the environment to run it in."""
        if self.modules is None:
            return dict(os.environ)
        # Else it tries the modules of an installed QEMU of another version.
        return {**os.environ, "QEMU_MODULE_DIR": str(self.modules)}


@dataclass(frozen=True)
class GuestSpec:
    """The machine and what its guest does; both ends of a migration need the same."""

    kernel: Path
    initrd: Path
    memory_mib: int = 128
    memory_extra_kib: int = 8
    """KiB of memory beyond `memory_mib`: see `arguments`."""
    fill_mib: int = 32
    mode: Literal["idle", "dirty", "touch"] = "idle"
    dirty_kib: int = 4096
    """KiB rewritten each second, in dirty mode."""
    touch_us: int = 500
    """Microseconds between two touches of pages at random, in touch mode."""
    tick_ms: int = 200
    """Milliseconds between two ticks."""
    sweep_ms: int = 1700
    """Milliseconds in which an idle guest checks all pages that it filled."""
    machine: str = "pc"
    pattern: Literal["random", "sparse", "delta", "compressible"] = "random"
    extra: tuple[str, ...] = ()
    """More arguments for QEMU."""

    @property
    def memory_bytes(self) -> int:
        """The size of the guest's memory."""
        return (self.memory_mib * 1024 + self.memory_extra_kib) * 1024

    def arguments(self) -> list[str]:
        """Return the arguments of QEMU for this machine."""
        # QEMU 7.2 (not 10.0) loses writes when it migrates an emulated guest away and the size
        # of the memory is a multiple of 64 pages: its dirty tracking then takes a short cut
        # that leaves the emulator's TLB as it was. An odd size avoids it.
        parameters = (
            f"{_KERNEL_PARAMETERS} migmib={self.fill_mib} migmode={self.mode} "
            f"migdirtykib={self.dirty_kib} migpattern={self.pattern} "
            f"migtouchus={self.touch_us} migtickms={self.tick_ms} migsweepms={self.sweep_ms}"
        )
        boot = ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", parameters]
        return ["-machine", self.machine, "-m", f"{self.memory_bytes // 1024}k", *boot, *self.extra]


class Qemu:
    """One QEMU process, from construction until `close`; also a context manager.

    said: what the guest's console said in processes before this one: `console` begins with it
    """

    def __init__(
        self,
        binary: QemuBinary,
        spec: GuestSpec,
        workdir: Path,
        *,
        incoming: str | None = None,
        name: str = "vm",
        pass_fds: Sequence[int] = (),
        said: str = "",
    ) -> None:
        self.name = name
        self.binary = binary
        self.spec = spec
        self._stderr_path = workdir / f"{name}.stderr"
        console_path = workdir / f"{name}.console"
        console_path.write_text(said, "ascii", newline="")
        self._console = Console(console_path)
        self._is_source = incoming is None
        self._qmp: QmpConnection | None = None
        # A socket pair has no path that could be too long, and is connected at once.
        ours, theirs = socket.socketpair()
        with theirs, self._stderr_path.open("wb") as stderr:
            arguments = self._arguments(console_path, theirs.fileno(), incoming)
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(*pass_fds, theirs.fileno()),
                env=binary.environment(),
            )
        try:
            self._qmp = QmpConnection(ours)
        except QmpConnectionError as error:
            message = self._death() or str(error)
            self.close()
            raise SelftestError(message) from error

    def _arguments(self, console: Path, qmp_fd: int, incoming: str | None) -> list[str]:
        # Options separate their parts with commas; a doubled comma stands for one.
        console_option = str(console).replace(",", ",,")
        arguments = [str(self.binary.path), *self.binary.args]
        arguments += ["-name", self.name.replace(",", ",,"), "-accel", "tcg"]
        # Otherwise the default devices: a stock guest has them, so their state migrates too.
        arguments += ["-no-user-config", "-display", "none", "-monitor", "none", "-net", "none"]
        # The guest's panic then ends the process, which every wait notices.
        arguments += ["-no-reboot"]
        arguments += ["-chardev", f"file,id=console,append=on,path={console_option}"]
        arguments += ["-serial", "chardev:console"]
        arguments += ["-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "qmp,mode=control"]
        arguments += self.spec.arguments()
        return arguments if incoming is None else [*arguments, "-incoming", incoming]

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; never raises."""
        with contextlib.suppress(Exception):
            self._process.kill()
        with contextlib.suppress(Exception):
            self._process.wait(30)
        if self._qmp is not None:
            with contextlib.suppress(Exception):
                self._qmp.close()

    # The process

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process, or None while it runs."""
        return self._process.poll()

    @property
    def stderr(self) -> str:
        """What QEMU has complained about."""
        return self._stderr_path.read_text(errors="replace")

    def wait_exit(self, timeout: float = 60) -> int:
        """Wait for the process to end by itself; return its exit code."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SelftestError(f"{self.name} did not exit within {timeout} seconds") from None

    def _death(self) -> str | None:
        """Say how the process died; None while it lives."""
        # A connection breaks a moment before the process can be reaped.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        if self.exit_code is None:
            return None
        said = self.stderr.strip() or "nothing on stderr"
        return f"{self.name} exited with {self.exit_code}: {said} (console: {self._last_words()})"

    def _last_words(self) -> str:
        lines = self.lines()
        # The stack traces of a kernel's panic would hide what matters.
        return " | ".join([x for x in lines if _TROUBLE.search(x)][:6] or lines[-3:]) or "nothing"

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if self.exit_code is not None:
                # What it waited for may have come just before the end.
                if done():
                    return
                raise SelftestError(f"waiting for {what}: {self._death()}")
            if time.monotonic() > deadline:
                raise SelftestError(
                    f"{self.name}: no {what} within {timeout} seconds "
                    f"(console: {self._last_words()})"
                )
            time.sleep(_POLL_INTERVAL)

    # QMP

    def command(self, name: str, /, **args: object) -> Any:
        """Run a QMP command; underscores in argument names stand for dashes."""
        return self._execute(name, args)

    def _execute(self, name: str, args: Mapping[str, object], fd: int | None = None) -> Any:
        if self._qmp is None:
            raise SelftestError(f"{self.name} has no QMP connection")
        if name == "migrate":
            self._is_source = True
        arguments = {key.replace("_", "-"): value for key, value in args.items()}
        try:
            return self._qmp.execute(name, arguments, fd=fd)
        except QmpConnectionError as error:
            raise SelftestError(f"{name}: {self._death() or error}") from error

    def events(self) -> list[dict[str, object]]:
        """Return the QMP events so far."""
        return [] if self._qmp is None else self._qmp.events()

    def get_fd(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a file descriptor, for URIs such as `fd:NAME`."""
        self._execute("getfd", {"fdname": name}, fd)

    def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        """Switch migration capabilities, before `migrate` or `migrate_incoming`."""
        states = [
            {"capability": name.replace("_", "-"), "state": state}
            for name, state in capabilities.items()
        ]
        self.command("migrate-set-capabilities", capabilities=states)

    def set_parameters(self, parameters: Mapping[str, object]) -> None:
        """Set migration parameters."""
        self._execute("migrate-set-parameters", parameters)

    def status(self) -> str:
        """Return the state of the machine, such as `running` or `inmigrate`."""
        return str(self.command("query-status")["status"])

    def wait_status(self, status: str, timeout: float = 60) -> None:
        """Wait for the machine to be in a state."""
        self._wait(lambda: self.status() == status, timeout, f"status {status}")

    # Migration

    def migrate(self, uri: str) -> None:
        """Start an outgoing migration."""
        self.command("migrate", uri=uri)

    def migrate_incoming(self, uri: str) -> None:
        """Start listening, in a process started with incoming='defer'."""
        self.command("migrate-incoming", uri=uri)

    def query_migrate(self) -> dict[str, Any]:
        """Return what QEMU says about the migration."""
        return dict(self.command("query-migrate"))

    def wait_migration(
        self, timeout: float = 60, until: Sequence[str] = ("completed", "failed", "cancelled")
    ) -> dict[str, Any]:
        """Wait for the migration to reach one of the states; return what QEMU says about it."""
        info: dict[str, Any] = {}

        def reached() -> bool:
            info.clear()
            info.update(self.query_migrate())
            return info.get("status") in until

        self._wait(reached, timeout, f"migration {' or '.join(until)}")
        # Only the source ever reports the times.
        if self._is_source and info["status"] == "completed":
            self._wait(lambda: reached() and "downtime" in info, _TOTALS_TIMEOUT, "migration times")
        return info

    # The guest

    def console(self) -> str:
        """Return all console output so far, as it came; see `check_ticks`."""
        return self._console.text()

    def lines(self) -> list[str]:
        """Return the finished lines of console output so far."""
        return self._console.lines()

    def ticks(self) -> list[Tick]:
        """Return the ticks that the guest reported in this process."""
        return parse_ticks(self.console())

    def slow_touches(self) -> list[int]:
        """Return the microseconds of touches that had to wait, in touch mode, in this process."""
        return slow_touches(self.console())

    def bad_pages(self) -> int:
        """Return how many corrupt pages the guest has found."""
        ticks = self.ticks()
        return ticks[-1].bad if ticks else 0

    def wait_ready(self, timeout: float = 120) -> None:
        """Wait until the guest has filled its memory."""
        self._wait(lambda: READY in self.lines(), timeout, "guest that is ready")

    def wait_ticks(
        self, count: int, timeout: float = 60, *, from_start: bool = False
    ) -> list[Tick]:
        """Wait for `count` ticks from now on, or since the process started; return them."""
        seen = 0 if from_start else len(self.ticks())
        self._wait(lambda: len(self.ticks()) >= seen + count, timeout, f"{count} ticks")
        return self.ticks()[seen:]


def _version(program: Path) -> tuple[int, int, int]:
    said = run([str(program), "--version"], f"running {program}")
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        raise SelftestError(f"{program} does not look like QEMU: {said.strip()!r}")
    return int(match[1]), int(match[2]), int(match[3])
