"""mig analyze, diff and check with what real QEMUs write, know and refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reference import analysis as oracle

import mig
from mig.analysis.check import Level, check
from mig.analysis.diff import diff
from mig.savevm.fields import State, Value
from mig.selftest.errors import SelftestError

FOREVER = 120.0
DEVICES = ("-device", "e1000", "-device", "usb-ehci", "-device", "usb-tablet", "-smp", "2")


def written(lab, version: str, spec, name: str) -> str:
    """A machine that has not run yet, as QEMU itself writes it into a file."""
    file = lab.path(name)
    source = lab.start(version, replace(spec, extra=(*spec.extra, "-S")))
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    source.close()
    return file


@pytest.fixture(scope="module", params=["7.2", "10.0"])
def stream(request, module_lab):
    """Version, machine and file of one captured machine."""
    version = request.param
    spec = module_lab.spec("pc" if version == "7.2" else "q35", extra=DEVICES)
    return version, spec, written(module_lab, version, spec, f"vm-{version}")


def test_everything_is_understood(stream):
    version, spec, file = stream
    found = mig.analyze(file)
    assert found.ok, found.findings
    assert not found.findings
    assert found.nbytes == Path(file).stat().st_size
    ram = {b.idstr: b for b in found.ram.blocks}
    assert ram["pc.ram"].used_length == spec.memory_bytes
    assert all(b.missing_pages == 0 for b in found.ram.blocks)
    assert found.device("cpu", 1)["env.segs[1].base"] == 0xFFFF0000
    assert found.device("globalstate")["runstate"].rstrip(b"\0") in (b"prelaunch", b"paused")
    assert found.device("fw_cfg")["fw_cfg/dma.dma_addr"] == 0
    assert (found.configuration_state is None) == (version == "7.2")
    # of the whole machine only virtio keeps what it writes to itself
    assert all(device.state is not None for device in found.devices)


def as_the_script_has_it(value: Value, kind: str) -> Any:
    """A value as QEMU's scripts/analyze-migration.py shows one."""
    if isinstance(value, State):
        plain = [f for f in value.fields if f.type not in _SCRIPTS_OWN]
        fields = {f.name: as_the_script_has_it(f.value, f.type) for f in plain}
        return fields | {s.vmsd_name: as_the_script_has_it(s, "struct") for s in value.subsections}
    if isinstance(value, tuple):
        return [as_the_script_has_it(v, kind) for v in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        digits = {"8": 2, "16": 4, "32": 8, "64": 16}[re.findall(r"\d+", kind)[0]]
        unsigned = f"0x{value & ((1 << 4 * digits) - 1):0{digits}x}"
        return f"{unsigned} ({value})" if value < 0 else unsigned
    assert isinstance(value, bytes)
    return value.hex(" ")


#: types whose bytes the script does not interpret, or as something else
_SCRIPTS_OWN = {"timer", "tmp", "pci irq state", "bitmap", "int32 le", "uint8 equal", "qtailq"}


def without(tree: Any, names: set[str]) -> Any:
    if isinstance(tree, dict):
        return {k: without(v, names) for k, v in tree.items() if k not in names}
    return [without(v, names) for v in tree] if isinstance(tree, list) else tree


def own_names(state: State) -> set[str]:
    """Fields of a state, and of all in it, that the script shows differently."""
    out = set()
    for item in state.fields:
        if item.type in _SCRIPTS_OWN:
            out.add(item.name)
        for value in item.value if isinstance(item.value, tuple) else (item.value,):
            if isinstance(value, State):
                out |= own_names(value)
    return out.union(*(own_names(sub) for sub in state.subsections))


@pytest.mark.skipif(
    "MIG_QEMU_ANALYZE" not in os.environ,
    reason="set MIG_QEMU_ANALYZE to QEMU's scripts/analyze-migration.py, which no package ships",
)
def test_qemus_own_script_agrees(stream):
    _, _, file = stream
    script = os.environ["MIG_QEMU_ANALYZE"]
    said = subprocess.run([sys.executable, script, "-f", file], capture_output=True, check=True)
    theirs = json.loads(said.stdout)
    found = mig.analyze(file)
    lengths = {b.idstr: f"0x{b.used_length:016x}" for b in found.ram.blocks}
    compared = 0
    for section in found.sections:
        mine = theirs[f"{section.idstr} ({section.section_id})"]
        if section.device is None:
            assert mine["section sizes"] == lengths
            continue
        state = section.device.state
        skipped = own_names(state)
        assert without(as_the_script_has_it(state, "struct"), skipped) == without(mine, skipped)
        compared += 1
    assert compared > 30
    assert len(theirs) == len(found.sections)


def agrees_with_a_slow_walk(found: mig.Analysis, file: str) -> Counter[str]:
    """The records of each kind are as many as when they are gone over one by one."""
    slow = oracle.walk_stream(Path(file).read_bytes())
    for kind in ("normal", "zero", "xbzrle", "compressed"):
        assert sum(getattr(b, kind) for b in found.ram.blocks) == slow[kind], kind
    return slow


def test_the_walk_agrees_with_a_slow_one(stream):
    _, _, file = stream
    agrees_with_a_slow_walk(mig.analyze(file), file)


@pytest.mark.parametrize("offset", [0, 0x3000])
def test_a_file_with_mapped_ram(lab, offset):
    spec = lab.spec("q35", extra=(*DEVICES, "-S"))
    source = lab.start("10.0", spec)
    source.set_capabilities({"mapped-ram": True})
    source.set_parameters({"max-bandwidth": 0})
    uri = f"file:{lab.path('vm')},offset={offset:#x}"
    source.migrate(uri)
    assert source.wait_migration()["status"] == "completed"
    found = mig.analyze(uri)
    assert found.ok, found.findings
    assert not found.findings
    assert (found.format, found.start) == ("mapped-ram", offset)
    with mig.open_image(uri) as image:
        counts = {b.idstr: (b.data, b.zero) for b in image.blocks}
    assert {b.idstr: (b.data_pages, b.zero_pages) for b in found.ram.blocks} == counts
    assert counts["pc.bios"][0] > 0
    assert len(found.devices) > 30
    assert diff(uri, uri).equal


def test_a_stream_of_differences(lab):
    spec = lab.spec("pc", "dirty", pattern="delta", fill_mib=32, dirty_kib=65536)
    source = lab.boot("10.0", spec, fresh=True)
    source.set_capabilities({"xbzrle": True})
    source.set_parameters(
        {"xbzrle-cache-size": 64 << 20, "max-bandwidth": 30 << 20, "downtime-limit": 1}
    )
    file = lab.path("vm")
    source.migrate(f"exec:cat > {file}")
    deadline = time.monotonic() + FOREVER
    # the guest writes more than may be sent
    while source.query_migrate().get("xbzrle-cache", {}).get("pages", 0) < 100:
        assert source.query_migrate()["status"] in ("setup", "active")
        assert time.monotonic() < deadline, source.query_migrate()
        time.sleep(0.02)
    source.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})
    said = source.wait_migration()
    assert said["status"] == "completed"
    found = mig.analyze(file)
    assert found.ok, found.findings
    slow = agrees_with_a_slow_walk(found, file)
    # QEMU also counts those that turn out to be unchanged
    assert 50 < slow["xbzrle"] <= said["xbzrle-cache"]["pages"]
    assert sum(b.repeated for b in found.ram.blocks) >= slow["xbzrle"]


def test_a_stream_of_compressed_pages(lab):
    spec = lab.spec("pc", pattern="sparse", fill_mib=16)
    source = lab.boot("7.2", spec, fresh=True)
    source.set_capabilities({"compress": True})
    source.set_parameters({"max-bandwidth": 0, "compress-threads": 2, "compress-level": 1})
    file = lab.path("vm")
    source.migrate(f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    found = mig.analyze(file)
    assert found.ok, found.findings
    assert agrees_with_a_slow_walk(found, file)["compressed"] > 3000


def test_two_moments_of_a_guest_differ(lab, stream):
    version, spec, file = stream
    again = written(lab, version, spec, "again")
    found = diff(file, again)
    assert found.machines[0] == found.machines[1]
    assert not found.devices_only_a
    assert not found.devices_only_b
    # it has not run: only clocks differ
    assert {f.idstr for f in found.fields} <= {"timer", "mc146818rtc", "hpet", "i8254"}
    assert diff(file, file).equal


def dump(qemus, version: str, machine: str, folder: Path) -> str:
    """What this QEMU knows of devices."""
    binary, file = qemus[version], folder / f"vmstate-{version}-{machine}.json"
    command = [str(binary.path), *binary.args, "-M", machine, "-nodefaults"]
    command += ["-display", "none", "-dump-vmstate", str(file)]
    installed = binary.modules and Path("/") / binary.modules.relative_to(binary.path.parents[2])
    if installed and installed.is_dir():
        # it would load the modules of the QEMU that is installed, too, and die of it
        bind = f'mount --bind "{binary.modules}" "{installed}" && exec "$0" "$@"'
        command = ["unshare", "-rm", "sh", "-c", bind, *command]
    done = subprocess.run(command, env=binary.environment(), capture_output=True, timeout=60)
    assert file.exists(), done.stderr
    assert file.stat().st_size, done.stderr
    return str(file)


@pytest.fixture(scope="module")
def knowledge(qemus, tmp_path_factory):
    """What each QEMU knows, by version and machine type."""
    folder, made = tmp_path_factory.mktemp("vmstate"), {}

    def of(version: str, machine: str) -> str:
        key = version, machine
        made[key] = made.get(key) or dump(qemus, version, machine, folder)
        return made[key]

    return of


def test_a_qemu_knows_what_it_wrote(stream, knowledge):
    version, spec, file = stream
    found = check(file, knowledge(version, spec.machine))
    assert found.loads, found.reasons
    assert all(reason.level == Level.NOTE for reason in found.reasons)


def test_a_newer_qemu_knows_what_an_older_one_wrote(module_lab, knowledge):
    spec = module_lab.spec("pc-i440fx-7.2", extra=DEVICES)
    file = written(module_lab, "7.2", spec, "old")
    found = check(file, knowledge("10.0", "pc-i440fx-7.2"))
    assert found.loads, found.reasons
    found = check(file, knowledge("10.0", "pc"))
    assert [r.subject for r in found.reasons if r.level == Level.ERROR] == ["machine"]
    # and it does load
    destination = module_lab.incoming("10.0", spec, f"exec:cat {file}")
    assert destination.wait_migration()["status"] == "completed"
    destination.close()


def refused(lab, version: str, spec, file: str) -> str:
    """What a QEMU says when it refuses a stream."""
    try:
        destination = lab.incoming(version, spec, f"exec:cat {file}")
    except SelftestError as error:
        # it may be gone before it could be asked anything
        return str(error)
    assert destination.wait_exit() == 1
    return destination.stderr


def test_a_version_that_qemu_refuses(lab, stream, knowledge):
    version, spec, file = stream
    found = mig.analyze(file)
    (section,) = [s for s in found.sections if s.idstr == "serial"]
    data = bytearray(Path(file).read_bytes())
    at = section.offset + 1 + 4 + 1 + len("serial") + 4
    assert data[at : at + 4] == (3).to_bytes(4, "big")
    data[at + 3] = 9
    newer = Path(lab.path("newer"))
    newer.write_bytes(data)
    verdict = check(newer, knowledge(version, spec.machine))
    assert not verdict.loads
    text = "unsupported version 9 for 'serial' v3"
    assert text in refused(lab, version, spec, str(newer))
    # the description does not agree any more, either; so ask for the section alone
    assert any("version 9" in reason.message for reason in verdict.reasons)


def test_a_target_is_asked_before_anybody_pauses(lab, stream):
    version, spec, file = stream
    socket = lab.path("qmp")
    qmp = ("-qmp", f"unix:{socket},server=on,wait=off")
    same = lab.incoming(version, replace(spec, extra=(*spec.extra, *qmp)))
    found = check(file, socket)
    assert found.loads, found.reasons
    assert found.reasons == ()
    same.close()
    Path(socket).unlink()
    bare = replace(spec, extra=("-smp", "1", *qmp))
    other = lab.incoming(version, bare)
    found = check(file, socket)
    other.close()
    Path(socket).unlink()
    subjects = {r.subject.rpartition("/")[2] for r in found.reasons if r.level == Level.ERROR}
    assert {"cpu", "e1000", "ehci", "e1000.rom"} <= subjects
    assert "e1000" in refused(lab, version, bare, file)
