"""VMState: devices as QEMU 7.2 and 10.0 wrote them (tests/reference/vmstate.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference import vmstate as qemu

FILE = Path(qemu.__file__).with_name("vmstate.json")
WRITTEN = [
    pytest.param(tuple(map(int, version.split("."))), device, id=f"{version}-{device['idstr']}-{i}")
    for version, devices in json.loads(FILE.read_text()).items()
    for i, device in enumerate(devices)
]


def load(version: tuple[int, int], device: dict[str, Any]) -> Any:
    description = qemu.description_of(device["idstr"], version)
    assert description is not None
    payload = bytes.fromhex(device["payload"])
    return description.load(
        payload, qemu.state_before(device["idstr"]), device["described"]["version"]
    )


@pytest.mark.parametrize(("version", "device"), WRITTEN)
def test_a_device_of_qemu_s_is_loaded_and_saved_byte_for_byte(version, device):
    description = qemu.description_of(device["idstr"], version)
    payload, body = description.save(load(version, device), dialect=version)
    assert payload == bytes.fromhex(device["payload"])
    # as text: the order of keys is QEMU's, too
    named = dict(list(device["described"].items())[2:])
    assert body.text() == json.dumps(named)


@pytest.mark.parametrize(("version", "device"), WRITTEN)
def test_a_device_of_qemu_s_that_is_cut_anywhere_is_refused(version, device):
    description = qemu.description_of(device["idstr"], version)
    payload = bytes.fromhex(device["payload"])
    whole = load(version, device)
    for end in range(len(payload)):
        part, error = qemu.attempt(description, payload[:end], device["idstr"])
        if error is None:
            # cut before its last subsections, which may as well not be there
            assert payload.startswith(description.save(part)[0])
            assert part != whole
        else:
            assert error.offset is not None
            assert error.offset <= end
            assert error.section == description.name


def test_values_are_those_that_the_devices_had():
    found = {
        device.values[1]["idstr"]: load(*device.values)
        for device in WRITTEN
        if device.values[0] == (10, 0)
    }
    assert found["globalstate"]["runstate"].startswith(b"prelaunch\0")
    assert found["PCIBUS"]["irq_count"] == [0, 0, 0, 0]
    assert found["mc146818rtc"]["periodic_timer"] is None
    assert found["0000:00:01.0/PIIX3"]["dev"]["config"][:2] == b"\x86\x80"
    assert [timer["tn"] for timer in found["hpet"]["timer"]] == [0, 1, 2]
    assert [drive["media_rate"] for drive in found["fdc"]["state"]["drives"]] == [0, 0]
