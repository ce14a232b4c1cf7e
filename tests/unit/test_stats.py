"""Counters and what query() hands out."""

from __future__ import annotations

import pytest

from mig.events import Listening, PassStarted, StatusChanged
from mig.state import Status
from mig.stats import (
    InetAddress,
    MigrationInfo,
    RamCounters,
    RamStats,
    UnixAddress,
    XbzrleStats,
)

RAM = RamStats(1000, 0, 0, 0, 0, 4096, 1)


def info(total: float | None, setup: float | None) -> MigrationInfo:
    return MigrationInfo(Status.ACTIVE, total, setup, None, RAM, None)


def test_counters_tell_pages_from_fill_records():
    counters = RamCounters()
    counters.add(10, 3)
    counters.add(1, 1)
    assert (counters.normal, counters.fill) == (7, 4)


def test_throughput_is_bytes_since_setup():
    assert info(3.0, 1.0).throughput == 500


@pytest.mark.parametrize(("total", "setup"), [(None, None), (1.0, None), (1.0, 1.0), (1.0, 2.0)])
def test_throughput_is_unknown_before_there_is_time(total, setup):
    assert info(total, setup).throughput is None


def test_events_are_values():
    assert StatusChanged(Status.ACTIVE) == StatusChanged(Status.ACTIVE)
    assert PassStarted(1) != PassStarted(2)
    assert Listening("tcp:a:1").uri == "tcp:a:1"


# ---- query-migrate ---------------------------------------------------------------------------

FULL = RamStats(1000, 20, 4096, 3, 2, 4096, 1, 7, 1e6, 5, 900, 80, 20, 4, 50, 6)


def migration(status: Status, **more) -> MigrationInfo:
    return MigrationInfo(status, 2.5, 0.5, 0.25, FULL, None, **more)


@pytest.mark.parametrize("status", list(Status))
def test_a_source_tells_what_it_has_to(status):
    qmp = migration(status, expected_downtime=0.3).to_qmp()
    always = {"status", "setup-time", "total-time", "ram"}
    if status == Status.NONE:
        assert qmp == {}
    elif status in ("setup", "wait-unplug", "colo", "failed", "cancelled"):
        assert qmp == {"status": str(status)}
    elif status == Status.COMPLETED or status.startswith("postcopy"):
        assert qmp.keys() == always | {"downtime"}
        assert qmp["downtime"] == 250
    else:
        assert qmp.keys() == always | {"expected-downtime"}
        assert qmp["expected-downtime"] == 300


def test_times_are_in_milliseconds_and_rates_in_megabits():
    qmp = migration(Status.ACTIVE).to_qmp()
    assert (qmp["total-time"], qmp["setup-time"]) == (2500, 500)
    assert qmp["ram"] == {
        "transferred": 1000,
        "remaining": 20,
        "total": 4096,
        "duplicate": 3,
        "normal": 2,
        "normal-bytes": 8192,
        "dirty-pages-rate": 7,
        "mbps": 8.0,
        "dirty-sync-count": 1,
        "postcopy-requests": 4,
        "page-size": 4096,
        "multifd-bytes": 50,
        "pages-per-second": 5,
        "precopy-bytes": 900,
        "downtime-bytes": 80,
        "postcopy-bytes": 20,
        "dirty-sync-missed-zero-copy": 6,
    }


def test_in_the_end_the_rate_is_that_of_the_whole():
    ram = migration(Status.COMPLETED).to_qmp()["ram"]
    assert (ram["remaining"], ram["dirty-pages-rate"]) == (0, 0)
    assert ram["mbps"] == pytest.approx(1000 * 8 / 2.0 / 1e6)


def test_features_tell_about_themselves():
    qmp = migration(
        Status.ACTIVE,
        cpu_throttle_percentage=20,
        xbzrle_cache=XbzrleStats(4096, 1, 2, 3, 0.5, 1.5, 4),
        vfio_transferred=9,
        blocked_reasons=("because",),
        dirty_limit_throttle_time_per_round=0.001,
        dirty_limit_ring_full_time=0.002,
    ).to_qmp()
    assert qmp["cpu-throttle-percentage"] == 20
    assert qmp["xbzrle-cache"] == {
        "cache-size": 4096,
        "bytes": 1,
        "pages": 2,
        "cache-miss": 3,
        "cache-miss-rate": 0.5,
        "encoding-rate": 1.5,
        "overflow": 4,
    }
    assert qmp["vfio"] == {"transferred": 9}
    assert qmp["blocked-reasons"] == ["because"]
    assert qmp["dirty-limit-throttle-time-per-round"] == 1000
    assert qmp["dirty-limit-ring-full-time"] == 2000


def test_reasons_are_told_before_anything_happens():
    info = migration(Status.NONE, blocked_reasons=("because",))
    assert info.to_qmp() == {"blocked-reasons": ["because"]}


def test_a_destination_tells_its_status_its_addresses_and_its_waits():
    more = {
        "incoming": True,
        "socket_address": (InetAddress("::1", 5), InetAddress("host", 6), UnixAddress("/s")),
        "postcopy_blocktime": 0.5,
        "postcopy_vcpu_blocktime": (0.25, 0.5),
    }
    assert migration(Status.ACTIVE, **more).to_qmp() == {
        "status": "active",
        "socket-address": [
            {"type": "inet", "host": "::1", "port": "5", "ipv6": True},
            {"type": "inet", "host": "host", "port": "6"},
            {"type": "unix", "path": "/s"},
        ],
    }
    assert migration(Status.COMPLETED, **more).to_qmp() == {
        "status": "completed",
        "postcopy-blocktime": 500,
        "postcopy-vcpu-blocktime": [250, 500],
    }


@pytest.mark.parametrize("incoming", [True, False])
def test_a_failure_says_why(incoming):
    info = MigrationInfo(Status.FAILED, 1.0, None, None, FULL, "gone", incoming)
    assert info.to_qmp() == {"status": "failed", "error-desc": "gone"}
