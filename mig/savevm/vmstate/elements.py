"""What fields and arrays are made of: each class is one of QEMU's VMStateInfo."""

from __future__ import annotations

import operator
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mig.errors import DeviceStateError
from mig.savevm.vmstate.access import shown
from mig.savevm.vmstate.describe import JsonObject
from mig.savevm.vmstate.streams import StateReader, StateWriter


class Element(ABC):
    """How one value goes over the wire.

    type_name: what the VMDESCRIPTION calls it
    nested:    whether its contents stand in an object of their own there
    """

    type_name: str
    nested = False

    @property
    def alike(self) -> bool:
        """Whether all elements of an array may be described by the first."""
        return True

    @abstractmethod
    def put(self, out: StateWriter, value: Any, body: JsonObject) -> None:
        """Write a value, and into ``body`` what it consists of; DeviceStateError to refuse it."""

    @abstractmethod
    def get(self, source: StateReader, old: Any, parent: Any) -> Any:
        """Read a value.

        old:    what the state has in this place, MISSING if nothing
        parent: the state that it is part of
        """


class Scalar(Element):
    """A value of fixed width: ``code`` is struct's, big-endian."""

    def __init__(self, type_name: str, code: str) -> None:
        self.type_name = type_name
        self._code = code
        self.nbytes = struct.calcsize(">" + code)

    def convert(self, out: StateWriter, value: Any) -> Any:
        """Return what struct can pack."""
        return value

    def restore(self, value: Any) -> Any:
        """Return the value that was packed."""
        return value

    def put(self, out: StateWriter, value: Any, body: JsonObject) -> None:
        """Write one."""
        out.put(struct.pack(">" + self._code, self.convert(out, value)))

    def get(self, source: StateReader, old: Any, parent: Any) -> Any:
        """Read one."""
        return self.restore(struct.unpack(">" + self._code, source.read(self.nbytes))[0])

    def put_many(self, out: StateWriter, values: Sequence[Any]) -> None:
        """Write an array."""
        packed = []
        for i, value in enumerate(values):
            try:
                packed.append(self.convert(out, value))
            except DeviceStateError as error:
                raise DeviceStateError(error.message, field=f"{out.path}[{i}]") from None
        out.put(struct.pack(f">{len(packed)}{self._code}", *packed))

    def get_many(self, source: StateReader, count: int) -> list[Any]:
        """Read an array."""
        data = source.read(count * self.nbytes)
        return [self.restore(value) for value in struct.unpack(f">{count}{self._code}", data)]


class Integer(Scalar):
    """An integer, refused where it does not fit."""

    def __init__(self, type_name: str, code: str) -> None:
        super().__init__(type_name, code)
        bits = 8 * self.nbytes
        signed = code.islower()
        self._low = -(1 << (bits - 1)) if signed else 0
        self._high = (1 << (bits - signed)) - 1

    def convert(self, out: StateWriter, value: Any) -> int:
        """Return the integer; DeviceStateError if it is none, or past its width."""
        try:
            number = operator.index(value)
        except TypeError:
            raise out.error(f"{shown(value)} is no {self.type_name}") from None
        if not self._low <= number <= self._high:
            raise out.error(
                f"{shown(number)} is no {self.type_name}, which is {self._low} to {self._high}"
            )
        return number


class Boolean(Integer):
    """One byte; any but 0 is true."""

    def __init__(self) -> None:
        super().__init__("bool", "B")
        self._high = 1

    def convert(self, out: StateWriter, value: Any) -> int:
        """Return 0 or 1."""
        # numpy's bool is no index
        return super().convert(out, value.item() if hasattr(value, "item") else value)

    def restore(self, value: int) -> bool:
        """Return the truth."""
        return value != 0


class Double(Scalar):
    """The 64 bits of a float."""

    def __init__(self, type_name: str) -> None:
        super().__init__(type_name, "d")

    def convert(self, out: StateWriter, value: Any) -> float:
        """Return the float."""
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise out.error(f"{shown(value)} is no {self.type_name}") from None


class Expiry(Integer):
    """A timer: nanoseconds at which it expires, None while it does not run."""

    def __init__(self) -> None:
        super().__init__("timer", "Q")
        self._high -= 1  # all ones: it does not run

    def convert(self, out: StateWriter, value: Any) -> int:
        """Return the word."""
        return self._high + 1 if value is None else super().convert(out, value)

    def restore(self, value: int) -> int | None:
        """Return the time."""
        return None if value == self._high + 1 else value


INT8, UINT8 = Integer("int8", "b"), Integer("uint8", "B")
INT16, UINT16 = Integer("int16", "h"), Integer("uint16", "H")
INT32, UINT32 = Integer("int32", "i"), Integer("uint32", "I")
INT64, UINT64 = Integer("int64", "q"), Integer("uint64", "Q")
BOOL, TIMER = Boolean(), Expiry()
FLOAT64, CPU_DOUBLE = Double("float64"), Double("CPU_Double_U")
