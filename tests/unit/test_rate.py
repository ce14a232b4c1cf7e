"""RateLimit, by a clock that is told what to say."""

from __future__ import annotations

import pytest

from mig.engine.rate import RateLimit
from mig.errors import CancelledError


class Clock:
    """Time that passes when told to, or in sleep()."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def limit(self, bandwidth: int) -> RateLimit:
        return RateLimit(lambda: bandwidth, self.sleep, self)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_without_limit_nobody_sleeps(clock):
    limit = clock.limit(0)
    for _ in range(100):
        assert limit.room() is None
        limit.spend(10**9)
    assert clock.slept == []


def test_below_the_budget_of_a_slice_nobody_sleeps(clock):
    limit = clock.limit(1000)
    assert limit.room() == 100
    limit.spend(99)
    assert clock.slept == []
    assert limit.room() == 1
    limit.spend(1)
    assert clock.slept == [pytest.approx(0.1)]
    assert limit.room() == 100


def test_there_is_room_for_what_the_limit_has_become(clock):
    bandwidths = [1000]
    limit = RateLimit(lambda: bandwidths[0], clock.sleep, clock)
    limit.spend(60)
    bandwidths[0] = 10_000
    assert limit.room() == 940
    bandwidths[0] = 0
    assert limit.room() is None


def test_there_is_always_room_for_something(clock):
    limit = clock.limit(1000)
    limit.spend(99)
    clock.now += 0.05
    assert limit.room() == 1
    clock.now += 0.06
    assert limit.room() == 100


@pytest.mark.parametrize("chunk", [1, 37, 100, 250, 5000])
@pytest.mark.parametrize("bandwidth", [100, 1000, 12345])
def test_over_time_no_more_than_the_bandwidth_is_spent(clock, chunk, bandwidth):
    limit, began, sent = clock.limit(bandwidth), clock.now, 0
    for _ in range(200):
        limit.spend(chunk)
        sent += chunk
        # one slice's budget may be used ahead, and the chunk that reaches it is waited for
        assert sent <= bandwidth * (clock.now - began + RateLimit.SLICE) + 1e-6 * bandwidth


def test_time_that_was_not_used_is_not_saved_up(clock):
    limit = clock.limit(1000)
    clock.now += 50
    limit.spend(100)
    assert clock.slept == [pytest.approx(0.1)]


def test_a_bandwidth_that_rises_ends_the_sleep(clock):
    bandwidths = [10]

    def woken(seconds: float) -> None:
        clock.sleep(min(seconds, 0.5))
        bandwidths[0] = 1000

    limit = RateLimit(lambda: bandwidths[0], woken, clock)
    limit.spend(1000)
    assert clock.slept == [0.5]
    # what went under the old limit is settled: there is a whole slice to use
    limit.spend(99)
    assert clock.slept == [0.5]


def test_what_went_without_limit_is_not_paid_for_later(clock):
    bandwidths = [0]
    limit = RateLimit(lambda: bandwidths[0], clock.sleep, clock)
    limit.spend(10**9)
    bandwidths[0] = 1000
    limit.spend(100)
    assert clock.slept == [pytest.approx(0.1)]


def test_a_sleep_that_ends_early_for_no_reason_goes_on(clock):
    def nap(seconds: float) -> None:
        clock.sleep(min(seconds, 0.04))

    RateLimit(lambda: 1000, nap, clock).spend(100)
    assert sum(clock.slept) == pytest.approx(0.1)


def test_a_sleep_that_is_cancelled_raises(clock):
    def cancelled(seconds: float) -> None:
        raise CancelledError("cancelled")

    with pytest.raises(CancelledError):
        RateLimit(lambda: 10, cancelled, clock).spend(1000)
