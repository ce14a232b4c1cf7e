"""The main job, end to end: QEMU → mig → file → mig → QEMU, with a guest that checks itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mig.engine import IncomingMigration, OutgoingMigration
from mig.image import StreamCapture, open_image
from mig.selftest.console import check_ticks
from mig.selftest.errors import SelftestError
from mig.selftest.initramfs import write_initramfs
from mig.selftest.qemu import GuestSpec, Qemu, QemuBinary
from mig.stats import MigrationInfo

#: QEMU before this loses pages of a guest that writes while it is migrated under TCG
_TRUSTED_SOURCE = (8, 0, 0)
_TICKS_BEFORE = 5
_TICKS_AFTER = 15


@dataclass(frozen=True, slots=True)
class SelftestReport:
    """What happened; times in seconds."""

    qemu: str
    machine: str
    mode: str
    memory_nbytes: int
    file_nbytes: int
    devices: int
    receive: MigrationInfo
    send: MigrationInfo
    ticks_before: int
    ticks_after: int
    pages_checked: int


class Selftest:
    """One run of the main job.

    on_step: called with a short text when a step begins
    """

    def __init__(
        self,
        binary: QemuBinary,
        kernel: Path,
        workdir: Path,
        *,
        machine: str = "pc",
        memory_mib: int = 128,
        on_step: Callable[[str], None] = lambda text: None,
    ) -> None:
        mode: Any = "dirty" if binary.version >= _TRUSTED_SOURCE else "idle"
        self._binary = binary
        self._workdir = workdir
        self._step = on_step
        self._file = workdir / "vm.mig"
        self._spec = GuestSpec(
            kernel=kernel,
            initrd=write_initramfs(workdir / "initrd"),
            memory_mib=memory_mib,
            fill_mib=memory_mib // 4,
            mode=mode,
            machine=machine,
        )

    def run(self) -> SelftestReport:
        """Run all steps; SelftestError or MigError says which part went wrong."""
        version = ".".join(map(str, self._binary.version))
        self._step(
            f"boot a Linux guest ({self._spec.mode}) in QEMU {version}, {self._spec.machine}"
        )
        with self._qemu("source") as source:
            source.wait_ready()
            source.wait_ticks(_TICKS_BEFORE)
            received = self._receive(source)
            self._step("look into the file")
            machine, file_nbytes, devices = self._look()
            with self._qemu("destination", incoming="defer") as destination:
                sent = self._send(destination)
                self._step("let the guest go on and check its memory")
                destination.wait_ticks(_TICKS_AFTER)
                ticks = check_ticks(source.console(), destination.console())
                before = len(source.ticks())
        return SelftestReport(
            qemu=version,
            machine=machine,
            mode=self._spec.mode,
            memory_nbytes=self._spec.memory_bytes,
            file_nbytes=file_nbytes,
            devices=devices,
            receive=received,
            send=sent,
            ticks_before=before,
            ticks_after=len(ticks) - before,
            pages_checked=ticks[-1].checked,
        )

    @contextmanager
    def _qemu(self, name: str, incoming: str | None = None) -> Iterator[Qemu]:
        with Qemu(self._binary, self._spec, self._workdir, incoming=incoming, name=name) as qemu:
            yield qemu

    def _receive(self, source: Qemu) -> MigrationInfo:
        self._step("receive it live into a file")
        incoming = IncomingMigration(StreamCapture(self._file))
        incoming.listen(f"unix:{self._workdir / 'receive'}")
        source.set_capabilities({"return-path": True})
        source.set_parameters({"max-bandwidth": 0})
        assert incoming.uri is not None
        source.migrate(incoming.uri)
        incoming.wait()
        status = source.wait_migration()["status"]
        if status != "completed":
            raise SelftestError(f"QEMU says that the migration to mig has {status}")
        return incoming.query()

    def _look(self) -> tuple[str, int, int]:
        with open_image(self._file) as image:
            return image.machine or "unnamed", image.nbytes, len(image.devices or ())

    def _send(self, destination: Qemu) -> MigrationInfo:
        self._step("send the file to a second QEMU")
        uri = f"unix:{self._workdir / 'send'}"
        destination.migrate_incoming(uri)
        with open_image(self._file) as image:
            outgoing = OutgoingMigration(
                image, capabilities={"return-path"}, parameters={"max-bandwidth": 0}
            )
            outgoing.start(uri)
            outgoing.wait()
        status = destination.wait_migration()["status"]
        if status != "completed":
            raise SelftestError(f"QEMU says that the migration from mig has {status}")
        destination.wait_status("running")
        return outgoing.query()
