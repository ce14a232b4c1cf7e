"""``mig receive``."""

from __future__ import annotations

import click

from mig.cli.common import (
    capability_option,
    follow,
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
from mig.engine import IncomingMigration
from mig.errors import MigError
from mig.events import Event, Listening, StatusChanged
from mig.image import MappedCapture, StreamCapture
from mig.options import Capability, Parameters
from mig.state import Status

_FORMATS = {"mapped-ram": MappedCapture, "stream": StreamCapture}


@click.command()
@click.argument("uri")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--format",
    "format_",
    type=click.Choice(sorted(_FORMATS)),
    help="What FILE is to be: mapped-ram, or with x-ignore-shared a stream.",
)
@click.option("--fsync", is_flag=True, help="Have FILE on stable storage before saying so.")
@capability_option
@parameter_option
@json_option
@reports_errors
def receive(
    uri: str,
    file: str,
    format_: str | None,
    fsync: bool,
    capabilities: tuple[str, ...],
    parameters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Be the destination of a migration; keep the VM in FILE.

    FILE is written around the page cache; with -p direct-io=off through it, which a slow disk may
    ask for.

    FILE appears when everything is received, or not at all. As mapped-ram it has a place for every
    page, and QEMU 9.0 and later start from it with `-incoming file:FILE` and capability mapped-ram;
    as a stream it is what any QEMU starts from, with `-incoming "exec:cat FILE"`. `mig send` sends
    either.

    With -c postcopy-ram the source may go into postcopy (for QEMU: migrate-start-postcopy). If the
    connection breaks then, URI is listened on again, for the source to resume.

    With -c x-ignore-shared, which the source must have too, memory that it shares by a file stays
    out of FILE: whoever gets the VM next must map the same file.
    """
    chosen_capabilities = parse_capabilities(capabilities)
    chosen_parameters = parse_parameters(parameters)
    direct_io = Parameters.from_qmp(chosen_parameters).direct_io
    shared = chosen_capabilities.get(Capability.X_IGNORE_SHARED, False)
    capture = _FORMATS[format_ or ("stream" if shared else "mapped-ram")](
        file, fsync=fsync, direct_io=direct_io
    )
    try:
        migration = IncomingMigration(
            capture,
            capabilities=chosen_capabilities,
            parameters=chosen_parameters,
            on_event=lambda event: _follow_up(migration, event),
        )
        migration.listen(uri)
    except BaseException:
        capture.abort()
        raise
    info = follow(migration)
    if as_json:
        print_json({**info_as_dict(info), "file": file})
    else:
        click.echo(f"{file}: {summary(info)}")


def _follow_up(migration: IncomingMigration, event: Event) -> None:
    if isinstance(event, Listening) and event.uri.startswith(("tcp:", "unix:")):
        say(f"listening on {event.uri}")
    elif event == StatusChanged(Status.POSTCOPY_PAUSED) and migration.uri is not None:
        say("the connection broke in postcopy: the source is to resume")
        try:
            migration.recover(migration.uri)
        except MigError as error:
            # half of the guest is here: somebody may still find a way
            say(str(error))
