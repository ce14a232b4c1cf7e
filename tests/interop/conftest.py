"""Real QEMUs and a Linux guest. What is missing is fetched, or the tests fail and say how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interop.kept import KeptBoots
from workers import shared_folder

from mig.selftest.console import check_ticks
from mig.selftest.initramfs import write_initramfs
from mig.selftest.kernel import find_kernel
from mig.selftest.packages import fetch_qemu_backport
from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary

#: milliseconds: short, so that no test has to wait long for the guest
TICK_MS, SWEEP_MS = 100, 500
LISTENING = re.compile(r"mig: listening on (\S+)")


@pytest.fixture(scope="session")
def qemus() -> dict[str, QemuBinary]:
    """The QEMUs by the name that the tests use."""
    backport = os.environ.get("MIG_QEMU_10")
    root = Path(backport) if backport else fetch_qemu_backport()
    return {"7.2": QemuBinary.installed(), "10.0": QemuBinary.unpacked(root)}


@pytest.fixture(scope="session")
def kernel() -> Path:
    return find_kernel()


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_initramfs(tmp_path_factory.mktemp("guest") / "initrd")


@pytest.fixture(scope="session")
def kept_boots(tmp_path_factory: pytest.TempPathFactory) -> KeptBoots:
    return KeptBoots(shared_folder(tmp_path_factory, "kept-boots"))


class Mig:
    """One ``mig`` command in a process of its own."""

    def __init__(self, *args: str, pass_fds: Sequence[int] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mig", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=tuple(pass_fds),
        )
        self.stderr = ""

    def wait_listening(self) -> str:
        """Return the URI that it listens on."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line
            if match := LISTENING.match(line):
                return match[1]
        raise AssertionError(f"mig ended: {self.stderr}")

    def finish(self, timeout: float = 60) -> int:
        """Wait for the end; returns the exit status, output is in stdout and stderr."""
        self.stdout, rest = self.process.communicate(timeout=timeout)
        self.stderr += rest
        return self.process.returncode

    def result(self) -> dict[str, Any]:
        """Wait for success; return the JSON object on the last line."""
        assert self.finish() == 0, self.stderr
        result: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Lab:
    """Starts QEMUs and mig commands that end with the test."""

    folder: Path
    stack: ExitStack
    qemus: dict[str, QemuBinary]
    kernel: Path
    initrd: Path
    kept_boots: KeptBoots
    count: int = 0

    def spec(self, machine: str, mode: str = "idle", **options: Any) -> GuestSpec:
        timing = {"tick_ms": TICK_MS, "sweep_ms": SWEEP_MS}
        return GuestSpec(self.kernel, self.initrd, machine=machine, mode=mode, **timing | options)

    def boot(self, version: str, spec: GuestSpec, *, fresh: bool = False) -> Qemu:
        """Return a QEMU whose guest is up and ticking.

        It goes on from a file, in which the first one that booted this machine was saved.

        fresh: it is booted here: for machines that are in no other test, and where it matters
               that it has never been migrated or that its memory is a file
        """
        if fresh:
            qemu = self.start(version, spec)
            qemu.wait_ready()
            qemu.wait_ticks(3)
            return qemu
        kept = self.kept_boots.get(version, spec, lambda: self.start(version, spec))
        uri = f"exec:cat {kept.stream}"
        qemu = self.start(version, spec, incoming=uri, said=kept.console)
        qemu.wait_status("paused")
        qemu.command("cont")
        qemu.wait_ticks(1)
        return qemu

    def incoming(self, version: str, spec: GuestSpec, uri: str = "defer", **options: Any) -> Qemu:
        """Return a QEMU that waits for a migration."""
        return self.start(version, spec, incoming=uri, **options)

    def start(self, version: str, spec: GuestSpec, **options: Any) -> Qemu:
        """Return a QEMU that has just been started."""
        self.count += 1
        name = f"vm{self.count}"
        return self.stack.enter_context(
            Qemu(self.qemus[version], spec, self.folder, name=name, **options)
        )

    def mig(self, *args: str, pass_fds: Sequence[int] = ()) -> Mig:
        command = Mig(*args, pass_fds=pass_fds)
        self.stack.callback(command.kill)
        return command

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def receive(
        self,
        source: Qemu,
        file: str,
        uri: str,
        *,
        return_path: bool,
        options: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Migrate a running guest to ``mig receive``; returns what that prints."""
        command = self.mig("receive", uri, file, "--json", *options)
        migrate(source, command.wait_listening(), return_path=return_path)
        result = command.result()
        assert source.wait_migration()["status"] == "completed"
        assert source.status() == "postmigrate"
        return result


def migrate(source: Qemu, uri: str, *, return_path: bool = False) -> None:
    source.set_capabilities({"return-path": return_path})
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(uri)


def goes_on(source: Qemu, destination: Qemu, ticks: int = 6) -> None:
    """The guest runs where it was stopped: no tick missing or twice, no bad page.

    It has looked at each page that it filled.
    """
    destination.wait_status("running")
    destination.wait_ticks(ticks)
    filled = destination.spec.fill_mib << 8
    while True:
        looked_at = check_ticks(source.console(), destination.console())[-1].checked
        if looked_at - source.ticks()[-1].checked >= filled:
            return
        destination.wait_ticks(1)


@pytest.fixture
def lab(
    tmp_path: Path,
    qemus: dict[str, QemuBinary],
    kernel: Path,
    initrd: Path,
    kept_boots: KeptBoots,
) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(tmp_path, stack, qemus, kernel, initrd, kept_boots)


@pytest.fixture(scope="module")
def module_lab(
    tmp_path_factory: pytest.TempPathFactory,
    qemus: dict[str, QemuBinary],
    kernel: Path,
    initrd: Path,
    kept_boots: KeptBoots,
) -> Iterator[Lab]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("module")
        yield Lab(folder, stack, qemus, kernel, initrd, kept_boots)


@pytest.fixture
def start_migration() -> Callable[..., None]:
    return migrate


@pytest.fixture
def assert_goes_on() -> Callable[..., None]:
    return goes_on
