"""What a device says of itself in the VMDESCRIPTION, in the order in which QEMU's JSON has it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

#: QEMU whose way of describing is followed where nothing else is said
DEFAULT_DIALECT: Final = (10, 0)


class JsonObject:
    """A JSON object that keeps its order, and every key however often it comes.

    QEMU writes the elements of a queue as if they were one, so keys do come again.
    """

    __slots__ = ("pairs",)

    def __init__(self, *pairs: tuple[str, Any]) -> None:
        self.pairs = list(pairs)

    def add(self, key: str, value: Any) -> None:
        """Append a pair; values are str, int, lists and JsonObjects."""
        self.pairs.append((key, value))

    def text(self) -> str:
        """Return the JSON as QEMU writes it: ``{"a": 1, "b": [2]}``."""
        return _text(self)


def _text(value: Any) -> str:
    if isinstance(value, JsonObject):
        return "{" + ", ".join(f"{json.dumps(k)}: {_text(v)}" for k, v in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)


def numbers_in_array(dialect: tuple[int, int], i: int, length: int) -> bool:
    """Whether element ``i`` of an array that is described one by one has its number.

    Up to QEMU 9 each has, since 10.0 all but the last; an array of one never.
    """
    return length > 1 and (dialect < (10, 0) or i < length - 1)


def entry(
    name: str,
    type_name: str,
    body: JsonObject,
    nbytes: int,
    *,
    nested: bool = False,
    array: Iterable[tuple[str, int]] = (),
) -> JsonObject:
    """Return what is said of a field, or of one element of it.

    body:   what its contents said of themselves
    nested: whether they stand in an object of their own, as structs do
    array:  `array_len` or `index`, where it is an array
    """
    out = JsonObject(("name", name), *array, ("type", type_name))
    if nested:
        out.add("struct", body)
    else:
        out.pairs += body.pairs
    out.add("size", nbytes)
    return out
