"""Arithmetic of pages, bytes and offsets; page sizes are data, never a literal."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

#: indexes of pages in their block
PageIndex: TypeAlias = NDArray[np.uint64]
#: places of pages in a file, one per page: byte offset, PAGE_ZERO or PAGE_NONE
PagePlaces: TypeAlias = NDArray[np.int64]


def check_page_size(page_size: int) -> int:
    """Return ``page_size`` (bytes); ValueError unless it is a power of two of at least 64."""
    if page_size < 64 or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is not a power of two of at least 64")
    return page_size


def pages_of(nbytes: int, page_size: int) -> int:
    """Return the number of pages that hold ``nbytes`` bytes, the last one perhaps in part."""
    return -(-nbytes // page_size)


def is_aligned(nbytes: int, page_size: int) -> bool:
    """Whether ``nbytes`` is a whole number of pages."""
    return nbytes % page_size == 0
