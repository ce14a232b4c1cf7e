"""``mig selftest``."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

from mig.cli.common import info_as_dict, json_option, print_json, reports_errors, sized, summary
from mig.selftest.job import Selftest
from mig.selftest.kernel import find_kernel
from mig.selftest.qemu import QemuBinary


@click.command()
@click.option("--qemu", metavar="PATH", help="QEMU to use; default: qemu-system-x86_64.")
@click.option("--kernel", metavar="PATH", help="Linux kernel of the guest; default: found.")
@click.option("--machine", default="pc", show_default=True, help="Machine type of the guest.")
@click.option(
    "--memory", default=128, show_default=True, help="Memory of the guest in MiB, 64 at least."
)
@json_option
@reports_errors
def selftest(
    qemu: str | None, kernel: str | None, machine: str, memory: int, as_json: bool
) -> None:
    """Run the main job on this machine.

    A small Linux guest, which writes and checks its own memory, is started in the installed QEMU,
    received live into a file, looked at, sent to a second QEMU, and must go on there intact.

    Needs qemu-system-x86_64, and a Linux kernel: --kernel, one in /boot, or (on Debian) one that
    is fetched with apt-get into the cache directory, without root.
    """
    if memory < 64:
        raise click.UsageError("the guest needs 64 MiB of memory at least")
    binary = _binary(qemu)
    progress = _Steps()
    progress.step("find a kernel")
    found = find_kernel(kernel)
    with tempfile.TemporaryDirectory(prefix="mig-selftest-") as folder:
        job = Selftest(
            binary,
            found,
            Path(folder),
            machine=machine,
            memory_mib=memory,
            on_step=progress.step,
        )
        report = job.run()
    progress.done()
    if as_json:
        print_json(
            {
                "status": "completed",
                "qemu": report.qemu,
                "machine": report.machine,
                "guest": report.mode,
                "memory-nbytes": report.memory_nbytes,
                "file-nbytes": report.file_nbytes,
                "devices": report.devices,
                "receive": info_as_dict(report.receive),
                "send": info_as_dict(report.send),
                "ticks-before": report.ticks_before,
                "ticks-after": report.ticks_after,
                "pages-checked": report.pages_checked,
                "pages-bad": 0,
            }
        )
        return
    click.echo(f"machine   {report.machine}, {sized(report.memory_nbytes)}, QEMU {report.qemu}")
    click.echo(f"file      {sized(report.file_nbytes)}, {report.devices} devices")
    click.echo(f"received  {summary(report.receive)}")
    click.echo(f"sent      {summary(report.send)}")
    click.echo(
        f"guest     ticked {report.ticks_before} times before and {report.ticks_after} after, "
        f"checked {report.pages_checked} pages of its memory, none was bad"
    )
    click.echo("selftest passed")


def _binary(path: str | None) -> QemuBinary:
    if path is None:
        return QemuBinary.installed()
    return QemuBinary.unpacked(Path(path)) if Path(path).is_dir() else QemuBinary.at(Path(path))


class _Steps:
    """Names each step as it begins, and how long it took as it ends; on standard error."""

    def __init__(self) -> None:
        self._began = 0.0
        self._text = ""

    def step(self, text: str) -> None:
        self.done()
        self._began, self._text = time.monotonic(), text
        if sys.stderr.isatty():
            click.echo(f"   …    {text}\r", nl=False, err=True)

    def done(self) -> None:
        if self._text:
            click.echo(f"{time.monotonic() - self._began:6.2f} s {self._text}", err=True)
        self._text = ""
