"""VMState: what a device's state consists of, said once for saving, loading and describing.

::

    UART = vmstate.Description(
        "uart",
        version=2,
        minimum_version=1,
        fields=[
            vmstate.UInt8("rbr"),
            vmstate.Array("fifo", vmstate.UInt8, 16, since=2),
            vmstate.Timer("timeout"),
        ],
    )
    devices = mig.DeviceRegistry()
    devices.register(UART, uart)        # any object with these attributes, or a dict

Bytes and VMDESCRIPTION are those that QEMU writes for the same VMStateDescription.
"""

from mig.savevm.vmstate.arrays import Array, PointerArray
from mig.savevm.vmstate.describe import JsonObject
from mig.savevm.vmstate.description import Description, Priority
from mig.savevm.vmstate.elements import Element
from mig.savevm.vmstate.fields import (
    Bitmap,
    Bool,
    Buffer,
    CpuDouble,
    Custom,
    Field,
    Float64,
    Int8,
    Int16,
    Int32,
    Int64,
    Timer,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Unused,
    Validate,
)
from mig.savevm.vmstate.streams import StateReader, StateWriter
from mig.savevm.vmstate.structs import LinkedList, Single, Struct, TailQueue, Temporary, Tree

__all__ = [
    "Array",
    "Bitmap",
    "Bool",
    "Buffer",
    "CpuDouble",
    "Custom",
    "Description",
    "Element",
    "Field",
    "Float64",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "JsonObject",
    "LinkedList",
    "PointerArray",
    "Priority",
    "Single",
    "StateReader",
    "StateWriter",
    "Struct",
    "TailQueue",
    "Temporary",
    "Timer",
    "Tree",
    "UInt8",
    "UInt16",
    "UInt32",
    "UInt64",
    "Unused",
    "Validate",
]
