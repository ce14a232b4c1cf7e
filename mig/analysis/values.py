"""Values of devices as JSON: integers and bools as they are, bytes as hexadecimal digits."""

from __future__ import annotations

import math
from typing import Any

from mig.savevm.fields import Device, Field, State, Value


def value_as_json(value: Value) -> Any:
    """Return what json.dumps() takes for a value."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [value_as_json(item) for item in value]
    if isinstance(value, State):
        return state_as_json(value)
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such numbers
        return str(value)
    return value


def state_as_json(state: State) -> dict[str, Any]:
    """Return a state: its name and version, fields and subsections."""
    return {
        "vmsd-name": state.vmsd_name,
        "version-id": state.version_id,
        "fields": [_field_as_json(item) for item in state.fields],
        "subsections": [state_as_json(sub) for sub in state.subsections],
    }


def _field_as_json(item: Field) -> dict[str, Any]:
    return {
        "name": item.name,
        "type": item.type,
        "offset": item.offset,
        "nbytes": item.nbytes,
        "value": value_as_json(item.value),
    }


def device_as_json(device: Device) -> dict[str, Any] | None:
    """Return the state of a device; None when nothing describes it."""
    return None if device.state is None else state_as_json(device.state)
