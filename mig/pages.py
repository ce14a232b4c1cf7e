"""Arithmetic of pages, bytes and offsets; page sizes are data, never a literal."""

from __future__ import annotations

import mmap
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mig.wire import MAX_PAGE_BITS, MIN_PAGE_BITS

#: indexes of pages in their block
PageIndex: TypeAlias = NDArray[np.uint64]
#: places of pages in a file, one per page: byte offset, PAGE_ZERO or PAGE_NONE
PagePlaces: TypeAlias = NDArray[np.int64]
#: bytes; that of memory which is not in huge pages
HOST_PAGE_SIZE: Final = mmap.PAGESIZE


def check_page_size(page_size: int) -> int:
    """Return ``page_size`` (bytes); ValueError unless a target can have it."""
    low, high = 1 << MIN_PAGE_BITS, 1 << MAX_PAGE_BITS
    if not low <= page_size <= high or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is not a power of two from {low} to {high}")
    return page_size
