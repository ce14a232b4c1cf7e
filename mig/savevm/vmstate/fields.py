"""Fields of one value: numbers, buffers, bitmaps, timers, padding, and what only checks."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from mig.savevm.vmstate import access, elements
from mig.savevm.vmstate.describe import JsonObject, entry
from mig.savevm.vmstate.elements import Scalar
from mig.savevm.vmstate.limits import MAX_BUFFER, MAX_ELEMENTS
from mig.savevm.vmstate.streams import StateReader, StateWriter
from mig.stream.reader import StreamReader

#: when(state, version_id): whether a field is in the stream
Predicate = Callable[[Any, int], bool]
#: how many: a number, or the attribute of the state that knows
Count = int | str


class Field(ABC):
    """One entry of a description.

    name:      as the VMDESCRIPTION has it
    since:     version that it is in the stream from; what is older is loaded without
    when:      says instead whether it is there, called with state and version
    attribute: where the state has it, if not by its name; dots lead to attributes of attributes
    """

    must_exist: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        *,
        since: int = 0,
        when: Predicate | None = None,
        attribute: str | None = None,
    ) -> None:
        if when is not None and since:
            raise ValueError(f"field '{name}': `when` alone decides, it is given the version too")
        self.name = name
        self.since = since
        self.when = when
        self.attribute = attribute or name

    def exists(self, state: Any, version_id: int) -> bool:
        """Whether a stream of this version has it; matches vmstate_field_exists()."""
        if self.when is not None:
            return bool(self.when(state, version_id))
        return self.since <= version_id

    @property
    def alike(self) -> bool:
        """Whether it looks the same in all elements of an array of structs."""
        return self.when is None

    @abstractmethod
    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write it, and append what is said of it, under ``name``."""

    @abstractmethod
    def load(self, source: StateReader, state: Any) -> None:
        """Read it into the state."""

    # ---- the state --------------------------------------------------------------------------

    def value(self, out: StateWriter, state: Any) -> Any:
        """Return what the state has; DeviceStateError if nothing."""
        found = access.get(state, self.attribute)
        if found is access.MISSING:
            raise out.error(f"the state has no '{self.attribute}'")
        return found

    def store(self, source: StateReader, state: Any, value: Any, at: int) -> None:
        """Set it; MismatchError, with the offset ``at``, where the state does not take it."""
        try:
            access.put(state, self.attribute, value)
        except access.REFUSALS as error:
            reason = f"the state does not take {access.shown(value)}: {error}"
            raise source.error(reason, offset=at) from error

    def fill(self, source: StateReader, state: Any, at: int, fill: Callable[[Any], Any]) -> None:
        """Set what ``fill`` returns for what the state has, unless that is the same object."""
        old = access.get(state, self.attribute)
        try:
            new = fill(old)
            if new is not old:
                access.put(state, self.attribute, new)
        except access.REFUSALS as error:
            raise source.error(f"the state does not take it: {error}", offset=at) from error


def known_count(count: Count, state: Any, maximum: int) -> int:
    """Return how many; ValueError if nobody knows, or past the limit."""
    if isinstance(count, int):
        return count
    try:
        found = operator.index(access.get(state, count))
    except TypeError:
        raise ValueError(f"'{count}', which says how many, is no number") from None
    if not 0 <= found <= maximum:
        raise ValueError(f"{access.shown(found)} of '{count}': 0 to {maximum} can be")
    return found


# ---- numbers ---------------------------------------------------------------------------------


class ScalarField(Field):
    """One value of fixed width."""

    element: ClassVar[Scalar]

    @property
    def type_name(self) -> str:
        """What the VMDESCRIPTION calls it."""
        return self.element.type_name

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write the value; DeviceStateError if it does not fit."""
        body = JsonObject()
        self.element.put(out, self.value(out, state), body)
        described.append(entry(name, self.type_name, body, self.element.nbytes))

    def load(self, source: StateReader, state: Any) -> None:
        """Read the value."""
        at = source.reader.offset
        value = self.element.get(source, access.MISSING, state)
        self.store(source, state, self.accept(source, state, value, at), at)

    def accept(self, source: StateReader, state: Any, value: Any, at: int) -> Any:
        """Return the value to keep; MismatchError to refuse it."""
        return value


class _Comparable(ScalarField):
    """A number that may have to be the same on both sides.

    equal: what is received must be what the state already has (VMSTATE_*_EQUAL)
    hint:  said when it is not
    """

    equal_name: ClassVar[str]

    def __init__(self, name: str, *, equal: bool = False, hint: str = "", **options: Any) -> None:
        super().__init__(name, **options)
        self._equal = equal
        self._hint = hint

    @property
    def type_name(self) -> str:
        """What the VMDESCRIPTION calls it."""
        return self.equal_name if self._equal else self.element.type_name

    def accept(self, source: StateReader, state: Any, value: Any, at: int) -> Any:
        """MismatchError unless it is the same, if it must be."""
        mine = access.get(state, self.attribute)
        if self._equal and mine != value:
            hint = f"; {self._hint}" if self._hint else ""
            raise source.error(f"{self._hex(mine)} != {self._hex(value)}{hint}", offset=at)
        return value

    def _hex(self, value: Any) -> str:
        bits = 8 * self.element.nbytes
        return f"{value & ((1 << bits) - 1):x}" if isinstance(value, int) else "nothing"


class Int8(ScalarField):
    """8 bits, signed."""

    element = elements.INT8


class Int16(ScalarField):
    """16 bits, signed."""

    element = elements.INT16


class Int32(_Comparable):
    """32 bits, signed.

    at_most: what is received must be 0 to what the state already has (VMSTATE_INT32_POSITIVE_LE)
    """

    element = elements.INT32
    equal_name = "int32 equal"

    def __init__(self, name: str, *, at_most: bool = False, **options: Any) -> None:
        super().__init__(name, **options)
        self._at_most = at_most

    @property
    def type_name(self) -> str:
        """What the VMDESCRIPTION calls it."""
        return "int32 le" if self._at_most else super().type_name

    def accept(self, source: StateReader, state: Any, value: Any, at: int) -> Any:
        """MismatchError if it is more than it may be."""
        mine = access.get(state, self.attribute)
        if self._at_most and not (isinstance(mine, int) and 0 <= value <= mine):
            raise source.error(
                f"Invalid value {value} expecting positive value <= {mine}", offset=at
            )
        return super().accept(source, state, value, at)


class Int64(ScalarField):
    """64 bits, signed."""

    element = elements.INT64


class UInt8(_Comparable):
    """8 bits."""

    element = elements.UINT8
    equal_name = "uint8 equal"


class UInt16(_Comparable):
    """16 bits."""

    element = elements.UINT16
    equal_name = "uint16 equal"


class UInt32(_Comparable):
    """32 bits."""

    element = elements.UINT32
    equal_name = "uint32 equal"


class UInt64(_Comparable):
    """64 bits."""

    element = elements.UINT64
    equal_name = "int64 equal"  # QEMU's name for it


class Bool(ScalarField):
    """One byte; any but 0 is true."""

    element = elements.BOOL


class Float64(ScalarField):
    """A float's 64 bits."""

    element = elements.FLOAT64


class CpuDouble(ScalarField):
    """A float's 64 bits, as registers of a CPU have them (CPU_DoubleU)."""

    element = elements.CPU_DOUBLE


class Timer(ScalarField):
    """When a timer expires, in nanoseconds; None while it does not run."""

    element = elements.TIMER


# ---- bytes -----------------------------------------------------------------------------------


class Buffer(Field):
    """Bytes: ``nbytes`` of them, or as many as an attribute of the state says.

    times:   the attribute counts units of so many bytes
    start:   of these bytes in the buffer that the state has, which keeps what is around them
    maximum: bytes that an attribute may say

    What is loaded goes into the buffer that the state has (bytearray, memoryview, numpy array); in
    place of bytes, or nothing, it has bytes.
    """

    def __init__(
        self,
        name: str,
        nbytes: Count,
        *,
        times: int = 1,
        start: int = 0,
        maximum: int = MAX_BUFFER,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self._nbytes = nbytes
        self._times = times
        self._start = start
        self._maximum = maximum

    def _length(self, state: Any) -> int:
        return known_count(self._nbytes, state, self._maximum // self._times) * self._times

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write the bytes; DeviceStateError unless there are as many."""
        value = self.value(out, state)
        try:
            nbytes = self._length(state)
            data = memoryview(value).cast("B")
        except (TypeError, ValueError) as error:
            raise out.error(str(error)) from error
        end = self._start + nbytes
        exact = not self._start and not (access.is_fixed(value) and isinstance(self._nbytes, str))
        if len(data) < end or (exact and len(data) != end):
            raise out.error(f"{len(data)} bytes, not {end}")
        out.put(data[self._start : end])
        described.append(entry(name, "buffer", JsonObject(), nbytes))

    def load(self, source: StateReader, state: Any) -> None:
        """Read the bytes."""
        at = source.reader.offset
        try:
            nbytes = self._length(state)
        except ValueError as error:
            raise source.error(str(error)) from error
        data = source.read(nbytes)
        self.fill(source, state, at, lambda old: access.refill_bytes(old, data, self._start))


class Unused(Field):
    """Bytes that mean nothing any more: zeros are sent, anything is taken.

    count: so many times; an attribute of the state, usually
    """

    def __init__(
        self, nbytes: int, *, count: Count = 1, name: str = "unused", **options: Any
    ) -> None:
        super().__init__(name, **options)
        self._nbytes = nbytes
        self._count = count

    def _times(self, state: Any) -> int:
        return known_count(self._count, state, MAX_BUFFER // max(1, self._nbytes))

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write zeros."""
        try:
            count = self._times(state)
        except ValueError as error:
            raise out.error(str(error)) from error
        out.put(bytes(count * self._nbytes))
        if count:
            array = [("array_len", count)] if count > 1 else []
            described.append(entry(name, "unused_buffer", JsonObject(), self._nbytes, array=array))

    def load(self, source: StateReader, state: Any) -> None:
        """Read over them."""
        try:
            source.read(self._times(state) * self._nbytes)
        except ValueError as error:
            raise source.error(str(error)) from error


class Bitmap(Field):
    """``nbits`` bits, or as many as an attribute says: an int, whose bit 0 is the first.

    On the wire they are 64-bit words, the first of them that with bit 0.
    """

    def __init__(
        self, name: str, nbits: Count, *, maximum: int = 8 * MAX_ELEMENTS, **options: Any
    ) -> None:
        super().__init__(name, **options)
        self._nbits = nbits
        self._maximum = maximum

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write the words; DeviceStateError for bits that are not in it."""
        value = self.value(out, state)
        try:
            nbits = known_count(self._nbits, state, self._maximum)
        except ValueError as error:
            raise out.error(str(error)) from error
        if not isinstance(value, int) or value < 0 or value.bit_length() > nbits:
            raise out.error(f"{access.shown(value)} is no bitmap of {nbits} bits")
        nwords = -(-nbits // 64)
        words = value.to_bytes(8 * nwords, "little")
        out.put(_swap_words(words))
        described.append(entry(name, "bitmap", JsonObject(), 8 * nwords))

    def load(self, source: StateReader, state: Any) -> None:
        """Read the words."""
        at = source.reader.offset
        try:
            nbits = known_count(self._nbits, state, self._maximum)
        except ValueError as error:
            raise source.error(str(error)) from error
        words = _swap_words(source.read(8 * -(-nbits // 64)))
        # bits behind the last are nobody's
        value = int.from_bytes(words, "little") & ((1 << nbits) - 1)
        self.store(source, state, value, at)


def _swap_words(data: bytes) -> bytes:
    out = bytearray(len(data))
    for i in range(8):
        out[i::8] = data[7 - i :: 8]
    return bytes(out)


# ---- the owner's own -------------------------------------------------------------------------


class Custom(Field):
    """What no other field can say.

    type_name: what the VMDESCRIPTION calls it
    save:      called with the state, returns bytes
    load:      called with the state and a StreamReader, takes as many from it; MismatchError or
               ValueError to refuse them
    """

    def __init__(
        self,
        name: str,
        type_name: str,
        *,
        save: Callable[[Any], bytes],
        load: Callable[[Any, StreamReader], object],
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self._type_name = type_name
        self._save = save
        self._load = load

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write what the owner returns."""
        data = self._save(state)
        out.put(data)
        described.append(entry(name, self._type_name, JsonObject(), len(data)))

    def load(self, source: StateReader, state: Any) -> None:
        """Have the owner read it."""
        at = source.reader.offset
        try:
            self._load(state, source.reader)
        except ValueError as error:
            raise source.error(str(error), offset=at) from error


class Validate(Field):
    """Nothing on the wire: ``test(state, version_id)`` must hold for what was loaded before it."""

    must_exist = True

    def __init__(self, name: str, test: Predicate) -> None:
        super().__init__(name, when=test)

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write nothing."""

    def load(self, source: StateReader, state: Any) -> None:
        """Read nothing."""
