"""What the pages of a process guest hold and in which order they are written; slow and obvious."""

from __future__ import annotations

from collections.abc import Iterator

STEP = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def key(seed: int, page: int, count: int) -> int:
    return mix(mix(seed + (page + 1) * STEP) + (count + 1) * STEP)


def page_bytes(seed: int, page: int, count: int, page_size: int, pattern: str, fill: str) -> bytes:
    """The page after ``count`` writes."""
    below = 0 if pattern == "words" else count
    zero = below == 0 and (fill == "zero" or (fill == "half" and page % 2 == 1))
    base = key(seed, page, below)
    words = [0 if zero else mix(base + i * STEP) for i in range(page_size // 8)]
    if fill == "compressible":
        words[len(words) // 2 :] = [base] * (len(words) // 2)
    if pattern == "words" and count > 0:
        block = min(512, page_size) // 8
        places, values = key(seed, page, -2), key(seed, page, count)
        for i in range(len(words) // block):
            words[i * block + mix(places + i * STEP) % block] = mix(values + i * STEP)
    return b"".join(word.to_bytes(8, "little") for word in words)


def order(seed: int, worker: int, npages: int, pattern: str) -> Iterator[int]:
    """The pages that a worker writes, numbered from the first it owns; it writes all of them."""
    state = mix(seed ^ mix(worker + 1))

    def draw(n: int) -> int:
        nonlocal state
        state = (state + STEP) & MASK
        return mix(state) * n >> 64

    position = 0
    while True:
        if pattern == "sequential":
            yield position
            position = (position + 1) % npages
        elif pattern == "hot" and draw(10):
            yield draw((npages + 9) // 10)
        else:
            yield draw(npages)
