"""``mig convert``."""

from __future__ import annotations

from pathlib import Path

import click

from mig.cli.common import json_option, print_json, reports_errors, sized
from mig.conversion import Format
from mig.conversion import convert as convert_file


@click.command()
@click.argument("file")
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(map(str, Format))),
    required=True,
    help="What OUT is to be.",
)
@click.option("--block", help="The block that raw memory is of; default: the machine's memory.")
@click.option(
    "--memory",
    "memories",
    multiple=True,
    metavar="[BLOCK=]PATH",
    help="Take the contents of a block from a raw file or ELF core; may repeat.",
)
@json_option
@reports_errors
def convert(
    file: str,
    out: str,
    format_: str,
    block: str | None,
    memories: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the VM in FILE to OUT in another format.

    mapped-ram and stream hold the whole VM. raw is the memory alone, with holes for zero pages; elf
    is a core of a PC for gdb and crash: memory at its physical and the kernel's addresses, vCPUs as
    threads.

    With --memory the machine's memory (or BLOCK) comes from PATH, all else from FILE: the way back
    from raw and elf.

    FILE may be given as file:PATH,offset=N. OUT appears when it is complete, or not at all.
    """
    memory = dict(_block_and_path(text) for text in memories)
    convert_file(file, out, format_, block=block, memory=memory)
    stat = Path(out).stat()
    if as_json:
        print_json({"file": out, "format": format_, "length": stat.st_size})
    else:
        click.echo(
            f"{out}: {format_}, {sized(stat.st_size)}, {sized(stat.st_blocks * 512)} on disk"
        )


def _block_and_path(text: str) -> tuple[str, str]:
    block, equals, path = text.partition("=")
    return (block, path) if equals else ("pc.ram", text)
