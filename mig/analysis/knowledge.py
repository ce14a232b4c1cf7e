"""What a target QEMU knows of devices: the output of its -dump-vmstate."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mig.errors import ChannelError, MigError

#: longest file (QEMU's have less than 1 MiB), and deepest nesting of descriptions
MAX_DUMP: Final = 256 << 20
_MAX_NESTING: Final = 64


@dataclass(frozen=True, slots=True)
class KnownField:
    """A field of a description.

    version_id:  of the first version that has it; conditional: a function of the device decides
    nbytes:      of an element in the device's memory, which for integers is that on the wire
    description: of what it consists of, None for a plain field
    """

    name: str
    version_id: int
    conditional: bool
    nbytes: int
    description: KnownState | None = None


@dataclass(frozen=True, slots=True)
class KnownState:
    """A VMStateDescription."""

    name: str
    version_id: int
    minimum_version_id: int
    fields: tuple[KnownField, ...]
    subsections: tuple[KnownState, ...]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """All of a dump.

    machine: the machine type it was made with
    states:  of device types, by the name of their description; several types may share a name
    """

    machine: str
    states: Mapping[str, tuple[KnownState, ...]]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Knowledge:
        """Read a file; ChannelError, or MigError when it is something else."""
        try:
            with Path(path).open("rb") as file:
                text = file.read(MAX_DUMP + 1)
        except OSError as error:
            raise ChannelError(f"{path}: {error.strerror or error}") from error
        if len(text) > MAX_DUMP:
            raise MigError(f"{path} is too long for what -dump-vmstate writes")
        try:
            return cls.parse(text)
        except ValueError as error:
            raise MigError(f"{path} is not what -dump-vmstate writes: {error}") from error

    @classmethod
    def parse(cls, text: bytes) -> Knowledge:
        """Read the JSON; ValueError when it is something else."""
        try:
            data = json.loads(text)
            machine = str(data.pop("vmschkmachine")["Name"])
            states: dict[str, dict[KnownState, None]] = {}
            for entry in data.values():
                if "Description" in entry:
                    state = _state(entry["Description"], 0)
                    states.setdefault(state.name, {})[state] = None
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(repr(error)) from error
        return cls(machine, {name: tuple(found) for name, found in states.items()})


def _state(entry: dict[str, Any], depth: int) -> KnownState:
    if depth > _MAX_NESTING:
        raise ValueError(f"descriptions nested deeper than {_MAX_NESTING}")
    return KnownState(
        str(entry["name"]),
        int(entry["version_id"]),
        int(entry["minimum_version_id"]),
        tuple(_field(item, depth) for item in entry.get("Fields", ())),
        tuple(_state(item, depth + 1) for item in entry.get("Subsections", ())),
    )


def _field(entry: dict[str, Any], depth: int) -> KnownField:
    described = entry.get("Description")
    return KnownField(
        str(entry["field"]),
        int(entry["version_id"]),
        bool(entry["field_exists"]),
        int(entry["size"]),
        None if described is None else _state(described, depth + 1),
    )
