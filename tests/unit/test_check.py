"""mig check: will a target load it, by what it knows and by what it has."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import stream
from reference.devicevalues import Made
from reference.ram import Record
from reference.stream import Device

from mig import analyze
from mig.analysis.check import Level, against_knowledge, against_target, check
from mig.analysis.knowledge import Knowledge
from mig.analysis.target import Target, TargetBlock
from mig.cli import main
from mig.errors import ChannelError, MigError

PAGE = 4096
PCI = "0000:00:03.0/nic"


def nic(**more: Any) -> Made:
    inner = Made("ring").add("head", "uint16", b"\0\1", 1)
    made = Made("nic", more.pop("version", 2)).add("mac", "buffer", b"abcdef", None)
    made.add("irq[0]", "uint32", b"\0\0\0\1", 1).struct("ring", inner)
    return made.subsection(Made("nic/tso", more.pop("sub", 1)).add("n", "uint8", b"\1", 1))


def known(field: str, size: int, **more: Any) -> dict[str, Any]:
    return {"field": field, "version_id": 0, "field_exists": False, "size": size, **more}


def described(name: str, version: int, oldest: int, fields: list[Any], **more: Any) -> Any:
    return {
        "name": name,
        "version_id": version,
        "minimum_version_id": oldest,
        "Fields": fields,
        **more,
    }


def dump(machine: str = "box", **changes: Any) -> dict[str, Any]:
    """What a target says of its nic; changes: of the description."""
    ring = described("ring", 1, 1, [known("head", 2)])
    fields = [
        known("mac", 6),
        known("maybe", 4, field_exists=True),
        known("irq", 4),
        known("newer", 4, version_id=3),
        known("ring", 16, Description=ring),
    ]
    tso = described("nic/tso", 1, 1, [known("n", 1)])
    state = {**described("nic", 2, 1, fields, Subsections=[tso]), **changes}
    entry = {"Name": "nic", "version_id": 2, "minimum_version_id": 1, "Description": state}
    return {"vmschkmachine": {"Name": machine}, "nic": entry}


def written(path: Path, made: Made | None = None, *, machine: str = "box") -> Path:
    data = stream.whole(
        {"pc.ram": 4 * PAGE, "rom": PAGE},
        [[Record(b"pc.ram", 0, 0)]],
        [],
        config=stream.configuration(machine),
    )
    devices = [
        (Device("timer", b"\0", 4), Made("timer").add("t", "uint8", b"\0", 0)),
        (Device("cpu_common", b"\0", 6), Made("cpu_common").add("h", "uint8", b"\0", 0)),
    ]
    made = made or nic()
    devices.append((Device(PCI, made.payload, 5, version_id=made.version), made))
    entries = [
        {"name": d.idstr, "instance_id": d.instance_id, **m.described()} for d, m in devices
    ]
    tail = b"".join(d.encode() for d, _ in devices) + b"\0"
    tail += stream.described({"devices": entries, "page_size": PAGE})
    path.write_bytes(data[: -len(stream.device_state([]))] + tail)
    return path


def reasons(tmp_path: Path, made: Made | None = None, **changes: Any) -> list[tuple[Level, str]]:
    """What the dump says against a nic, notes left out."""
    knowledge = Knowledge.parse(json.dumps(dump(**changes)).encode())
    found = against_knowledge(analyze(written(tmp_path / "vm", made)), knowledge)
    return [(r.level, r.message) for r in found if r.level != Level.NOTE]


# ---- what a target knows ---------------------------------------------------------------------


def test_what_is_known_loads(tmp_path):
    assert reasons(tmp_path) == []


def test_sections_by_code_are_not_told_about(tmp_path):
    knowledge = Knowledge.parse(json.dumps(dump()).encode())
    found = against_knowledge(analyze(written(tmp_path / "vm")), knowledge)
    assert [(r.level, r.subject) for r in found] == [
        (Level.NOTE, "timer"),
        (Level.NOTE, "cpu_common"),
    ]


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        (nic(), {"machine": "crate"}, "Machine type received is 'box' and local is 'crate'"),
        (nic(version=3), {}, f"unsupported version 3 for '{PCI}' v2"),
        (
            nic(version=0),
            {},
            "incoming version_id 0 is too old for local minimum version_id 1",
        ),
        (nic(), {"Subsections": []}, "the target does not know subsection 'nic/tso'"),
        (
            nic(sub=2),
            {},
            "subsection 'nic/tso' of version 2, the target takes 1 to 1",
        ),
        (
            nic(),
            {"Fields": [known("mac", 6)]},
            "the target does not know field 'irq[0]' of 'nic'",
        ),
    ],
)
def test_what_does_not_load(tmp_path, made, changes, message):
    assert reasons(tmp_path, made, **changes) == [(Level.ERROR, message)]


def test_a_field_that_has_got_another_name(tmp_path):
    ring = described("ring", 1, 1, [known("front", 2)])
    fields = [known("address", 6), known("irq", 4), known("ring", 16, Description=ring)]
    assert reasons(tmp_path, Fields=fields) == []
    ring = described("ring", 1, 1, [known("front", 4)])
    fields = [known("address", 6), known("irq", 4), known("ring", 16, Description=ring)]
    assert reasons(tmp_path, Fields=fields) == [
        (Level.ERROR, "the target does not know field 'head' of 'ring'")
    ]


def test_a_field_of_a_newer_version_than_the_section(tmp_path):
    fields = [known("mac", 6, version_id=3), known("irq", 4), known("ring", 16)]
    assert reasons(tmp_path, Fields=fields) == [
        (Level.ERROR, "field 'mac' is of version 3, the section of 2")
    ]


def test_one_of_the_types_that_share_a_name_has_to_take_it(tmp_path):
    data = dump()
    data["other"] = {"Description": described("nic", 1, 1, [])}
    knowledge = Knowledge.parse(json.dumps(data).encode())
    assert len(knowledge.states["nic"]) == 2
    analysis = analyze(written(tmp_path / "vm"))
    assert {r.level for r in against_knowledge(analysis, knowledge)} == {Level.NOTE}


def test_a_device_that_is_in_no_dump(tmp_path):
    knowledge = Knowledge.parse(b'{"vmschkmachine": {"Name": "box"}}')
    found = list(against_knowledge(analyze(written(tmp_path / "vm")), knowledge))
    assert [(r.level, r.subject) for r in found if r.level != Level.NOTE] == [
        (Level.WARNING, PCI)
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"vmschkmachine": 1}',
        b'{"vmschkmachine": {"Name": "x"}, "a": 1}',
        b'{"vmschkmachine": {"Name": "x"}, "a": {"Description": {}}}',
        b'{"vmschkmachine": {"Name": "x"}, "a": {"Description": {"name": "d", "version_id": "x"}}}',
        b'{"vmschkmachine": ' * 100_000,
        b"\xff",
    ],
    ids=range(9),
)
def test_what_is_no_dump_is_refused(tmp_path, text):
    (tmp_path / "dump").write_bytes(text)
    with pytest.raises(MigError, match="not what -dump-vmstate writes"):
        check(written(tmp_path / "vm"), str(tmp_path / "dump"))


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["Description", "Fields", "Subsections", "name", "field", "a"]),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_a_dump_or_refused(value):
    text = json.dumps({"vmschkmachine": {"Name": "x"}, "d": value}).encode()
    try:
        Knowledge.parse(text)
    except ValueError as error:
        if isinstance(error, RecursionError):
            pytest.fail("not bounded")


# ---- what a target has -----------------------------------------------------------------------

TARGET = Target(
    version="10.0.2",
    machine="box",
    machines=frozenset({"box", "crate"}),
    blocks={"pc.ram": TargetBlock(4 * PAGE, 4 * PAGE), "rom": TargetBlock(2 * PAGE, 8 * PAGE)},
    ncpus=1,
    pci=frozenset({"0000:00:03.0"}),
    capabilities=frozenset(),
)


def against(tmp_path: Path, **changes: Any) -> list[tuple[Level, str]]:
    fields = {name: getattr(TARGET, name) for name in Target.__slots__}
    found = against_target(analyze(written(tmp_path / "vm")), Target(**{**fields, **changes}))
    return [(r.level, r.message) for r in found]


def test_a_target_that_has_all_of_it(tmp_path):
    # a block that can be resized may be of another length
    assert against(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({"machines": frozenset({"crate"})}, "error", "has no machine type 'box'"),
        ({"machine": "crate"}, "error", "received is 'box' and local is 'crate'"),
        ({"blocks": {**TARGET.blocks, "rom": TargetBlock(PAGE // 2, PAGE // 2)}}, "error", "0x800"),
        ({"blocks": {"pc.ram": TARGET.blocks["pc.ram"]}}, "error", "has no such RAM block"),
        ({"blocks": {**TARGET.blocks, "more": TargetBlock(1, 1)}}, "warning", "only the target"),
        ({"blocks": None}, "note", "does not tell its RAM blocks"),
        ({"ncpus": 2}, "warning", "1 processors, the target has 2"),
        ({"ncpus": 0}, "error", "1 processors, the target has 0"),
        ({"pci": frozenset()}, "error", f"Unknown savevm section or instance '{PCI}' 0"),
        ({"pci": TARGET.pci | {"0000:00:04.0"}}, "warning", "only the target"),
        ({"pci": None}, "note", "does not tell its PCI devices"),
        (
            {"capabilities": frozenset({"x-ignore-shared"})},
            "error",
            "Capability x-ignore-shared is on, but received capability is off",
        ),
    ],
    ids=range(12),
)
def test_targets_that_lack_something(tmp_path, changes, level, message):
    ((found, text),) = against(tmp_path, **changes)
    assert found == level
    assert message in text


class FakeQemu:
    """Answers QMP as a QEMU does, or as it does not."""

    def __init__(self, path: str, answers: dict[str, Any]) -> None:
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError):
            greeting = {"QMP": {"version": {}, "capabilities": []}}
            connection.sendall(json.dumps(greeting).encode() + b"\n")
            # one command at a time, with no end of line behind it
            while data := connection.recv(65536):
                command = json.loads(data)
                name = command["execute"]
                answer: dict[str, Any] = {"return": self._answers.get(name, {})}
                if name not in self._answers and name != "qmp_capabilities":
                    answer = {"error": {"class": "CommandNotFound", "desc": "no"}}
                if "id" in command:
                    answer["id"] = command["id"]
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def end(self) -> None:
        self._thread.join(20)
        self._listener.close()


RAMBLOCKS = """        Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000000004000 0x0000000000004000
                     rom    4 KiB  0x0000000000004000 0x0000000000001000 0x0000000000008000
"""
ANSWERS: dict[str, Any] = {
    "query-version": {"qemu": {"major": 9, "minor": 2, "micro": 1}},
    "query-machines": [{"name": "box-1", "alias": "box"}],
    "query-migrate-capabilities": [{"capability": "xbzrle", "state": True}],
    "qom-get": "box-machine",
    "human-monitor-command": RAMBLOCKS,
    "query-cpus-fast": [{}],
    "query-pci": [
        {
            "devices": [
                {
                    "bus": 0,
                    "slot": 3,
                    "function": 0,
                    "pci_bridge": {"devices": [{"bus": 1, "slot": 31, "function": 7}]},
                }
            ]
        }
    ],
}


def test_a_target_is_asked_over_qmp(tmp_path):
    address = str(tmp_path / "qmp")
    fake = FakeQemu(address, ANSWERS)
    target = Target.ask(address)
    fake.end()
    assert target == Target(
        "9.2.1",
        "box",
        frozenset({"box", "box-1"}),
        {"pc.ram": TargetBlock(0x4000, 0x4000), "rom": TargetBlock(0x1000, 0x8000)},
        1,
        frozenset({"0000:00:03.0", "0000:01:1f.7"}),
        frozenset({"xbzrle"}),
    )


def test_a_target_that_cannot_say_much(tmp_path):
    address = str(tmp_path / "qmp")
    few = ("query-version", "query-machines", "query-migrate-capabilities")
    fake = FakeQemu(address, {name: ANSWERS[name] for name in few})
    target = Target.ask(f"unix:{address}")
    fake.end()
    assert (target.machine, target.blocks, target.ncpus, target.pci) == (None,) * 4


@pytest.mark.parametrize(
    "wrong",
    [{"query-version": {}}, {"query-machines": [1]}, {"query-pci": [{"devices": [{}]}]}],
    ids=range(3),
)
def test_answers_that_are_not_qemus(tmp_path, wrong):
    address = str(tmp_path / "qmp")
    fake = FakeQemu(address, {**ANSWERS, **wrong})
    with pytest.raises(MigError, match="not QEMU's"):
        Target.ask(address)
    fake.end()


def test_targets_that_are_not_there(tmp_path):
    vm = written(tmp_path / "vm")
    for against_ in (str(tmp_path / "none"), f"unix:{tmp_path}/none", "127.0.0.1:1"):
        with pytest.raises(ChannelError):
            check(vm, against_)


# ---- the command -----------------------------------------------------------------------------


def test_the_command(tmp_path):
    vm = str(written(tmp_path / "vm"))
    result = CliRunner().invoke(main, ["check", vm])
    assert (result.exit_code, result.output) == (0, "verdict: nothing keeps it from loading\n")
    (tmp_path / "dump").write_text(json.dumps(dump("crate")))
    result = CliRunner().invoke(main, ["check", vm, "--against", str(tmp_path / "dump"), "--json"])
    assert result.exit_code == 1
    data = json.loads(result.output.splitlines()[-1])
    assert data["loads"] is False
    assert data["reasons"][0]["subject"] == "machine"
    assert data["blocks"] == {"pc.ram": 4 * PAGE, "rom": PAGE}


def test_a_file_that_is_broken_does_not_load(tmp_path):
    vm = written(tmp_path / "vm")
    vm.write_bytes(vm.read_bytes()[:100])
    found = check(vm)
    assert not found.loads
    result = CliRunner().invoke(main, ["check", str(vm)])
    assert result.exit_code == 1
    assert "it will not load" in result.output
