"""What the commands share: options, errors, progress, JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import click

from mig.engine import OutgoingMigration
from mig.engine.migration import Migration
from mig.errors import MigError, OptionError, StateError
from mig.options import Capability
from mig.stats import MigrationInfo

P = ParamSpec("P")
R = TypeVar("R")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of output."
)
capability_option = click.option(
    "-c",
    "--capability",
    "capabilities",
    multiple=True,
    metavar="NAME[=on|off]",
    help="Switch a capability on or off; QMP's names. May repeat.",
)
parameter_option = click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a parameter; QMP's names (max-bandwidth in bytes/s or with suffix k, M, G, 0: no "
    "limit) and idle-timeout in seconds, 0: wait for ever. May repeat.",
)


def parse_capabilities(values: tuple[str, ...]) -> dict[str, bool]:
    """Return on/off by name; click.UsageError for what is neither."""
    out = {}
    for value in values:
        name, equals, state = value.partition("=")
        if equals and state not in ("on", "off"):
            raise click.UsageError(f"capability {value!r}: say {name}=on or {name}=off")
        if name not in set(Capability):
            raise click.UsageError(f"there is no capability '{name}'")
        out[name] = state != "off"
    return out


def parse_parameters(values: tuple[str, ...]) -> dict[str, str]:
    """Return values by name; click.UsageError for what is no NAME=VALUE."""
    out = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise click.UsageError(f"parameter {value!r}: say NAME=VALUE")
        out[name] = text
    return out


def reports_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Make a command end as the design says: one line on standard error, status 1 (usage: 2)."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OptionError as error:
            raise click.UsageError(str(error)) from error
        except (MigError, OSError) as error:
            if kwargs.get("as_json"):
                print_json({"status": "failed", "error": str(error), "kind": type(error).__name__})
            click.echo(f"mig: {' '.join(str(error).split())}", err=True)
            raise SystemExit(1) from error

    return wrapper


def print_json(data: dict[str, Any]) -> None:
    """Print one line of JSON on standard output."""
    click.echo(json.dumps(data))


def say(text: str) -> None:
    """Tell the person at the terminal something; standard output is kept for results."""
    click.echo(f"mig: {text}", err=True)


@contextmanager
def cancelled_by_signals(*migrations: Migration) -> Iterator[None]:
    """SIGINT and SIGTERM cancel the migrations instead of killing the process midway.

    In postcopy a source is given up: the destination is then paused until somebody resumes it. A
    destination would lose half of the guest: only the second signal ends its process.
    """
    warned = False

    def cancel(number: int, frame: FrameType | None) -> None:
        nonlocal warned
        for migration in migrations:
            try:
                migration.cancel()
            except StateError as error:
                if isinstance(migration, OutgoingMigration):
                    # it may have ended meanwhile
                    with contextlib.suppress(StateError):
                        migration.abandon()
                    continue
                if warned:
                    raise
                warned = True
                say(f"{error}; once more to lose the guest")

    old = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def follow(migration: Migration) -> MigrationInfo:
    """Wait for the end, with a progress bar on a terminal; raises the migration's error."""
    follow_all([migration])
    migration.wait()
    return migration.query()


def follow_all(migrations: Sequence[Migration]) -> None:
    """Wait for the end of all, whatever it is, with progress bars on a terminal."""
    with cancelled_by_signals(*migrations):
        if sys.stderr.isatty():
            # it takes as long to load as all of mig
            from mig.cli.progress import show_progress

            show_progress(migrations, _wait_for_all)
        else:
            # in slices only so that Python runs the signal handlers
            _wait_for_all(migrations, 1.0)


def _wait_for_all(
    migrations: Sequence[Migration],
    seconds: float,
    show: Callable[[Migration], None] = lambda _: None,
) -> None:
    """Wait in slices of so many seconds; ``show`` is called for each migration in each of them."""
    waiting = list(migrations)
    while waiting:
        _has_ended(waiting[0], seconds)
        for migration in list(waiting):
            if _has_ended(migration, 0):
                waiting.remove(migration)
            else:
                _look_at_breaks(migration)
            show(migration)


def _has_ended(migration: Migration, seconds: float) -> bool:
    try:
        return migration.wait(seconds)
    except MigError:
        return True


def _look_at_breaks(migration: Migration) -> None:
    """A command does not wait for another URI: who resumes it gives one."""
    if isinstance(migration, OutgoingMigration) and migration.waits_for_owner:
        with contextlib.suppress(StateError):
            migration.abandon()


def info_as_dict(info: MigrationInfo) -> dict[str, Any]:
    """Return what query-migrate says of a source; for a destination, too, which has counted."""
    return replace(info, incoming=False).to_qmp()


def sized(nbytes: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def summary(info: MigrationInfo) -> str:
    """Return one line about a migration that is over."""
    parts = [f"{sized(info.ram.transferred)} in {info.total_time or 0:.2f} s"]
    if info.throughput:
        parts.append(f"{sized(info.throughput)}/s")
    parts.append(f"{info.ram.normal} pages, {info.ram.duplicate} zero")
    return ", ".join(parts)
