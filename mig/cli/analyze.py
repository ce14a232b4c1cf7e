"""``mig analyze``."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mig.analysis import Analysis, SectionItem
from mig.analysis import analyze as analyze_file
from mig.cli.common import json_option, print_json, reports_errors, sized
from mig.savevm.fields import State, Value

#: longest value, in characters, and most elements of an array that are shown to people
_WIDTH = 64
_ELEMENTS = 8
#: columns of what is not a terminal
_PIPE_WIDTH = 240


@click.command()
@click.argument("file")
@click.option(
    "-d",
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="Show the fields of devices whose name contains NAME. May repeat.",
)
@click.option("--fields", is_flag=True, help="Show the fields of all devices.")
@json_option
@reports_errors
def analyze(file: str, devices: tuple[str, ...], fields: bool, as_json: bool) -> None:
    """Show everything that is in FILE, and what is wrong with it.

    FILE is a migration stream, of any kind that QEMU writes into a file, or a file with mapped-ram,
    or a save file of libvirt; also compressed. It may be given as file:PATH,offset=N. With --json
    all sections, devices, fields and subsections are one object.

    Exit status 1 when something is wrong with it.
    """
    analysis = analyze_file(file)
    if as_json:
        print_json(analysis.to_json())
    else:
        _Page().show(analysis, ("",) if fields else devices)
    if not analysis.ok:
        raise SystemExit(1)


class _Page:
    """The reading for people."""

    def __init__(self) -> None:
        # a pipe gets whole lines, however long; names from the stream are text, not markup
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        self._console = Console(
            soft_wrap=True, highlight=False, markup=False, emoji=False, width=width
        )

    def show(self, analysis: Analysis, devices: tuple[str, ...]) -> None:
        self._head(analysis)
        self._ram(analysis)
        self._commands(analysis)
        self._sections(analysis)
        for section in analysis.sections:
            if any(name in section.idstr for name in devices):
                self._fields(section)
        for finding in analysis.findings:
            self._line(str(finding))
        if analysis.nfindings > len(analysis.findings):
            self._line(f"{analysis.nfindings - len(analysis.findings)} more findings")
        self._line("verdict  nothing is wrong" if analysis.ok else "verdict  something is wrong")

    def _line(self, text: str) -> None:
        self._console.print(text)

    def _head(self, analysis: Analysis) -> None:
        size = f"{sized(analysis.nbytes)} of {sized(analysis.file_nbytes)}"
        packing = f", {analysis.packing}" if analysis.packing else ""
        start = f" from {analysis.start:#x}" if analysis.start else ""
        self._line(f"format   {analysis.format}{packing}, {size}{start}")
        save = analysis.libvirt
        if save is not None:
            was = "running" if save.was_running else "paused"
            domain = ", ".join(f"{key} {value}" for key, value in save.domain.items())
            self._line(f"libvirt  save file of version {save.version}, guest was {was}; {domain}")
        self._line(f"machine  {analysis.machine or 'not named in the stream'}")
        configuration = analysis.configuration
        if configuration is not None and configuration.capabilities:
            self._line(f"needs    {', '.join(configuration.capabilities)}")

    def _ram(self, analysis: Analysis) -> None:
        ram = analysis.ram
        if ram is None:
            return
        text = f"{sized(ram.total)} in {len(ram.blocks)} blocks, pages of {analysis.page_size}"
        flushes = f", {ram.flushes} multifd flushes" if ram.flushes else ""
        self._line(f"memory   {text}, {ram.records} records in {ram.parts} parts{flushes}")
        columns = {
            "data": [b.data_pages for b in ram.blocks],
            "zero": [b.zero_pages for b in ram.blocks],
            "missing": [b.missing_pages for b in ram.blocks],
            "normal": [b.normal for b in ram.blocks],
            "zeros": [b.zero for b in ram.blocks],
            "xbzrle": [b.xbzrle for b in ram.blocks],
            "compressed": [b.compressed for b in ram.blocks],
            "repeated": [b.repeated for b in ram.blocks],
        }
        # what is nowhere needs no column, except for the plain kinds
        shown = [name for name, n in columns.items() if any(n) or name in ("data", "zero")]
        table = Table("block", "size", *shown, "bytes", box=None)
        for i, b in enumerate(ram.blocks):
            numbers = (str(columns[name][i]) for name in shown)
            table.add_row(b.idstr, sized(b.used_length), *numbers, sized(b.record_nbytes))
        self._console.print(table)

    def _commands(self, analysis: Analysis) -> None:
        if not analysis.commands:
            return
        table = Table("command", "offset", "says", box=None)
        for command in analysis.commands:
            says = ", ".join(f"{k} {v}" for k, v in command.arguments.items())
            table.add_row(command.name, hex(command.offset), _cut(says))
        self._console.print(table)

    def _sections(self, analysis: Analysis) -> None:
        table = Table(
            "section", "id", "instance", "version", "offset", "bytes", "subsections", box=None
        )
        for s in analysis.sections:
            numbers = (str(n) for n in (s.section_id, s.instance_id, s.version_id))
            state = s.device.state if s.device is not None else None
            subs = " ".join(sub.vmsd_name for sub in state.subsections) if state else ""
            table.add_row(s.idstr, *numbers, hex(s.offset), str(s.nbytes), subs)
        self._console.print(table)

    def _fields(self, section: SectionItem) -> None:
        if section.device is None:
            return
        tree = Tree(Text(f"{section.idstr} {section.instance_id}"))
        if section.device.state is None:
            tree.add(Text(_shown(section.device.section.payload)))
        else:
            _grow(tree, section.device.state)
        self._console.print(tree)


def _grow(tree: Tree, state: State) -> None:
    for item in state.fields:
        _branch(tree, f"{item.name} ({item.type})", item.value)
    for sub in state.subsections:
        _grow(tree.add(Text(f"{sub.vmsd_name} (subsection, version {sub.version_id})")), sub)


def _branch(tree: Tree, name: str, value: Value) -> None:
    if isinstance(value, State):
        _grow(tree.add(Text(name)), value)
    elif isinstance(value, tuple) and any(isinstance(v, State | tuple) for v in value):
        branch = tree.add(Text(name))
        for i, element in enumerate(value):
            _branch(branch, f"[{i}]", element)
    else:
        tree.add(Text(f"{name}: {_shown(value)}"))


def _shown(value: Any) -> str:
    """A value without states in it, on one line."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value} ({value:#x})" if value > 9 else str(value)
    if isinstance(value, bytes):
        return _cut(value.hex())
    if isinstance(value, tuple):
        more = f" ... {len(value)} in all" if len(value) > _ELEMENTS else ""
        return " ".join(_shown(v) for v in value[:_ELEMENTS]) + more
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
