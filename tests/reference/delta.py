"""A sender with XBZRLE, page by page: records, and the cache that they are made against."""

from __future__ import annotations

from reference import ram
from reference.pagecache import REFUSED, PageCache
from reference.ram import Delta, Record


class DeltaSender:
    """Blocks lie one behind the other in the space that the cache is addressed by."""

    def __init__(self, blocks: dict[str, int], page_size: int, cache_npages: int) -> None:
        self.page_size = page_size
        self.cache = PageCache(cache_npages, page_size)
        self.current: bytes | None = None
        self.record_bytes = 0
        self._addresses = {}
        address = 0
        for name, npages in blocks.items():
            self._addresses[name] = address
            address += npages * page_size

    def _record(self, name: str, page: int, contents: bytes | int | Delta) -> bytes:
        record = Record(name.encode(), page, contents)
        data = ram.encode_record(record, self.page_size, self.current)
        self.current = record.block
        return data

    def plain(self, name: str, page: int, contents: bytes) -> bytes:
        return self._record(name, page, contents if any(contents) else 0)

    def send(
        self, name: str, page: int, contents: bytes, generation: int, *, last_stage: bool = False
    ) -> bytes:
        address = self._addresses[name] + page * self.page_size
        if not any(contents):
            self.cache.insert(address, None, generation)
            return self._record(name, page, 0)
        (result,), encoding = self.cache.encode(
            [contents],
            [0],
            generation,
            self.page_size,
            address=address,
            last_stage=last_stage,
        )
        if result == 0:
            return b""
        if result < 0:
            if result > REFUSED + 1:  # overflow
                self.record_bytes += self.page_size
            return self._record(name, page, contents)
        data = self._record(name, page, Delta(encoding))
        self.record_bytes += len(data) - 8
        return data
