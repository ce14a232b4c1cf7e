"""Bitmaps as lists of bools."""

from __future__ import annotations

Bits = list[bool]


def set_range(bits: Bits, first: int, nbits: int) -> None:
    for i in range(first, first + nbits):
        bits[i] = True


def clear_range(bits: Bits, first: int, nbits: int) -> None:
    for i in range(first, first + nbits):
        bits[i] = False


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


def take(bits: Bits, start: int, most: int) -> list[int]:
    """Clear and return the first set bits at or after start."""
    taken = []
    for i in range(start, len(bits)):
        if bits[i] and len(taken) < most:
            bits[i] = False
            taken.append(i)
    return taken


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


def words(bits: Bits) -> list[int]:
    """The 64-bit words: bit i is bit i % 64 of word i // 64."""
    out = [0] * ((len(bits) + 63) // 64)
    for i, bit in enumerate(bits):
        if bit:
            out[i // 64] += 2 ** (i % 64)
    return out
