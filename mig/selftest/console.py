# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the self-test guest says on its serial console."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mig.selftest.errors import SelftestError

READY = "mig-guest: ready"
_TICK = re.compile(r"^mig-guest: tick (\d+) checked (\d+) bad (\d+)\r*\n", re.MULTILINE)
_SLOW = re.compile(r"^mig-guest: slow((?: \d+)+)\r*\n", re.MULTILINE)
_COMPLAINT = re.compile(r"^mig-guest: (?:corrupt|error) ")


@dataclass(frozen=True)
class Tick:
    """One report of the guest: its number, pages checked and corrupt pages found so far."""

    number: int
    checked: int
    bad: int


def parse_ticks(text: str) -> list[Tick]:
    """Return the ticks in console output; unfinished lines do not count."""
    return [Tick(*map(int, match)) for match in _TICK.findall(text)]


def slow_touches(text: str) -> list[int]:
    """Return the microseconds of every slow touch; unfinished lines do not count."""
    return [int(number) for numbers in _SLOW.findall(text) for number in numbers.split()]


def complaints(text: str) -> list[str]:
    """Return the lines in which the guest reports corrupt pages or an error of its own."""
    return [line for line in text.splitlines() if _COMPLAINT.match(line)]


def check_ticks(*texts: str) -> list[Tick]:
    """Check the consoles of the machines that one guest ran on, in order; return its ticks.

    Joined, they are one stream even where a machine stopped in the middle of a line.
    Raises a `SelftestError` if a tick is missing or repeated, or if a page was corrupt.
    """
    text = "".join(texts)
    ticks = parse_ticks(text)
    if not ticks:
        raise SelftestError("the guest did not report anything")
    _check_order(ticks)
    reports = complaints(text)
    if ticks[-1].bad or reports:
        detail = "; ".join(reports) or "no details"
        raise SelftestError(f"the guest found {ticks[-1].bad} corrupt pages: {detail}")
    return ticks


def _check_order(ticks: Sequence[Tick]) -> None:
    for before, after in pairwise(ticks):
        if after.number != before.number + 1 or after.checked < before.checked:
            raise SelftestError(f"the guest did not go on where it was: {before}, then {after}")


class Console:
    """The console output that QEMU writes to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = b""

    def text(self) -> str:
        """Return everything said so far, with an unfinished last line."""
        try:
            with self._path.open("rb") as file:
                file.seek(len(self._data))
                self._data += file.read()
        except FileNotFoundError:
            pass
        return self._data.decode("ascii", "replace")

    def lines(self) -> list[str]:
        """Return the finished lines so far."""
        finished, _, _ = self.text().rpartition("\n")
        return finished.replace("\r", "").split("\n") if finished else []
