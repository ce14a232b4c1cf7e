"""Requests that are answered into a file, to be looked at."""

from __future__ import annotations

import os
import struct
from typing import Self

import numpy as np

from mig import _core
from mig.engine.requests import PageRequests
from mig.engine.sharedsearch import SharedSearch
from mig.ram.search import PageBatch, PageSearch, SourceBlock

ZERO, PAGE, CONTINUE = 0x02, 0x08, 0x20


class Answering(SharedSearch):
    """A search, and requests of its pages by a destination that notes what it gets.

    Tests may go on with either of them, this one and the search, in turns.
    """

    def __init__(self, search: PageSearch, **options) -> None:
        self.requests = PageRequests(search, **options)
        self.sent: list[PageBatch] = []
        super().__init__(search, self.requests, self.sent.append)
        self.size = search.listed[0].pages.page_size
        self.fd = os.memfd_create("answers")
        self.requests.attach(_core.Descriptor(self.fd))
        #: of pages that came, their contents
        self.contents: dict[tuple[str, int], bytes] = {}
        self._block = ""
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.clear()
        self.requests.close()
        os.close(self.fd)

    def take(self, block: SourceBlock, first: int, npages: int) -> PageBatch | None:
        """Ask for pages; returns what came, None: nothing."""
        number = [id(b) for b in self.listed].index(id(block))
        self.requests.server.answer(number, first, npages)
        self.heed()
        came = self.came()
        assert {name for name, _ in came} <= {block.idstr}
        return PageBatch(block, np.array([n for _, n in came], np.uint64)) if came else None

    def came(self) -> list[tuple[str, int]]:
        """Block and number of the pages that came since the last call."""
        data = os.pread(self.fd, os.fstat(self.fd).st_size - self._read, self._read)
        self._read += len(data)
        pages, at = [], 0
        while at < len(data):
            (word,) = struct.unpack_from(">Q", data, at)
            at += 8
            if not word & CONTINUE:
                self._block = data[at + 1 : at + 1 + data[at]].decode()
                at += 1 + data[at]
            page = self._block, word // self.size
            kind = word % self.size & ~CONTINUE
            assert kind in (ZERO, PAGE)
            length = 1 if kind == ZERO else self.size
            self.contents[page] = data[at : at + length]
            pages.append(page)
            at += length
        assert at == len(data)
        return pages
