"""The state of a device: any object with attributes, or a mapping."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

#: stands for what a state does not have
MISSING: Any = object()
#: what a state may raise that does not take a value
REFUSALS = (AttributeError, TypeError, ValueError, OverflowError, IndexError)


def get(state: Any, path: str) -> Any:
    """Return an attribute (or item), MISSING where there is none; a path may have dots."""
    for name in path.split("."):
        if isinstance(state, Mapping):
            state = state.get(name, MISSING)
        else:
            state = getattr(state, name, MISSING)
        if state is MISSING:
            return MISSING
    return state


def put(state: Any, path: str, value: Any) -> None:
    """Set an attribute (or item); AttributeError or TypeError where it cannot be."""
    *owners, name = path.split(".")
    owner = get(state, ".".join(owners)) if owners else state
    if owner is MISSING:
        raise AttributeError(f"there is no {'.'.join(owners)}")
    if isinstance(owner, MutableMapping):
        owner[name] = value
    else:
        setattr(owner, name, value)


def blank(parent: Any) -> Any:
    """Return a new state for what its description cannot make: like the one that it is part of."""
    return {} if isinstance(parent, Mapping) else SimpleNamespace()


def shown(value: Any) -> str:
    """Return a value for an error, however large it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return f"{value!r:.40}"


def is_fixed(value: Any) -> bool:
    """Whether a sequence keeps its length (bytearray, array, numpy array)."""
    return hasattr(value, "__setitem__") and not isinstance(value, (list, deque, MutableMapping))


def refill(old: Any, values: Sequence[Any], start: int = 0) -> Any:
    """Return what a state is to hold of ``values``: ``old`` with them in it, where that can be.

    start: of the first of them in ``old``, which then keeps its length

    ValueError, TypeError or OverflowError where ``old`` cannot hold them.
    """
    if isinstance(old, list):
        if start:
            _require_room(old, start + len(values))
            old[start : start + len(values)] = values
        else:
            old[:] = values
        return old
    if isinstance(old, deque):
        old.clear()
        old.extend(values)
        return old
    if is_fixed(old):
        _require_room(old, start + len(values))
        for i, value in enumerate(values, start):
            old[i] = value
        return old
    if start:
        raise TypeError("there is no array to load a part of")
    return type(old)(values) if isinstance(old, (bytes, tuple)) else list(values)


def refill_bytes(old: Any, data: bytes, start: int = 0) -> Any:
    """Like refill(), for a buffer."""
    if isinstance(old, bytes) or not is_fixed(old):
        if start:
            raise TypeError("there is no buffer to load a part of")
        return data
    view = memoryview(old).cast("B")
    _require_room(view, start + len(data))
    view[start : start + len(data)] = data
    return old


def _require_room(old: Any, needed: int) -> None:
    if len(old) < needed:
        raise ValueError(f"room for {len(old)}, not {needed}")
