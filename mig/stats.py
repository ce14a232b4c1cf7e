"""Counters that a running migration keeps, and the snapshots it hands out.

Attributes are in seconds and bytes; `to_qmp` gives QEMU's names and units (ms, Mbit/s).
"""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import dataclass
from typing import Any, Final

from mig.state import Status


@dataclass(slots=True)
class RamCounters:
    """Counts of one migration, written by its engine thread only.

    total:   bytes of RAM in the block list; a source leaves out the blocks that it does not send
    normal:  PAGE records
    fill:    ZERO records (QEMU's ``duplicate``)
    xbzrle:  XBZRLE records
    packed:  COMPRESS_PAGE records
    """

    total: int = 0
    normal: int = 0
    fill: int = 0
    xbzrle: int = 0
    packed: int = 0

    @property
    def records(self) -> int:
        """Records of pages, of every kind."""
        return self.normal + self.fill + self.xbzrle + self.packed

    def add(self, npages: int, nfill: int, nxbzrle: int = 0, npacked: int = 0) -> None:
        """Count ``npages`` records, of which so many are ZERO, XBZRLE and COMPRESS_PAGE."""
        self.normal += npages - nfill - nxbzrle - npacked
        self.fill += nfill
        self.xbzrle += nxbzrle
        self.packed += npacked


@dataclass(frozen=True, slots=True)
class RamStats:
    """Statistics of RAM (MigrationStats). None: not known, or not yet.

    transferred:       bytes of stream so far, all of it
    remaining:         bytes of dirty pages not yet sent; None on the incoming side
    total:             bytes of RAM
    duplicate:         zero pages
    normal:            pages sent whole
    page_size:         bytes
    dirty_sync_count:  passes over the dirty log; None on the incoming side
    dirty_pages_rate:  pages that the guest writes per second
    bandwidth:         bytes sent per second, lately (QMP's mbps)
    pages_per_second:  pages sent per second, lately
    precopy_bytes:     bytes sent while the guest ran at the source
    downtime_bytes:    bytes sent while it stood still
    postcopy_bytes:    bytes sent while it ran at the destination
    postcopy_requests: pages that the destination asked for
    multifd_bytes:     bytes sent over the channels of multifd
    dirty_sync_missed_zero_copy: passes for which the kernel copied what it was not to copy
    """

    transferred: int
    remaining: int | None
    total: int
    duplicate: int
    normal: int
    page_size: int
    dirty_sync_count: int | None
    dirty_pages_rate: int | None = None
    bandwidth: float | None = None
    pages_per_second: int | None = None
    precopy_bytes: int | None = None
    downtime_bytes: int | None = None
    postcopy_bytes: int = 0
    postcopy_requests: int = 0
    multifd_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0

    @property
    def normal_bytes(self) -> int:
        """Bytes of the pages sent whole."""
        return self.normal * self.page_size

    def to_qmp(self) -> dict[str, Any]:
        """Return QEMU's dict. It leaves nothing out: what it has not measured it calls 0."""
        return {
            "transferred": self.transferred,
            "remaining": self.remaining or 0,
            "total": self.total,
            "duplicate": self.duplicate,
            "normal": self.normal,
            "normal-bytes": self.normal_bytes,
            "dirty-pages-rate": self.dirty_pages_rate or 0,
            "mbps": (self.bandwidth or 0) * 8 / 1e6,
            "dirty-sync-count": self.dirty_sync_count or 0,
            "postcopy-requests": self.postcopy_requests,
            "page-size": self.page_size,
            "multifd-bytes": self.multifd_bytes,
            "pages-per-second": self.pages_per_second or 0,
            "precopy-bytes": self.precopy_bytes or 0,
            "downtime-bytes": self.downtime_bytes or 0,
            "postcopy-bytes": self.postcopy_bytes,
            "dirty-sync-missed-zero-copy": self.dirty_sync_missed_zero_copy,
        }


@dataclass(frozen=True, slots=True)
class XbzrleStats:
    """Statistics of XBZRLE (XBZRLECacheStats).

    cache_size:      bytes of the cache
    nbytes:          bytes of XBZRLE records without their words, and a page for each overflow
                     (QMP's bytes)
    npages:          pages that were in the cache, also those that overflowed or had not changed
                     (QMP's pages)
    cache_miss:      pages that were not in the cache
    cache_miss_rate: their share of the pages sent lately
    encoding_rate:   bytes of pages for each of ``nbytes``, lately
    overflow:        pages whose difference was longer than they are

    Lately: in the last period of a second or more that ended with a sync of the dirty bitmap.
    """

    cache_size: int
    nbytes: int
    npages: int
    cache_miss: int
    cache_miss_rate: float
    encoding_rate: float
    overflow: int

    def to_qmp(self) -> dict[str, Any]:
        """Return QEMU's dict."""
        return {
            "cache-size": self.cache_size,
            "bytes": self.nbytes,
            "pages": self.npages,
            "cache-miss": self.cache_miss,
            "cache-miss-rate": self.cache_miss_rate,
            "encoding-rate": self.encoding_rate,
            "overflow": self.overflow,
        }


@dataclass(frozen=True, slots=True)
class CompressionStats:
    """Statistics of compression threads (CompressionStats of QEMU 7.2).

    pages:            pages sent compressed
    busy:             pages sent as they are, since no thread was free
    busy_rate:        their share of the pages sent lately
    compressed_size:  bytes of the records of compressed pages, without their words
    compression_rate: bytes of pages for each of these bytes, lately

    Lately: as for XbzrleStats.
    """

    pages: int
    busy: int
    busy_rate: float
    compressed_size: int
    compression_rate: float

    def to_qmp(self) -> dict[str, Any]:
        """Return QEMU's dict."""
        return {
            "pages": self.pages,
            "busy": self.busy,
            "busy-rate": self.busy_rate,
            "compressed-size": self.compressed_size,
            "compression-rate": self.compression_rate,
        }


@dataclass(frozen=True, slots=True)
class AdaptiveStats:
    """How pages went with multifd-compression adaptive, in pages (QEMU has no such thing).

    raw: as they are; delta: as the difference to what was sent of them before; zstd: compressed;
    unchanged: not at all, since they are as they were sent before
    """

    raw: int
    delta: int
    zstd: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class InetAddress:
    """A TCP address that is listened on."""

    host: str
    port: int

    def to_qmp(self) -> dict[str, Any]:
        """Return QEMU's dict (SocketAddress)."""
        out: dict[str, Any] = {"type": "inet", "host": self.host, "port": str(self.port)}
        with contextlib.suppress(ValueError):
            out[f"ipv{ipaddress.ip_address(self.host).version}"] = True
        return out


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket that is listened on."""

    path: str

    def to_qmp(self) -> dict[str, Any]:
        """Return QEMU's dict (SocketAddress)."""
        return {"type": "unix", "path": self.path}


#: the statuses of a source that tell no more than themselves, by QMP's names
_BARE: Final = frozenset({"setup", "wait-unplug", "colo", "failed", "cancelled"})

#: the statuses in which the guest has stopped at the source for good: its downtime is known
_MOVED: Final = frozenset(
    {
        "completed",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
    }
)

#: the statuses of a destination that listens no more
_DEAF: Final = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class SnapshotStats:
    """Statistics of a background snapshot.

    pause:  seconds that the guest stood still, None before
    faults: pages that had to be copied because the guest wrote to them
    waits:  how often a write had to wait because too many copies waited to be sent
    """

    pause: float | None
    faults: int
    waits: int


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """What query() returns (MigrationInfo); None or empty until it is known.

    total_time:              seconds since the start, or from start to end
    setup_time:              seconds until memory is sent
    downtime:                seconds that the guest stood still at the source
    ram:                     statistics of RAM
    error:                   why it failed (QMP's error-desc)
    incoming:                whether this is the destination
    expected_downtime:       seconds that the guest would stand still if it stopped now
    cpu_throttle_percentage: of the time is taken from the guest, None when nothing is
    xbzrle_cache:            statistics of XBZRLE, None when it is off
    compression:             statistics of compression threads, None when there are none
    adaptive:                how pages went, None unless multifd-compression is adaptive
    vfio_transferred:        bytes of VFIO devices, None when there are none
    blocked_reasons:         why the guest cannot be migrated
    postcopy_blocktime:      seconds that all vCPUs together waited for pages
    postcopy_vcpu_blocktime: seconds that each vCPU waited for pages
    postcopy_latencies:      of single waits for pages: (below so many seconds, how many); QEMU has
                             none before 10.1
    socket_address:          what the destination listens on
    dirty_limit_throttle_time_per_round: seconds that dirty-limit stops a vCPU at most per round
    dirty_limit_ring_full_time:          seconds in which the guest fills the dirty ring
    snapshot:                statistics of a background snapshot, None of any other migration
    """

    status: Status
    total_time: float | None
    setup_time: float | None
    downtime: float | None
    ram: RamStats
    error: str | None
    incoming: bool = False
    expected_downtime: float | None = None
    cpu_throttle_percentage: int | None = None
    xbzrle_cache: XbzrleStats | None = None
    compression: CompressionStats | None = None
    adaptive: AdaptiveStats | None = None
    vfio_transferred: int | None = None
    blocked_reasons: tuple[str, ...] = ()
    postcopy_blocktime: float | None = None
    postcopy_vcpu_blocktime: tuple[float, ...] = ()
    postcopy_latencies: tuple[tuple[float, int], ...] = ()
    socket_address: tuple[InetAddress | UnixAddress, ...] = ()
    dirty_limit_throttle_time_per_round: float | None = None
    dirty_limit_ring_full_time: float | None = None
    snapshot: SnapshotStats | None = None

    @property
    def throughput(self) -> float | None:
        """Bytes of stream per second since setup, None before that."""
        if self.total_time is None or self.setup_time is None:
            return None
        seconds = self.total_time - self.setup_time
        return self.ram.transferred / seconds if seconds > 0 else None

    def to_qmp(self) -> dict[str, Any]:
        """Return what query-migrate answers in this status, with QEMU's names and units."""
        out: dict[str, Any] = {"status": str(self.status), "error-desc": self.error}
        if self.status == Status.NONE:
            out = {}
        elif self.incoming:
            out |= self._destination()
        elif self.status not in _BARE:
            out |= self._source()
        if not self.incoming:
            out["blocked-reasons"] = list(self.blocked_reasons) or None
        return {name: value for name, value in out.items() if value is not None}

    def _source(self) -> dict[str, Any]:
        moved = self.status in _MOVED
        vfio, throttle = self.vfio_transferred, self.dirty_limit_throttle_time_per_round
        return {
            "setup-time": _ms(self.setup_time or 0),
            "total-time": _ms(self.total_time or 0),
            "downtime": _ms(self.downtime) if moved else None,
            "expected-downtime": None if moved else _ms(self.expected_downtime),
            "ram": self._ram(),
            "xbzrle-cache": self.xbzrle_cache.to_qmp() if self.xbzrle_cache else None,
            "compression": self.compression.to_qmp() if self.compression else None,
            "vfio": None if vfio is None else {"transferred": vfio},
            "cpu-throttle-percentage": self.cpu_throttle_percentage,
            "dirty-limit-throttle-time-per-round": _us(throttle),
            "dirty-limit-ring-full-time": _us(self.dirty_limit_ring_full_time),
        }

    def _ram(self) -> dict[str, Any]:
        out = self.ram.to_qmp()
        if self.status == Status.COMPLETED:
            # in the end QEMU gives the rate of the whole, and nothing is left
            out |= {"remaining": 0, "dirty-pages-rate": 0, "mbps": (self.throughput or 0) * 8 / 1e6}
        return out

    def _destination(self) -> dict[str, Any]:
        done = self.status == Status.COMPLETED
        addresses = () if self.status in _DEAF else self.socket_address
        waits = [_ms(seconds) for seconds in self.postcopy_vcpu_blocktime]
        return {
            "socket-address": [address.to_qmp() for address in addresses] or None,
            "postcopy-blocktime": _ms(self.postcopy_blocktime) if done else None,
            "postcopy-vcpu-blocktime": (waits or None) if done else None,
        }


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1_000_000)
