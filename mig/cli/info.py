"""``mig info``."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mig import _core
from mig.cli.common import json_option, print_json, reports_errors, sized
from mig.errors import KernelError
from mig.image import Image, open_image

_FORMATS = {"stream": "migration stream", "mapped-ram": "mapped-ram file"}


@click.command()
@click.argument("file", required=False)
@click.option("--kernels", is_flag=True, help="Show the C kernels: which there are, which is used.")
@json_option
@reports_errors
def info(file: str | None, kernels: bool, as_json: bool) -> None:
    """Show what is in FILE: machine, RAM blocks, pages, zero share, devices.

    FILE was written by `mig receive` or by QEMU itself (migrate to exec: or file:, also with
    mapped-ram); it may be given as file:PATH,offset=N.
    """
    if kernels == (file is not None):
        raise click.UsageError("give FILE, or --kernels")
    if file is None:
        _show_kernels(as_json)
        return
    with open_image(file) as image:
        if as_json:
            print_json(_as_dict(file, image))
        else:
            _show(image)


def _show_kernels(as_json: bool) -> None:
    usable = {}
    for name in _core.kernel_names():
        try:
            _core.kernels(name)
            usable[name] = "usable"
        except KernelError as error:
            usable[name] = str(error)
    if as_json:
        print_json({"kernel": _core.KERNELS.name, "kernels": usable})
        return
    for name, state in usable.items():
        used = " (in use)" if name == _core.KERNELS.name else ""
        click.echo(f"{name}: {state}{used}")


def _as_dict(file: str, image: Image) -> dict[str, Any]:
    devices = image.devices
    return {
        "file": file,
        "format": image.format,
        "nbytes": image.nbytes,
        "machine": image.machine,
        "page-size": image.page_size,
        "records": image.records,
        "blocks": [
            {
                "name": block.idstr,
                "used-length": block.used_length,
                "data-pages": block.data,
                "zero-pages": block.zero,
                "missing-pages": block.missing,
                "address": block.address,
                "ignored": block.ignored,
            }
            for block in image.blocks
        ],
        "device-state-nbytes": len(image.device_state.raw),
        "devices": None
        if devices is None
        else [
            {
                "name": device.idstr,
                "instance-id": device.instance_id,
                "version-id": device.version_id,
                "section-id": device.section_id,
                "nbytes": len(device.payload),
            }
            for device in devices
        ],
    }


def _show(image: Image) -> None:
    # a pipe gets whole lines, however long
    # and names from the stream are text, not markup
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    blocks = image.blocks
    total = sum(b.used_length for b in blocks)
    ignored = [b for b in blocks if b.ignored]
    pages = sum(b.data + b.zero + b.missing for b in blocks)
    zero = sum(b.zero for b in blocks)
    console.print(f"format   {_FORMATS.get(image.format, image.format)}, {sized(image.nbytes)}")
    console.print(f"machine  {image.machine or 'not named in the stream'}")
    console.print(
        f"memory   {sized(total)} in {len(blocks)} blocks, {pages} pages of {image.page_size} "
        f"bytes, {100 * zero / max(pages, 1):.1f} % zero"
    )
    if image.records > pages:
        console.print(f"records  {image.records}: {image.records - pages} pages were sent again")
    table = Table("block", "size", "data", "zero", "missing", box=None)
    for block in blocks:
        table.add_row(
            block.idstr,
            sized(block.used_length),
            *(str(n) for n in (block.data, block.zero, block.missing)),
        )
    console.print(table)
    for block in ignored:
        console.print(
            f"not here {block.idstr}: shared memory, at {block.address:#x} of the guest's "
            "(x-ignore-shared)"
        )
    _show_devices(console, image)


def _show_devices(console: Console, image: Image) -> None:
    devices = image.devices
    if devices is None:
        size = sized(len(image.device_state.raw))
        console.print(f"devices  {size} in one piece: the stream does not say how to cut it")
        return
    table = Table("device", "instance", "version", "section", "bytes", box=None)
    for device in devices:
        numbers = (device.instance_id, device.version_id, device.section_id, len(device.payload))
        table.add_row(device.idstr, *(str(n) for n in numbers))
    console.print(table)
