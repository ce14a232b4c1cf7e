"""MappedCapture: a destination that keeps the VM in a mapped-ram file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mig import _core
from mig.errors import MismatchError
from mig.image.capture import Capture
from mig.options import Capability
from mig.records import (
    BlockInfo,
    BlockList,
)
from mig.savevm.devices import DeviceState


class MappedCapture(Capture):
    """A capture with a place for every page; see Capture.

    QEMU 9.0 and later resume from it by ``-incoming file:FILE`` with capability mapped-ram. Zero
    pages are holes, and so are pages that the source never sent. Each channel of multifd writes for
    itself, and with direct_io from where the network left the bytes.
    """

    _pages: _core.MappedLog | None = None
    _laid_out = BlockList()

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """Keep the block list; MismatchError for one that leaves memory out (x-ignore-shared).

        QEMU 10.0 has no way to say so in such a file.
        """
        shared = next((block for block in blocks if block.address is not None), None)
        if shared is not None:
            raise MismatchError(
                "a mapped-ram file cannot leave memory out (x-ignore-shared): keep a stream",
                block=shared.idstr,
            )
        super().open_blocks(blocks, page_size)

    @property
    def _has_pages(self) -> bool:
        return self._pages is not None

    def _mapped_head(self) -> bytes:
        """What the source said of itself, and how the file is made."""
        configuration = self._configuration
        if configuration is not None:
            names = (*(configuration.capabilities or ()), str(Capability.MAPPED_RAM))
            configuration = replace(configuration, capabilities=names)
        return self._head(configuration)

    def _open_pages(self, parser: _core.RamParser) -> None:
        if self._pages is not None:
            return
        at = len(self._mapped_head())
        self._laid_out = self._blocks.laid_out(at, self._page_size)
        places = [block.mapped.pages_offset for block in self._laid_out.blocks if block.mapped]
        _, end = self._laid_out.pieces(at)
        os.ftruncate(self._file.fd, end)
        # the kernel takes whole blocks, aligned ones
        direct_fd = self._direct_fd if self._page_size % _DIRECT_BLOCK == 0 else -1
        self._pages = _core.MappedLog(self._file.fd, parser, places, direct_fd=direct_fd)

    def _put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        assert self._pages is not None
        self._pages.put(data, start, parser)

    def land(
        self, parser: _core.RamParser, fd: _core.Descriptor, data: bytearray, held: int
    ) -> tuple[int, int, bool] | None:
        """Read pages straight to where they are written from."""
        # with postcopy two connections may bring some
        if self._pages is None or self._received is not None:
            return None
        with self._file.naming():
            return _core.land_in_file(fd, parser, self._pages, data, held)

    def _serve_lanes(self, receiver: _core.MultifdReceiver) -> None:
        assert self._pages is not None
        receiver.to_file(self._pages)

    def _write_end(self, state: DeviceState) -> None:
        assert self._pages is not None
        self._pages.flush()
        file = _core.PageFile(self._file.fd)
        for block, present in zip(self._laid_out.blocks, self._pages.present, strict=True):
            assert block.mapped is not None
            words = np.asarray(present)
            if self._postcopy and self._received is not None:
                # what was discarded and did not come again
                words &= np.asarray(self._received[block.idstr])
            bits = words.astype("<u8", copy=False).view(np.uint8).data
            file.put(bits, block.mapped.bitmap_offset)
        head = self._mapped_head()
        file.put(head, 0)
        pieces, end = self._laid_out.pieces(len(head))
        for at, piece in pieces:
            file.put(piece, at)
        file.put(self._tail(state), end)

    def close(self) -> None:
        """Release the descriptor."""
        self._pages = None
        super().close()


#: bytes that direct writes come in multiples of, whatever the disk
_DIRECT_BLOCK = 4096
