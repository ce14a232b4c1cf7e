"""Counters that a running migration keeps, and the snapshots it hands out."""

from __future__ import annotations

from dataclasses import dataclass

from mig.state import Status


@dataclass(slots=True)
class RamCounters:
    """Counts of one migration, written by its engine thread only.

    total:   bytes of RAM in the block list
    normal:  PAGE records
    fill:    ZERO records (QEMU's ``duplicate``)
    """

    total: int = 0
    normal: int = 0
    fill: int = 0

    def add(self, npages: int, nfill: int) -> None:
        """Count ``npages`` records, ``nfill`` of them ZERO."""
        self.normal += npages - nfill
        self.fill += nfill


@dataclass(frozen=True, slots=True)
class RamStats:
    """Statistics of RAM, named after those of query-migrate.

    transferred:      bytes of stream so far, all of it
    remaining:        bytes of dirty pages not yet sent; None on the incoming side
    total:            bytes of RAM
    duplicate:        zero pages
    normal:           pages sent whole
    page_size:        bytes
    dirty_sync_count: passes over the dirty log; None on the incoming side
    """

    transferred: int
    remaining: int | None
    total: int
    duplicate: int
    normal: int
    page_size: int
    dirty_sync_count: int | None


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """What query() returns; times in seconds, None until they are known.

    setup_time: from the start to the connection
    downtime:   how long the guest stood still at the source
    """

    status: Status
    total_time: float | None
    setup_time: float | None
    downtime: float | None
    ram: RamStats
    error: str | None

    @property
    def throughput(self) -> float | None:
        """Bytes of stream per second since setup, None before that."""
        if self.total_time is None or self.setup_time is None:
            return None
        seconds = self.total_time - self.setup_time
        return self.ram.transferred / seconds if seconds > 0 else None
