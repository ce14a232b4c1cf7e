"""Bitmaps as lists of bools, and what is asked of large ones as plain numpy expressions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = list[bool]
Flags = NDArray[np.bool_]


def set_range(bits: Bits, first: int, nbits: int) -> int:
    """Return how many were clear."""
    changed = 0
    for i in range(first, first + nbits):
        if not bits[i]:
            bits[i] = True
            changed += 1
    return changed


def clear_range(bits: Bits, first: int, nbits: int) -> int:
    """Return how many were set."""
    changed = 0
    for i in range(first, first + nbits):
        if bits[i]:
            bits[i] = False
            changed += 1
    return changed


def count(bits: Bits, first: int, nbits: int) -> int:
    total = 0
    for i in range(first, first + nbits):
        if bits[i]:
            total += 1
    return total


def next_equal(bits: Bits, start: int, value: bool) -> int:
    """First bit at or after start that has the value; the length when there is none."""
    for i in range(start, len(bits)):
        if bits[i] == value:
            return i
    return len(bits)


def indexes(bits: Bits, start: int = 0, most: int | None = None) -> list[int]:
    found = []
    for i in range(start, len(bits)):
        if bits[i] and (most is None or len(found) < most):
            found.append(i)
    return found


def take(bits: Bits, start: int, most: int) -> list[int]:
    """Clear and return the first set bits at or after start."""
    taken = indexes(bits, start, most)
    for i in taken:
        bits[i] = False
    return taken


def runs(
    bits: Bits, start: int = 0, most: int | None = None, budget: int | None = None
) -> list[list[int]]:
    """First bit and end of every run, bit by bit: a bit goes on with the run that ends at it."""
    found: list[list[int]] = []
    for i in indexes(bits, start, budget):
        if found and found[-1][1] == i:
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1])
    return found if most is None else found[:most]


def merge(into: Bits, source: Bits) -> int:
    """Or source into the other; return how many bits were newly set."""
    fresh = 0
    for i, bit in enumerate(source):
        if bit and not into[i]:
            into[i] = True
            fresh += 1
    return fresh


def drain(into: Bits, source: Bits) -> int:
    fresh = merge(into, source)
    clear_range(source, 0, len(source))
    return fresh


def intersect(into: Bits, source: Bits) -> None:
    for i, bit in enumerate(source):
        if not bit:
            into[i] = False


def subtract(into: Bits, source: Bits) -> None:
    for i, bit in enumerate(source):
        if bit:
            into[i] = False


def complement(bits: Bits) -> None:
    for i, bit in enumerate(bits):
        bits[i] = not bit


def fill_groups(bits: Bits, group: int) -> None:
    for first in range(0, len(bits), group):
        end = min(first + group, len(bits))
        if any(bits[first:end]):
            set_range(bits, first, end - first)


def words(bits: Bits) -> list[int]:
    """The 64-bit words: bit i is bit i % 64 of word i // 64."""
    out = [0] * ((len(bits) + 63) // 64)
    for i, bit in enumerate(bits):
        if bit:
            out[i // 64] += 2 ** (i % 64)
    return out


def wire(bits: Bits) -> bytes:
    return b"".join(word.to_bytes(8, "little") for word in words(bits))


# ---- large ones ------------------------------------------------------------------------------


def all_indexes(flags: Flags) -> NDArray[np.uint64]:
    return np.flatnonzero(flags).astype(np.uint64)


def all_runs(flags: Flags) -> NDArray[np.uint64]:
    padded = np.concatenate(([False], flags, [False]))
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2).astype(np.uint64)


def cut_runs(found: NDArray[np.uint64], budget: int) -> NDArray[np.uint64]:
    """As many of the runs as fit into so many bits, the last one cut."""
    lengths = (found[:, 1] - found[:, 0]).astype(np.int64)
    left = budget - (np.cumsum(lengths) - lengths)
    cut = found[left > 0].copy()
    if len(cut):
        last = len(cut) - 1
        cut[last, 1] = cut[last, 0] + np.uint64(min(lengths[last], left[last]))
    return cut


def all_groups(flags: Flags, group: int) -> Flags:
    padded = np.concatenate((flags, np.zeros(-len(flags) % group, dtype=bool)))
    return np.repeat(padded.reshape(-1, group).any(axis=1), group)[: len(flags)]


def all_words(flags: Flags) -> NDArray[np.uint64]:
    padded = np.concatenate((flags, np.zeros(-len(flags) % 64, dtype=bool)))
    return np.packbits(padded, bitorder="little").view("<u8").astype(np.uint64)
