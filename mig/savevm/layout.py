"""The VMDESCRIPTION as a tree: which fields each device wrote, in order, of which type and size.

`mig.savevm.vmdesc` reads of the same JSON only how long each device is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from mig.savevm.vmdesc import DescriptionError

#: deepest nesting of states (structs, subsections) in one device
MAX_NESTING: Final = 64
#: most bytes of one field, and most elements of one array
MAX_FIELD: Final = 1 << 32

# where a state is written once for each element of a list, its keys come again in one JSON object
_STATE_KEYS: Final = ("vmsd_name", "version", "fields", "subsections")
_REPEATED: Final = "\0repeated"


@dataclass(frozen=True, slots=True)
class FieldLayout:
    """One entry of a state's fields.

    nbytes:    of one element
    array_len: number of elements that are alike and described once, None for a single entry
    index:     of the element that this entry describes, None when it describes no element
    states:    what it consists of: of a struct one, of a list one for each element
    """

    name: str
    type: str
    nbytes: int
    array_len: int | None = None
    index: int | None = None
    states: tuple[StateLayout, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all elements."""
        return self.nbytes * (1 if self.array_len is None else self.array_len)


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What vmstate_save_state() wrote: fields, then subsections."""

    vmsd_name: str
    version_id: int
    fields: tuple[FieldLayout, ...] = ()
    subsections: tuple[StateLayout, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """One device. ``old_style``: it wrote bytes by code of its own; one buffer describes them."""

    idstr: str
    instance_id: int
    state: StateLayout
    old_style: bool = False


@dataclass(frozen=True, slots=True)
class MachineLayout:
    """A whole description.

    configuration: of the configuration section (since QEMU 9.0), None when it is not described
    page_size:     of the target, in bytes; None when it is not said
    """

    devices: tuple[DeviceLayout, ...]
    configuration: StateLayout | None = None
    page_size: int | None = None
    _by_key: dict[tuple[str, int], DeviceLayout] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read the JSON; DescriptionError when it is no description."""
        try:
            data = json.loads(text, object_pairs_hook=_keep_repeated)
            devices = tuple(_device(entry) for entry in data["devices"])
            configuration = data.get("configuration")
            page_size = data.get("page_size")
            return cls(
                devices,
                None if configuration is None else _state(configuration, 0),
                None if page_size is None else _number(page_size, "page_size"),
                {(d.idstr, d.instance_id): d for d in reversed(devices)},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DescriptionError(f"not a machine description: {error!r}") from error

    def device(self, idstr: str, instance_id: int) -> DeviceLayout | None:
        """Return the description of a section, None when there is none."""
        return self._by_key.get((idstr, instance_id))


def _keep_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; where keys of a state come more than once, all states that they make."""
    out = dict(pairs)
    if len(out) == len(pairs):
        return out
    states: list[dict[str, Any]] = []
    for key, value in pairs:
        if key not in _STATE_KEYS:
            continue
        if key == "vmsd_name" or not states:
            states.append({})
        states[-1][key] = value
    out[_REPEATED] = states
    return out


def _device(entry: dict[str, Any]) -> DeviceLayout:
    return DeviceLayout(
        _text(entry["name"], "name"),
        _number(entry["instance_id"], "instance_id"),
        _state(entry, 0),
        "vmsd_name" not in entry,
    )


def _state(entry: dict[str, Any], depth: int) -> StateLayout:
    if depth > MAX_NESTING:
        raise ValueError(f"states nested deeper than {MAX_NESTING}")
    return StateLayout(
        _text(entry.get("vmsd_name", ""), "vmsd_name"),
        _number(entry.get("version", 0), "version"),
        tuple(_field(item, depth) for item in _list(entry, "fields")),
        tuple(_state(item, depth + 1) for item in _list(entry, "subsections")),
    )


def _field(entry: dict[str, Any], depth: int) -> FieldLayout:
    array_len, index = entry.get("array_len"), entry.get("index")
    if "struct" in entry:
        states = [entry["struct"]]
    elif _REPEATED in entry:
        states = entry[_REPEATED]
    else:
        # lists and states behind a type of their own stand in the entry itself
        states = [entry] if "fields" in entry else []
    return FieldLayout(
        _text(entry["name"], "name"),
        _text(entry.get("type", ""), "type"),
        _number(entry["size"], "size"),
        None if array_len is None else _number(array_len, "array_len"),
        None if index is None else _number(index, "index"),
        tuple(_state(item, depth + 1) for item in states),
    )


def _list(entry: dict[str, Any], key: str) -> Sequence[Any]:
    value = entry.get(key, ())
    if not isinstance(value, list | tuple):
        raise TypeError(f"{key} is no list")
    return value


def _number(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_FIELD:
        raise ValueError(f"{what} is {value!r:.40}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is no string")
    return value
