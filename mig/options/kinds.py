"""What values a parameter takes: read from QMP's types or from a command line's text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Generic, Protocol, TypeVar

from mig.options.bitmaps import NodeAlias, read_mapping

Chosen = TypeVar("Chosen", bound=StrEnum)

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1

BETWEEN = "a value between {low} and {high}"
IN_RANGE = "an integer in the range of {low} to {high}"

_INTEGER = re.compile(r"[+-]?\d+|0[xX][0-9a-fA-F]+")
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)([bBkKmMgGtTpPeE]?)")
_SWITCHES = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


class Kind(Protocol):
    """Turns what somebody wrote into a value, and back."""

    @property
    def unit(self) -> str:
        """Unit of the value; empty where there is none."""

    @property
    def range(self) -> str:
        """The values there are, for people."""

    def read(self, name: str, raw: object) -> object:
        """Return the value; ValueError with the words for parameter ``name``."""

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""


def _expects(name: str, what: str) -> ValueError:
    return ValueError(f"Parameter '{name}' expects {what}")


def _invalid_type(name: str, what: str) -> ValueError:
    return ValueError(f"Invalid parameter type for '{name}', expected: {what}")


def _integer(text: str) -> int | None:
    if not _INTEGER.fullmatch(text):
        return None
    # more digits than any range has are not worth converting
    return int(text, 16 if text[:2].lower() == "0x" else 10) if len(text) < 64 else UINT64_MAX + 1


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number from ``low`` to ``high``, both included.

    words: what QEMU says it expects
    """

    low: int
    high: int
    unit: str = ""
    words: str = BETWEEN

    @property
    def range(self) -> str:
        """The values there are, for people."""
        return f"{self.low} to {_power(self.high)}"

    def _parse(self, text: str) -> int | None:
        return _integer(text)

    def _accepts(self, value: int) -> bool:
        return self.low <= value <= self.high

    def read(self, name: str, raw: object) -> int:
        """Return the value; ValueError with the words for parameter ``name``."""
        value = self._parse(raw.strip()) if isinstance(raw, str) else raw
        if not isinstance(value, int) or isinstance(value, bool) or not self._accepts(value):
            raise _expects(name, self.words.format(low=self.low, high=self.high))
        return value

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""
        return value


@dataclass(frozen=True, slots=True)
class Size(Integer):
    """A number of bytes; as text with QEMU's suffixes k, M, G, T, P, E (of 1024), bare in bytes.

    power: only powers of two
    """

    power: bool = field(default=False, kw_only=True)

    @property
    def range(self) -> str:
        """The values there are, for people."""
        text = f"{_power(self.low)} to {_power(self.high)}"
        return f"{text}, a power of two" if self.power else text

    def _accepts(self, value: int) -> bool:
        return self.low <= value <= self.high and not (self.power and value & (value - 1))

    def _parse(self, text: str) -> int | None:
        match = _SIZE.fullmatch(text) if len(text) < 64 else None
        if match is None:
            return _integer(text)
        number, suffix = match[1], match[2].lower() or "b"
        nbytes = Fraction(number) * 1024 ** "bkmgtpe".index(suffix)
        # a fraction of a byte is a slip, one of a kilobyte is rounded down, as QEMU does
        return None if suffix == "b" and nbytes.denominator > 1 else int(nbytes)


@dataclass(frozen=True, slots=True)
class Seconds:
    """A time of ``low`` to ``high`` seconds."""

    low: float
    high: float
    unit: str = "s"

    @property
    def range(self) -> str:
        """The values there are, for people."""
        return f"{self.low:g} to {self.high:.0f}"

    def read(self, name: str, raw: object) -> float:
        """Return the value; ValueError with the words for parameter ``name``."""
        value = math.nan
        if isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
            try:
                value = float(raw)
            except (ValueError, OverflowError):
                value = math.nan
        if not self.low <= value <= self.high:
            raise _expects(name, f"a value between {self.low:g} and {self.high:.0f} seconds")
        return value

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""
        return value


@dataclass(frozen=True, slots=True)
class Switch:
    """On or off."""

    unit: str = ""

    @property
    def range(self) -> str:
        """The values there are, for people."""
        return "on, off"

    def read(self, name: str, raw: object) -> bool:
        """Return the value; ValueError with the words for parameter ``name``."""
        if isinstance(raw, str) and raw in _SWITCHES:
            return _SWITCHES[raw]
        if not isinstance(raw, bool):
            raise _invalid_type(name, "boolean (as text: on or off)")
        return raw

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""
        return value


@dataclass(frozen=True, slots=True)
class Choice(Generic[Chosen]):
    """One of an enumeration's names."""

    names: type[Chosen]
    unit: str = ""

    @property
    def range(self) -> str:
        """The values there are, for people."""
        return ", ".join(self.names)

    def read(self, name: str, raw: object) -> Chosen:
        """Return the value; ValueError with the words for parameter ``name``."""
        if not isinstance(raw, str):
            raise _invalid_type(name, "string")
        try:
            return self.names(raw)
        except ValueError:
            raise ValueError(
                f"Parameter '{name}' does not accept value '{raw}' (there are {self.range})"
            ) from None

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Text:
    """Any text; QMP's null resets it to none."""

    unit: str = ""

    @property
    def range(self) -> str:
        """The values there are, for people."""
        return "any text"

    def read(self, name: str, raw: object) -> str:
        """Return the value; ValueError with the words for parameter ``name``."""
        if raw is None:
            return ""
        if not isinstance(raw, str):
            raise _invalid_type(name, "StrOrNull")
        return raw

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""
        return value


@dataclass(frozen=True, slots=True)
class BitmapMapping:
    """QMP's list of BitmapMigrationNodeAlias."""

    unit: str = ""

    @property
    def range(self) -> str:
        """The values there are, for people."""
        return "a list of nodes"

    def read(self, name: str, raw: object) -> tuple[NodeAlias, ...]:
        """Return the value; ValueError with the words for parameter ``name``."""
        return read_mapping(name, raw)

    def to_qmp(self, value: object) -> object:
        """Return the value as JSON has it."""
        return [node.to_qmp() for node in value] if isinstance(value, tuple) else None


def _power(number: int) -> str:
    """A number for people: those past 32 bits as powers of two."""
    for exponent in (32, 63, 64):
        if number == 1 << exponent:
            return f"2^{exponent}"
        if number == (1 << exponent) - 1:
            return f"2^{exponent}-1"
    return str(number)
