"""State of a KVM vCPU on the wire: numbers big-endian, whatever the machine.

payload: parts in ascending order, each ``part u16, length u32, bytes``; a part appears once
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from mig.errors import MismatchError

IDSTR = "kvm-vcpu"
VERSION = 1

_PART = struct.Struct(">HI")
_MAX_MSRS = 512
_MAX_XCRS = 16
_XCRS_PADDING = bytes(16 * 8)

_SEGMENT = "QIH9Bx"
_TABLE = "QH6x"


class Fields:
    """A structure of fixed fields; those that are reserved do not go over the wire."""

    def __init__(self, layout: str) -> None:
        self._native = struct.Struct("<" + layout)
        # "x" with its count stands for reserved bytes
        self._wire = struct.Struct(">" + "".join(_without_padding(layout)))

    def encode(self, data: bytes) -> bytes:
        """Return the wire form of the kernel's structure."""
        return self._wire.pack(*self._native.unpack(data))

    def decode(self, data: bytes) -> bytes:
        """Return the kernel's structure; ValueError for another length."""
        if len(data) != self._wire.size:
            raise ValueError(f"{len(data)} bytes, not {self._wire.size}")
        return self._native.pack(*self._wire.unpack(data))


def _without_padding(layout: str) -> Iterable[str]:
    count = ""
    for char in layout:
        if char.isdigit():
            count += char
            continue
        if char != "x":
            yield count + char
        count = ""


class Area:
    """Bytes whose order is the architecture's own, little-endian."""

    def encode(self, data: bytes) -> bytes:
        """Return them as they are."""
        return data

    def decode(self, data: bytes) -> bytes:
        """Return them as they are: KVM knows how many it takes."""
        return data


class Msrs:
    """``index u32, value u64`` for each model-specific register."""

    _native, _wire = struct.Struct("<IxxxxQ"), struct.Struct(">IQ")

    def encode(self, data: bytes) -> bytes:
        """Return the wire form of struct kvm_msr_entry[]."""
        return b"".join(self._wire.pack(*entry) for entry in self._native.iter_unpack(data))

    def decode(self, data: bytes) -> bytes:
        """Return struct kvm_msr_entry[]; ValueError for a length that cannot be."""
        if len(data) % self._wire.size or len(data) > _MAX_MSRS * self._wire.size:
            raise ValueError(f"{len(data)} bytes are no list of registers")
        return b"".join(self._native.pack(*entry) for entry in self._wire.iter_unpack(data))


class Xcrs:
    """``register u32, value u64`` for each extended control register."""

    _native, _wire, _head = struct.Struct("<IxxxxQ"), struct.Struct(">IQ"), struct.Struct("<Ixxxx")

    def encode(self, data: bytes) -> bytes:
        """Return the wire form of struct kvm_xcrs."""
        (count,) = self._head.unpack_from(data)
        end = self._head.size + count * self._native.size
        used = data[self._head.size : end]
        return b"".join(self._wire.pack(*entry) for entry in self._native.iter_unpack(used))

    def decode(self, data: bytes) -> bytes:
        """Return struct kvm_xcrs; ValueError for a length that cannot be."""
        count, rest = divmod(len(data), self._wire.size)
        if rest or count > _MAX_XCRS:
            raise ValueError(f"{len(data)} bytes are no list of registers")
        used = b"".join(self._native.pack(*entry) for entry in self._wire.iter_unpack(data))
        room = bytes((_MAX_XCRS - count) * self._native.size)
        return self._head.pack(count) + used + room + _XCRS_PADDING


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the state: its name in `KvmVm.get_state`, and its number and form on the wire."""

    number: int
    name: str
    form: Fields | Area | Msrs | Xcrs


#: In the order in which they are set: the mode before what depends on it, the local APIC before the
#: registers of its timer, and last what says whether the vCPU runs and what is pending.
PARTS = (
    Part(1, "sregs", Fields(_SEGMENT * 8 + _TABLE * 2 + "11Q")),
    Part(2, "regs", Fields("18Q")),
    Part(3, "xcrs", Xcrs()),
    Part(4, "xsave", Area()),
    Part(5, "tsc_khz", Fields("I")),
    Part(6, "lapic", Area()),
    Part(7, "msrs", Msrs()),
    Part(8, "debugregs", Fields("7Q72x")),
    Part(9, "mp_state", Fields("I")),
    Part(10, "events", Fields("4BI4B3BxII4BB26xBQ")),
)
_BY_NUMBER = {part.number: part for part in PARTS}


def encode_state(state: Iterable[tuple[Part, bytes]]) -> bytes:
    """Return the payload of the kernel's structures, given in order of PARTS."""
    out = []
    for part, data in state:
        encoded = part.form.encode(data)
        out += [_PART.pack(part.number, len(encoded)), encoded]
    return b"".join(out)


def decode_state(payload: bytes) -> list[tuple[Part, bytes]]:
    """Return the kernel's structures; MismatchError for a payload that is not one of these."""
    state: list[tuple[Part, bytes]] = []
    at, last = 0, 0
    while at < len(payload):
        if len(payload) - at < _PART.size:
            raise MismatchError("vCPU state ends within a part", section=IDSTR)
        number, nbytes = _PART.unpack_from(payload, at)
        at += _PART.size
        part = _BY_NUMBER.get(number)
        if part is None or number <= last:
            raise MismatchError(f"vCPU state has a part {number} after {last}", section=IDSTR)
        if nbytes > len(payload) - at:
            raise MismatchError(f"vCPU state ends within '{part.name}'", section=IDSTR)
        try:
            state.append((part, part.form.decode(payload[at : at + nbytes])))
        except ValueError as error:
            raise MismatchError(f"vCPU state '{part.name}': {error}", section=IDSTR) from None
        at, last = at + nbytes, number
    return state
