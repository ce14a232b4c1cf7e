"""The VMDESCRIPTION: JSON at the end of a precopy stream that says what each device wrote.

Field sizes are in wire bytes, so their sum delimits a device's payload. Written by QEMU's
vmstate_save() and vmsd_desc_field_start().
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mig.wire import SectionType


class DescriptionError(ValueError):
    """The JSON is not a description."""


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """One device: who it is and how many payload bytes it wrote."""

    idstr: str
    instance_id: int
    version_id: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """A whole description: target page size (bytes, None when absent) and devices in order."""

    page_size: int | None
    devices: tuple[DeviceDescription, ...]

    @classmethod
    def parse(cls, text: bytes) -> Description:
        """Read the JSON; DescriptionError when it is none or lacks a size."""
        try:
            data = json.loads(text)
            devices = tuple(_device(device) for device in data["devices"])
            page_size = data.get("page_size")
            if page_size is not None and not isinstance(page_size, int):
                raise TypeError("page_size")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise DescriptionError(f"not a machine description: {error!r}") from error
        return cls(page_size, devices)


def _device(device: dict[str, Any]) -> DeviceDescription:
    version = device.get("version", 0)
    return DeviceDescription(
        str(device["name"]), int(device["instance_id"]), int(version), _nbytes(device)
    )


def _nbytes(state: dict[str, Any]) -> int:
    """Wire bytes of the fields and subsections of a vmstate."""
    total = 0
    for entry in state.get("fields", ()):
        # an array whose elements are alike is described once
        size, times = entry["size"], entry.get("array_len", 1)
        if not isinstance(size, int) or not isinstance(times, int) or size < 0 or times < 0:
            raise ValueError("a size that is no length")
        total += size * times
    for sub in state.get("subsections", ()):
        # type byte, counted name, be32 version_id
        total += 1 + 1 + len(sub["vmsd_name"].encode()) + 4 + _nbytes(sub)
    return total


def encode_description(devices: Sequence[DeviceDescription], page_size: int) -> bytes:
    """Return a VMDESCRIPTION (type byte, be32 length, JSON) of opaque devices.

    Each device is described as QEMU describes old-style ones: one buffer field.
    """
    text = json.dumps(
        {
            "configuration": {"vmsd_name": "configuration", "version": 1, "fields": []},
            "page_size": page_size,
            "devices": [
                {
                    "name": device.idstr,
                    "instance_id": device.instance_id,
                    "version": device.version_id,
                    "size": device.nbytes,
                    "fields": [{"name": "data", "size": device.nbytes, "type": "buffer"}],
                }
                for device in devices
            ],
        }
    ).encode("ascii")
    return struct.pack(">BI", SectionType.VMDESCRIPTION, len(text)) + text
