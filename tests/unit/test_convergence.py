"""Convergence and RateLimit, by clocks that are told what to say."""

from __future__ import annotations

import pytest

from mig.engine.convergence import Convergence, RateLimit
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


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_guest_may_stop_when_the_rest_fits_into_the_downtime(clock):
    convergence = Convergence(lambda: 500, clock)
    convergence.pass_started()
    clock.now += 2
    convergence.pass_ended(2000)  # 1000 bytes a second
    assert convergence.may_stop(500)
    assert not convergence.may_stop(501)


def test_before_the_first_pass_only_nothing_fits(clock):
    convergence = Convergence(lambda: 300, clock)
    assert convergence.may_stop(0)
    assert not convergence.may_stop(1)


def test_the_bandwidth_is_that_of_the_last_pass(clock):
    convergence = Convergence(lambda: 1000, clock)
    for nbytes in (1000, 10):
        convergence.pass_started()
        clock.now += 1
        convergence.pass_ended(nbytes)
    assert convergence.may_stop(10)
    assert not convergence.may_stop(11)


def test_a_pass_that_took_no_time_says_nothing(clock):
    convergence = Convergence(lambda: 1000, clock)
    convergence.pass_started()
    clock.now += 1
    convergence.pass_ended(100)
    convergence.pass_started()
    convergence.pass_ended(5)
    assert convergence.may_stop(100)


def test_a_downtime_limit_of_zero_needs_everything_sent(clock):
    convergence = Convergence(lambda: 0, clock)
    convergence.pass_started()
    clock.now += 1
    convergence.pass_ended(10**9)
    assert not convergence.may_stop(1)
    assert convergence.may_stop(0)


def test_without_limit_nobody_sleeps(clock):
    limit = RateLimit(lambda: 0, clock.sleep, clock)
    for _ in range(100):
        limit.spend(10**9)
    assert clock.slept == []


def test_below_the_budget_of_a_slice_nobody_sleeps(clock):
    limit = RateLimit(lambda: 1000, clock.sleep, clock)
    limit.spend(99)
    assert clock.slept == []
    limit.spend(1)
    assert clock.slept == [pytest.approx(0.1)]


@pytest.mark.parametrize("chunk", [1, 37, 100, 250, 5000])
@pytest.mark.parametrize("bandwidth", [100, 1000, 12345])
def test_over_time_no_more_than_the_bandwidth_is_spent(clock, chunk, bandwidth):
    limit, began, sent = RateLimit(lambda: bandwidth, clock.sleep, clock), clock.now, 0
    for _ in range(200):
        limit.spend(chunk)
        sent += chunk
        # one slice's budget may be used ahead, and the chunk that reaches it is waited for
        assert sent <= bandwidth * (clock.now - began + RateLimit.SLICE) + 1e-6 * bandwidth


def test_time_that_was_not_used_is_not_saved_up(clock):
    limit = RateLimit(lambda: 1000, clock.sleep, clock)
    clock.now += 50
    limit.spend(100)
    assert clock.slept == [pytest.approx(0.1)]


def test_a_sleep_that_is_cancelled_raises(clock):
    def cancelled(seconds: float) -> None:
        raise CancelledError("cancelled")

    with pytest.raises(CancelledError):
        RateLimit(lambda: 10, cancelled, clock).spend(1000)


def test_a_downtime_limit_that_changes_is_the_one_that_counts(clock):
    limits = [0]
    convergence = Convergence(lambda: limits[0], clock)
    convergence.pass_started()
    clock.now += 1
    convergence.pass_ended(1000)
    assert not convergence.may_stop(500)
    limits[0] = 500
    assert convergence.may_stop(500)


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
