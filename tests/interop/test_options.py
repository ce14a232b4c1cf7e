"""Options as real QEMUs have them: they are asked, and mig must say the same."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from mig.errors import OptionError
from mig.options import (
    CAPABILITIES,
    REMOVED_CAPABILITIES,
    REMOVED_PARAMETERS,
    Capability,
    Parameters,
    capabilities_to_qmp,
)
from mig.options.kinds import UINT64_MAX, BitmapMapping, Choice, Integer, Size, Switch, Text
from mig.options.rules import broken_rules
from mig.selftest.qmp import QmpCommandError

SPECS = {spec.name: spec for spec in Parameters.specs()}
OLD = {name for name, spec in SPECS.items() if spec.until is not None}
QEMU_SPECS = {n: s for n, s in SPECS.items() if s.since is not None and n not in OLD}
NUMBERS = [name for name, spec in QEMU_SPECS.items() if isinstance(spec.kind, Integer)]
#: QEMU takes a negative 64-bit number for a large one; mig does not
WRAPS = {
    name
    for name in NUMBERS
    if SPECS[name].kind.high == UINT64_MAX or SPECS[name].kind.high == 1 << 63
}
#: where QEMU's words are wrong or an accident, mig has better ones
BETTER = {
    "Parameter 'downtime-limit' expects an integer in the range of 0 to (2000 * 1000) ms": (
        "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 ms"
    ),
    "Parameter 'announce-step' expects a value between 0 and 10000": (
        "Parameter 'announce-step' expects a value between 1 and 10000"
    ),
    "Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s": (
        "Parameter 'vcpu-dirty-limit' expects a value of at least 1 MB/s"
    ),
}
#: what QEMU says before it looks at the range
IS_TYPE = re.compile(r"expects u?int(8|16|32|64)(_t)?$")
#: needs KVM's dirty ring, which no emulated machine has
NEEDS_KVM = "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"


@pytest.fixture(scope="module")
def answers(module_lab):
    """QEMUs by version that have not begun anything; they stand still."""
    spec = module_lab.spec("pc", extra=("-S",))
    return {version: module_lab.start(version, spec) for version in ("7.2", "10.0")}


@pytest.fixture(scope="module")
def qemu(answers):
    return answers["10.0"]


@pytest.fixture(scope="module", params=["7.2", "10.0"])
def any_qemu(request, answers):
    return answers[request.param]


def since(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def is_known(qemu, first: str) -> bool:
    return since(first) <= qemu.binary.version[:2]


def schema(qemu) -> dict[str, Any]:
    return {entity["name"]: entity for entity in qemu.command("query-qmp-schema")}


def refusal(qemu, name: str, value: object) -> str | None:
    """What QEMU says to a value; it keeps its old one."""
    before = qemu.command("query-migrate-parameters")
    try:
        qemu.set_parameters({name: value})
    except QmpCommandError as error:
        return error.description
    if name in before:
        qemu.set_parameters({name: before[name]})
    return None


def words(text: str) -> str:
    """QEMU's words with QMP's names, which have dashes."""
    quoted = re.sub(r"'[a-z_]+'", lambda match: match[0].replace("_", "-"), text)
    text = quoted.replace("cpu_throttle_initial", "cpu-throttle-initial")
    return BETTER.get(text, text)


def mig_refusal(name: str, value: object) -> str | None:
    try:
        Parameters.from_qmp({name: value})
    except OptionError as error:
        return error.violations[0]
    return None


# ---- names, defaults, types ------------------------------------------------------------------


def test_capabilities_are_those_of_qemu(any_qemu):
    answer = any_qemu.command("query-migrate-capabilities")
    expected = [
        str(capability)
        for capability, info in CAPABILITIES.items()
        if is_known(any_qemu, info.since)
        and (info.until is None or not is_known(any_qemu, info.until))
    ]
    assert sorted(entry["capability"] for entry in answer) == sorted(expected)


def test_the_answer_about_capabilities_is_qemu_s(qemu):
    assert capabilities_to_qmp(frozenset()) == qemu.command("query-migrate-capabilities")


def test_parameters_and_defaults_are_those_of_qemu(any_qemu):
    theirs = any_qemu.command("query-migrate-parameters")
    expected = {
        name: value
        for name, value in Parameters(direct_io=False).to_qmp().items()
        if is_known(any_qemu, SPECS[name].since)
    }
    for name in set(theirs) & set(REMOVED_PARAMETERS):
        theirs.pop(name)
    for name in set(theirs) & OLD:
        assert theirs.pop(name) == SPECS[name].default
    assert theirs == expected


def test_the_answer_about_parameters_has_qemu_s_types(qemu):
    theirs = qemu.command("query-migrate-parameters")
    for name, value in json.loads(json.dumps(Parameters().to_qmp())).items():
        assert type(value) is type(theirs[name]), name


def test_parameters_have_the_types_of_qemu_s_schema(any_qemu):
    entities = schema(any_qemu)
    arguments = entities[entities["migrate-set-parameters"]["arg-type"]]["members"]
    types = {member["name"]: entities[member["type"]] for member in arguments}
    known = {name for name, spec in QEMU_SPECS.items() if is_known(any_qemu, spec.since)}
    assert set(types) - set(REMOVED_PARAMETERS) - OLD == known
    for name in known:
        kind, entity = SPECS[name].kind, types[name]
        if isinstance(kind, Choice):
            values = [member["name"] for member in entity["members"]]
            own = {"adaptive"} if name == "multifd-compression" else set()
            assert set(kind.names) - own == set(values)
            continue
        expected = {Text: "alternate", BitmapMapping: "array", Switch: "boolean"}
        found = entity["meta-type"] if entity["meta-type"] != "builtin" else entity["json-type"]
        assert found == expected.get(type(kind), "int"), name


def test_removed_options_are_those_that_only_the_old_qemu_has(answers):
    old, new = (
        {entry["capability"] for entry in answers[v].command("query-migrate-capabilities")}
        for v in ("7.2", "10.0")
    )
    # 10.0 still has its name, but no block migration any more
    assert old - new | {"zero-blocks"} == {
        str(c) for c, info in CAPABILITIES.items() if info.until or c in REMOVED_CAPABILITIES
    }
    old, new = (set(answers[v].command("query-migrate-parameters")) for v in ("7.2", "10.0"))
    assert old - new == set(REMOVED_PARAMETERS) | OLD


# ---- ranges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS)
def test_ranges_end_where_qemu_s_do(qemu, name):
    kind = SPECS[name].kind
    # with the other throttle parameters at their defaults, which bound them
    low = 20 if name == "max-cpu-throttle" else kind.low
    for value in (low, kind.high):
        assert refusal(qemu, name, value) is None
        assert mig_refusal(name, value) is None
    for value in (low - 1, kind.high + 1):
        mine, theirs = mig_refusal(name, value), refusal(qemu, name, value)
        assert mine is not None
        if value < 0 and name in WRAPS:
            continue
        assert theirs is not None
        if not IS_TYPE.search(theirs):
            assert mine == words(theirs)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_old_qemu_has_the_same_ranges(answers, name):
    """But for the levels of compression, which 7.2 does not check."""
    if name in ("multifd-zlib-level", "multifd-zstd-level") or not is_known(
        answers["7.2"], SPECS[name].since
    ):
        return
    kind = SPECS[name].kind
    low = 20 if name == "max-cpu-throttle" else kind.low
    assert [refusal(answers["7.2"], name, value) for value in (low, kind.high)] == [None, None]
    assert refusal(answers["7.2"], name, kind.high + 1) is not None
    if name not in WRAPS:
        assert refusal(answers["7.2"], name, low - 1) is not None


@pytest.mark.parametrize("value", [4097, 3 << 20, (1 << 40) - 1, 1 << 62])
def test_caches_are_powers_of_two_where_qemu_s_are(qemu, value):
    name = "xbzrle-cache-size"
    mine, theirs = mig_refusal(name, value), refusal(qemu, name, value)
    assert mine == (None if theirs is None else words(theirs))


@pytest.mark.parametrize("name", QEMU_SPECS)
@pytest.mark.parametrize("value", [None, True, 1.5, "x", [], {}, [1]], ids=repr)
def test_what_qemu_takes_for_a_type_mig_takes(qemu, name, value):
    mine, theirs = mig_refusal(name, value), refusal(qemu, name, value)
    assert (mine is None) == (theirs is None), (mine, theirs)


def test_an_unknown_parameter_is_called_unexpected(qemu):
    assert mig_refusal("speed", 1).startswith(refusal(qemu, "speed", 1))


def node(name: str, alias: str, *bitmaps: tuple[str, str]) -> dict[str, Any]:
    return {
        "node-name": name,
        "alias": alias,
        "bitmaps": [{"name": name, "alias": alias} for name, alias in bitmaps],
    }


@pytest.mark.parametrize(
    "mapping",
    [
        [node("a", "x"), node("a", "y")],
        [node("a", "x"), node("b", "x")],
        [node("a", "x" * 255)],
        [node("a", "x" * 256)],
        [node("", "x")],
        [node("a", "")],
        [node("a", "9-")],
        [node("a", "a_b-c.9")],
        [node("a", "x", ("p", "1"), ("p", "2"))],
        [node("a", "x", ("p", "1"), ("q", "1"))],
        [node("a", "x", ("p", "1" * 256))],
        [node("a", "x", ("", ""))],
        [{"node-name": "a"}],
        [{"node-name": "a", "alias": "x"}],
        [{"node-name": "a", "alias": 1, "bitmaps": []}],
        [{**node("a", "x"), "more": 1}],
        [{"node-name": "a", "alias": "x", "bitmaps": [{"name": "p"}]}],
        [{"node-name": "a", "alias": "x", "bitmaps": 3}],
    ],
    ids=range(18),
)
def test_mappings_of_bitmaps_are_checked_as_qemu_does(qemu, mapping):
    name = "block-bitmap-mapping"
    assert mig_refusal(name, mapping) == refusal(qemu, name, mapping)


def test_a_mapping_of_bitmaps_comes_back_as_qemu_gives_it(qemu):
    mapping = [node("a", "x", ("p", "1"))]
    mapping[0]["bitmaps"][0]["transform"] = {"persistent": True}
    qemu.set_parameters({"block-bitmap-mapping": mapping})
    theirs = qemu.command("query-migrate-parameters")["block-bitmap-mapping"]
    mine = Parameters.from_qmp({"block-bitmap-mapping": mapping}).to_qmp()
    assert mine["block-bitmap-mapping"] == theirs


SIZES = ["1k", "1.1K", ".5M", "1.M", "2g", "1T", "3P", "100B", "0.5k", "1.00000001k"]
NO_SIZES = ["1.5B", "1e3", "0x10M", "64MB", "64Mi", "16E", "-1k", "1z"]


@pytest.mark.parametrize("text", SIZES + NO_SIZES)
def test_sizes_are_read_as_qemu_s_command_line_reads_them(qemu, text):
    """Those with a suffix: a bare number is in MiB there, and in bytes here as in QMP."""
    qemu.set_parameters({"max-bandwidth": 7})
    line = f"migrate_set_parameter max-bandwidth {text}"
    said = qemu.command("human-monitor-command", command_line=line)
    theirs = qemu.command("query-migrate-parameters")["max-bandwidth"]
    qemu.set_parameters({"max-bandwidth": 128 << 20})
    if said:
        assert mig_refusal("max-bandwidth", text) is not None
    else:
        assert Parameters.from_qmp({"max-bandwidth": text}).max_bandwidth == theirs


def test_only_rates_and_sizes_take_suffixes():
    sizes = {name for name, spec in SPECS.items() if isinstance(spec.kind, Size)}
    assert {SPECS[name].kind.unit for name in sizes} == {"bytes", "bytes/s"}


# ---- what goes together ----------------------------------------------------------------------


def set_capabilities(qemu, names) -> str | None:
    """Switch exactly these on, and off again; returns what QEMU says."""
    known = [entry["capability"] for entry in qemu.command("query-migrate-capabilities")]
    try:
        qemu.set_capabilities({name: name in names for name in known})
    except QmpCommandError as error:
        return error.description
    qemu.set_capabilities(dict.fromkeys(known, False))
    return None


def with_what_they_need(*names: Capability) -> frozenset[Capability]:
    needs = {
        Capability.POSTCOPY_PREEMPT: Capability.POSTCOPY_RAM,
        Capability.SWITCHOVER_ACK: Capability.RETURN_PATH,
        Capability.ZERO_COPY_SEND: Capability.MULTIFD,
    }
    return frozenset(names) | {needs[name] for name in names if name in needs}


def combinations() -> list[frozenset[Capability]]:
    """Every capability, every two, and every two with what they need."""
    present = [name for name, info in CAPABILITIES.items() if info.until is None]
    # asked about one at a time below: all of them need KVM
    present.remove(Capability.DIRTY_LIMIT)
    sets = [frozenset([name]) for name in present]
    for pair in itertools.combinations(present, 2):
        sets += [frozenset(pair), with_what_they_need(*pair)]
    return list(dict.fromkeys(sets))


def test_capabilities_go_together_where_they_do_in_qemu(qemu):
    different = []
    for names in combinations():
        theirs, mine = set_capabilities(qemu, names), broken_rules(names, Parameters())
        if (theirs is None) != (not mine) or (theirs is not None and theirs not in mine):
            different.append((sorted(names), theirs, mine))
    assert different == []


def test_dirty_limit_needs_more_than_mig_can_see_here(qemu):
    both = frozenset({Capability.DIRTY_LIMIT, Capability.AUTO_CONVERGE})
    assert broken_rules(both, Parameters()) == [set_capabilities(qemu, both)]
    alone = frozenset({Capability.DIRTY_LIMIT})
    assert set_capabilities(qemu, alone) == NEEDS_KVM
    assert broken_rules(alone, Parameters()) == []


@pytest.mark.parametrize("parameter", [("tls-creds", "x"), ("multifd-compression", "zlib")])
def test_zero_copy_goes_with_what_it_does_in_qemu(qemu, parameter):
    names = frozenset({Capability.ZERO_COPY_SEND, Capability.MULTIFD})
    name, value = parameter
    qemu.set_parameters({name: value})
    theirs = set_capabilities(qemu, names)
    qemu.set_parameters({name: SPECS[name].kind.to_qmp(SPECS[name].default)})
    assert broken_rules(names, Parameters.from_qmp({name: value})) == [theirs]


@pytest.mark.parametrize(
    ("capability", "name", "value"),
    [
        ("mapped-ram", "tls-creds", "x"),
        ("mapped-ram", "multifd-compression", "zstd"),
        ("postcopy-ram", "mode", "cpr-reboot"),
        ("dirty-bitmaps", "mode", "cpr-reboot"),
        ("background-snapshot", "mode", "cpr-reboot"),
        ("x-colo", "mode", "cpr-reboot"),
    ],
)
def test_what_qemu_refuses_as_it_starts_mig_refuses(qemu, capability, name, value):
    qemu.set_capabilities({capability: True})
    qemu.set_parameters({name: value})
    try:
        with pytest.raises(QmpCommandError) as caught:
            qemu.migrate("file:/dev/null")
    finally:
        qemu.set_capabilities({capability: False})
        qemu.set_parameters({name: SPECS[name].kind.to_qmp(SPECS[name].default)})
    names, parameters = frozenset({Capability(capability)}), Parameters.from_qmp({name: value})
    assert broken_rules(names, parameters) == [caught.value.description]


@pytest.mark.parametrize(
    "values",
    [
        {"cpu-throttle-initial": 50, "max-cpu-throttle": 49},
        {"cpu-throttle-initial": 50, "max-cpu-throttle": 50},
    ],
)
def test_throttles_are_compared_as_qemu_does(qemu, values):
    try:
        qemu.set_parameters(values)
        theirs = []
    except QmpCommandError as error:
        theirs = [words(error.description)]
    qemu.set_parameters({"cpu-throttle-initial": 20, "max-cpu-throttle": 99})
    mine = []
    try:
        Parameters.from_qmp(values)
    except OptionError as error:
        mine = list(error.violations)
    assert mine == theirs
