# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages to measure with: page-aligned buffers as large as each level of memory, and changes."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mig import _core

PAGE = 4096
#: pages of one call, as the engine has them
BATCH = 1024
_HUGE = 2 << 20

Array = np.ndarray[Any, Any]

#: the one that mig chooses, and those it is compared with
DEFAULT = _core.KERNELS.name
OTHERS = [name for name in _core.kernel_names(usable=True) if name != DEFAULT]


def aligned(npages: int) -> Array:
    """Zeroed pages, touched; in huge pages, as guests have, when there are enough."""
    memory = mmap.mmap(-1, npages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if npages * PAGE >= _HUGE:
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8).reshape(npages, PAGE)
    array[:] = 0
    return array


def random_pages(npages: int, seed: int = 1) -> Array:
    """Aligned pages of random bytes, each of its own; none of the bytes is 0."""
    pages = aligned(npages)
    rng = np.random.default_rng(seed)
    for i in range(0, npages, BATCH):
        part = pages[i : i + BATCH]
        part[:] = rng.integers(1, 256, part.shape, dtype=np.uint8)
    return pages


def cache_pages(level: int) -> int:
    """How many pages a data cache of the first CPU holds, or a usual one when nobody says."""
    usual = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kind = (folder / "type").read_text().strip()
        if int((folder / "level").read_text()) == level and kind != "Instruction":
            size = (folder / "size").read_text().strip()
            return (int(size.removesuffix("K")) << 10) // PAGE
    return usual[level] // PAGE


#: resident in a cache with room to spare
L1_PAGES = max(1, cache_pages(1) * 3 // 8)
L2_PAGES = max(1, cache_pages(2) // 4)
L3_PAGES = max(1, min(cache_pages(3) // 2, 4096))
#: pairs of pages that stay in a level together with their encodings
L1_PAIRS = max(1, L1_PAGES // 2)
L2_PAIRS = L2_PAGES


def free_mib() -> int:
    """Memory that is free, MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


def _bytes(pages: Array, rng: np.random.Generator, places: Array) -> None:
    """Give other values to the bytes at places."""
    pages[places] ^= rng.integers(1, 256, int(places.sum()), dtype=np.uint8)


def _spots(width: int, count: int) -> Callable[[Array, np.random.Generator], None]:
    """Change `count` aligned pieces of `width` bytes in each page."""

    def change(pages: Array, rng: np.random.Generator) -> None:
        pieces = np.zeros((len(pages), PAGE // width), dtype=bool)
        chosen = rng.random(pieces.shape).argpartition(count, axis=1)[:, :count]
        np.put_along_axis(pieces, chosen, True, axis=1)
        _bytes(pages, rng, pieces.repeat(width, axis=1))

    return change


def _share(share: float) -> Callable[[Array, np.random.Generator], None]:
    """Change that share of all bytes, anywhere."""

    def change(pages: Array, rng: np.random.Generator) -> None:
        _bytes(pages, rng, rng.random(pages.shape, dtype=np.float32) < share)

    return change


def _alternate(pages: Array, rng: np.random.Generator) -> None:
    pages[:, ::2] ^= rng.integers(1, 256, pages[:, ::2].shape, dtype=np.uint8)


def _replace(pages: Array, rng: np.random.Generator) -> None:
    pages[:] = rng.integers(0, 256, pages.shape, dtype=np.uint8)


CHANGES: dict[str, Callable[[Array, np.random.Generator], None]] = {
    "identical": lambda pages, rng: None,
    "1 byte": _spots(1, 1),
    "8 words": _spots(8, 8),
    "1 line": _spots(64, 1),
    "10%": _share(0.1),
    "50%": _share(0.5),
    "alternating": _alternate,
    "replaced": _replace,
}


def changed(old: Array, change: str, seed: int = 2) -> Array:
    """Aligned pages that differ from old ones, no two in the same way."""
    pages = aligned(len(old))
    rng = np.random.default_rng(seed)
    for i in range(0, len(old), BATCH):
        part = pages[i : i + BATCH]
        part[:] = old[i : i + BATCH]
        CHANGES[change](part, rng)
    return pages
