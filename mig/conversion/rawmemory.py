"""Guest memory as plain bytes: written as a sparse file, and taken from one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mig import _core
from mig.errors import ChannelError, MismatchError
from mig.image.base import Image, StandingStill
from mig.ram.search import SourceBlock

#: pages that are written with one call
_AT_ONCE = 1 << 16


def main_block(blocks: Sequence[SourceBlock]) -> SourceBlock:
    """Return the block that is the machine's memory: the longest. MismatchError without blocks."""
    if not blocks:
        raise MismatchError("there is no memory in it")
    return max(blocks, key=lambda block: block.used_length)


def write_memory(fd: int, block: SourceBlock, offset: int) -> None:
    """Write the pages of a block from ``offset`` on; zero pages become holes.

    The file is long enough afterwards. ChannelError.
    """
    if os.fstat(fd).st_size < offset + block.used_length:
        os.ftruncate(fd, offset + block.used_length)
    file, stored = _core.PageFile(fd), _core.Bitmap(block.pages.npages)
    page = 0
    while len(index := block.dirty.indexes(page, _AT_ONCE)):
        zero, _ = _core.KERNELS.zero_pages(block.pages, index)
        file.write(block.pages, index, zero, stored, offset)
        page = int(index[-1]) + 1


class OtherMemory(StandingStill):
    """An image with the contents of some blocks from elsewhere; satisfies SourceGuest.

    image:  keeps everything else; closed by its owner, after this
    memory: (file, offset) of whole blocks, by their names

    MismatchError for a block that the image does not have or whose file is too short;
    ChannelError for a file that cannot be mapped.
    """

    def __init__(self, image: Image, memory: Mapping[str, tuple[Path, int]]) -> None:
        self.configuration = image.configuration
        self.ram_section_id = image.ram_section_id
        self.footers = image.footers
        self.switchover_start = image.switchover_start
        self._image = image
        self._maps: dict[str, mmap.mmap] = {}
        self._views: dict[str, memoryview] = {}
        self._pages: dict[str, _core.Pages] = {}
        self._lengths = {block.idstr: block.used_length for block in image.blocks}
        try:
            for idstr, (path, offset) in memory.items():
                if idstr not in self._lengths:
                    raise MismatchError("the image has no such block", block=idstr)
                self._pages[idstr] = self._map(idstr, path, offset, self._lengths[idstr])
        except BaseException:
            self.close()
            raise

    def _map(self, idstr: str, path: Path, offset: int, nbytes: int) -> _core.Pages:
        try:
            with path.open("rb") as file:
                there = os.fstat(file.fileno()).st_size - offset
                if there < nbytes:
                    raise MismatchError(
                        f"{path} has {max(there, 0)} bytes of memory, not {nbytes}", block=idstr
                    )
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ChannelError(f"{path}: {error.strerror or error}") from error
        self._maps[idstr] = mapping
        view = self._views[idstr] = memoryview(mapping)[offset : offset + nbytes]
        return _core.Pages(view, self._image.page_size)

    def source_blocks(self) -> Sequence[SourceBlock]:
        """Return the blocks; all of those from elsewhere are to be sent."""
        out = []
        for block in self._image.source_blocks():
            pages = self._pages.get(block.idstr)
            if pages is not None:
                dirty = _core.Bitmap(pages.npages, fill=True)
                block = replace(block, pages=pages, dirty=dirty, detect_zero=True, shared=False)
            out.append(block)
        return out

    @property
    def ignores_shared(self) -> bool:
        """Whether memory is left out since the destination has it (x-ignore-shared)."""
        return self._image.ignores_shared

    def page(self, idstr: str, page_index: int) -> bytes | None:
        """Return the contents of one page, None when there is none; KeyError."""
        page_size = self._image.page_size
        at = page_index * page_size
        if not 0 <= at < self._lengths[idstr]:
            return None
        if idstr in self._views:
            return bytes(self._views[idstr][at : at + page_size])
        return self._image.page(idstr, page_index)

    def save_devices(self) -> bytes:
        """Return the device state of the image."""
        return self._image.save_devices()

    def close(self) -> None:
        """Unmap the files."""
        for pages in self._pages.values():
            pages.release()
        for view in self._views.values():
            view.release()
        for mapping in self._maps.values():
            mapping.close()
