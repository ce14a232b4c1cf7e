"""Whole streams by hand, piece by piece."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from reference import ram


def header(version: int = 3) -> bytes:
    return b"QEVM" + struct.pack(">I", version)


def configuration(machine: str = "box", page_bits: int | None = None) -> bytes:
    out = b"\x07" + struct.pack(">I", len(machine)) + machine.encode()
    if page_bits is not None:
        name = b"configuration/target-page-bits"
        out += b"\x05" + bytes([len(name)]) + name + struct.pack(">II", 1, page_bits)
    return out


def section(kind: int, section_id: int, idstr: str, instance_id: int, version_id: int) -> bytes:
    """Header of a START (1) or FULL (4) section."""
    name = bytes([len(idstr)]) + idstr.encode()
    return bytes([kind]) + struct.pack(">I", section_id) + name + struct.pack(
        ">II", instance_id, version_id
    )


def ram_start(section_id: int, blocks: dict[str, int]) -> bytes:
    return section(1, section_id, "ram", 0, 4) + ram.block_list(blocks) + ram.eos()


def ram_more(kind: int, section_id: int, payload: bytes) -> bytes:
    """A PART (2) or END (3) section without footer."""
    return bytes([kind]) + struct.pack(">I", section_id) + payload + ram.eos()


def footer(section_id: int) -> bytes:
    return b"\x7e" + struct.pack(">I", section_id)


def command(number: int, data: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(data)) + data


@dataclass(frozen=True)
class Device:
    idstr: str
    payload: bytes
    section_id: int
    instance_id: int = 0
    version_id: int = 1

    def encode(self, *, footers: bool = True) -> bytes:
        head = section(4, self.section_id, self.idstr, self.instance_id, self.version_id)
        return head + self.payload + (footer(self.section_id) if footers else b"")

    def describe(self) -> dict[str, object]:
        nbytes = len(self.payload)
        return {
            "name": self.idstr,
            "instance_id": self.instance_id,
            "version": self.version_id,
            "fields": [{"name": "data", "size": nbytes, "type": "buffer"}],
        }


def description(devices: list[Device]) -> bytes:
    return described({"page_size": 4096, "devices": [d.describe() for d in devices]})


def described(value: object) -> bytes:
    """A VMDESCRIPTION of any JSON."""
    text = json.dumps(value).encode()
    return b"\x06" + struct.pack(">I", len(text)) + text


def device_state(
    devices: list[Device], *, footers: bool = True, with_description: bool = True
) -> bytes:
    out = b"".join(d.encode(footers=footers) for d in devices) + b"\x00"
    return out + (description(devices) if with_description else b"")


def whole(
    blocks: dict[str, int],
    bursts: list[list[ram.Record]],
    devices: list[Device],
    *,
    page_size: int = 4096,
    section_id: int = 2,
    footers: bool = True,
    config: bytes | None = None,
    before_end: bytes = b"",
    with_description: bool = True,
) -> bytes:
    """A stream with one PART for each burst but the last, which is in the END."""
    end = footer(section_id) if footers else b""
    out = header() + (configuration() if config is None else config)
    out += ram_start(section_id, blocks) + end
    current = None
    bursts = bursts or [[]]
    for i, burst in enumerate(bursts):
        last = i == len(bursts) - 1
        if last:
            out += before_end
        payload = ram.encode(burst, page_size, current)
        out += ram_more(3 if last else 2, section_id, payload) + end
        if burst:
            current = burst[-1].block
    return out + device_state(devices, footers=footers, with_description=with_description)
