"""Convergence and DirtyRate: numbers in, decisions out."""

from __future__ import annotations

import pytest

from mig.engine.convergence import Convergence, DirtyRate, Period
from mig.options import Parameters


def convergence(*, auto_converge: bool = False, **parameters: object) -> Convergence:
    names = {name.replace("_", "-"): value for name, value in parameters.items()}
    chosen = Parameters.from_qmp(names)
    return Convergence(lambda: chosen, auto_converge=auto_converge)


# ---- when to stop ----------------------------------------------------------------------------


def test_what_can_be_sent_within_the_downtime_is_few_enough():
    policy = convergence(downtime_limit=500)
    policy.measured(200_000, 2.0, 30_000)
    assert policy.bandwidth == 100_000
    assert policy.threshold == 50_000
    assert policy.expected_downtime == pytest.approx(0.3)


def test_before_anything_was_measured_only_nothing_is_few_enough():
    policy = convergence()
    assert policy.threshold == 0
    assert policy.expected_downtime is None


def test_the_bandwidth_is_the_last_one():
    policy = convergence(downtime_limit=1000)
    for nbytes in (1000, 10):
        policy.measured(nbytes, 1.0, 0)
    assert policy.threshold == 10
    policy.measured(5, 0.0, 0)
    assert policy.threshold == 10


def test_a_bandwidth_that_is_given_is_counted_on():
    policy = convergence(downtime_limit=100, avail_switchover_bandwidth=10_000)
    assert policy.threshold == 1000
    policy.measured(20_000, 1.0, 5000)
    assert policy.threshold == 1000
    assert policy.expected_downtime == pytest.approx(0.5)


def test_little_says_nothing_about_the_downtime():
    policy = convergence()
    policy.measured(10_000, 1.0, 5000)
    policy.measured(1_000_000, 1.0, 0)
    assert policy.expected_downtime is None


def test_a_limit_can_change_meanwhile():
    chosen = [Parameters.from_qmp({"downtime-limit": 100})]
    policy = Convergence(lambda: chosen[0], auto_converge=False)
    policy.measured(1000, 1.0, 0)
    chosen[0] = Parameters.from_qmp({"downtime-limit": 200})
    assert policy.threshold == 200


# ---- slowing down ----------------------------------------------------------------------------

TOO_MUCH = Period(1.0, dirty=600, sent=1000)
ENOUGH = Period(1.0, dirty=500, sent=1000)


def test_a_guest_is_slowed_down_at_every_second_period_of_too_much():
    policy = convergence(auto_converge=True)
    steps = [policy.throttle(TOO_MUCH) for _ in range(8)]
    assert steps == [None, 20, None, 30, None, 40, None, 50]


def test_periods_between_do_not_start_the_count_again():
    # as in QEMU, which counts periods of too much however far apart
    policy = convergence(auto_converge=True)
    assert [policy.throttle(p) for p in (TOO_MUCH, ENOUGH, ENOUGH, TOO_MUCH)] == [None] * 3 + [20]


def test_without_auto_converge_nobody_is_slowed_down():
    policy = convergence()
    assert [policy.throttle(TOO_MUCH) for _ in range(6)] == [None] * 6


def test_there_is_a_most():
    policy = convergence(
        auto_converge=True, cpu_throttle_initial=60, cpu_throttle_increment=30, max_cpu_throttle=80
    )
    steps = [policy.throttle(TOO_MUCH) for _ in range(6)]
    assert steps == [None, 60, None, 80, None, 80]


@pytest.mark.parametrize(("percent", "dirty"), [(1, 11), (50, 501), (100, 1001)])
def test_how_much_is_too_much_is_a_parameter(percent, dirty):
    policy = convergence(auto_converge=True, throttle_trigger_threshold=percent)
    at = Period(1.0, dirty=dirty - 1, sent=1000)
    above = Period(1.0, dirty=dirty, sent=1000)
    assert [policy.throttle(p) for p in (at, at, at, above, above)] == [None] * 4 + [20]


def test_the_tail_can_be_slow():
    policy = convergence(
        auto_converge=True,
        cpu_throttle_tailslow=True,
        cpu_throttle_initial=50,
        cpu_throttle_increment=20,
    )
    slightly = Period(1.0, dirty=550, sent=1000)
    twice = Period(1.0, dirty=1000, sent=1000)
    assert [policy.throttle(p) for p in (slightly, slightly)] == [None, 50]
    # it runs half of its time, and 500/550 of that would do: 45 of 100
    assert [policy.throttle(p) for p in (slightly, slightly)] == [None, 55]
    # half of the 45 % would do, but no step is larger than the increment
    assert [policy.throttle(p) for p in (twice, twice)] == [None, 75]
    # the smallest step is one, so that it goes on
    barely = Period(1.0, dirty=501, sent=1000)
    assert [policy.throttle(p) for p in (barely, barely)] == [None, 76]


# ---- periods ---------------------------------------------------------------------------------


def test_syncs_add_up_to_a_period_of_a_second():
    rate = DirtyRate(4096, 10.0, 100)
    assert rate.synced(5, 10.4, 1000) is None
    assert rate.synced(7, 10.9, 2000) is None
    assert rate.pages_per_second == 0
    assert rate.synced(4, 12.0, 5100) == Period(2.0, dirty=16 * 4096, sent=5000)
    assert rate.pages_per_second == 8
    assert rate.synced(1, 12.5, 6000) is None
    assert rate.synced(2, 13.0, 7000) == Period(1.0, dirty=3 * 4096, sent=1900)
    assert rate.pages_per_second == 3
