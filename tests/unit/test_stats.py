"""Counters and what query() hands out."""

from __future__ import annotations

import pytest

from mig.events import Listening, PassStarted, StatusChanged
from mig.state import Status
from mig.stats import MigrationInfo, RamCounters, RamStats

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
