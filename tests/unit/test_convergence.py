"""Convergence and DirtyRate: numbers in, decisions out."""

from __future__ import annotations

from functools import partial

import pytest
from unit.boxes import FOREVER, Box

from mig import Patient
from mig.engine.convergence import Convergence, DirtyRate, Period
from mig.options import Parameters


def chosen(**parameters: object) -> Parameters:
    return Parameters.from_qmp({name.replace("_", "-"): v for name, v in parameters.items()})


def convergence(*, auto_converge: bool = False, **parameters: object) -> Convergence:
    return Convergence(lambda: chosen(**parameters), auto_converge=auto_converge)


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
    # as in QEMU, which sets its threshold when the first window is over
    assert policy.threshold == 0
    policy.measured(20_000, 1.0, 5000)
    assert policy.threshold == 1000
    assert policy.expected_downtime == pytest.approx(0.5)


def test_little_says_nothing_about_the_downtime():
    policy = convergence()
    policy.measured(10_000, 1.0, 5000)
    policy.measured(1_000_000, 1.0, 0)
    assert policy.expected_downtime is None


def test_a_limit_can_change_meanwhile():
    limits = [100]
    policy = Convergence(lambda: chosen(downtime_limit=limits[0]), auto_converge=False)
    policy.measured(1000, 1.0, 0)
    limits[0] = 200
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


# ---- patience --------------------------------------------------------------------------------


def patient(
    *, auto_converge: bool = False, factor: float = 1.5, passes: int = 30, **parameters: object
) -> Patient:
    policy = Patient(
        lambda: chosen(**parameters), auto_converge=auto_converge, factor=factor, passes=passes
    )
    policy.measured(1_000_000, 1.0, 0)
    return policy


def thresholds(policy: Patient, *remaining: int) -> list[float]:
    seen = []
    for nbytes in remaining:
        policy.synced(nbytes)
        seen.append(policy.threshold)
    return seen


def test_the_patient_go_on_while_each_pass_makes_it_smaller():
    policy = patient(downtime_limit=100)
    assert policy.threshold == 0
    assert thresholds(policy, 90_000, 60_000, 40_000) == [0, 0, 0]
    assert thresholds(policy, 27_000) == [100_000]


def test_how_much_smaller_is_up_to_the_user():
    assert thresholds(patient(factor=3), 900, 300, 101) == [0, 0, 300_000]
    assert thresholds(patient(factor=1.01), 900, 890, 881, 880) == [0, 0, 0, 300_000]
    for factor in (1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="factor"):
            patient(factor=factor)


def test_patience_can_come_back():
    # the guest writes less, or is slowed down
    policy = patient()
    assert thresholds(policy, 900, 900, 500, 300, 299) == [0, 300_000, 0, 0, 300_000]


def test_patience_ends_after_so_many_passes():
    falling = [10**9, 10**8, 10**7, 10**6, 10**5]
    assert thresholds(patient(passes=3), *falling) == [0, 0, 300_000, 300_000, 300_000]
    assert patient(passes=0).threshold == 300_000


def test_the_patient_count_on_the_slowest_of_the_last_windows():
    policy = patient(passes=0, downtime_limit=1000)
    rates = [5000, 3000, 4000, 6000, 7000, 8000, 9000, 9000]
    seen = []
    for rate in rates:
        policy.measured(rate * 10, 10.0, 60_000)
        seen.append(policy.threshold)
    assert seen == [5000, 3000, 3000, 3000, 3000, 3000, 4000, 6000]
    assert policy.expected_downtime == pytest.approx(10.0)


def test_windows_of_many_passes_do_not_tell_the_bandwidth():
    policy = patient(passes=0, downtime_limit=1000)
    policy.measured(9_000_000, 1.0, 0)
    assert policy.bandwidth == 1_000_000
    for syncs, nbytes, bandwidth in [(2, 10, 1_000_000), (1, 800_000, 800_000), (3, 7, 800_000)]:
        for _ in range(syncs):
            policy.synced(5)
        policy.measured(nbytes, 1.0, 0)
        assert policy.bandwidth == bandwidth
    first = Patient(lambda: chosen(downtime_limit=1000), auto_converge=False, passes=0)
    first.synced(5)
    first.synced(5)
    first.measured(10, 1.0, 0)
    assert first.threshold == 10


def test_the_patient_believe_a_bandwidth_that_is_given():
    policy = patient(passes=0, downtime_limit=100, avail_switchover_bandwidth=10_000)
    assert policy.threshold == 1000


def test_the_patient_slow_down_as_others():
    policy = patient(auto_converge=True)
    assert [policy.throttle(TOO_MUCH) for _ in range(4)] == [None, 20, None, 30]


class Falling:
    """A dirty log of a guest that writes fewer pages after each sync."""

    chunk_pages = 0

    def __init__(self, *npages: int) -> None:
        self.npages = list(npages)

    def start(self) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        if idstr != "pc.ram" or not self.npages:
            return 0
        npages = self.npages.pop(0)
        dirty.set(0, npages)
        return npages

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        raise AssertionError("nothing to clear")

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        (None, [128, 64, 32, 32, 31, 31]),
        (Convergence, [128, 64, 32, 32, 31, 31]),
        (Patient, [31, 31]),
        (partial(Patient, factor=1.9), [31, 31]),
        (partial(Patient, factor=2.1), [64, 32, 32, 31, 31]),
        (partial(Patient, passes=3), [32, 32, 31, 31]),
    ],
    ids=["default", "qemu", "patient", "halving", "more than halving", "three passes"],
)
def test_the_patient_stop_the_guest_later(made, policy, left):
    log = Falling(256, 128, 64, 32, 32, 31, 31)
    source, target = Box(80, dirty=log), Box()
    stopped = []
    stop = source.guest.stop
    source.guest.stop = lambda: (stopped.extend(log.npages), stop())
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    # whatever is left is within the limit
    outgoing = made.outgoing(
        source.guest, policy=policy, parameters={"downtime-limit": 2_000_000, "max-bandwidth": 0}
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert stopped == left
    assert target.same_as(source)


def test_a_policy_that_is_made_for_a_migration_has_its_options(made):
    policies = []

    def make(parameters, *, auto_converge: bool) -> Patient:
        policies.append((parameters, auto_converge))
        return Patient(parameters, auto_converge=auto_converge)

    outgoing = made.outgoing(Box().guest, policy=make, capabilities={"auto-converge"})
    ((parameters, auto_converge),) = policies
    assert auto_converge
    outgoing.set_parameters({"downtime-limit": 77})
    assert parameters().downtime_limit == 77
