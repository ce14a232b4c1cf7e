"""Arrays: of numbers and of structs, of fixed and of variable length, of pointers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mig.savevm.vmstate import access
from mig.savevm.vmstate.describe import JsonObject, entry, numbers_in_array
from mig.savevm.vmstate.description import Description
from mig.savevm.vmstate.elements import Element, Integer, Scalar
from mig.savevm.vmstate.fields import Field, ScalarField, known_count
from mig.savevm.vmstate.limits import MAX_ELEMENTS
from mig.savevm.vmstate.streams import StateReader, StateWriter
from mig.savevm.vmstate.structs import StructElement

#: what an array consists of: a class of field (UInt8), a description, or an Element
ElementKind = type[ScalarField] | Description | Element
_NULL = Integer("nullptr", "B")
_NULL_MARK, _VALID_MARK = 0x30, 0x31


def element_of(kind: ElementKind) -> Element:
    """Return how one element goes over the wire."""
    if isinstance(kind, Description):
        return StructElement(kind)
    return kind if isinstance(kind, Element) else kind.element


class Array(Field):
    """Elements of one kind.

    count:   how many; or rows and columns and so on, then the value is a sequence of sequences; or
             the attribute of the state that says how many
    times:   the attribute counts groups of so many
    start:   of the first in the sequence that the state has, which keeps the others
    maximum: elements that an attribute may say

    What is loaded goes into the sequence that the state has. A list gets as long as what is loaded;
    a bytearray, an array or a numpy array keeps its length, and may be longer than what an
    attribute says. A tuple, bytes or nothing become a new tuple, bytes or list.
    """

    def __init__(
        self,
        name: str,
        kind: ElementKind,
        count: int | tuple[int, ...] | str,
        *,
        times: int = 1,
        start: int = 0,
        maximum: int = MAX_ELEMENTS,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self._element = element_of(kind)
        self._shape = count if isinstance(count, tuple) else ()
        if len(self._shape) > 1 and start:
            raise ValueError(f"field '{name}': a part of an array has one dimension")
        self._count = math.prod(count) if isinstance(count, tuple) else count
        self._times = times
        self._start = start
        self._maximum = maximum

    @property
    def alike(self) -> bool:
        """Whether it looks the same in all elements of an array of structs."""
        return super().alike and self._element.alike

    def _length(self, state: Any) -> int:
        return known_count(self._count, state, self._maximum // self._times) * self._times

    # ---- saving -----------------------------------------------------------------------------

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write all elements; DeviceStateError unless there are as many."""
        value = self.value(out, state)
        try:
            length = self._length(state)
            values = self._values(value, length)
        except (TypeError, ValueError) as error:
            raise out.error(str(error)) from error
        self._put_all(out, name, values, described)

    def _values(self, value: Any, length: int) -> Sequence[Any]:
        """The elements to be sent; ValueError unless there are as many."""
        if len(self._shape) > 1:
            return _flatten(value, self._shape)
        end = self._start + length
        exact = not self._start and not (access.is_fixed(value) and isinstance(self._count, str))
        if len(value) < end or (exact and len(value) != end):
            raise ValueError(f"{len(value)} elements, not {end}")
        # a deque has no slices
        values = value if len(value) == length else [value[i] for i in range(self._start, end)]
        return list(values)

    def _put_all(
        self, out: StateWriter, name: str, values: Sequence[Any], described: list[JsonObject]
    ) -> None:
        element, alike = self._element, self.when is None and self._element.alike
        if isinstance(element, Scalar) and alike:
            element.put_many(out, values)
            if values:
                array = [("array_len", len(values))] if len(values) > 1 else []
                described.append(
                    entry(name, element.type_name, JsonObject(), element.nbytes, array=array)
                )
            return
        found: list[tuple[Element, JsonObject, int]] = []
        for i, value in enumerate(values):
            body, start = JsonObject(), out.nbytes
            with out.at(f"[{i}]"):
                element.put(out, value, body)
            nbytes = out.nbytes - start
            if alike and found and nbytes == found[0][2]:
                body = found[0][1]  # what thousands of elements say need not be kept
            found.append((element, body, nbytes))
        describe_elements(out, name, found, described, alike=alike)

    # ---- loading ----------------------------------------------------------------------------

    def load(self, source: StateReader, state: Any) -> None:
        """Read all elements."""
        at = source.reader.offset
        old = access.get(state, self.attribute)
        try:
            length = self._length(state)
        except ValueError as error:
            raise source.error(str(error)) from error
        values = self._get_all(source, old, state, length)
        self.fill(source, state, at, lambda old: self._refilled(old, values))

    def _refilled(self, old: Any, values: list[Any]) -> Any:
        if len(self._shape) > 1:
            return _nest(old, values, self._shape)
        return access.refill(old, values, self._start)

    def _get_all(self, source: StateReader, old: Any, state: Any, length: int) -> list[Any]:
        element = self._element
        if isinstance(element, Scalar):
            return element.get_many(source, length)
        mine = self._old_values(old, length)
        values = []
        for i in range(length):
            with source.at(f"[{i}]"):
                values.append(element.get(source, mine[i] if i < len(mine) else None, state))
        return values

    def _old_values(self, old: Any, length: int) -> Sequence[Any]:
        """The elements that the state has, in the order of the stream; as many as there are."""
        if not hasattr(old, "__len__"):
            return ()  # None, or what a state has until it is loaded
        if len(self._shape) > 1:
            return _flatten(old, self._shape)
        return [old[i] for i in range(self._start, min(len(old), self._start + length))]


class PointerArray(Array):
    """An array whose elements may be None, which is one byte on the wire.

    marked: each element is preceded by a byte that says whether it is None. Without, who loads must
            have None in the same places, as with QEMU up to 10.0
    """

    def __init__(
        self,
        name: str,
        kind: ElementKind,
        count: int | str,
        *,
        marked: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(name, kind, count, **options)
        self._marked = marked

    def _put_all(
        self, out: StateWriter, name: str, values: Sequence[Any], described: list[JsonObject]
    ) -> None:
        found: list[tuple[Element, JsonObject, int]] = []
        for i, value in enumerate(values):
            body, start = JsonObject(), out.nbytes
            with out.at(f"[{i}]"):
                if value is None:
                    out.put(bytes([_NULL_MARK]))
                    found.append((_NULL, body, 1))
                    continue
                if self._marked:
                    out.put(bytes([_VALID_MARK]))
                    found.append((_NULL, JsonObject(), 1))
                    start += 1
                self._element.put(out, value, body)
                found.append((self._element, body, out.nbytes - start))
        if self._marked:
            described += [
                entry(
                    name,
                    "ptr-marker" if element is _NULL else element.type_name,
                    body,
                    nbytes,
                    nested=element.nested,
                )
                for element, body, nbytes in found
            ]
            return
        alike = self.when is None and self._element.alike
        describe_elements(out, name, found, described, alike=alike)

    @property
    def alike(self) -> bool:
        """Whether it looks the same in all elements of an array of structs."""
        return super().alike and not self._marked

    def _get_all(self, source: StateReader, old: Any, state: Any, length: int) -> list[Any]:
        mine = list(self._old_values(old, length))
        if not self._marked and len(mine) < length:
            raise source.error(f"which of {length} pointers are None? The state has {len(mine)}")
        mine += [None] * (length - len(mine))
        values = []
        for i, present in enumerate(mine):
            with source.at(f"[{i}]"):
                values.append(self._get_one(source, present, state))
        return values

    def _get_one(self, source: StateReader, old: Any, state: Any) -> Any:
        at = source.reader.offset
        if self._marked or old is None:
            mark = source.read(1)[0]
            if mark == _NULL_MARK:
                return None
            if not self._marked:
                raise source.error(
                    "expected VMS_NULLPTR_MARKER: this pointer is None here", offset=at
                )
            if mark != _VALID_MARK:
                raise source.error(f"{mark:#04x} does not tell whether it is None", offset=at)
        return self._element.get(source, old, state)


def describe_elements(
    out: StateWriter,
    name: str,
    found: Sequence[tuple[Element, JsonObject, int]],
    described: list[JsonObject],
    *,
    alike: bool,
) -> None:
    """Append what is said of an array: of the first of a run of like ones, or of each.

    QEMU describes the first also where others are longer: its own sizes are wrong then, and who
    goes by them does not find the next device. Here they are right.
    """
    runs: list[list[tuple[Element, JsonObject, int]]] = []
    for item in found:
        if runs and runs[-1][0][0] is item[0]:
            runs[-1].append(item)
        else:
            runs.append([item])
    i = 0
    for run in runs:
        element, body, nbytes = run[0]
        if alike and all(item[2] == nbytes for item in run):
            array = [("array_len", len(run))] if len(run) > 1 else []
            described.append(
                entry(name, element.type_name, body, nbytes, nested=element.nested, array=array)
            )
            i += len(run)
            continue
        for element, body, nbytes in run:
            numbered = numbers_in_array(out.dialect, i, len(found))
            array = [("index", i)] if numbered else []
            described.append(
                entry(name, element.type_name, body, nbytes, nested=element.nested, array=array)
            )
            i += 1


def _flatten(value: Any, shape: tuple[int, ...]) -> list[Any]:
    """The elements row by row; ValueError where a row has another length."""
    if len(value) != shape[0]:
        raise ValueError(f"{len(value)} elements, not {shape[0]}")
    if len(shape) == 1:
        return list(value)
    return [element for row in value for element in _flatten(row, shape[1:])]


def _nest(old: Any, values: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """The elements as rows, in those that are there."""
    if len(shape) == 1:
        return access.refill(old, values)
    step = len(values) // shape[0]
    rows = []
    for i in range(shape[0]):
        has_row = hasattr(old, "__len__") and i < len(old)
        part = values[i * step : (i + 1) * step]
        rows.append(_nest(old[i] if has_row else access.MISSING, part, shape[1:]))
    # the rows of a numpy array are views of it, and filled
    return old if access.is_fixed(old) else access.refill(old, rows)
