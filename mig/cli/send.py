"""``mig send``."""

from __future__ import annotations

import click

from mig.channel import carries_return_path, parse_uri
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
    summary,
)
from mig.engine import OutgoingMigration
from mig.image import open_image
from mig.options import Capability


@click.command()
@click.argument("file")
@click.argument("uri")
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
@json_option
@reports_errors
def send(
    file: str,
    uri: str,
    capabilities: tuple[str, ...],
    parameters: tuple[str, ...],
    postcopy: bool,
    background: str | None,
    resume: bool,
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

    Parameter max-bandwidth is 0 (no limit) unless given: no guest runs here that would have to be
    spared.
    """
    wanted = parse_capabilities(capabilities)
    values = {"max-bandwidth": "0", **parse_parameters(parameters)}
    if not postcopy and (resume or background is not None):
        raise click.UsageError("--background and --resume belong to --postcopy")
    if postcopy:
        wanted[Capability.POSTCOPY_RAM] = True
    if background not in (None, "off"):
        values["max-postcopy-bandwidth"] = background
    if wanted.get(Capability.PAUSE_BEFORE_SWITCHOVER):
        raise click.UsageError(
            "capability 'pause-before-switchover': nobody can say migrate-continue to this command"
        )
    if Capability.RETURN_PATH not in wanted:
        wanted[Capability.RETURN_PATH] = carries_return_path(parse_uri(uri))
    with open_image(file) as image:
        if image.ignores_shared:
            wanted.setdefault(Capability.X_IGNORE_SHARED, True)
        migration = OutgoingMigration(image, capabilities=wanted, parameters=values)
        migration.background = background != "off"
        if postcopy and not resume:
            migration.start_postcopy()
        migration.start(uri, resume=resume)
        info = follow(migration)
    if as_json:
        print_json({**info_as_dict(info), "uri": uri})
    else:
        click.echo(f"{uri}: {summary(info)}")
