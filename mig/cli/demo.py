"""``mig demo``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from mig.cli.common import (
    cancelled_by_signals,
    capability_option,
    info_as_dict,
    json_option,
    parameter_option,
    parse_capabilities,
    parse_parameters,
    print_json,
    reports_errors,
    say,
    sized,
)
from mig.demo.guests import GUESTS, LOGS, Options, best_log
from mig.demo.job import Demo, DemoReport, PostcopyReport
from mig.engine import OutgoingMigration, Patient
from mig.errors import KvmUnavailableError
from mig.options import Capability, kinds
from mig.stats import MigrationInfo
from mig.wire import DEFAULT_PAGE_BITS

_PAGE = 1 << DEFAULT_PAGE_BITS
_SIZES = kinds.Size(0, 1 << 62)


class _Size(click.ParamType):  # type: ignore[type-arg]  # click is generic since 8.3 only
    """Bytes, with QEMU's suffixes."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            return _SIZES.read("size", value)
        except ValueError:
            self.fail(f"{value!r} is no size, as 65536, 512M and 1.5G are", param, ctx)


@click.command()
@click.option(
    "--guest",
    type=click.Choice(GUESTS),
    default="process",
    show_default=True,
    help="Threads of this process, or a small virtual machine of /dev/kvm.",
)
@click.option("--memory", type=_Size(), default="512M", show_default=True, help="Of the guest.")
@click.option(
    "--dirty-rate",
    type=_Size(),
    default="50M",
    show_default=True,
    help="Memory that the guest dirties per second; 0: as fast as it can, as kvm always does.",
)
@click.option("--workers", default=1, show_default=True, help="Threads that write: its vCPUs.")
@click.option(
    "--pattern",
    type=click.Choice(["full", "words", "sequential", "hot"]),
    default="full",
    show_default=True,
    help="What is written: whole pages in random order, some words of them, whole pages in order, "
    "or mostly a hot spot.",
)
@click.option(
    "--working-set",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    help="Share of the memory that is written.",
)
@click.option(
    "--dirty-log",
    type=click.Choice(LOGS),
    help="Who notes writes: the kernel (tracked) or the guest itself (marked); default: the kernel "
    "where it can.",
)
@click.option(
    "--patient",
    is_flag=True,
    help="Stop the guest when it stands still for as short as can be, not as soon as parameter "
    "downtime-limit allows.",
)
@click.option(
    "--postcopy",
    is_flag=True,
    help="Let the guest run at the other end at once; its memory follows as it touches it.",
)
@capability_option
@parameter_option
@json_option
@reports_errors
def demo(
    guest: str,
    memory: int,
    dirty_rate: int,
    workers: int,
    pattern: str,
    working_set: float,
    dirty_log: str | None,
    patient: bool,
    postcopy: bool,
    capabilities: tuple[str, ...],
    parameters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Move a running guest live to another process, and check that all of it arrived.

    The guest writes its memory, and checks what it wrote; it goes on until the switchover, and then
    in the other process. In the end all of its memory is checked in both.

    With --postcopy it tells how long the guest waited for its memory.

    Capability return-path is on, and parameter max-bandwidth 0 (no limit), unless given.
    """
    chosen = {"return-path": True, **parse_capabilities(capabilities)}
    if postcopy:
        chosen[Capability.POSTCOPY_RAM] = True
    of_kvm = "ring" if chosen.get("dirty-limit") else "kvm"
    log, reason = (of_kvm, None) if guest == "kvm" else best_log(dirty_log)
    if reason is not None:
        say(f"writes are {log}: {reason}")
    options = Options(
        guest=guest,
        nbytes=max(_PAGE, memory // _PAGE * _PAGE),
        rate=dirty_rate,
        workers=workers,
        pattern=pattern,
        working_set=working_set,
        log=log,
    )
    display = _Display()
    try:
        job = Demo(
            options,
            capabilities=chosen,
            parameters={"max-bandwidth": 0, **parse_parameters(parameters)},
            on_start=display.shown_for,
            on_look=display.show,
            policy=Patient if patient else None,
            postcopy=postcopy,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except KvmUnavailableError as error:
        raise KvmUnavailableError(f"{error} (--guest process needs no KVM)") from error
    report = job.run()
    if as_json:
        print_json(_as_dict(report))
    else:
        _print(report)


class _Display:
    """How the migration stands, on a terminal."""

    def __init__(self) -> None:
        self._live: Live | None = None

    @contextmanager
    def shown_for(self, migration: OutgoingMigration) -> Iterator[None]:
        """Show it while it runs; signals cancel it."""
        with cancelled_by_signals(migration):
            if not sys.stderr.isatty():
                yield
                return
            with Live(console=Console(stderr=True), transient=True) as self._live:
                yield

    def show(self, info: MigrationInfo) -> None:
        """Draw it again."""
        if self._live is not None:
            self._live.update(_table(info))


def _table(info: MigrationInfo) -> Table:
    ram = info.ram
    table = Table.grid(padding=(0, 2))
    expected = info.expected_downtime
    dirty = (ram.dirty_pages_rate or 0) * ram.page_size
    rows = {
        "status": str(info.status),
        "iteration": str(ram.dirty_sync_count or 0),
        "remaining": f"{sized(ram.remaining or 0)} of {sized(ram.total)}",
        "dirty rate": f"{sized(dirty)}/s",
        "throughput": f"{sized(ram.bandwidth or 0)}/s",
        "expected downtime": "?" if expected is None else f"{expected * 1000:.0f} ms",
        "throttle": _throttle(info),
    }
    if ram.postcopy_requests:
        rows["asked for"] = f"{ram.postcopy_requests} pages"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _throttle(info: MigrationInfo) -> str:
    """How far the guest is slowed down, by auto-converge or by dirty-limit."""
    per_round = info.dirty_limit_throttle_time_per_round
    if per_round is None:
        return f"{info.cpu_throttle_percentage or 0} %"
    return f"{_milliseconds(per_round)} for each dirty ring of a vCPU"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds * 1000:.1f} ms" if seconds >= 0.001 else f"{seconds * 1e6:.0f} us"


def _print(report: DemoReport) -> None:
    info, ram, there = report.info, report.info.ram, report.destination
    options = report.options
    rate = f"{sized(options.rate)}/s" if options.rate else "as fast as it can"
    how = "vCPUs of KVM" if options.guest == "kvm" else f"{rate}, {options.pattern}"
    click.echo(f"guest       {sized(ram.total)} of memory; dirties it: {how}; log: {options.log}")
    click.echo(
        f"migration   {info.total_time or 0:.2f} s, {sized(ram.transferred)}, "
        f"{sized(info.throughput or 0)}/s, {ram.dirty_sync_count} iterations"
    )
    click.echo(f"pages       {ram.normal} whole, {ram.duplicate} zero")
    click.echo(
        f"downtime    {_milliseconds(report.guest_downtime)} as the guest saw it, "
        f"{_milliseconds(info.downtime)} by the engine's clock"
    )
    if report.postcopy is not None:
        _print_postcopy(report.postcopy)
    click.echo(
        f"verified    {there['npages']} pages at either end, none is corrupt; "
        f"{report.source['writes']} writes before, {there['writes']} after"
    )


def _print_postcopy(postcopy: PostcopyReport) -> None:
    click.echo(
        f"postcopy    it ran at the destination after {_milliseconds(postcopy.time_to_run)}; "
        f"{postcopy.requests} pages were asked for"
    )
    if postcopy.faults:
        each = ", ".join(_milliseconds(seconds) for seconds in postcopy.vcpus)
        click.echo(
            f"waits       {postcopy.faults}, for {_milliseconds(postcopy.p50)} (p50) and "
            f"{_milliseconds(postcopy.p99)} (p99); each vCPU for {each}, all together for "
            f"{_milliseconds(postcopy.blocktime)}"
        )


def _postcopy_as_dict(postcopy: PostcopyReport) -> dict[str, object]:
    return {name.replace("_", "-"): value for name, value in asdict(postcopy).items()}


def _as_dict(report: DemoReport) -> dict[str, object]:
    return {
        "status": "completed",
        "memory-nbytes": report.options.nbytes,
        "dirty-log": report.options.log,
        "guest-downtime": report.guest_downtime,
        "postcopy": _postcopy_as_dict(report.postcopy) if report.postcopy else None,
        "migration": info_as_dict(report.info),
        "source": report.source,
        "destination": report.destination,
    }
