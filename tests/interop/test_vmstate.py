"""Devices described in Python and the same ones of a real QEMU: 7.2 and 10.0."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reference import vmstate as described

import mig
from mig.records import SectionHeader
from mig.savevm.devices import DeviceSection, DeviceState
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

VERSIONS = {"7.2": (7, 2), "10.0": (10, 0)}
MACHINE = "pc-i440fx-7.2"
#: I/O ports of the serial port's scratch register, and of the interrupt controller's mask
SCRATCH, MASK = 0x3FF, 0x21


@pytest.fixture(scope="module")
def spec(module_lab):
    return module_lab.spec(MACHINE, fill_mib=4)


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stream(module_lab, spec, version) -> Path:
    """A guest that has run, as this QEMU saved it."""
    source = module_lab.boot(version, spec, fresh=True)
    source.command("stop")
    file = Path(module_lab.path(f"{version}.mig"))
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    source.close()
    return file


def sections_of(file: Path) -> tuple[list[DeviceSection], int, dict[tuple[str, int], Any]]:
    """The sections, where the device state begins, and what QEMU says of each."""
    with mig.open_image(file) as image:
        assert image.devices is not None
        state = image.device_state
        devices = json.loads(state.description)["devices"]
        by_key = {(device["name"], device["instance_id"]): device for device in devices}
        return list(image.devices), state.offset, by_key


def load(section: DeviceSection, version: str) -> Any:
    description = described.description_of(section.idstr, VERSIONS[version])
    assert description is not None
    state = described.state_before(section.idstr)
    return description.load(section.payload, state, section.version_id)


def test_what_qemu_wrote_is_loaded_and_written_again_byte_for_byte(stream, version):
    dialect, seen = VERSIONS[version], set()
    sections, _, said = sections_of(stream)
    for section in sections:
        description = described.description_of(section.idstr, dialect)
        if description is None:
            continue
        seen.add(section.idstr)
        payload, body = description.save(load(section, version), dialect=dialect)
        assert payload == section.payload, section.idstr
        key = (section.idstr, section.instance_id)
        mine = {"name": key[0], "instance_id": key[1], **json.loads(body.text())}
        assert json.dumps(mine) == json.dumps(said[key]), section.idstr
    assert seen == {*described.DEVICES, "globalstate", "hpet"}


def check_mirrored(theirs: dict[str, Any], payload: bytes, dialect: tuple[int, int]) -> None:
    """A description made of what QEMU said of a device loads it, and writes and says the same."""
    description = described.mirrored(theirs)
    again, body = description.save(description.load(payload), dialect=dialect)
    assert again == payload, theirs["name"]
    head = {key: theirs[key] for key in ("name", "instance_id")}
    assert json.dumps({**head, **json.loads(body.text())}) == json.dumps(theirs)


def test_every_device_is_described_as_qemu_does_it(stream, version):
    """Arrays that are not alike, CPU and all."""
    sections, _, said = sections_of(stream)
    found = [(said[s.idstr, s.instance_id], s.payload) for s in sections]
    # old-style devices are not described
    mirrored = [item for item in found if "vmsd_name" in item[0]]
    for theirs, payload in mirrored:
        check_mirrored(theirs, payload, VERSIONS[version])
    assert len(mirrored) > 25


class Parts:
    """LoadTarget that keeps the payloads of devices, also of those that come before memory."""

    def __init__(self, said: dict[tuple[str, int], Any]) -> None:
        self._said = said
        self.early: list[str] = []
        self.payloads: dict[tuple[str, int], bytes] = {}

    def load_early_device(self, header: SectionHeader, reader: StreamReader) -> None:
        key = (header.idstr, header.instance_id)
        description = described.mirrored(self._said[key])
        state: dict[str, Any] = {}
        description.load_from(reader, state, header.version_id)
        self.early.append(header.idstr)
        self.payloads[key] = description.save(state)[0]

    def load_devices(self, state: DeviceState) -> None:
        assert state.sections is not None
        self.payloads |= {(s.idstr, s.instance_id): s.payload for s in state.sections}

    def configure(self, *_: object) -> None: ...
    def open_blocks(self, *_: object) -> None: ...
    def ram_started(self, *_: object) -> None: ...
    def put(self, *_: object) -> None: ...
    def switchover_started(self) -> None: ...


#: for a bitmap in a device that comes before memory, and for many other devices
MANY = (
    *("-S", "-m", "131080k,maxmem=1G,slots=2"),
    *("-object", "memory-backend-ram,id=plugged,size=128M"),
    *("-device", "virtio-mem-pci,memdev=plugged,requested-size=0"),
    *("-device", "e1000e", "-device", "qemu-xhci", "-device", "usb-tablet"),
    *("-device", "virtio-serial-pci", "-device", "sdhci-pci", "-device", "intel-hda"),
)


def test_devices_of_another_machine_also_one_that_comes_before_memory(lab):
    source = lab.start("10.0", lab.spec("q35", extra=MANY))
    file = Path(lab.path("q35.mig"))
    source.migrate(f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    data = file.read_bytes()
    devices = json.loads(data[data.index(b"{", data.rindex(b"\0\x06")) :])["devices"]
    parts = Parts({(device["name"], device["instance_id"]): device for device in devices})
    StreamLoader(StreamReader(data=data), parts, on_command=lambda _: None).run()
    assert [idstr.partition("/")[2] for idstr in parts.early] == ["virtio-mem-device-early"]
    for device in devices:
        payload = parts.payloads[device["name"], device["instance_id"]]
        assert payload in data
        if "vmsd_name" in device:
            check_mirrored(device, payload, (10, 0))
    assert len(devices) > 35


def changed(stream: Path, version: str, changes: dict[tuple[str, int], Any]) -> bytes:
    """The stream with sections as mig writes them, after changes to what they hold."""
    sections, start, _ = sections_of(stream)
    data = bytearray(stream.read_bytes())
    for section in reversed(sections):
        change = changes.get((section.idstr, section.instance_id))
        if change is None:
            continue
        description = described.description_of(section.idstr, VERSIONS[version])
        assert description is not None
        state = load(section, version)
        change(state)
        payload, _ = description.save(state)
        at = start + section.offset + 14 + len(section.idstr)
        data[at : at + len(section.payload)] = payload
    return bytes(data)


def port(qemu: Any, number: int) -> int:
    """What a guest reads from an I/O port."""
    said = qemu.command("human-monitor-command", command_line=f"i /bx {number:#x}")
    found = re.search(r"= (0x[0-9a-f]+)", said)
    assert found is not None, said
    return int(found[1], 16)


def run(lab: Any, version: str, spec: Any, data: bytes) -> Any:
    """A QEMU of this version that has loaded a stream."""
    file = Path(lab.path("changed.mig"))
    file.write_bytes(data)
    qemu = lab.incoming(version, spec)
    qemu.migrate_incoming(f"exec:cat {file}")
    assert qemu.wait_migration()["status"] == "completed", qemu.stderr
    return qemu


def run_again(state: dict[str, Any]) -> None:
    name = b"running\0"
    state["size"] = len(name)
    state["runstate"] = name.ljust(len(state["runstate"]), b"\0")


@pytest.mark.parametrize("to", VERSIONS)
def test_qemu_runs_with_what_mig_wrote(lab, spec, stream, version, to):
    """Stopped when it was saved, a guest runs on: so says the state that mig wrote."""
    data = changed(
        stream,
        version,
        {
            ("globalstate", 0): run_again,
            ("serial", 0): lambda state: state["state"].update(scr=0xA5),
            ("hpet", 0): lambda state: None,
            ("mc146818rtc", 0): lambda state: None,
            # an array of structs with subsections
            ("fdc", 0): lambda state: None,
        },
    )
    qemu = run(lab, to, spec, data)
    qemu.wait_status("running")
    assert port(qemu, SCRATCH) == 0xA5
    assert qemu.wait_ticks(3)
    assert not qemu.bad_pages()


def test_qemu_stays_stopped_and_has_the_values_that_mig_wrote(lab, spec, stream, version):
    data = changed(
        stream,
        version,
        {
            ("i8259", 0): lambda state: state.update(imr=0x5A),
            ("serial", 0): lambda state: state["state"].update(scr=0x77, thr_ipending=0),
            # without one of its subsections, and with a longer stream for the one above
            ("fw_cfg", 0): lambda state: state.pop("dma_addr"),
        },
    )
    assert len(data) != stream.stat().st_size
    qemu = run(lab, version, spec, data)
    assert qemu.status() == "paused"
    assert (port(qemu, MASK), port(qemu, SCRATCH)) == (0x5A, 0x77)


def test_qemu_refuses_a_subsection_that_it_does_not_know(lab, spec, stream, version):
    sections, start, _ = sections_of(stream)
    section = next(s for s in sections if s.idstr == "serial")
    extra = mig.vmstate.Description("serial/new", fields=[mig.vmstate.UInt8("new")])
    inner = mig.vmstate.Description(
        "serial", version=3, fields=described.SERIAL.fields, subsections=[extra]
    )
    outer = mig.vmstate.Description(
        "serial", version=3, fields=[mig.vmstate.Struct("state", inner)]
    )
    state = load(section, version)
    state["state"]["new"] = 1
    payload, _ = outer.save(state)
    # as mig itself refuses it
    with pytest.raises(mig.errors.MismatchError, match="'serial/new' in 'serial' does not exist"):
        described.ISA_SERIAL.load(payload, version_id=3)
    data, at = stream.read_bytes(), start + section.offset + 14 + len("serial")
    file = Path(lab.path("changed.mig"))
    file.write_bytes(data[:at] + payload + data[at + len(section.payload) :])
    qemu = lab.incoming(version, spec, f"exec:cat {file}")
    assert qemu.wait_exit() == 1
    assert "serial" in qemu.stderr
