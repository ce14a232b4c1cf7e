"""StreamImage: a VM in a stream file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mig import _core
from mig.image.base import BlockPages, Contents, Image, PageBytes
from mig.pages import PagePlaces
from mig.records import BlockInfo
from mig.wire import DEFAULT_PAGE_BITS


class _Index(Contents):
    """Notes also where each page is."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self._base = base
        self.places: list[PagePlaces] = []

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        super().open_blocks(blocks, page_size)
        # zeros cost no memory until a place is noted
        self.places = [np.zeros(b.npages(page_size), dtype=np.int64) for b in blocks]

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        if parser.npages:
            parser.index(self._base + start, self.places[parser.current])


class StreamPages:
    """The pages of one block, which lie scattered in a stream; satisfies BlockPages.

    pages[i] is a view of shape (page_size,), pages[a:b] or pages[indexes] a copy of shape
    (n, page_size), numpy.asarray(pages) a copy of them all.
    """

    dtype = np.dtype(np.uint8)
    ndim = 2

    def __init__(self, data: PageBytes, places: PagePlaces, page_size: int) -> None:
        self._data = data
        self._places = places
        self._page_size = page_size
        self._zero = np.zeros(page_size, dtype=np.uint8)
        self._zero.flags.writeable = False

    @property
    def shape(self) -> tuple[int, int]:
        """(npages, page_size)."""
        return len(self._places), self._page_size

    def __len__(self) -> int:
        return len(self._places)

    def _one(self, place: int) -> PageBytes:
        return self._data[place : place + self._page_size] if place > 0 else self._zero

    def __getitem__(self, key: int | slice | Sequence[int] | NDArray[np.integer], /) -> PageBytes:
        places = self._places[key]
        if np.ndim(places) == 0:
            return self._one(int(places))
        copy = np.zeros((len(places), self._page_size), dtype=np.uint8)
        for i in np.flatnonzero(places > 0):
            copy[i] = self._one(int(places[i]))
        return copy

    def __iter__(self) -> Iterator[PageBytes]:
        return (self._one(int(place)) for place in self._places)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> PageBytes:
        return self[:]


class StreamImage(Image):
    """A whole stream in a file; satisfies SourceGuest, so that it can be sent.

    path:      the file
    offset:    byte where the stream starts
    page_size: target page size in bytes where the stream does not name it

    Opening reads the stream once: a StreamError tells what is wrong with it. Pages stay in the
    file, which is mapped. Any number of migrations may send it at the same time: they share the
    mapping, and each has a dirty bitmap of its own.
    """

    format = "stream"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        page_size: int = 1 << DEFAULT_PAGE_BITS,
    ) -> None:
        super().__init__(path, offset)
        index = _Index(offset)
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._load(index, offset, page_size)
        self._map.madvise(mmap.MADV_NORMAL)
        self._places = index.places

    def _count(self, number: int) -> tuple[int, int]:
        places = self._places[number]
        return int(np.count_nonzero(places > 0)), int(np.count_nonzero(places == _core.PAGE_ZERO))

    @property
    def pages(self) -> Mapping[str, BlockPages]:
        """The pages of each block by its name; pages that were never sent read as zeros.

        A page is a view of the file, several are a copy: see `StreamPages`.
        """
        data = np.frombuffer(self._view, dtype=np.uint8)
        return {
            block.idstr: StreamPages(data, places, self.page_size)
            for block, places in zip(self._contents.blocks, self._places, strict=True)
        }

    def _page(self, number: int, page_index: int) -> bytes | None:
        place = int(self._places[number][page_index])
        if place == _core.PAGE_NONE:
            return None
        if place == _core.PAGE_ZERO:
            return bytes(self.page_size)
        return bytes(self._view[place : place + self.page_size])

    def _stored_pages(self, number: int) -> tuple[_core.Pages, _core.Bitmap, bool]:
        places = self._places[number]
        dirty = _core.Bitmap(len(places))
        bits = np.packbits(places != _core.PAGE_NONE, bitorder="little")
        np.asarray(dirty).view(np.uint8)[: len(bits)] = bits
        left_out = self._contents.blocks[number].address is not None and not bits.any()
        return _core.Pages(self._view, self.page_size, where=places), dirty, left_out
