"""Zero pages: which pages hold nothing but zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mig import _core
from mig.wire import DEFAULT_PAGE_BITS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from typing_extensions import Buffer


def is_zero(data: Buffer) -> bool:
    """Say whether every byte is 0; any length, any alignment, and no bytes at all are zero."""
    return _core.KERNELS.is_zero(data)


def zero_pages(
    data: Buffer, page_size: int = 1 << DEFAULT_PAGE_BITS, index: ArrayLike | None = None
) -> tuple[_core.Bitmap, int]:
    """Find the zero pages of a buffer; return (bitmap, how many there are).

    data:      contiguous bytes, whole pages: an array, memoryview, mmap, ...
    page_size: bytes, a power of two of at least 64; huge pages are pages too
    index:     integers: look only at these pages, in this order; bit i is about page index[i]

    Without ``index`` bit i is about page i. ValueError: part of a page, or no such page size.
    TypeError: page numbers that are no integers. IndexError: a page that is not in the buffer. The
    GIL is not held meanwhile. Somebody else may be writing: the answer is then about bytes that
    were there at some moment.
    """
    pages = _core.Pages(data, page_size)
    return _core.KERNELS.zero_pages(pages, index)
