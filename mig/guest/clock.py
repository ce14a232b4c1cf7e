"""Moments that two processes of one machine can compare."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: what stands for a boot that is not known
NO_BOOT = bytes(16)

# boot id, nanoseconds
_MOMENT = struct.Struct(">16sQ")


def boot_id() -> bytes:
    """Return what tells this boot of this kernel from any other: 16 bytes, zeros: not known."""
    try:
        return uuid.UUID(_BOOT_ID.read_text().strip()).bytes
    except OSError:
        return NO_BOOT


def encode_moment(seconds: float) -> bytes:
    """Return a time of time.monotonic() and what clock it is of."""
    return _MOMENT.pack(boot_id(), int(seconds * 1e9))


def decode_moment(payload: bytes) -> float | None:
    """Return that time, None when it is of another boot; ValueError for what is no such thing."""
    if len(payload) != _MOMENT.size:
        raise ValueError(f"{len(payload)} bytes are no moment")
    boot, nanoseconds = _MOMENT.unpack(payload)
    return None if boot == NO_BOOT or boot != boot_id() else nanoseconds / 1e9
