"""Which pages go in which order when host pages are sent whole, one page at a time."""

from __future__ import annotations

from itertools import pairwise


def host_page_of(page: int, per_host_page: int) -> int:
    return page // per_host_page


def order(dirty: list[set[int]], per_host_page: list[int]) -> list[tuple[int, int]]:
    """(block, page) of everything that is dirty, in the order of a search from the beginning."""
    out = []
    for block, pages in enumerate(dirty):
        for host_page in sorted({host_page_of(p, per_host_page[block]) for p in pages}):
            out += [
                (block, p)
                for p in sorted(pages)
                if host_page_of(p, per_host_page[block]) == host_page
            ]
    return out


def splits(batches: list[tuple[int, list[int]]], per_host_page: list[int]) -> list[int]:
    """Batches that end within a host page which the next one goes on with."""
    out = []
    for i, ((block, pages), (after, following)) in enumerate(pairwise(batches)):
        n = per_host_page[block]
        if block == after and host_page_of(pages[-1], n) == host_page_of(following[0], n):
            out.append(i)
    return out
