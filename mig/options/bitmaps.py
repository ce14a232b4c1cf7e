"""Parameter block-bitmap-mapping: which dirty bitmaps go under which names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: bytes that a name may have on the wire
MAX_ALIAS = 255

#: a node alias may become the name of a block node
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class BitmapAlias:
    """A bitmap and its name on the wire (BitmapMigrationBitmapAlias).

    persistent: whether the bitmap becomes persistent, None to leave it as it is
    transform:  whether a transform was given at all
    """

    name: str
    alias: str
    persistent: bool | None = None
    transform: bool = False

    def to_qmp(self) -> dict[str, Any]:
        """Return it as QMP has it."""
        out: dict[str, Any] = {"name": self.name, "alias": self.alias}
        if self.transform:
            kept = self.persistent is None
            out["transform"] = {} if kept else {"persistent": self.persistent}
        return out


@dataclass(frozen=True, slots=True)
class NodeAlias:
    """A block node, its name on the wire, and its bitmaps (BitmapMigrationNodeAlias)."""

    node_name: str
    alias: str
    bitmaps: tuple[BitmapAlias, ...] = ()

    def to_qmp(self) -> dict[str, Any]:
        """Return it as QMP has it."""
        bitmaps = [bitmap.to_qmp() for bitmap in self.bitmaps]
        return {"node-name": self.node_name, "alias": self.alias, "bitmaps": bitmaps}


def read_mapping(name: str, raw: object) -> tuple[NodeAlias, ...]:
    """Read QMP's form; ValueError with QEMU's words for parameter ``name``."""
    nodes = tuple(_node(where, entry) for where, entry in _entries(name, raw))
    reason = _reason(nodes)
    if reason is not None:
        raise ValueError(f"Invalid mapping given for {name}: {reason}")
    return nodes


def _entries(name: str, raw: object) -> list[tuple[str, object]]:
    if not isinstance(raw, (list, tuple)):
        raise ValueError(f"Invalid parameter type for '{name}', expected: array")
    return [(f"{name}[{i}]", entry) for i, entry in enumerate(raw)]


def _members(where: str, raw: object, needed: Mapping[str, type], more: str) -> dict[str, Any]:
    """Return the members of an object, the ``needed`` ones and one that may be missing."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"Invalid parameter type for '{where}', expected: object")
    for key, kind in needed.items():
        if key not in raw:
            raise ValueError(f"Parameter '{where}.{key}' is missing")
        if not isinstance(raw[key], kind):
            raise ValueError(f"Invalid parameter type for '{where}.{key}', expected: string")
    for key in raw:
        if key not in needed and key != more:
            raise ValueError(f"Parameter '{where}.{key}' is unexpected")
    return dict(raw)


def _node(where: str, raw: object) -> NodeAlias:
    if isinstance(raw, NodeAlias):
        return raw
    members = _members(where, raw, {"node-name": str, "alias": str}, "bitmaps")
    if "bitmaps" not in members:
        raise ValueError(f"Parameter '{where}.bitmaps' is missing")
    entries = _entries(f"{where}.bitmaps", members["bitmaps"])
    bitmaps = tuple(_bitmap(place, entry) for place, entry in entries)
    return NodeAlias(members["node-name"], members["alias"], bitmaps)


def _bitmap(where: str, raw: object) -> BitmapAlias:
    members = _members(where, raw, {"name": str, "alias": str}, "transform")
    if "transform" not in members:
        return BitmapAlias(members["name"], members["alias"])
    transform = _members(f"{where}.transform", members["transform"], {}, "persistent")
    persistent = transform.get("persistent")
    if "persistent" in transform and not isinstance(persistent, bool):
        place = f"{where}.transform.persistent"
        raise ValueError(f"Invalid parameter type for '{place}', expected: boolean")
    return BitmapAlias(members["name"], members["alias"], persistent, True)


def _reason(nodes: tuple[NodeAlias, ...]) -> str | None:
    """What is wrong with a mapping, None when nothing is."""
    names: set[str] = set()
    aliases: set[str] = set()
    for node in nodes:
        if not _NODE_NAME.fullmatch(node.alias):
            return f"The node alias '{node.alias}' is not well-formed"
        if len(node.alias.encode()) > MAX_ALIAS:
            return f"The node alias '{node.alias}' is longer than {MAX_ALIAS} bytes"
        if node.node_name in names:
            return f"The node name '{node.node_name}' is mapped twice"
        if node.alias in aliases:
            return f"The node alias '{node.alias}' is used twice"
        names.add(node.node_name)
        aliases.add(node.alias)
        reason = _bitmap_reason(node)
        if reason is not None:
            return reason
    return None


def _bitmap_reason(node: NodeAlias) -> str | None:
    names: set[str] = set()
    aliases: set[str] = set()
    for bitmap in node.bitmaps:
        if len(bitmap.alias.encode()) > MAX_ALIAS:
            return f"The bitmap alias '{bitmap.alias}' is longer than {MAX_ALIAS} bytes"
        if bitmap.name in names:
            return f"The bitmap '{node.node_name}'/'{bitmap.name}' is mapped twice"
        if bitmap.alias in aliases:
            return f"The bitmap alias '{node.alias}'/'{bitmap.alias}' is used twice"
        names.add(bitmap.name)
        aliases.add(bitmap.alias)
    return None
