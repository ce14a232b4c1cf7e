"""Options: QMP's names, ranges, rules, and every violation at once.

tests/interop/test_options.py compares them with real QEMUs.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mig.errors import OptionError
from mig.options import (
    CAPABILITIES,
    INCOMING_CAPABILITIES,
    OUTGOING_CAPABILITIES,
    REMOVED_CAPABILITIES,
    REMOVED_PARAMETERS,
    SUPPORTED_PARAMETERS,
    Capability,
    MigMode,
    MultiFDCompression,
    Options,
    Parameters,
    ZeroPageDetection,
    capabilities_to_qmp,
    capability_set,
)
from mig.options.document import document
from mig.options.kinds import Integer, Size
from mig.options.rules import RULES, broken_rules

DOCUMENT = Path(__file__).parents[2] / "docs" / "options.md"
SPECS = {spec.name: spec for spec in Parameters.specs()}
NUMBERS = {name: spec for name, spec in SPECS.items() if isinstance(spec.kind, Integer)}
ALL = frozenset(Capability)
#: a value of each other parameter that is not its default
OTHERS = {
    "compress-wait-thread": False,
    "cpu-throttle-tailslow": True,
    "tls-creds": "tls0",
    "tls-hostname": "host",
    "tls-authz": "authz0",
    "multifd-compression": "zlib",
    "block-bitmap-mapping": [{"node-name": "a", "alias": "b", "bitmaps": []}],
    "mode": "cpr-reboot",
    "zero-page-detection": "none",
    "direct-io": False,
    "idle-timeout": 1,
}


def another(name: str) -> object:
    """A value that is in range and not the default."""
    if name in OTHERS:
        return OTHERS[name]
    if name == "max-cpu-throttle":
        return 98
    low = NUMBERS[name].kind.low
    return low if low != NUMBERS[name].default else low + 1


def violations(values: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        Parameters.from_qmp(values)
    return caught.value.violations


# ---- parameters ------------------------------------------------------------------------------


def test_defaults_are_qemu_s_but_for_direct_io():
    assert Parameters.from_qmp({}) == Parameters()
    qmp = Parameters().to_qmp()
    assert qmp["max-bandwidth"] == 128 << 20
    assert qmp["downtime-limit"] == 300
    assert qmp["direct-io"] is True
    # neither mig's own nor one that nobody has set, nor one that 10.0 has no more
    gone = {"compress-level", "compress-threads", "compress-wait-thread", "decompress-threads"}
    assert set(SPECS) - set(qmp) == {"idle-timeout", "block-bitmap-mapping"} | gone


def test_every_parameter_is_of_a_kind_that_accepts_its_default():
    for spec in SPECS.values():
        if spec.default is not None:
            value = spec.kind.read(spec.name, spec.kind.to_qmp(spec.default))
            assert value == spec.default


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_belong_to_it(name):
    kind = NUMBERS[name].kind
    for value in (kind.low, kind.high):
        values = {name: value}
        if name == "cpu-throttle-initial":
            values["max-cpu-throttle"] = 99
        if name == "max-cpu-throttle":
            values["cpu-throttle-initial"] = 1
        assert getattr(Parameters.from_qmp(values), NUMBERS[name].attribute) == value


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_just_outside_of_a_range_is_refused(name):
    kind = NUMBERS[name].kind
    for value in (kind.low - 1, kind.high + 1):
        for raw in (value, str(value)):
            (text,) = violations({name: raw})
            assert text.startswith(f"Parameter '{name}' expects ")


@pytest.mark.parametrize("name", [*NUMBERS, "idle-timeout"])
@pytest.mark.parametrize(
    "value", ["x", "", None, [], {}, True, float("nan"), float("inf"), "inf", "9" * 10_000]
)
def test_what_is_no_number_in_range_is_refused(name, value):
    (text,) = violations({name: value})
    assert name in text


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [50.0, 1.5])
def test_a_whole_number_is_no_fraction(name, value):
    assert name in violations({name: value})[0]


def test_all_violations_are_listed_at_once():
    values = {"max-bandwidth": -1, "downtime-limit": "soon", "idle-timeout": 10**7, "speed": 1}
    found = violations(values | {"mode": "fast", "block-incremental": 1, "direct-io": 3})
    names = [*values, "mode", "block-incremental", "direct-io"]
    for name, text in zip(names, found, strict=True):
        assert f"'{name}'" in text


@pytest.mark.parametrize("name", REMOVED_PARAMETERS)
def test_a_parameter_of_old_qemus_is_known(name):
    assert violations({name: 1}) == (
        f"parameter '{name}' is not supported: {REMOVED_PARAMETERS[name]}",
    )


def test_numbers_may_come_as_text():
    assert Parameters.from_qmp({"max-bandwidth": "1000"}).max_bandwidth == 1000
    assert Parameters.from_qmp({"downtime-limit": "0x10"}).downtime_limit == 16
    assert Parameters.from_qmp({"idle-timeout": "1.5"}).idle_timeout == 1.5


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1k", 1024),
        ("1.1K", 1126),
        (".5M", 1 << 19),
        ("1.G", 1 << 30),
        ("2g", 2 << 30),
        (" 3T ", 3 << 40),
        ("1P", 1 << 50),
        ("15E", 15 << 60),
        ("100B", 100),
        ("1.0", 1),
        ("0x10000", 65536),
    ],
)
def test_sizes_take_suffixes(text, nbytes):
    assert Parameters.from_qmp({"max-bandwidth": text}).max_bandwidth == nbytes


@pytest.mark.parametrize(
    "text", ["k", "1.5", "1.5B", "1e3", "0x10M", "64MB", "64Mi", "16E", "-1k", "1 k", "1,5k"]
)
def test_what_is_no_size_is_refused(text):
    assert "max-bandwidth" in violations({"max-bandwidth": text})[0]


def test_what_is_no_size_takes_no_suffix():
    assert "downtime-limit" in violations({"downtime-limit": "1k"})[0]


@given(st.integers(0, 2**64 - 1), st.sampled_from("bkmgtpe"))
def test_a_suffix_multiplies(number, suffix):
    nbytes = number * 1024 ** "bkmgtpe".index(suffix)
    kind = Size(0, 2**64 - 1)
    if nbytes <= kind.high:
        assert kind.read("x", f"{number}{suffix}") == nbytes
    else:
        with pytest.raises(ValueError, match="expects"):
            kind.read("x", f"{number}{suffix}")


@given(st.text())
def test_no_text_breaks_a_kind(text):
    for spec in SPECS.values():
        with contextlib.suppress(ValueError):
            value = spec.kind.read(spec.name, text)
            assert spec.kind.read(spec.name, spec.kind.to_qmp(value)) == value


def test_a_cache_has_a_power_of_two():
    assert Parameters.from_qmp({"xbzrle-cache-size": "4k"}).xbzrle_cache_size == 4096
    for value in (0, 2048, 4097, 3 << 20):
        assert "a power of two" in violations({"xbzrle-cache-size": value})[0]


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("yes", True), ("off", False), ("false", False)]
)
def test_switches_may_come_as_text(text, value):
    assert Parameters.from_qmp({"direct-io": text}).direct_io is value


@pytest.mark.parametrize("value", ["maybe", "", 1, None])
def test_what_is_no_switch_is_refused(value):
    assert "expected: boolean" in violations({"direct-io": value})[0]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("multifd-compression", MultiFDCompression),
        ("zero-page-detection", ZeroPageDetection),
        ("mode", MigMode),
    ],
)
def test_enumerations_are_typed(name, names):
    for choice in names:
        assert getattr(Parameters.from_qmp({name: str(choice)}), SPECS[name].attribute) is choice
    assert "does not accept value 'x'" in violations({name: "x"})[0]
    assert "expected: string" in violations({name: 1})[0]


def test_texts_are_reset_by_null():
    assert Parameters.from_qmp({"tls-creds": None}).tls_creds == ""
    assert "expected: StrOrNull" in violations({"tls-creds": 1})[0]


def test_an_idle_limit_of_nothing_is_none():
    assert Parameters.from_qmp({"idle-timeout": 0}).timeout is None
    assert Parameters.from_qmp({"idle-timeout": 5}).timeout == 5.0


def test_parameters_do_not_change():
    with pytest.raises(AttributeError):
        Parameters().max_bandwidth = 1


def test_a_mapping_of_bitmaps_comes_back_as_it_went():
    bitmaps = [
        {"name": "b0", "alias": "x"},
        {"name": "b1", "alias": "y", "transform": {"persistent": True}},
        {"name": "b2", "alias": "z", "transform": {}},
    ]
    mapping = [{"node-name": "disk", "alias": "d-1", "bitmaps": bitmaps}]
    parameters = Parameters.from_qmp({"block-bitmap-mapping": mapping})
    assert parameters.to_qmp()["block-bitmap-mapping"] == mapping
    assert Parameters.from_qmp({"block-bitmap-mapping": []}).block_bitmap_mapping == ()


# ---- capabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("supported", [OUTGOING_CAPABILITIES, INCOMING_CAPABILITIES])
def test_every_supported_capability_can_be_switched_on(supported):
    for capability in supported:
        needs = {rule.without for rule in RULES if rule.on == {capability} and rule.without}
        names = {capability, *needs}
        assert capability_set([str(c) for c in names], supported) == names


@pytest.mark.parametrize("supported", [OUTGOING_CAPABILITIES, INCOMING_CAPABILITIES])
@pytest.mark.parametrize("capability", list(Capability))
def test_a_capability_that_is_off_may_be_named(capability, supported):
    assert capability_set({str(capability): False}, supported) == frozenset()
    if capability not in supported:
        words = "is not supported" if capability in REMOVED_CAPABILITIES else "mig does not do"
        with pytest.raises(OptionError, match=f"{words}.*"):
            capability_set([str(capability)], supported)


def test_all_violations_of_all_options_are_listed_at_once():
    with pytest.raises(OptionError) as caught:
        Options.choose(
            ["warp", "x-colo", "rdma-pin-all", "switchover-ack", "block"],
            {"downtime-limit": -1, "tls-creds": "tls0"},
            INCOMING_CAPABILITIES,
        )
    assert caught.value.violations == (
        "there is no capability 'warp'",
        "capability 'block' is not supported: " + REMOVED_CAPABILITIES[Capability.BLOCK],
        "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 ms",
        "Capability 'switchover-ack' requires capability 'return-path'",
        "mig does not do rdma-pin-all yet (capability 'rdma-pin-all')",
        "mig does not do x-colo yet (capability 'x-colo')",
        "mig does not do tls-creds yet (parameter 'tls-creds')",
    )


def test_a_required_capability_must_be_on():
    both = {"switchover-ack": True, "return-path": True}
    assert len(capability_set(both, INCOMING_CAPABILITIES)) == 2
    with pytest.raises(OptionError, match="requires"):
        capability_set({"switchover-ack": True, "return-path": False}, INCOMING_CAPABILITIES)


def test_every_capability_is_described():
    assert set(CAPABILITIES) == set(Capability)


def test_the_answer_to_query_migrate_capabilities():
    answer = capabilities_to_qmp(frozenset({Capability.MULTIFD}))
    assert {"capability": "multifd", "state": True} in answer
    assert {"capability": "xbzrle", "state": False} in answer
    assert "block" not in [entry["capability"] for entry in answer]


# ---- rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.words[:60])
def test_a_rule_needs_everything_that_it_names(rule):
    """With parameters that break every rule, each capability taken away heals it."""
    bad = Parameters.from_qmp(
        {"tls-creds": "x", "multifd-compression": "zstd", "mode": "cpr-reboot"}
    )
    assert rule.words in broken_rules(rule.on, bad) or not rule.on
    for capability in rule.on:
        assert not rule.broken(rule.on - {capability}, bad)
    if rule.without is not None:
        assert not rule.broken(rule.on | {rule.without}, bad)


def test_each_rule_speaks_once():
    zero_copy = frozenset({Capability.ZERO_COPY_SEND, Capability.XBZRLE})
    assert broken_rules(zero_copy, Parameters(tls_creds="x")) == [
        "Zero copy only available for non-compressed non-TLS multifd migration"
    ]


def test_what_auto_converge_takes_at_first_is_no_more_than_the_most():
    expected = "integer in the range of cpu-throttle-initial to 99"
    for values in (
        {"cpu-throttle-initial": 50, "max-cpu-throttle": 49},
        {"max-cpu-throttle": 19},
    ):
        assert expected in violations(values)[0]
    Parameters.from_qmp({"cpu-throttle-initial": 50, "max-cpu-throttle": 50})


# ---- what mig does ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_a_parameter_that_mig_does_not_do_may_only_be_its_default(name):
    default = SPECS[name].default
    if default is not None:
        Options.choose((), {name: SPECS[name].kind.to_qmp(default)}, ALL)
    if name in SUPPORTED_PARAMETERS:
        assert Options.choose((), {name: another(name)}, ALL).parameters != Parameters()
    else:
        with pytest.raises(OptionError, match=f"^mig does not do {name} yet"):
            Options.choose((), {name: another(name)}, ALL)


@pytest.mark.parametrize("name", sorted(SUPPORTED_PARAMETERS))
def test_only_some_parameters_change_in_flight(name):
    options = Options()
    changed = options.changed({name: another(name)}, running=False)
    assert changed.parameters != options.parameters
    if SPECS[name].in_flight:
        assert options.changed({name: another(name)}, running=True) == changed
    else:
        with pytest.raises(OptionError, match="cannot change"):
            options.changed({name: another(name)}, running=True)
        # what does not change may be said again
        assert changed.changed({name: another(name)}, running=True) == changed


def test_a_change_leaves_the_other_parameters():
    options = Options.choose((), {"max-bandwidth": 5}, ALL)
    changed = options.changed({"downtime-limit": 7}, running=True).parameters
    assert (changed.max_bandwidth, changed.downtime_limit) == (5, 7)


def test_a_change_lists_all_violations():
    with pytest.raises(OptionError) as caught:
        Options().changed(
            {"max-bandwidth": "x", "direct-io": False, "tls-creds": "y"}, running=True
        )
    assert len(caught.value.violations) == 4


def test_pairs_of_capabilities_are_checked_in_any_order():
    for pair in itertools.permutations([Capability.POSTCOPY_RAM, Capability.MULTIFD]):
        with pytest.raises(OptionError, match="not yet compatible with multifd"):
            capability_set([str(c) for c in pair], ALL)


def test_the_document_is_the_one_that_the_tables_give():
    assert DOCUMENT.is_file(), "make it from mig.options.document.document()"
    assert DOCUMENT.read_text() == document()
