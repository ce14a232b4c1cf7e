"""The encoder of compression threads: each page as a zlib stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from mig import _core
from mig.errors import MigError, OptionError
from mig.ram.encode import PageEncoder, RecordWriter, ZeroFinder
from mig.ram.search import PageBatch
from mig.stats import CompressionStats, MigrationInfo, RamCounters

#: bytes of pages that are compressed, or wait to be put, at once
_AT_ONCE = 4 << 20
#: bytes of a page that a StreamWriter has room for
_MAX_PAGE = 1 << 16
#: pages that are sent between two looks whether threads are free
_LOOK = 32


class CompressEncoder(PageEncoder):
    """ZERO and COMPRESS_PAGE records; matches save_compress_page() of QEMU before 9.1.

    nthreads: that compress
    level:    zlib's
    waits:    whether pages wait for a thread; if not, those for which none is free go as they are

    OptionError when there cannot be so many threads, or not for pages of this size.
    """

    def __init__(
        self,
        records: RecordWriter,
        zeros: ZeroFinder,
        counters: RamCounters,
        *,
        page_size: int,
        nthreads: int,
        level: int,
        waits: Callable[[], bool],
    ) -> None:
        self._records = records
        self._zeros = zeros
        self._counters = counters
        self._page_size = page_size
        self._nthreads = nthreads
        self._waits = waits
        self._max = max(1, nthreads, _AT_ONCE // page_size)
        try:
            if page_size > _MAX_PAGE:
                raise ValueError(f"pages of {page_size} bytes are too large")
            self._compressor = _core.Compressor(nthreads, level, page_size, self._max)
        except (ValueError, MemoryError, MigError) as error:
            raise OptionError(f"capability 'compress': {error or 'no memory'}") from error
        self._busy = 0
        self._rates = (0.0, 0.0)
        self._before = (0, 0, 0, 0)

    def encode(self, batch: PageBatch) -> None:
        """All of the batch; the threads have nothing left to do then."""
        if self._waits():
            for part in _parts(batch, self._max):
                self._encode_all(part)
        else:
            try:
                self._encode_some(batch)
            except BaseException:
                # the pages are their owner's again
                self._compressor.wait()
                raise

    def _encode_all(self, batch: PageBatch) -> None:
        compressor = self._compressor
        zero, nzero = self._zeros.find(batch)
        compressor.start(batch.block.pages, batch.index, zero)
        packed = len(compressor.wait())
        self._records.put_compressed(batch.block, batch.index, zero, compressor, skip=False)
        self._counters.add(len(batch.index), nzero, npacked=packed)

    def _encode_some(self, batch: PageBatch) -> None:
        """While the threads are at work the other pages go as they are."""
        compressor = self._compressor
        for part in _parts(batch, _LOOK):
            zero, nzero = self._zeros.find(part)
            started = 0
            if compressor.done:
                self._put_finished(batch)
                started = compressor.start(part.block.pages, part.index, zero, most=self._nthreads)
                self._records.put_compressed(part.block, part.index, zero, compressor, skip=True)
            else:
                self._records.put(part.block, part.index, zero)
            sent = len(part.index) - started
            self._busy += sent - nzero
            self._counters.add(sent, nzero)
            # what takes its time is the sending: threads get on meanwhile
            self._records.writer.flush()
        self._put_finished(batch)

    def _put_finished(self, batch: PageBatch) -> None:
        finished = self._compressor.wait()
        if len(finished):
            self._records.put_compressed(batch.block, finished, None, self._compressor, skip=False)
            self._counters.add(len(finished), 0, npacked=len(finished))

    def end_period(self) -> None:
        """A period is over: compute its rates; matches migration_update_rates() before 9.1."""
        pages, nbytes = self._compressor.compressed, self._compressor.record_bytes
        records = self._counters.records
        busy_before, pages_before, nbytes_before, records_before = self._before
        self._before = (self._busy, pages, nbytes, records)
        sent, packed = records - records_before, nbytes - nbytes_before
        if not sent:
            return
        rate = (pages - pages_before) * self._page_size / packed if packed else self._rates[1]
        self._rates = ((self._busy - busy_before) / sent, rate)

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Add the statistics of compression. Any thread."""
        return replace(info, compression=self.stats)

    @property
    def stats(self) -> CompressionStats:
        """What query-migrate says of it. Any thread."""
        busy_rate, compression_rate = self._rates
        return CompressionStats(
            pages=self._compressor.compressed,
            busy=self._busy,
            busy_rate=busy_rate,
            compressed_size=self._compressor.record_bytes,
            compression_rate=compression_rate,
        )


def _parts(batch: PageBatch, npages: int) -> Iterator[PageBatch]:
    for first in range(0, len(batch.index), npages):
        yield PageBatch(batch.block, batch.index[first : first + npages])
