# SPDX-License-Identifier: LGPL-2.1-or-later
"""The page of results as text: sections, and rows of their tables, that take the place of others.

What is not replaced stays as it is, byte for byte. The page:

    # Benchmarks

    Regenerate: ...

    - what it was measured on, when, and beside what
    - ...

    ## Section

    Text.

    | table |
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

_K = TypeVar("_K", bound=Hashable)

_TITLE = "# Benchmarks"
_DRIFT = "; machines drift: only ratios within a run mean anything"
_SOME = "some of "

_MACHINE = re.compile(r"- (.+, \d+ CPUs, Linux [^:]+)(?:: (.+))?")
_VERSIONS = re.compile(r"- (QEMU \d[^;]*)")
_DATES = re.compile(r"- (\d{4}-\d\d-\d\d[^;]*);.*")
_KERNELS = re.compile(r"- the kernels that mig chooses (.+): `(.+)`")
_LIBRARIES = re.compile(r"- libraries that the kernels are measured beside: (.*)")
#: what a cell says besides the name: how fast a disk was
_ASIDE = re.compile(r" \([\d.]+ GB/s\)$")


# ---- what the page says first ----------------------------------------------------------------


def _parse_dates(text: str) -> set[str]:
    """Read '2026-11-21, 22 and 2026-12-01': a day alone is of the month before it."""
    dates, month = set(), ""
    for part in re.split(r", | and ", text):
        month = part[:-2] or month
        dates.add(month + part[-2:])
    return dates


def _list(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _format_dates(dates: set[str]) -> str:
    parts, month = [], ""
    for date in sorted(dates):
        parts.append(date[-2:] if date[:-2] == month else date)
        month = date[:-2]
    return _list(parts)


@dataclass
class Opening:
    """Where, when and beside what the sections were measured.

    machines:  the sections that were measured there, or rows of them ('some of ...'); the first
               machine has none: what is not said of others was measured there
    kernels:   what mig chooses, by machine
    libraries: what the kernels are measured beside; None: the page does not say
    others:    lines that are somebody's own
    """

    command: str = ""
    machines: dict[str, list[str]] = field(default_factory=dict)
    versions: set[str] = field(default_factory=set)
    dates: set[str] = field(default_factory=set)
    kernels: dict[str, str] = field(default_factory=dict)
    libraries: set[str] | None = None
    others: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Opening:
        """Read the lines before the first section."""
        self = cls()
        for line in text.splitlines():
            if line in ("", _TITLE):
                continue
            if line.startswith("Regenerate: "):
                self.command = line.removeprefix("Regenerate: ").strip("`")
            # before the machines: it may name one
            elif found := _KERNELS.fullmatch(line):
                machine = found[1].removeprefix("on ")
                self.kernels[self.first if machine == "here" else machine] = found[2]
            elif found := _MACHINE.fullmatch(line):
                self.machines[found[1]] = found[2].split(", ") if found[2] else []
            elif found := _VERSIONS.fullmatch(line):
                self.versions |= set(found[1].split(", "))
            elif found := _DATES.fullmatch(line):
                self.dates |= _parse_dates(found[1])
            elif found := _LIBRARIES.fullmatch(line):
                self.libraries = set(re.findall("`(.+?)`", found[1]))
            else:
                self.others.append(line)
        return self

    def __str__(self) -> str:
        lines = [_TITLE, "", f"Regenerate: `{self.command}`", ""]
        for machine, sections in self.machines.items():
            lines.append(f"- {machine}: {', '.join(sections)}" if sections else f"- {machine}")
        if self.versions:
            lines.append(f"- {', '.join(sorted(self.versions))}")
        if self.dates:
            lines.append(f"- {_format_dates(self.dates)}{_DRIFT}")
        for machine, kernels in self.kernels.items():
            where = "here" if machine == self.first else f"on {machine}"
            lines.append(f"- the kernels that mig chooses {where}: `{kernels}`")
        if self.libraries is not None:
            named = _list([f"`{name}`" for name in sorted(self.libraries)])
            beside = named or "none (plain C only)"
            lines.append(f"- libraries that the kernels are measured beside: {beside}")
        return "\n".join([*lines, *self.others])

    @property
    def first(self) -> str:
        """The machine that what is not said of others was measured on; '' on an empty page."""
        return next(iter(self.machines), "")

    def owners(self, titles: Sequence[str]) -> dict[str, list[str]]:
        """Return the machines that each section was measured on."""
        owners: dict[str, list[str]] = {}
        for title in titles:
            some = [m for m, named in self.machines.items() if _SOME + title in named]
            whole = [m for m, named in self.machines.items() if title in named]
            owners[title] = whole or [m for m in (self.first, *some) if m]
        return owners

    def set_owners(self, owners: Mapping[str, Sequence[str]]) -> None:
        """Say which machines the sections were measured on; those that have none left go."""
        measured = {machine for several in owners.values() for machine in several}
        machines = [machine for machine in self.machines if machine in measured]
        machines += sorted(measured - set(machines))
        self.machines = {machine: [] for machine in machines}
        for title, several in owners.items():
            for machine in several:
                if machine != machines[0]:
                    name = title if len(several) == 1 else _SOME + title
                    self.machines[machine].append(name)


# ---- pieces of text --------------------------------------------------------------------------


def _pieces(text: str, mark: str) -> tuple[str, dict[str, str]]:
    """Split text at its headings: what precedes them, and by title what is from one to the next.

    Joined, the pieces are the text again.
    """
    opening, *pieces = re.split(rf"(?=\n\n{mark} )", text)
    named = {piece.lstrip("\n").partition("\n")[0][len(mark) + 1 :]: piece for piece in pieces}
    if len(named) < len(pieces):
        raise ValueError(f"two headings '{mark} ...' with the same words")
    return opening, named


def _among(old: Mapping[_K, str], new: Mapping[_K, str]) -> dict[_K, str]:
    """Put new entries in the place of old ones, others behind those that they follow in `new`."""
    keys = list(old)
    place = next((keys.index(key) for key in new if key in old), len(keys))
    for key in new:
        if key in old:
            place = keys.index(key)
        else:
            keys.insert(place, key)
        place += 1
    return {**dict.fromkeys(keys, ""), **old, **new}


def _split_table(text: str) -> tuple[str, str, list[str]]:
    """Split a piece into what precedes its table, the table's head, and the rows."""
    at = text.find("\n\n|")
    if at < 0:
        return text, "", []
    head, rule, *rows = text[at + 2 :].splitlines()
    return text[:at], f"{head}\n{rule}", rows


def _named(rows: Sequence[str], names: int) -> dict[tuple[str, ...], str]:
    """Return rows by their first cells."""
    found: dict[tuple[str, ...], str] = {}
    for row in rows:
        key = tuple(_ASIDE.sub("", cell) for cell in row[2:-2].split(" | ")[:names])
        found[key] = f"{found[key]}\n{row}" if key in found else row
    return found


@dataclass
class Change:
    """What became of a section.

    kept:      how many rows, or whole tables, are those of before
    reworded:  they are under a text that has changed
    recolumned: a table has other columns than before
    lost:      rows that were not in the results and did not fit in the new columns
    """

    title: str
    added: bool = False
    kept: int = 0
    reworded: bool = False
    recolumned: bool = False
    lost: list[str] = field(default_factory=list)


def _merge_table(old: str, new: str, names: int, change: Change) -> str:
    """Return a piece with one table, which has rows of the old one where new has none."""
    text, head, rows = _split_table(new)
    old_text, old_head, old_rows = _split_table(old)
    if not head:
        return new
    ours, theirs = _named(rows, names), _named(old_rows, names)
    left = [row for key, row in theirs.items() if key not in ours] if names else []
    if old_head != head:
        change.recolumned = True
        change.lost += left
        return new
    if not left:
        return new
    change.kept += len(left)
    change.reworded |= text.partition("\n\n")[2] != old_text.partition("\n\n")[2]
    return "\n".join([f"{text}\n\n{head}", *_among(theirs, ours).values()])


def _merge_section(old: str, new: str, names: int, change: Change) -> str:
    """Return a section with the old one's rows and parts ('### ...') where new has none."""
    (opening, groups), (old_opening, old_groups) = _pieces(new, "###"), _pieces(old, "###")
    kept = [title for title in old_groups if title not in groups]
    change.kept += len(kept)
    change.reworded |= bool(kept) and opening != old_opening
    merged = {
        title: _merge_table(old_groups[title], piece, names, change)
        for title, piece in groups.items()
        if title in old_groups
    }
    opening = _merge_table(old_opening, opening, names, change)
    return "".join([opening, *_among(old_groups, {**groups, **merged}).values()])


class Page:
    """What was measured, and can be measured anew bit by bit."""

    def __init__(self, text: str = "") -> None:
        """ValueError: two sections have the same title."""
        opening, self.sections = _pieces(text.removesuffix("\n"), "##")
        self._opening = opening
        self.opening = Opening.parse(opening)

    def rewrite_opening(self) -> None:
        """Let the opening be written as it is now; till then it is what was read."""
        self._opening = str(self.opening)

    def __str__(self) -> str:
        return "".join([self._opening, *self.sections.values(), "\n"])

    def put(self, text: str, names: int, later: Sequence[re.Pattern[str]]) -> Change:
        """Put sections' rows in place.

        text:  one section, from its heading
        names: how many columns, from the left, name a row of its tables; 0: none stays
        later: titles of sections that come after it
        """
        ((title, new),) = _pieces(f"\n\n{text}", "##")[1].items()
        change = Change(title, added=title not in self.sections)
        if not change.added:
            self.sections[title] = _merge_section(self.sections[title], new, names, change)
            return change
        titles = list(self.sections)
        after = (i for i, t in enumerate(titles) if any(p.fullmatch(t) for p in later))
        titles.insert(next(after, len(titles)), title)
        self.sections = {t: new if t == title else self.sections[t] for t in titles}
        return change
