"""The XBZRLE encoder: pages that were sent before go as their difference to what was sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mig import _core
from mig.errors import OptionError
from mig.ram.encode import PageEncoder, RecordWriter, ZeroFinder
from mig.ram.search import PageBatch, PageSearch
from mig.stats import MigrationInfo, RamCounters, XbzrleStats

#: bytes of a page, so that the flag 0x40 is none of the bits of its offset
_MIN_PAGE = 128


class DeltaEncoder(PageEncoder):
    """Matches save_xbzrle_page(): in the first full round as ``plain`` does, then differences.

    cache_size: bytes that the cache is to have, read at each batch; it can change
    last_stage: whether the guest stands still, so that nothing is sent again

    The cache is keyed by the address that a page has when the blocks lie one behind the other.
    OptionError when there cannot be a cache of that size, or not for pages of this size.
    """

    def __init__(
        self,
        plain: PageEncoder,
        records: RecordWriter,
        zeros: ZeroFinder,
        search: PageSearch,
        counters: RamCounters,
        *,
        cache_size: Callable[[], int],
        last_stage: Callable[[], bool],
    ) -> None:
        self._plain = plain
        self._records = records
        self._zeros = zeros
        self._search = search
        self._counters = counters
        self._cache_size = cache_size
        self._last_stage = last_stage
        self._addresses: dict[str, int] = {}
        address, page_size = 0, 1 << 12
        for block in search.blocks:
            page_size = block.pages.page_size
            self._addresses[block.idstr] = address
            address += block.pages.npages * page_size
        self._page_size = page_size
        self._cache = self._open(cache_size())
        self._wanted = self._cache.nbytes
        self._generation = 0
        self._rates = (0.0, 0.0)
        self._before = (0, 0, 0, 0)

    def _open(self, nbytes: int) -> _core.XbzrleCache:
        try:
            if self._page_size < _MIN_PAGE:
                raise ValueError(f"pages of {self._page_size} bytes are too small")
            return _core.XbzrleCache(nbytes, self._page_size)
        except ValueError as error:
            raise OptionError(f"capability 'xbzrle': {error}") from error
        except MemoryError as error:
            raise OptionError(f"Parameter 'xbzrle-cache-size': {error}") from error

    def check_size(self, nbytes: int) -> None:
        """OptionError when the cache cannot be changed to that size."""
        if nbytes < self._page_size:
            raise OptionError(
                "Parameter 'xbzrle-cache-size' expects a power of two no less than the target "
                "page size"
            )

    def encode(self, batch: PageBatch) -> None:
        """ZERO records, XBZRLE records, PAGE records, and none for a page that has not changed."""
        if not self._search.wrapped:
            self._plain.encode(batch)
            return
        if self._cache_size() != self._wanted:
            self._resize(self._cache_size())
        cache, block = self._cache, batch.block
        zero, nzero = self._zeros.find(batch)
        encoded, unchanged = cache.encoded_pages, cache.unchanged
        self._records.put_deltas(
            block,
            batch.index,
            zero,
            cache,
            address=self._addresses[block.idstr],
            generation=self._generation,
            last_stage=self._last_stage(),
        )
        sent = len(batch.index) - (cache.unchanged - unchanged)
        self._counters.add(sent, nzero, cache.encoded_pages - encoded)

    def _resize(self, nbytes: int) -> None:
        """Begin with an empty cache of another size; the old one stays where that cannot be had."""
        self._wanted = nbytes
        self._records.writer.flush()
        try:
            self._cache.resize(nbytes)
        except (ValueError, MemoryError):
            # no reason to fail: statistics tell the size that there is
            return

    def begin_pass(self) -> None:
        """The age of what is cached is counted in syncs of the dirty bitmap."""
        self._generation += 1
        self._plain.begin_pass()

    def end_period(self) -> None:
        """A period is over: compute its rates; matches migration_update_rates()."""
        self._plain.end_period()
        cache = self._cache
        pages, nbytes, misses = cache.hits, cache.record_bytes, cache.misses
        records = self._counters.records
        pages_before, nbytes_before, misses_before, records_before = self._before
        self._before = (pages, nbytes, misses, records)
        sent = records - records_before
        if not sent:
            return
        encoded = nbytes - nbytes_before
        whole = (pages - pages_before) * self._page_size
        self._rates = ((misses - misses_before) / sent, whole / encoded if encoded else 0.0)

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Add the statistics of the cache. Any thread."""
        return replace(self._plain.report(info), xbzrle_cache=self.stats)

    @property
    def stats(self) -> XbzrleStats:
        """What query-migrate says of it. Any thread."""
        cache = self._cache
        miss_rate, encoding_rate = self._rates
        return XbzrleStats(
            cache_size=cache.nbytes,
            nbytes=cache.record_bytes,
            npages=cache.hits,
            cache_miss=cache.misses,
            cache_miss_rate=miss_rate,
            encoding_rate=encoding_rate,
            overflow=cache.overflows,
        )
