"""VMState: described devices in a registry, and in guests that move."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference import stream
from reference.stream import Device
from unit.boxes import FOREVER, error_of

from mig import DeviceRegistry, GuestMemory, MemoryGuest, vmstate
from mig.errors import (
    BlockedError,
    DeviceStateError,
    MismatchError,
    PeerError,
    StreamError,
    TruncatedError,
    UnsupportedError,
)
from mig.records import BlockInfo, SectionHeader
from mig.savevm.devices import DeviceState, DeviceTail
from mig.savevm.load import StreamLoader
from mig.savevm.vmstate import Description, Priority
from mig.state import Status
from mig.stream.reader import StreamReader

UART = Description("uart", version=2, minimum_version=1, fields=[vmstate.UInt16("n")])


def word(name: str, **options: Any) -> Description:
    return Description(name, fields=[vmstate.UInt16("n")], **options)


def state(n: int = 0) -> SimpleNamespace:
    return SimpleNamespace(n=n)


def cut(data: bytes, offset: int = 0) -> DeviceState:
    tail = DeviceTail(offset)
    return tail.feed(data) or tail.finish()


def names(data: bytes) -> list[tuple[int, str, int]]:
    sections = cut(data).sections
    assert sections is not None
    return [(s.section_id, s.idstr, s.instance_id) for s in sections]


# ---- who is who ------------------------------------------------------------------------------


def test_instances_are_numbered():
    devices = DeviceRegistry()
    for _ in range(3):
        devices.register(UART, state())
    devices.register(word("disk"), state())
    devices.register(UART, state(), instance_id=7)
    devices.register(UART, state())
    found = [instance for _, idstr, instance in names(devices.save(4096, 1)) if idstr == "uart"]
    assert found == [0, 1, 2, 7, 8]


def test_a_device_is_there_once():
    devices = DeviceRegistry()
    devices.register(UART, state())
    with pytest.raises(ValueError, match="there already"):
        devices.register(UART, state(), instance_id=0)
    devices.unregister("uart", 0)
    devices.register(UART, state(), instance_id=0)


@pytest.mark.parametrize("options", [{"instance_id": -1}, {"instance_id": 1 << 32}, {"path": "ä"}])
def test_a_device_that_cannot_be(options):
    with pytest.raises(ValueError, match=r"is no idstr|32 bits"):
        DeviceRegistry().register(UART, state(), **options)


def test_a_device_without_description_needs_save_and_load():
    with pytest.raises(ValueError, match="needs save and load"):
        DeviceRegistry().register("uart")  # type: ignore[call-overload]


def test_a_path_is_part_of_the_name():
    devices, uarts = DeviceRegistry(), [state(1), state(2)]
    devices.register(UART, uarts[0], path="0000:00:03.0")
    devices.register(UART, uarts[1], path="0000:00:04.0")
    assert names(devices.save(4096, 1)) == [
        (1, "0000:00:03.0/uart", 0),
        (2, "0000:00:04.0/uart", 0),
    ]
    # as it was before its bus had paths
    older = [Device("uart", b"\0\x08", 1, 0), Device("uart", b"\0\x09", 2, 1)]
    devices.load(cut(stream.device_state(older)))
    assert [uart.n for uart in uarts] == [8, 9]


def test_an_alias_is_another_name():
    devices, uart = DeviceRegistry(), state()
    devices.register(UART, uart, aliases=[("uart", 0x3F8), ("serial", 0)])
    devices.register(UART, state())
    for n, key in enumerate([("uart", 0x3F8), ("serial", 0), ("uart", 0)]):
        devices.load(cut(stream.device_state([Device(key[0], bytes([0, n]), 1, key[1])])))
        assert uart.n == n
    # aliases count for nobody's number
    assert [instance for *_, instance in names(devices.save(4096, 1))] == [0, 1]


def test_an_unknown_section_is_refused_in_qemu_s_words():
    devices, uart = DeviceRegistry(), state()
    devices.register(UART, uart)
    made = [Device("uart", b"\0\x01", 1), Device("disk", b"", 2, 3)]
    unknown = "Unknown savevm section or instance 'disk' 3"
    with pytest.raises(MismatchError, match=unknown) as caught:
        devices.load(cut(stream.device_state(made), 1000))
    assert caught.value.section == "disk"
    # nothing was loaded before that was known
    assert uart.n == 0


def test_versions_are_looked_at_before_anything_is_loaded():
    devices, uarts = DeviceRegistry(), [state(), state()]
    for uart in uarts:
        devices.register(UART, uart)
    for version, words in ((3, "too new for local version_id 2"), (0, "minimum version_id 1")):
        made = [
            Device("uart", b"\0\x01", 1, version_id=2),
            Device("uart", b"\0\x01", 2, 1, version_id=version),
        ]
        with pytest.raises(MismatchError, match=f"uart: incoming version_id {version}.*{words}"):
            devices.load(cut(stream.device_state(made)))
        assert uarts[0].n == 0


# ---- order -----------------------------------------------------------------------------------


def test_devices_are_saved_by_priority_then_as_they_were_registered():
    devices = DeviceRegistry()
    order = [Priority.DEFAULT, Priority.LOW, Priority.GICV3, Priority.IOMMU, Priority.DEFAULT]
    for i, priority in enumerate(order):
        devices.register(word(f"d{i}", priority=priority), state())
    devices.register("opaque", save=bytes, load=lambda *_: None)
    found = names(devices.save(4096, 10))
    # section ids are those of the registration, as with QEMU
    assert [(section_id, name) for section_id, name, _ in found] == [
        (12, "d2"),
        (13, "d3"),
        (10, "d0"),
        (14, "d4"),
        (15, "opaque"),
        (11, "d1"),
    ]


def test_priorities_are_in_qemu_s_order():
    assert sorted(Priority) == [
        Priority.LOW,
        Priority.DEFAULT,
        Priority.IOMMU,
        Priority.PCI_BUS,
        Priority.VIRTIO_MEM,
        Priority.APIC,
        Priority.GICV3_ITS,
        Priority.GICV3,
    ]


def test_a_device_that_is_not_needed_is_not_sent():
    devices = DeviceRegistry()
    devices.register(word("idle", needed=lambda s: s.n), state())
    devices.register(word("busy", needed=lambda s: s.n), state(1))
    data = devices.save(4096, 1)
    assert [name for _, name, _ in names(data)] == ["busy"]
    assert b"idle" not in data


# ---- the wire --------------------------------------------------------------------------------


def test_the_description_is_qemu_s():
    devices = DeviceRegistry()
    devices.register(UART, state(1), path="0000:00:03.0")
    devices.register("opaque", save=lambda: b"abc", load=lambda *_: None)
    described = json.loads(cut(devices.save(4096, 1)).description)
    assert described["page_size"] == 4096
    assert described["devices"] == [
        {
            "name": "0000:00:03.0/uart",
            "instance_id": 0,
            "vmsd_name": "uart",
            "version": 2,
            "fields": [{"name": "n", "type": "uint16", "size": 2}],
        },
        {
            "name": "opaque",
            "instance_id": 0,
            "version": 1,
            "size": 3,
            "fields": [{"name": "data", "size": 3, "type": "buffer"}],
        },
    ]


@pytest.mark.parametrize("footers", [False, True])
def test_state_in_one_piece_is_loaded_if_all_of_it_is_described(footers):
    devices, uart, disk = DeviceRegistry(), state(0x1234), state(2)
    devices.register(UART, uart)
    devices.register(word("disk"), disk)
    data = devices.save(4096, 1, footers=footers)
    raw = data[: data.index(b"\0\x06") + 1]
    uart.n = disk.n = 0
    devices.load(DeviceState(0, raw, None, b""))
    assert (uart.n, disk.n) == (0x1234, 2)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x01", "no device section here"),
        (b"\x04\0\0\0\x01\x04uart\0\0\0\0\0\0\0\x02\0\x01\x7e\0\0\0\x02\0", "footer of section 2"),
        (b"\x04\0\0\0\x01\x04uart\0\0\0\0\0\0\0\x02\0\x01", "ends after"),
        (b"\x04\0\0\0\x01\x04uart\0\0\0\0\0\0\0\x02\0", "2 bytes are missing, there are 1"),
        (b"", "ends after"),
    ],
)
def test_state_in_one_piece_that_is_wrong(raw, message):
    devices = DeviceRegistry()
    devices.register(UART, state())
    with pytest.raises(StreamError, match=message):
        devices.load(DeviceState(0, raw, None, b""))


def test_errors_name_the_offset_in_the_stream():
    devices = DeviceRegistry()

    def refuse(*_: object) -> None:
        raise ValueError("no")

    devices.register(UART, state())
    devices.register(word("picky", post_load=refuse), state())
    made = [Device("uart", b"\0\x01", 1), Device("picky", b"\0\x01", 2)]
    data = stream.device_state(made)
    with pytest.raises(MismatchError, match="picky: post_load failed: no") as caught:
        devices.load(cut(data, 5000))
    place = data.index(b"picky") + len(b"picky") + 8 + 2
    assert (caught.value.offset, caught.value.section) == (5000 + place, "picky")


def test_a_payload_that_is_too_short_or_too_long():
    devices = DeviceRegistry()
    devices.register(UART, state())
    with pytest.raises(TruncatedError, match=r"uart\.n: 2 bytes are missing, there are 1"):
        devices.load(cut(stream.device_state([Device("uart", b"\0", 1)])))
    with pytest.raises(StreamError, match="uart: 1 bytes too many"):
        devices.load(cut(stream.device_state([Device("uart", b"\0\0\0", 1)])))


# ---- before memory ---------------------------------------------------------------------------

EARLY = word("plugged", early_setup=True, priority=Priority.VIRTIO_MEM)
PAGE = 4096


class Machine:
    """A guest with a page of memory and described devices."""

    def __init__(self, *devices: tuple[Description, Any]) -> None:
        self.memory = GuestMemory()
        self.memory.add("ram", PAGE)
        self.devices = DeviceRegistry()
        for description, its_state in devices:
            self.devices.register(description, its_state)
        self.stopped = 0
        self.guest = MemoryGuest(
            "box", self.memory, self.devices, on_stop=self._stop, on_resume=lambda: None
        )

    def _stop(self) -> None:
        self.stopped += 1


def move(made, source: Machine, target: Machine, **options: Any) -> None:
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"}, **options)
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


def test_early_devices_go_before_memory_and_are_described_at_the_end(made, tmp_path: Path):
    source = Machine((UART, state(5)), (EARLY, state(6)))
    made.outgoing(source.guest).start(f"file:{tmp_path}/f")
    assert made.migrations[-1].wait(FOREVER)
    data = (tmp_path / "f").read_bytes()
    assert data.count(b"\x07plugged\0\0\0\0") == 1
    assert data.index(b"\x07plugged") < data.index(b"\x03ram\0")
    described = json.loads(data[data.rindex(b'{"configuration"') :])
    assert [device["name"] for device in described["devices"]] == ["plugged", "uart"]

    plugged, uart = state(), state()
    target = Machine((EARLY, plugged), (UART, uart))
    seen: list[int] = []
    original = target.guest.open_blocks

    def open_blocks(blocks: list[BlockInfo], page_size: int) -> None:
        seen.append(plugged.n)
        original(blocks, page_size)

    target.guest.open_blocks = open_blocks
    loader = StreamLoader(StreamReader(data=data), target.guest, on_command=lambda command: None)
    loader.run()
    assert seen == [6]
    assert uart.n == 5


def test_early_devices_move_live(made):
    plugged, uart = state(), state()
    source = Machine((UART, state(5)), (EARLY, state(6)))
    move(made, source, Machine((EARLY, plugged), (UART, uart)))
    assert (plugged.n, uart.n) == (6, 5)


def test_early_devices_are_sent_again_when_a_migration_failed(made, tmp_path: Path):
    source = Machine((EARLY, state(6)), (UART, state(1 << 16)))
    outgoing = made.outgoing(source.guest)
    outgoing.start(f"file:{tmp_path}/f")
    assert isinstance(error_of(outgoing), DeviceStateError)
    source.guest.source_blocks()
    source.devices.unregister("uart")
    # by somebody who sends nothing early
    assert [name for _, name, _ in names(source.guest.save_devices())] == ["plugged"]


def test_early_devices_stay_in_place_where_nobody_sends_them_early():
    devices = DeviceRegistry()
    devices.register(EARLY, state(6))
    assert names(devices.save(4096, 1)) == [(1, "plugged", 0)]
    assert devices.save_early(1).startswith(b"\x04")
    assert names(devices.save(4096, 1)) == []
    assert names(devices.save(4096, 1)) == [(1, "plugged", 0)]


def test_an_early_device_of_unknown_length_cannot_be_loaded():
    devices = DeviceRegistry()
    devices.register("opaque", save=bytes, load=lambda *_: None)
    header = SectionHeader(1, "opaque", 0, 1)
    with pytest.raises(UnsupportedError, match="its length is not known"):
        devices.load_early(header, StreamReader(data=b""))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (stream.section(4, 9, "plugged", 0, 1) + b"\0", "2 bytes are missing|footer"),
        (stream.section(4, 9, "plugged", 0, 2) + b"\0\0", "too new"),
        (stream.section(4, 9, "other", 0, 1), "Unknown savevm section"),
        (stream.section(4, 9, "plugged", 0, 1) + b"\0\0" + stream.footer(8), "footer of section 8"),
    ],
)
def test_early_devices_that_are_wrong_name_their_place(section, message):
    data = stream.header() + stream.configuration("box") + section
    target = Machine((EARLY, state()))
    loader = StreamLoader(StreamReader(data=data), target.guest, on_command=lambda command: None)
    with pytest.raises(StreamError, match=message) as caught:
        loader.run()
    assert caught.value.offset is not None
    assert caught.value.offset >= len(data) - len(section)


# ---- live ------------------------------------------------------------------------------------


def test_a_device_that_is_unmigratable_blocks(made, tmp_path: Path):
    machine = Machine((word("passthrough", unmigratable=True), state()))
    outgoing = made.outgoing(machine.guest)
    with pytest.raises(BlockedError, match="State blocked by non-migratable device 'passthrough'"):
        outgoing.start(f"file:{tmp_path}/f")
    assert outgoing.query().blocked_reasons == (
        "State blocked by non-migratable device 'passthrough'",
    )
    assert (outgoing.status, machine.stopped) == (Status.NONE, 0)
    machine.devices.unregister("passthrough")
    outgoing.start(f"file:{tmp_path}/f")
    assert outgoing.wait(FOREVER)


def test_only_devices_that_can_migrate_may_be_asked_for():
    devices = DeviceRegistry(only_migratable=True)
    devices.register(UART, state())
    with pytest.raises(BlockedError, match="passthrough is not migratable, but --only-migratable"):
        devices.register(word("passthrough", unmigratable=True), state())
    assert devices.blocked_reasons == ()


def test_an_older_build_moves_to_a_newer_one(made):
    """Version 1 to version 2, whose device has moved to a path and knows one thing more."""
    old = Description("nic", version=1, fields=[vmstate.UInt8("irq")])

    def upgrade(nic: SimpleNamespace, version_id: int) -> None:
        if version_id < 2:
            nic.queues = 1

    new = Description(
        "nic",
        version=2,
        minimum_version=1,
        fields=[vmstate.UInt8("irq"), vmstate.UInt16("queues", since=2)],
        subsections=[
            Description(
                "nic/offload",
                needed=lambda nic: nic.offload,
                fields=[vmstate.UInt32("offload")],
            )
        ],
        post_load=upgrade,
    )
    nics = [SimpleNamespace(irq=0, queues=0, offload=0) for _ in range(2)]
    target = Machine()
    for i, nic in enumerate(nics):
        target.devices.register(new, nic, path=f"0000:00:0{i}.0")
    move(made, Machine((old, {"irq": 9}), (old, {"irq": 10})), target)
    assert nics == [SimpleNamespace(irq=irq, queues=1, offload=0) for irq in (9, 10)]

    # and on, with a subsection for one of them
    nics[1].offload, nics[1].queues = 7, 4
    again, third = [SimpleNamespace(irq=0, queues=0, offload=0) for _ in range(2)], Machine()
    for i, nic in enumerate(again):
        third.devices.register(new, nic, path=f"0000:00:0{i}.0")
    move(made, target, third)
    assert again == nics


def test_a_state_that_cannot_be_saved_does_not_leave(made):
    source, target = Machine((UART, state(1 << 16))), Machine((UART, state()))
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    error = error_of(outgoing)
    assert isinstance(error, DeviceStateError)
    assert error.field == "uart.n"
    assert source.guest.running
    error_of(incoming)


def test_a_state_that_cannot_be_loaded_makes_the_source_run_again(made):
    source = Machine((UART, state(5)))
    fixed = Description("uart", version=2, fields=[vmstate.UInt16("n", equal=True)])
    target = Machine((fixed, state(4)))
    incoming = made.incoming(target.guest)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={"return-path"})
    outgoing.start(incoming.uri)
    error = error_of(incoming)
    assert isinstance(error, MismatchError)
    assert error.message == "uart.n: 4 != 5"
    assert error.section == "uart"
    assert error.offset is not None
    assert isinstance(error_of(outgoing), PeerError)
    assert source.guest.running


def test_described_devices_move_in_postcopy(made):
    """Their package has no description that cuts it."""
    uart, plugged = state(), state()
    source = Machine((UART, state(5)), (EARLY, state(6)))
    target = Machine((UART, uart), (EARLY, plugged))
    capabilities = {"return-path", "postcopy-ram"}
    incoming = made.incoming(target.guest, capabilities=capabilities)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities=capabilities)
    outgoing.start_postcopy()
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert (uart.n, plugged.n) == (5, 6)
