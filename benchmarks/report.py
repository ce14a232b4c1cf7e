# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns results of pytest-benchmark into a page of tables, or puts them on one.

    python benchmarks/report.py RESULTS.json... > PAGE.md
    python benchmarks/report.py RESULTS.json... --update benchmarks/RESULTS.md

With --update, what the results have takes the place of what the page has: the rows of the same
settings (whatever the size of the guest), and whole tables whose rows belong together. Everything
else stays byte for byte, also rows of benchmarks that are no more. A section that the page does not
have comes where a whole page has it. What becomes of each section is said on standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import Change, Page
from sections import PARTS, part_of, versions
from tables import Row, rows_of

_COMMAND = (
    "MIG_QEMU_10=ROOT pytest benchmarks --benchmark-json=bench.json && "
    "python benchmarks/report.py bench.json --update benchmarks/RESULTS.md"
)
_KERNELS = PARTS["kernel"].title

#: a file of pytest-benchmark's
Result = dict[str, Any]


def _machine(result: Result) -> str:
    known = result["machine_info"]["mig"]
    smoke = ", **smoke run, too short to mean anything**" if known["smoke"] else ""
    return f"{known['cpu']}, {known['cpus']} CPUs, Linux {known['kernel']}{smoke}"


def _libraries(result: Result) -> set[str]:
    known = result["machine_info"]["mig"]
    return {known[key] for key in ("library", "scalar") if key in known}


def _pattern(title: str) -> re.Pattern[str]:
    return re.compile(re.escape(title).replace(re.escape("#"), r"[\d.]+"))


def _sections(text: str) -> Iterator[str]:
    """Split what a part writes."""
    yield from re.split(r"\n\n?(?=## )", text)


def _put(page: Page, rows: list[Row]) -> list[Change]:
    """Put the sections and rows of all benchmarks of one machine on the page."""
    changes = []
    for i, (kind, part) in enumerate(PARTS.items()):
        chosen = [row for row in rows if part_of(row) == kind]
        later = [_pattern(other.title) for other in list(PARTS.values())[i + 1 :]]
        if chosen:
            for section in _sections("\n".join(part.lines(chosen))):
                changes.append(page.put(section, part.names, later))
    return changes


def _update_of(page: Page, machine: str, results: list[Result]) -> list[Change]:
    """Put the results of one machine on the page, and what it says of the machine."""
    opening = page.opening
    rows = [row for result in results for row in rows_of(result)]
    owners = opening.owners(list(page.sections))
    changes = _put(page, rows)
    for change in changes:
        before = owners[change.title] if change.kept else []
        owners[change.title] = list(dict.fromkeys([*before, machine]))
    opening.set_owners({title: owners[title] for title in page.sections})
    dates = {result["datetime"][:10] for result in results}
    all_new = {change.title for change in changes if not change.kept} == set(page.sections)
    opening.dates = dates if all_new else opening.dates | dates
    body = "".join(page.sections.values())
    named = opening.versions | versions(rows)
    opening.versions = {name for name in named if name.removeprefix("QEMU ") in body}
    if _KERNELS in {change.title for change in changes}:
        chosen = {machine: results[0]["machine_info"]["mig"]["kernels"]}
        kernels = opening.kernels | chosen
        opening.kernels = {m: kernels[m] for m in owners[_KERNELS] if m in kernels}
        libraries = set().union(opening.libraries or (), *map(_libraries, results))
        opening.libraries = {name for name in libraries if f"| {name} x |" in body}
    opening.command = _COMMAND
    page.rewrite_opening()
    return changes


def update(page: Page, results: list[Result]) -> list[Change]:
    """Put results on the page, those of each machine by themselves; return what has changed."""
    by_machine: dict[str, list[Result]] = {}
    for result in results:
        if result["benchmarks"]:
            by_machine.setdefault(_machine(result), []).append(result)
    return [
        change for machine, some in by_machine.items() for change in _update_of(page, machine, some)
    ]


def _remarks(change: Change) -> Iterator[str]:
    """Say what became of a section."""
    if change.added:
        yield f"{change.title}: added"
    elif change.kept:
        yield f"{change.title}: rows or tables that were not measured stay ({change.kept})"
    else:
        yield f"{change.title}: replaced"
    if change.reworded:
        yield "  its text has changed: does it hold for what stays?"
    if change.recolumned:
        yield "  its columns have changed"
    if change.lost:
        yield "  rows that were not measured are gone with the old columns:"
        yield from (f"  {line}" for row in change.lost for line in row.splitlines())


def main() -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--update", type=Path, metavar="PAGE.md", help="need not exist")
    given = parser.parse_args()
    old = ""
    if given.update is not None and given.update.exists():
        old = given.update.read_text(encoding="utf-8")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in given.results]
    try:
        page = Page(old)
        changes = update(page, results)
    except ValueError as error:
        sys.exit(f"{given.update}: {error}")
    for change in changes:
        print(*_remarks(change), sep="\n", file=sys.stderr)
    if given.update is None:
        sys.stdout.write(str(page))
    elif str(page) != old:
        given.update.write_text(str(page), encoding="utf-8")


if __name__ == "__main__":
    main()
