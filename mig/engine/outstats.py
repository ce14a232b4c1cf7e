"""The statistics of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mig.engine.precopy import Precopy
from mig.ram.search import PageSearch
from mig.stats import RamCounters, RamStats


@dataclass(frozen=True, slots=True)
class SentBytes:
    """Bytes of stream, over all connections.

    total:     up to now
    running:   up to the moment when the guest was stopped, None: it is not
    here:      up to the moment when it might run at the destination, None: it does not
    channels:  of them, over the channels of multifd
    """

    total: int
    running: int | None
    here: int | None
    channels: int


def source_stats(
    sent: SentBytes,
    counters: Sequence[RamCounters],
    search: PageSearch | None,
    precopy: Precopy | None,
    *,
    remaining: int,
    requests: int,
    missed_zero_copy: int,
) -> RamStats:
    """Return the statistics of RAM, whatever of it is there yet.

    counters: the first one is of the main stream
    remaining: bytes of pages that are still to be sent
    requests: pages that were asked for
    """
    running = sent.total if sent.running is None else sent.running
    here = sent.total if sent.here is None else sent.here
    stats = RamStats(
        transferred=sent.total,
        remaining=remaining,
        total=counters[0].total,
        duplicate=sum(each.fill for each in counters),
        normal=sum(each.normal for each in counters),
        page_size=search.listed[0].pages.page_size if search and search.listed else 0,
        dirty_sync_count=precopy.passes if precopy else 0,
        precopy_bytes=running,
        downtime_bytes=here - running,
        postcopy_bytes=sent.total - here,
        postcopy_requests=requests,
        multifd_bytes=sent.channels,
        dirty_sync_missed_zero_copy=missed_zero_copy,
    )
    if precopy is None:
        return stats
    return replace(
        stats,
        dirty_pages_rate=round(precopy.dirty_pages_per_second),
        bandwidth=precopy.bandwidth,
        pages_per_second=round(precopy.pages_per_second),
    )
