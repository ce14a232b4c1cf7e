"""``mig send``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from mig.channel import carries_return_path, parse_uri
from mig.cli.common import (
    capability_option,
    follow_all,
    info_as_dict,
    json_option,
    parameter_option,
    parse_capabilities,
    parse_parameters,
    print_json,
    reports_errors,
    say,
    summary,
)
from mig.engine import OutgoingMigration, Retry, restore
from mig.errors import MigError, StateError
from mig.image import Image, OrderFile, open_image
from mig.options import Capability

#: seconds; Python's own are 25 times as many
_SWITCH_INTERVAL = 0.0002


@click.command()
@click.argument("file")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@capability_option
@parameter_option
@click.option(
    "--postcopy",
    is_flag=True,
    help="Let the guest run at the destination at once, and send its memory as it is needed.",
)
@click.option(
    "--background",
    metavar="off|BANDWIDTH",
    help="With --postcopy: how fast to send memory that nobody waits for (bytes/s, suffix k, M, G; "
    "0: no limit), or not at all. As parameter max-postcopy-bandwidth.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="With --postcopy: go on where another `mig send --postcopy` of FILE has left the "
    "destination paused; URI is where that waits now (QMP command migrate-recover).",
)
@click.option(
    "--retry",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="With --postcopy: when the connection breaks, try for so long to go on at URI before the "
    "command ends; it can be where another migrate-recover has the destination wait.",
)
@click.option(
    "--order",
    metavar="off|PATH",
    help="With --postcopy: begin with the pages that earlier restores have waited for, as PATH "
    "says (default: FILE.order, if it is there), or not.",
)
@click.option(
    "--record-order",
    is_flag=True,
    help="With --postcopy: write that file, or make it better by what is asked for now.",
)
@json_option
@reports_errors
def send(
    file: str,
    uris: tuple[str, ...],
    capabilities: tuple[str, ...],
    parameters: tuple[str, ...],
    postcopy: bool,
    background: str | None,
    resume: bool,
    retry: float | None,
    order: str | None,
    record_order: bool,
    as_json: bool,
) -> None:
    """Be the source of a migration; send the VM in FILE.

    FILE was written by `mig receive` or by QEMU itself (migrate to exec: or file:, also with
    mapped-ram); it may be given as file:PATH,offset=N.

    With -c mapped-ram URI is a file (file:PATH[,offset=N]) that is written in that format.

    Capability return-path is on where the connection allows it: then success means that the
    destination has loaded everything. Capability x-ignore-shared is on for a FILE that was
    received with it: the destination must have the memory that is not in FILE.

    With --postcopy the destination needs capability postcopy-ram. FILE must stay where it is until
    the command ends. If the connection breaks, or the command is ended before, the guest stands
    still wherever it needs memory that it has not got, until somebody resumes it.

    Several URIs are as many guests that come from FILE at the same time.

    Parameter max-bandwidth is 0 (no limit) unless given: no guest runs here that would have to be
    spared.
    """
    wanted = parse_capabilities(capabilities)
    values = {"max-bandwidth": "0", **parse_parameters(parameters)}
    given = (resume, record_order, *(x is not None for x in (background, order, retry)))
    if not postcopy and any(given):
        raise click.UsageError(
            "--background, --resume, --order, --record-order and --retry belong to --postcopy"
        )
    if background not in (None, "off"):
        values["max-postcopy-bandwidth"] = background
    _check(wanted)
    with open_image(file) as image:
        if image.ignores_shared:
            wanted.setdefault(Capability.X_IGNORE_SHARED, True)
        orders = _open_order(image, order, record=record_order) if postcopy else None

        def start(uri: str) -> OutgoingMigration:
            if orders is not None:
                return restore(
                    image,
                    uri,
                    resume=resume,
                    background=background != "off",
                    order=orders,
                    capabilities=wanted,
                    recovery=None if retry is None else Retry(within=retry),
                    parameters=values,
                )
            mine = {Capability.RETURN_PATH: carries_return_path(parse_uri(uri)), **wanted}
            migration = OutgoingMigration(image, capabilities=mine, parameters=values)
            migration.start(uri)
            return migration

        if postcopy:
            # A page that a guest waits for is asked for in one thread while another sends: a thread
            # that wants Python's lock asks for it only after this time.
            sys.setswitchinterval(_SWITCH_INTERVAL)
        ends = _send_to_all(uris, start)
    _report(uris, ends, as_json=as_json)


def _check(wanted: Mapping[str, bool]) -> None:
    if wanted.get(Capability.PAUSE_BEFORE_SWITCHOVER):
        raise click.UsageError(
            "capability 'pause-before-switchover': nobody can say migrate-continue to this command"
        )


def _open_order(image: Image, order: str | None, *, record: bool) -> OrderFile:
    path = None if order in (None, "off") else Path(order or "")
    return OrderFile(image, path, use=order != "off", record=record, warn=say)


def _send_to_all(
    uris: Sequence[str], start: Callable[[str], OutgoingMigration]
) -> list[OutgoingMigration]:
    """Start all migrations, and wait for their end; raises when one could not be started."""
    for uri in uris:
        parse_uri(uri)
    started: list[OutgoingMigration] = []
    try:
        for uri in uris:
            started.append(start(uri))
    except BaseException:
        for migration in started:
            with contextlib.suppress(StateError):
                migration.cancel()
                continue
            with contextlib.suppress(StateError):
                migration.abandon()
        follow_all(started)
        raise
    follow_all(started)
    return started


def _report(uris: Sequence[str], migrations: Sequence[OutgoingMigration], *, as_json: bool) -> None:
    """Print what has become of each; raises the error of the only one, SystemExit for others."""
    if len(migrations) == 1:
        migrations[0].wait()
    failed: list[tuple[str, MigError]] = []
    reports: list[dict[str, object]] = []
    for uri, migration in zip(uris, migrations, strict=True):
        info = migration.query()
        reports.append({**info_as_dict(info), "uri": uri})
        try:
            migration.wait()
        except MigError as error:
            failed.append((uri, error))
            reports[-1] |= {"error": str(error), "kind": type(error).__name__}
        else:
            if not as_json:
                click.echo(f"{uri}: {summary(info)}")
    if as_json and len(reports) == 1:
        print_json(reports[0])
    elif as_json:
        print_json({"status": "failed" if failed else "completed", "migrations": reports})
    for uri, reason in failed:
        say(f"{uri}: {' '.join(str(reason).split())}")
    if failed:
        raise SystemExit(1)
