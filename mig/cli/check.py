"""``mig check``."""

from __future__ import annotations

import click

from mig.analysis.check import Level
from mig.analysis.check import check as check_file
from mig.cli.common import json_option, print_json, reports_errors


@click.command()
@click.argument("file")
@click.option(
    "--against",
    metavar="QMP-SOCKET|VMSTATE.json",
    help="The target: its QMP socket (PATH or HOST:PORT), or what it wrote for "
    "-machine TYPE -dump-vmstate VMSTATE.json.",
)
@json_option
@reports_errors
def check(file: str, against: str | None, as_json: bool) -> None:
    """Say whether FILE will load, and what keeps it from loading.

    FILE is as for `mig analyze`. The two ways to name a target tell different things: a socket
    about machine type, RAM blocks, processors and PCI devices, a dump about versions, fields and
    subsections of devices.

    Exit status 1 when it will not load.
    """
    found = check_file(file, against)
    if as_json:
        print_json(found.to_json())
    else:
        for reason in found.reasons:
            if reason.level != Level.NOTE:
                click.echo(str(reason))
        notes = sum(reason.level == Level.NOTE for reason in found.reasons)
        if notes:
            click.echo(f"{notes} sections of which not everything can be told")
        what = "nothing keeps it from loading" if found.loads else "it will not load"
        click.echo(f"verdict: {what}{f' ({found.against})' if found.against else ''}")
    if not found.loads:
        raise SystemExit(1)
