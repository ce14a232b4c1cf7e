"""Zero pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def is_zero(data: bytes) -> bool:
    return all(byte == 0 for byte in data)


def zero_pages(pages: Sequence[bytes | None], index: Iterable[int]) -> list[bool]:
    """For each index whether that page is zero; None is a page without storage."""
    out = []
    for i in index:
        page = pages[i]
        out.append(page is None or is_zero(page))
    return out
