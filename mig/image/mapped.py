"""MappedImage: a VM in a mapped-ram file, each page of which has its place."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mig import _core
from mig.errors import ChannelError, StreamError
from mig.image.base import BlockPages, Contents, Image
from mig.mapped import MappedFile
from mig.pages import PageIndex
from mig.records import BlockInfo
from mig.wire import DEFAULT_PAGE_BITS

#: pages that are looked at with one call
_AT_ONCE = 1 << 16
#: memory is taken for what is written, not for all of a file (MAP_NORESERVE)
_MAP_NORESERVE = 0x4000


class _Bitmaps:
    """Reads which pages the file has, and none of them; satisfies MappedPages."""

    def __init__(self, fd: int, file: MappedFile) -> None:
        self._pages = _core.PageFile(fd)
        self._file = file
        self.stored: list[_core.Bitmap | None] = []

    @property
    def file(self) -> MappedFile:
        return self._file

    def load(self, blocks: Sequence[BlockInfo], page_size: int) -> tuple[int, int]:
        npages = nzero = 0
        for block in blocks:
            mapped, n = block.mapped, block.npages(page_size)
            assert mapped is not None
            if mapped.is_left_out:
                self.stored.append(None)
                continue
            stored = self._pages.read_bitmap(n, mapped.bitmap_offset)
            self.stored.append(stored)
            npages, nzero = npages + n, nzero + n - stored.count()
        return npages, nzero


class MappedImage(Image):
    """A mapped-ram file; satisfies SourceGuest, so that it can be sent.

    path:      the file
    offset:    byte where the stream starts
    page_size: target page size in bytes where the stream does not name it

    Opening reads headers, bitmaps and what is behind RAM, and no page. A StreamError tells what is
    wrong with them.

    Of the pages of `blocks` only those of shared memory are missing.
    """

    format = "mapped-ram"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        page_size: int = 1 << DEFAULT_PAGE_BITS,
    ) -> None:
        # a mapping that has zeros where the file still has what pages were that have become zero
        self._corrected: mmap.mmap | None = None
        self._is_checked = False
        super().__init__(path, offset)
        bitmaps = _Bitmaps(self._file.fileno(), MappedFile(offset, len(self._map)))
        self._load(Contents(), offset, page_size, bitmaps)
        self._stored = bitmaps.stored
        try:
            self._check_tail(offset)
        except BaseException:
            self.close()
            raise

    def _check_tail(self, offset: int) -> None:
        """StreamError when a bitmap lies in what is behind RAM, whose length is known only now."""
        placed = [(b, b.mapped.regions(b.used_length)) for b in self._contents.blocks if b.mapped]
        start = max((pages[1] for _, (_, pages) in placed), default=offset)
        for block, ((first, end), _) in placed:
            if first < offset + self.nbytes and end > max(start, first):
                raise StreamError(
                    f"the bitmap from {first:#x} to {end:#x} of the file overlaps with the stream",
                    block=block.idstr,
                )

    # ---- looking ----------------------------------------------------------------------------

    def _count(self, number: int) -> tuple[int, int]:
        # what the file has no page of is zero
        stored = self._stored[number]
        if stored is None:
            return 0, 0
        data = stored.count()
        return data, len(stored) - data

    @property
    def pages(self) -> Mapping[str, BlockPages]:
        """The pages of each block by its name: arrays that are views of the file.

        Where the file still has what a page was that has become zero, this process gets a page of
        zeros of its own; that is looked for once. A block that is not in the file has no pages.
        """
        if not self._is_checked:
            self._correct()
            self._is_checked = True
        view = self._view if self._corrected is None else memoryview(self._corrected)
        out: dict[str, BlockPages] = {}
        for number, block in enumerate(self._contents.blocks):
            region = self._region(number, view).toreadonly()
            out[block.idstr] = np.frombuffer(region, dtype=np.uint8).reshape(-1, self.page_size)
        return out

    def _region(self, number: int, view: memoryview) -> memoryview:
        """Return the pages of a block."""
        mapped = self._contents.blocks[number].mapped
        if self._stored[number] is None or mapped is None:
            return memoryview(b"")
        start, end = mapped.regions(self._contents.blocks[number].used_length)[1]
        return view[start:end]

    def _correct(self) -> None:
        for number, stored in enumerate(self._stored):
            for index in self._stale(number, stored) if stored is not None else ():
                if self._corrected is None:
                    self._corrected = mmap.mmap(
                        self._file.fileno(),
                        len(self._map),
                        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,
                    )
                with memoryview(self._corrected) as view, self._region(number, view) as region:
                    pages = np.frombuffer(region, dtype=np.uint8).reshape(-1, self.page_size)
                    pages[index] = 0
                    del pages

    def _stale(self, number: int, stored: _core.Bitmap) -> Iterator[PageIndex]:
        """Find pages that the file has something else of than the zeros that they are."""
        block, page_size = self._contents.blocks[number], self.page_size
        assert block.mapped is not None
        offset, npages = block.mapped.pages_offset, len(stored)
        absent = _core.Bitmap(npages)
        absent |= stored
        absent.complement()
        with self._region(number, self._view) as region:
            pages = _core.Pages(region, page_size)
            for start, end in _data_in(self._file.fileno(), offset, offset + block.used_length):
                page, last = (start - offset) // page_size, (end - offset - 1) // page_size
                while page <= last:
                    index = absent.indexes(page, _AT_ONCE)
                    index = index[index <= last]
                    if not len(index):
                        break
                    zero, nzero = _core.KERNELS.zero_pages(pages, index)
                    if nzero < len(index):
                        zero.complement()
                        yield index[zero.indexes()]
                    page = int(index[-1]) + 1
            pages.release()

    def _page(self, number: int, page_index: int) -> bytes | None:
        stored = self._stored[number]
        if stored is None:
            return None
        if not stored[page_index]:
            return bytes(self.page_size)
        place = page_index * self.page_size
        with self._region(number, self._view) as region:
            return bytes(region[place : place + self.page_size])

    # ---- sending ----------------------------------------------------------------------------

    def _stored_pages(self, number: int) -> tuple[_core.Pages, _core.Bitmap, bool]:
        stored, npages = self._stored[number], self._contents.blocks[number].npages(self.page_size)
        dirty = _core.Bitmap(npages, fill=stored is not None)
        if stored is None:
            where = np.zeros(npages, dtype=np.int64)
            return _core.Pages(b"", self.page_size, where=where), dirty, True
        region = self._region(number, self._view)
        return _core.Pages(region, self.page_size, stored=stored), dirty, False

    def close(self) -> None:
        """Unmap the file; BufferError while a migration sends from it, or `pages` are in use."""
        if self._corrected is not None:
            self._corrected.close()
            self._corrected, self._is_checked = None, False
        super().close()


def _data_in(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Return (start, end) of the parts of a file that are no holes."""
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # a hole up to the end of the file
                return
            raise ChannelError(f"the file's holes cannot be found: {error.strerror}") from error
        if first >= end:
            return
        start = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        yield first, start
