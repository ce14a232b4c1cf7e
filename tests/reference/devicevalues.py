"""Device states by hand: payload, description and values, made side by side and slowly."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Made:
    """One state while it is written: what is on the wire, what describes it, what it means."""

    name: str = "d"
    version: int = 1
    payload: bytes = b""
    fields: list[dict[str, Any]] = field(default_factory=list)
    subsections: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, kind: str, raw: bytes, value: Any, **more: Any) -> Made:
        """A field of ``raw`` bytes; more: array_len (size is then of one element), struct, ..."""
        size = len(raw) // more["array_len"] if more.get("array_len") else len(raw)
        self.fields.append({"name": name, **more, "type": kind, "size": size})
        self.payload += raw
        self.values[name] = value
        return self

    def struct(self, name: str, inner: Made) -> Made:
        return self.add(name, "struct", inner.payload, inner.values, struct=inner.described())

    def subsection(self, inner: Made) -> Made:
        name = inner.name.encode()
        self.payload += b"\x05" + bytes([len(name)]) + name + struct.pack(">I", inner.version)
        self.payload += inner.payload
        self.subsections.append(inner.described())
        self.values[inner.name] = inner.values
        return self

    def described(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "vmsd_name": self.name,
            "version": self.version,
            "fields": self.fields,
        }
        if self.subsections:
            out["subsections"] = self.subsections
        return out
