"""Options: QMP's names, ranges, and every violation at once."""

from __future__ import annotations

import pytest

from mig.errors import OptionError
from mig.options import (
    INCOMING_CAPABILITIES,
    OUTGOING_CAPABILITIES,
    Capability,
    Parameters,
    capability_set,
)

RANGES = {
    "max-bandwidth": (0, 2**63 - 1),
    "downtime-limit": (0, 2_000_000),
    "idle-timeout": (0, 10**6),
}


def violations(values: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        Parameters.from_qmp(values)
    return caught.value.violations


def test_defaults_are_qemu_s():
    parameters = Parameters.from_qmp({})
    assert parameters == Parameters()
    assert (parameters.max_bandwidth, parameters.downtime_limit) == (128 << 20, 300)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_belong_to_it(name):
    for value in RANGES[name]:
        parameters = Parameters.from_qmp({name: value})
        assert getattr(parameters, name.replace("-", "_")) == value


@pytest.mark.parametrize("name", RANGES)
def test_what_is_just_outside_of_a_range_is_refused(name):
    low, high = RANGES[name]
    for value in (low - 1, high + 1):
        (text,) = violations({name: value})
        assert name in text
        assert str(low) in text
        assert str(high) in text


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", ["x", "", None, [], {}, float("nan"), float("inf"), "inf"])
def test_what_is_no_number_in_range_is_refused(name, value):
    (text,) = violations({name: value})
    assert name in text


def test_all_violations_are_listed_at_once():
    found = violations(
        {"max-bandwidth": -1, "downtime-limit": "soon", "idle-timeout": 10**7, "speed": 1}
    )
    assert len(found) == 4
    for name, text in zip(
        ["max-bandwidth", "downtime-limit", "idle-timeout", "speed"], found, strict=True
    ):
        assert f"'{name}'" in text


def test_numbers_may_come_as_text():
    assert Parameters.from_qmp({"max-bandwidth": "1000"}).max_bandwidth == 1000
    assert Parameters.from_qmp({"idle-timeout": "1.5"}).idle_timeout == 1.5


def test_an_idle_limit_of_nothing_is_none():
    assert Parameters.from_qmp({"idle-timeout": 0}).timeout is None
    assert Parameters.from_qmp({"idle-timeout": 5}).timeout == 5.0


def test_parameters_do_not_change():
    with pytest.raises(AttributeError):
        Parameters().max_bandwidth = 1


@pytest.mark.parametrize("supported", [OUTGOING_CAPABILITIES, INCOMING_CAPABILITIES])
def test_every_supported_capability_can_be_switched_on(supported):
    assert capability_set([str(c) for c in supported], supported) == supported


@pytest.mark.parametrize("supported", [OUTGOING_CAPABILITIES, INCOMING_CAPABILITIES])
@pytest.mark.parametrize("capability", list(Capability))
def test_a_capability_that_is_off_may_be_named(capability, supported):
    assert capability_set({str(capability): False}, supported) == frozenset()
    if capability not in supported:
        with pytest.raises(OptionError, match="not supported here"):
            capability_set([str(capability)], supported)


def test_all_violations_of_capabilities_are_listed_at_once():
    with pytest.raises(OptionError) as caught:
        capability_set(["warp", "multifd", "switchover-ack"], INCOMING_CAPABILITIES)
    first, second, third = caught.value.violations
    assert "there is no capability 'warp'" in first
    assert "'multifd' is not supported" in second
    assert "'switchover-ack' requires capability 'return-path'" in third


def test_a_required_capability_must_be_on():
    both = {"switchover-ack": True, "return-path": True}
    assert len(capability_set(both, INCOMING_CAPABILITIES)) == 2
    with pytest.raises(OptionError, match="requires"):
        capability_set({"switchover-ack": True, "return-path": False}, INCOMING_CAPABILITIES)
