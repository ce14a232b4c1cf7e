"""The XBZRLE page cache as a dictionary from slots to what is in them."""

from __future__ import annotations

from collections.abc import Iterable

from reference import xbzrle

OVERFLOW = -1
MISS = -2
REFUSED = -3


class Entry:
    def __init__(self, address: int, age: int, page: bytes) -> None:
        self.address = address
        self.age = age
        self.page = page


class PageCache:
    def __init__(self, npages: int, page_size: int) -> None:
        self.page_size = page_size
        self.hits = self.misses = self.overflows = self.unchanged = 0
        self.encoded_pages = self.encoded_bytes = 0
        self.resize(npages)

    def resize(self, npages: int) -> None:
        self.npages = npages
        self.slots: dict[int, Entry] = {}

    def _slot(self, address: int) -> int:
        return address // self.page_size % self.npages

    def page(self, address: int) -> bytes | None:
        entry = self.slots.get(self._slot(address))
        return entry.page if entry and entry.address == address else None

    def lookup(self, address: int, generation: int) -> bool:
        if self.page(address) is None:
            return False
        self.slots[self._slot(address)].age = generation
        return True

    def insert(self, address: int, page: bytes | None, generation: int) -> bool:
        entry = self.slots.get(self._slot(address))
        if entry and entry.address != address and entry.age + 2 > generation:
            return False
        page = bytes(self.page_size) if page is None else page
        self.slots[self._slot(address)] = Entry(address, generation, page)
        return True

    def insert_pages(
        self, pages: list[bytes | None], index: Iterable[int], generation: int, address: int
    ) -> int:
        where = [(address + i * self.page_size, pages[i]) for i in index]
        return sum(self.insert(at, page, generation) for at, page in where)

    def _encode_page(
        self, address: int, page: bytes, generation: int, last_stage: bool
    ) -> tuple[int, bytes]:
        if not self.lookup(address, generation):
            self.misses += 1
            kept = not last_stage and self.insert(address, page, generation)
            return (MISS if kept else REFUSED), b""
        self.hits += 1
        entry = self.slots[self._slot(address)]
        encoding = xbzrle.encode(entry.page, page, self.page_size)
        if not last_stage:
            entry.page = page
        if encoding is None:
            self.overflows += 1
            return OVERFLOW, b""
        if not encoding:
            self.unchanged += 1
            return 0, b""
        self.encoded_pages += 1
        self.encoded_bytes += len(encoding)
        return len(encoding), encoding

    def encode(
        self,
        pages: list[bytes],
        index: Iterable[int],
        generation: int,
        room: int,
        *,
        address: int,
        last_stage: bool,
    ) -> tuple[list[int], bytes]:
        results = []
        out = b""
        for i in index:
            if room - len(out) < self.page_size:
                break
            result, encoding = self._encode_page(
                address + i * self.page_size, pages[i], generation, last_stage
            )
            results.append(result)
            out += encoding
        return results, out

    def counters(self) -> tuple[int, ...]:
        return (
            self.hits,
            self.misses,
            self.overflows,
            self.unchanged,
            self.encoded_pages,
            self.encoded_bytes,
            len(self.slots),
        )
