"""RateLimit, by a clock that is told what to say."""

from __future__ import annotations

import random

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


def test_there_is_room_for_some_milliseconds(clock):
    limit = clock.limit(100_000)
    assert limit.room() == 500
    limit.spend(500)
    assert clock.slept == [pytest.approx(0.005)]
    assert limit.room() == 500


def test_there_is_room_for_what_the_limit_has_become(clock):
    bandwidths = [1000]
    limit = RateLimit(lambda: bandwidths[0], clock.sleep, clock)
    limit.spend(60)
    bandwidths[0] = 10_000
    assert limit.room() == 50
    bandwidths[0] = 0
    assert limit.room() is None


def test_there_is_always_room_for_something(clock):
    limit = clock.limit(1)
    assert limit.room() == 1
    limit.spend(1)
    assert clock.slept == [pytest.approx(1.0)]
    assert limit.room() == 1


@pytest.mark.parametrize("chunk", [1, 37, 100, 250, 5000])
@pytest.mark.parametrize("bandwidth", [100, 1000, 12345])
def test_over_time_no_more_than_the_bandwidth_is_spent(clock, chunk, bandwidth):
    limit, began, sent = clock.limit(bandwidth), clock.now, 0
    for _ in range(200):
        limit.spend(chunk)
        sent += chunk
        assert sent == pytest.approx(bandwidth * (clock.now - began))


def busiest(spent: list[tuple[float, int]], span: float) -> int:
    """The most that was spent in a span of time."""
    most = total = start = 0
    for when, nbytes in spent:
        total += nbytes
        while spent[start][0] <= when - span + 1e-9:
            total -= spent[start][1]
            start += 1
        most = max(most, total)
    return most


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bandwidth", [1000, 100_000])
def test_lost_time_is_made_up_for_and_no_second_has_more_than_its_share(clock, bandwidth, seed):
    rng = random.Random(seed)
    limit, began = clock.limit(bandwidth), clock.now
    spent = []
    while clock.now < began + 20:
        clock.now += 0.06 if rng.random() < 0.005 else 0.001
        room = limit.room()
        spent.append((clock.now, room))
        limit.spend(room)
    assert busiest(spent, RateLimit.SPAN) <= bandwidth * (RateLimit.SPAN + RateLimit.TURN) + 1
    assert sum(n for _, n in spent) == pytest.approx(bandwidth * (clock.now - began), rel=0.02)


def test_what_is_made_up_for_has_a_bound(clock):
    limit = clock.limit(1000)
    clock.now += 50
    limit.spend(round(1000 * RateLimit.CARRY))
    assert clock.slept == []
    limit.spend(100)
    assert clock.slept == [pytest.approx(0.1)]


def test_a_bandwidth_that_rises_ends_the_sleep(clock):
    bandwidths = [10]

    def woken(seconds: float) -> None:
        clock.sleep(min(seconds, 0.5))
        bandwidths[0] = 1000

    limit = RateLimit(lambda: bandwidths[0], woken, clock)
    limit.spend(1000)
    # what went under the old limit is settled
    assert clock.slept == [0.5]
    limit.spend(99)
    assert clock.slept == [0.5, pytest.approx(0.099)]


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
