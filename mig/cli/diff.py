"""``mig diff``."""

from __future__ import annotations

import click

from mig.analysis.diff import Diff, Missing
from mig.analysis.diff import diff as diff_files
from mig.cli.common import json_option, print_json, reports_errors
from mig.savevm.fields import State, Value

_WIDTH = 48
_RANGES = 8


@click.command()
@click.argument("a")
@click.argument("b")
@json_option
@reports_errors
def diff(a: str, b: str, as_json: bool) -> None:
    """Show how two captured VMs differ: pages of RAM, and fields of devices with both values.

    A and B are files as `mig analyze` takes them. Pages are compared if they are plain in both.

    Exit status 1 when they differ.
    """
    found = diff_files(a, b)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if not found.equal:
        raise SystemExit(1)


def _show(found: Diff) -> None:
    if found.machines[0] != found.machines[1]:
        click.echo(f"machine {found.machines[0]} | {found.machines[1]}")
    for block in found.blocks:
        if block.length_a != block.length_b:
            click.echo(f"block {block.idstr}: {_bytes(block.length_a)} | {_bytes(block.length_b)}")
        if block.differ or block.only_a or block.only_b:
            click.echo(
                f"block {block.idstr}: {block.differ} pages differ, {block.only_a} only in A, "
                f"{block.only_b} only in B, {block.same} are the same"
            )
            shown = " ".join(f"{first}+{n}" for first, n in block.ranges[:_RANGES])
            more = " ..." if len(block.ranges) > _RANGES else ""
            click.echo(f"  pages {shown}{more}")
    if found.uncompared is not None:
        click.echo(f"pages could not be compared: {found.uncompared}")
    for side, keys in (("A", found.devices_only_a), ("B", found.devices_only_b)):
        for idstr, instance_id in keys:
            click.echo(f"device {idstr} {instance_id}: only in {side}")
    for item in found.fields:
        click.echo(
            f"{item.idstr} {item.instance_id} {item.path}: {_shown(item.a)} | {_shown(item.b)}"
        )
    if found.nfields > len(found.fields):
        click.echo(f"{found.nfields - len(found.fields)} more fields differ")
    if found.equal:
        click.echo("no difference")


def _bytes(nbytes: int | None) -> str:
    return "no such block" if nbytes is None else f"{nbytes} bytes"


def _shown(value: Value | Missing) -> str:
    if isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, State):
        text = f"{value.vmsd_name} of {len(value.fields)} fields"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:#x}" if value > 9 else str(value)
    else:
        text = str(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
