"""Device state as values: a section's payload, read by its description.

device = decode_device(section, MachineLayout.parse(state.description))
device["env.regs"][0], device["env.segs[1].base"]
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, TypeAlias

from mig.errors import StreamError, TruncatedError
from mig.savevm.devices import DeviceSection, DeviceState
from mig.savevm.layout import FieldLayout, MachineLayout, StateLayout
from mig.savevm.types import NULLPTR_MARKER, TIMER_IDLE, FieldType, Shape, field_type
from mig.wire import SectionType

#: most values (integers, structs, elements) of one device; buffers are one each
MAX_VALUES: Final = 4 << 20

Value: TypeAlias = "int | float | bool | str | bytes | State | tuple[Value, ...] | None"

_CODES: Final = {1: "b", 2: "h", 4: "i", 8: "q"}
_U32 = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    type:   QEMU's name of it
    offset: of its first byte in the device's payload; nbytes: of all of it
    value:  int, bool, float, bytes, str, a `State`; of an array a tuple of these; None is a null
            pointer, or a timer that is not armed
    """

    name: str
    type: str
    offset: int
    nbytes: int
    value: Value


@dataclass(frozen=True, slots=True)
class State:
    """What a device, a struct or a subsection wrote: its fields and subsections, in order.

    Names of fields are QEMU's; those of subsections are their vmsd_name, which holds a "/".
    """

    vmsd_name: str
    version_id: int
    fields: tuple[Field, ...]
    subsections: tuple[State, ...] = ()

    def __getitem__(self, path: str) -> Value:
        """Return the value at ``name``, ``name[i]``, ``name.name``, ...; KeyError."""
        value = self._find(path)
        if isinstance(value, _Nothing):
            raise KeyError(path)
        return value

    def get(self, path: str, default: Value = None) -> Value:
        """Return the value at a path, or the default when there is none."""
        value = self._find(path)
        return default if isinstance(value, _Nothing) else value

    def __contains__(self, path: str) -> bool:
        return not isinstance(self._find(path), _Nothing)

    def _find(self, path: str) -> Value | _Nothing:
        # names hold dots and brackets themselves
        for name, value in self._named():
            if path.startswith(name):
                found = _follow(value, path[len(name) :])
                if not isinstance(found, _Nothing):
                    return found
        return _NOTHING

    def _named(self) -> Iterator[tuple[str, Value]]:
        for item in self.fields:
            yield item.name, item.value
        for sub in self.subsections:
            yield sub.vmsd_name, sub


class _Nothing:
    """Says that there is no such field, which None does not."""


_NOTHING: Final = _Nothing()


def _follow(value: Value, rest: str) -> Value | _Nothing:
    """The value at the rest of a path: nothing, ``[i]...`` or ``.name...``."""
    if not rest:
        return value
    if rest[0] == "[" and isinstance(value, tuple):
        number, bracket, rest = rest[1:].partition("]")
        if bracket and number.isdecimal() and len(number) < 10 and int(number) < len(value):
            return _follow(value[int(number)], rest)
    elif rest[0] == "." and isinstance(value, State):
        return value._find(rest[1:])
    return _NOTHING


@dataclass(frozen=True, slots=True)
class Device:
    """One device section, its state as values.

    state: None when the stream does not describe it
    """

    section: DeviceSection
    state: State | None

    @property
    def idstr(self) -> str:
        """Name of the section."""
        return self.section.idstr

    @property
    def instance_id(self) -> int:
        """Which of the sections of that name."""
        return self.section.instance_id

    @property
    def version_id(self) -> int:
        """Version of the section."""
        return self.section.version_id

    def __getitem__(self, path: str) -> Value:
        """Return the value at a path, such as ``env.segs[1].base``; KeyError."""
        if self.state is None:
            raise KeyError(path)
        return self.state[path]

    def get(self, path: str, default: Value = None) -> Value:
        """Return the value at a path, or the default when there is none."""
        return default if self.state is None else self.state.get(path, default)


def decode_device(section: DeviceSection, layout: MachineLayout, *, base: int = 0) -> Device:
    """Return the section's values; StreamError when it is not as described.

    base: stream offset of the device state that the section is in, for errors
    """
    described = layout.device(section.idstr, section.instance_id)
    if described is None:
        return Device(section, None)
    state = described.state
    decoder = _Decoder(section.payload, section.idstr, base + section.payload_offset)
    # an old-style device's version is in its section only
    if not described.old_style and state.version_id != section.version_id:
        raise decoder.error(
            f"version {section.version_id}, where the description says {state.version_id}"
        )
    values = decoder.state(state)
    if decoder.at != len(section.payload):
        raise decoder.error(f"{len(section.payload) - decoder.at} bytes that nothing describes")
    return Device(section, values)


def decode_devices(state: DeviceState) -> tuple[Device, ...]:
    """Return all devices of a state; StreamError, or ValueError when it was not cut into devices.

    Where there is no description their `Device.state` is None.
    """
    if state.sections is None:
        raise ValueError("the device state is one piece")
    layout = MachineLayout.parse(state.description) if state.description else MachineLayout(())
    return tuple(decode_device(section, layout, base=state.offset) for section in state.sections)


def decode_state(layout: StateLayout, payload: bytes, *, section: str, offset: int = 0) -> State:
    """Return the values of a state that stands alone, such as the configuration; StreamError.

    Bytes behind it are left alone.
    """
    return _Decoder(payload, section, offset).state(layout)


class _Decoder:
    """A cursor over one payload. base: stream offset of its first byte."""

    def __init__(self, payload: bytes, idstr: str, base: int) -> None:
        self._payload = payload
        self._idstr = idstr
        self._base = base
        self._left = MAX_VALUES
        self.at = 0

    def error(self, message: str, at: int | None = None) -> StreamError:
        offset = self._base + (self.at if at is None else at)
        return StreamError(message, offset=offset, section=self._idstr)

    def _spend(self, nvalues: int) -> None:
        self._left -= nvalues
        if self._left < 0:
            raise self.error(f"more than {MAX_VALUES} values in one device")

    def _take(self, nbytes: int, what: str) -> bytes:
        start, end = self.at, self.at + nbytes
        if end > len(self._payload):
            raise TruncatedError(
                f"payload ends inside {what}", offset=self._base + start, section=self._idstr
            )
        self.at = end
        return self._payload[start:end]

    # ---- states -----------------------------------------------------------------------------

    def state(self, layout: StateLayout) -> State:
        """Read fields and subsections."""
        runs: list[list[Field]] = []
        for entry in layout.fields:
            item = self._field(entry)
            if runs and runs[-1][0].name == item.name:
                # elements of one array that are not alike are described one by one
                runs[-1].append(item)
            else:
                runs.append([item])
        fields = [run[0] if len(run) == 1 else _joined(run) for run in runs]
        subsections = tuple(self._subsection(sub) for sub in layout.subsections)
        return State(layout.vmsd_name, layout.version_id, tuple(fields), subsections)

    def _subsection(self, layout: StateLayout) -> State:
        start, what = self.at, f"subsection '{layout.vmsd_name}'"
        head = self._take(2, what)
        name = self._take(head[1], what)
        version: int = _U32.unpack(self._take(4, what))[0]
        if head[0] != SectionType.SUBSECTION or name != layout.vmsd_name.encode():
            raise self.error(f"{what} is described, but is not here", start)
        if version != layout.version_id:
            raise self.error(
                f"{what} is of version {version}, where the description says {layout.version_id}",
                start,
            )
        return self.state(layout)

    # ---- fields -----------------------------------------------------------------------------

    def _field(self, entry: FieldLayout) -> Field:
        start = self.at
        if start + entry.total > len(self._payload):
            raise TruncatedError(
                f"payload ends inside '{entry.name}', which is of {entry.total} bytes",
                offset=self._base + start,
                section=self._idstr,
            )
        kind = field_type(entry.type)
        if kind.nbytes not in (None, entry.nbytes):
            raise self.error(f"'{entry.name}' of type {entry.type} has {entry.nbytes} bytes")
        if entry.array_len is None:
            value = self._value(entry, kind)
            # what QEMU numbers is an array, of which this is one element
            value = value if entry.index is None else (value,)
        elif entry.nbytes == 0:
            # nothing bounds how many there are of these
            value = ()
        elif kind.shape in (Shape.SIGNED, Shape.UNSIGNED):
            value = self._integers(kind.shape, entry.nbytes, entry.array_len)
        else:
            value = tuple(self._value(entry, kind) for _ in range(entry.array_len))
        return Field(entry.name, entry.type, start, self.at - start, value)

    def _integers(self, shape: Shape, nbytes: int, count: int) -> tuple[int, ...]:
        self._spend(count)
        code = _CODES[nbytes]
        code = code if shape == Shape.SIGNED else code.upper()
        return struct.unpack(f">{count}{code}", self._take(nbytes * count, "an array"))

    def _value(self, entry: FieldLayout, kind: FieldType) -> Value:
        self._spend(1)
        start = self.at
        if entry.states and kind.shape in _NESTED:
            value = self._nested(entry, kind.shape)
            if self.at != start + entry.nbytes:
                raise self.error(
                    f"'{entry.name}' has {self.at - start} bytes, where the description says "
                    f"{entry.nbytes}",
                    start,
                )
            return value
        raw = self._take(entry.nbytes, f"'{entry.name}'")
        try:
            return self._leaf(raw, kind.shape)
        except ValueError as error:
            raise self.error(f"'{entry.name}': {error}", start) from error

    def _leaf(self, raw: bytes, shape: Shape) -> Value:
        """A value without parts; ValueError when these bytes are none."""
        if shape in (Shape.SIGNED, Shape.UNSIGNED):
            return int.from_bytes(raw, "big", signed=shape == Shape.SIGNED)
        if shape == Shape.BOOL:
            if raw[0] > 1:
                raise ValueError(f"{raw[0]} is no bool")
            return raw[0] == 1
        if shape == Shape.DOUBLE:
            number: float = struct.unpack(">d", raw)[0]
            return number
        if shape == Shape.TIME:
            expiry = int.from_bytes(raw, "big")
            return None if expiry == TIMER_IDLE else expiry
        if shape == Shape.NULL:
            if raw[0] != NULLPTR_MARKER:
                raise ValueError(f"{raw[0]:#x} does not mark a null pointer")
            return None
        if shape == Shape.TEXT:
            if not raw or raw[0] != len(raw) - 1:
                raise ValueError("not a counted string")
            return raw[1:].decode("ascii", "backslashreplace")
        if shape == Shape.FLOAT80:
            return int.from_bytes(raw[8:] + raw[:8], "big")
        size = {Shape.BITMAP: 8, Shape.WORDS: 4}.get(shape)
        if size is None or len(raw) % size:
            return raw
        self._spend(len(raw) // size)
        return struct.unpack(f">{len(raw) // size}{_CODES[size].upper()}", raw)

    # ---- states in fields -------------------------------------------------------------------

    def _nested(self, entry: FieldLayout, shape: Shape) -> Value:
        if shape == Shape.NESTED:
            return self.state(entry.states[0])
        if shape == Shape.QUEUE:
            return self._queue(entry)
        return self._tree(entry)

    def _queue(self, entry: FieldLayout) -> Value:
        """Elements, each behind a byte 1; a byte 0 ends them."""
        out: list[Value] = []
        for state in entry.states:
            self._mark(1, entry.name)
            out.append(self.state(state))
        self._mark(0, entry.name)
        return tuple(out)

    def _tree(self, entry: FieldLayout) -> Value:
        """Nodes as pairs of key and value. Keys are be64, or states like the values."""
        count: int = _U32.unpack(self._take(4, f"'{entry.name}'"))[0]
        states = iter(entry.states)
        if count and len(entry.states) not in (count, 2 * count):
            raise self.error(f"'{entry.name}' has {count} nodes, {len(entry.states)} are described")
        out: list[Value] = []
        for _ in range(count):
            self._mark(1, entry.name)
            if len(entry.states) == count:
                key: Value = int.from_bytes(self._take(8, f"'{entry.name}'"), "big")
            else:
                key = self.state(next(states))
            out.append((key, self.state(next(states))))
        self._mark(0, entry.name)
        return tuple(out)

    def _mark(self, expected: int, name: str) -> None:
        start = self.at
        found = self._take(1, f"'{name}'")[0]
        if found != expected:
            raise self.error(f"'{name}': {found:#x} where {expected:#x} is due", start)


_NESTED: Final = (Shape.NESTED, Shape.QUEUE, Shape.TREE)


def _joined(run: Sequence[Field]) -> Field:
    """The entries of one array as one field."""
    # an array of pointers may have null pointers, too
    name = next((item.type for item in run if item.type != "nullptr"), "nullptr")
    value = tuple(chain.from_iterable(_elements(item.value) for item in run))
    return Field(run[0].name, name, run[0].offset, sum(item.nbytes for item in run), value)


def _elements(value: Value) -> tuple[Value, ...]:
    return value if isinstance(value, tuple) else (value,)
