"""The types that a VMDESCRIPTION gives fields, by QEMU's names, and their shape on the wire.

A type that is not named here is opaque: its size is known, what its bytes mean only to its device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final


class TypeName(StrEnum):
    """Type names (the ``name`` of QEMU's VMStateInfos; STRUCT and VSTRUCT: vmstate_save_state)."""

    BOOL = "bool"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT32_EQUAL = "int32 equal"
    INT32_LE = "int32 le"
    INT64 = "int64"
    UINT8 = "uint8"
    UINT8_EQUAL = "uint8 equal"
    UINT16 = "uint16"
    UINT16_EQUAL = "uint16 equal"
    UINT32 = "uint32"
    UINT32_EQUAL = "uint32 equal"
    UINT64 = "uint64"
    # QEMU's name, although the field is unsigned
    UINT64_EQUAL = "int64 equal"
    FLOAT64 = "float64"
    CPU_DOUBLE = "CPU_Double_U"
    TIMER = "timer"
    FD = "fd"
    NULLPTR = "nullptr"
    CAPABILITY = "capability"
    BUFFER = "buffer"
    UNUSED = "unused_buffer"
    BITMAP = "bitmap"
    STRUCT = "struct"
    VSTRUCT = "vstruct"
    TMP = "tmp"
    QTAILQ = "qtailq"
    QLIST = "qlist"
    GTREE = "gtree"
    PCI_CONFIG = "pci config"
    PCI_IRQ_STATE = "pci irq state"
    FPREG = "fpreg"
    UNKNOWN = "unknown"


class Shape(Enum):
    """How the bytes of a field are read.

    SIGNED, UNSIGNED: big-endian integer    BOOL: one byte, 0 or 1
    DOUBLE: IEEE 754, big-endian            TIME: be64 of ns, all ones when nothing is armed
    NULL:   one byte "0"                    TEXT: counted string
    BYTES:  as they are                     BITMAP: be64 words, bit i in word i / 64
    WORDS:  be32 integers                   FLOAT80: be64 mantissa, be16 sign and exponent
    NESTED: a vmstate of its own            QUEUE: a byte 1 before each vmstate, a byte 0 at the end
    TREE:   be32 number of nodes; a byte 1, key and vmstate of each; a byte 0
    """

    SIGNED = auto()
    UNSIGNED = auto()
    BOOL = auto()
    DOUBLE = auto()
    TIME = auto()
    NULL = auto()
    TEXT = auto()
    BYTES = auto()
    BITMAP = auto()
    WORDS = auto()
    FLOAT80 = auto()
    NESTED = auto()
    QUEUE = auto()
    TREE = auto()


@dataclass(frozen=True, slots=True)
class FieldType:
    """What is known of a type: its shape and, where all fields of it are alike, its wire bytes."""

    shape: Shape
    nbytes: int | None = None


#: what stands for a null pointer in an array of pointers (VMS_NULLPTR_MARKER)
NULLPTR_MARKER: Final = 0x30
#: expiry of a timer that is not armed
TIMER_IDLE: Final = (1 << 64) - 1

_T = TypeName
FIELD_TYPES: Final[dict[str, FieldType]] = {
    _T.BOOL: FieldType(Shape.BOOL, 1),
    **{name: FieldType(Shape.SIGNED, n) for name, n in ((_T.INT8, 1), (_T.INT16, 2))},
    **{name: FieldType(Shape.SIGNED, 4) for name in (_T.INT32, _T.INT32_EQUAL, _T.INT32_LE, _T.FD)},
    _T.INT64: FieldType(Shape.SIGNED, 8),
    **{name: FieldType(Shape.UNSIGNED, 1) for name in (_T.UINT8, _T.UINT8_EQUAL)},
    **{name: FieldType(Shape.UNSIGNED, 2) for name in (_T.UINT16, _T.UINT16_EQUAL)},
    **{name: FieldType(Shape.UNSIGNED, 4) for name in (_T.UINT32, _T.UINT32_EQUAL)},
    **{name: FieldType(Shape.UNSIGNED, 8) for name in (_T.UINT64, _T.UINT64_EQUAL)},
    **{name: FieldType(Shape.DOUBLE, 8) for name in (_T.FLOAT64, _T.CPU_DOUBLE)},
    _T.TIMER: FieldType(Shape.TIME, 8),
    _T.NULLPTR: FieldType(Shape.NULL, 1),
    _T.CAPABILITY: FieldType(Shape.TEXT),
    **{name: FieldType(Shape.BYTES) for name in (_T.BUFFER, _T.UNUSED, _T.PCI_CONFIG, _T.UNKNOWN)},
    _T.BITMAP: FieldType(Shape.BITMAP),
    _T.PCI_IRQ_STATE: FieldType(Shape.WORDS),
    _T.FPREG: FieldType(Shape.FLOAT80, 10),
    **{name: FieldType(Shape.NESTED) for name in (_T.STRUCT, _T.VSTRUCT, _T.TMP)},
    **{name: FieldType(Shape.QUEUE) for name in (_T.QTAILQ, _T.QLIST)},
    _T.GTREE: FieldType(Shape.TREE),
}

#: of every type that is not in FIELD_TYPES
OPAQUE: Final = FieldType(Shape.BYTES)


def field_type(name: str) -> FieldType:
    """Return what is known of the type of that name."""
    return FIELD_TYPES.get(name, OPAQUE)
