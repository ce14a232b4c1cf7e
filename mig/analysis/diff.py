"""How two captured VMs differ: page by page, field by field."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeAlias

from mig import _core
from mig.analysis.analyze import analyze
from mig.analysis.report import Analysis, BlockCounts
from mig.analysis.values import value_as_json
from mig.errors import MigError
from mig.image import open_image
from mig.savevm.fields import Device, State, Value

#: pages compared at a time
_STEP: Final = 1 << 16
#: most ranges of pages that are named of one block, and most fields in all
MAX_RANGES: Final = 1000
MAX_FIELDS: Final = 10_000


@dataclass(frozen=True, slots=True)
class BlockDiff:
    """How one RAM block differs, in pages; lengths in bytes, None where there is no such block.

    same:           pages with equal contents, and those that neither has
    only_a, only_b: pages that only one of them has (the other was never sent that page)
    ranges:         (first page, number of pages) of what is not the same, from the start
    """

    idstr: str
    length_a: int | None
    length_b: int | None
    same: int = 0
    differ: int = 0
    only_a: int = 0
    only_b: int = 0
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return self.length_a == self.length_b and not (self.differ or self.only_a or self.only_b)

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "name": self.idstr,
            "lengths": [self.length_a, self.length_b],
            "same-pages": self.same,
            "different-pages": self.differ,
            "only-in-a": self.only_a,
            "only-in-b": self.only_b,
            "ranges": [list(pair) for pair in self.ranges],
        }


@dataclass(frozen=True, slots=True)
class FieldDiff:
    """One field that differs. A value is `MISSING` where that device has no such field."""

    idstr: str
    instance_id: int
    path: str
    a: Value | Missing
    b: Value | Missing

    def to_json(self) -> dict[str, Any]:
        """Return both values; what is missing is left out."""
        out: dict[str, Any] = {
            "device": self.idstr,
            "instance-id": self.instance_id,
            "path": self.path,
        }
        for side, value in (("a", self.a), ("b", self.b)):
            if not isinstance(value, Missing):
                out[side] = value_as_json(value)
        return out


class Missing:
    """Says that there is no such field; None is the value of a null pointer."""

    def __repr__(self) -> str:
        return "missing"


MISSING: Final = Missing()


@dataclass(frozen=True, slots=True)
class Diff:
    """How two captured VMs differ.

    machines:       machine types
    devices_only_a, devices_only_b: (idstr, instance_id) that the other does not have
    nfields:        how many fields differ; MAX_FIELDS of them are in ``fields``
    uncompared:     why pages could not be compared, None when they were
    """

    machines: tuple[str | None, str | None]
    blocks: tuple[BlockDiff, ...]
    devices_only_a: tuple[tuple[str, int], ...]
    devices_only_b: tuple[tuple[str, int], ...]
    fields: tuple[FieldDiff, ...]
    nfields: int
    uncompared: str | None = None

    @property
    def equal(self) -> bool:
        """Whether no difference was found, and everything could be compared."""
        return (
            self.machines[0] == self.machines[1]
            and all(block.equal for block in self.blocks)
            and not (self.devices_only_a or self.devices_only_b or self.nfields)
            and self.uncompared is None
        )

    def to_json(self) -> dict[str, Any]:
        """Return all of it as one object."""
        return {
            "equal": self.equal,
            "machines": list(self.machines),
            "blocks": [block.to_json() for block in self.blocks],
            "devices-only-in-a": [list(key) for key in self.devices_only_a],
            "devices-only-in-b": [list(key) for key in self.devices_only_b],
            "fields": [item.to_json() for item in self.fields],
            "field-count": self.nfields,
            "uncompared": self.uncompared,
        }


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Diff:
    """Compare two captured VMs; names as `analyze` takes them.

    Pages are compared where both files can be opened as images; memory does not grow with them,
    except for 8 bytes a page. MigError when a file cannot be read, or is so wrong that a comparison
    would say nothing.
    """
    found = analyze(a), analyze(b)
    for analysis in found:
        if analysis.ram is None:
            text = analysis.findings[0].message if analysis.findings else "there is no RAM in it"
            raise MigError(f"{analysis.file}: {text}")
    only_a, only_b, fields = _devices(*found)
    kept = tuple(islice(fields, MAX_FIELDS))
    nfields = len(kept) + sum(1 for _ in fields)
    machines = found[0].machine, found[1].machine
    uncompared = None
    try:
        blocks = _pages(a, b)
    except MigError as error:
        blocks, uncompared = _lengths(*found), str(error)
    return Diff(machines, blocks, only_a, only_b, kept, nfields, uncompared)


# ---- pages -----------------------------------------------------------------------------------


def _lengths(a: Analysis, b: Analysis) -> tuple[BlockDiff, ...]:
    """What can be said of blocks whose pages are not compared."""
    lengths = [_lengths_of(x.ram.blocks if x.ram else ()) for x in (a, b)]
    names = dict.fromkeys([*lengths[0], *lengths[1]])
    return tuple(BlockDiff(name, lengths[0].get(name), lengths[1].get(name)) for name in names)


def _lengths_of(blocks: tuple[BlockCounts, ...]) -> dict[str, int]:
    return {block.idstr: block.used_length for block in blocks}


def _pages(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[BlockDiff, ...]:
    with open_image(a) as image_a, open_image(b) as image_b:
        if image_a.page_size != image_b.page_size:
            raise MigError(f"pages of {image_a.page_size} and of {image_b.page_size} bytes")
        blocks_a = {block.idstr: block for block in image_a.source_blocks()}
        blocks_b = {block.idstr: block for block in image_b.source_blocks()}
        out = []
        for name in dict.fromkeys([*blocks_a, *blocks_b]):
            in_a, in_b = blocks_a.get(name), blocks_b.get(name)
            if in_a is None or in_b is None:
                there = in_a or in_b
                length = there.used_length if there else 0
                out.append(BlockDiff(name, length if in_a else None, length if in_b else None))
                continue
            lengths = in_a.used_length, in_b.used_length
            npages = min(lengths) // image_a.page_size
            out.append(_block(name, lengths, in_a.pages, in_b.pages, npages))
        return tuple(out)


def _block(
    name: str, lengths: tuple[int, int], a: _core.Pages, b: _core.Pages, npages: int
) -> BlockDiff:
    differ = _core.Bitmap(npages)
    same = differing = only_a = only_b = 0
    for first in range(0, npages, _STEP):
        step = _core.diff_pages(a, b, first, min(npages, first + _STEP), differ)
        same, differing = same + step[0], differing + step[1]
        only_a, only_b = only_a + step[2], only_b + step[3]
    ranges = tuple(islice(_ranges(differ), MAX_RANGES))
    return BlockDiff(name, *lengths, same, differing, only_a, only_b, ranges)


def _ranges(bits: _core.Bitmap) -> Iterator[tuple[int, int]]:
    first = bits.next_set()
    while first < bits.nbits:
        end = bits.next_clear(first)
        yield first, end - first
        first = bits.next_set(end) if end < bits.nbits else bits.nbits


# ---- devices ---------------------------------------------------------------------------------

_Keys: TypeAlias = tuple[tuple[str, int], ...]


def _devices(a: Analysis, b: Analysis) -> tuple[_Keys, _Keys, Iterator[FieldDiff]]:
    devices_a = {(d.idstr, d.instance_id): d for d in a.devices}
    devices_b = {(d.idstr, d.instance_id): d for d in b.devices}
    both = [key for key in devices_a if key in devices_b]
    return (
        tuple(key for key in devices_a if key not in devices_b),
        tuple(key for key in devices_b if key not in devices_a),
        (item for key in both for item in _device(devices_a[key], devices_b[key])),
    )


def _device(a: Device, b: Device) -> Iterator[FieldDiff]:
    """Everything in one device that differs."""
    key = a.idstr, a.instance_id
    if a.version_id != b.version_id:
        yield FieldDiff(*key, "version_id", a.version_id, b.version_id)
    if a.state is not None and b.state is not None:
        for path, x, y in _states("", a.state, b.state):
            yield FieldDiff(*key, path, x, y)
    elif a.section.payload != b.section.payload:
        yield FieldDiff(*key, "payload", a.section.payload, b.section.payload)


_Difference: TypeAlias = "tuple[str, Value | Missing, Value | Missing]"


def _states(path: str, a: State, b: State) -> Iterator[_Difference]:
    in_a, in_b = _parts(a), _parts(b)
    dot = "." if path else ""
    for name in dict.fromkeys([*in_a, *in_b]):
        x, y = in_a.get(name, MISSING), in_b.get(name, MISSING)
        yield from _values(f"{path}{dot}{name}", x, y)


def _parts(state: State) -> dict[str, Value | Missing]:
    parts: dict[str, Value | Missing] = {item.name: item.value for item in state.fields}
    return parts | {sub.vmsd_name: sub for sub in state.subsections}


def _values(path: str, a: Value | Missing, b: Value | Missing) -> Iterator[_Difference]:
    """Where two values differ: as deep in them as they are alike."""
    if isinstance(a, State) and isinstance(b, State):
        yield from _states(path, a, b)
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _values(f"{path}[{i}]", x, y)
    elif not _same(a, b):
        yield path, a, b


def _same(a: Value | Missing, b: Value | Missing) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        # -0.0 is another value than 0.0, and no number is one value
        return struct.pack(">d", a) == struct.pack(">d", b)
    return type(a) is type(b) and a == b
