"""DeviceRegistry: devices of a guest that a program builds for itself."""

from __future__ import annotations

import pytest
from reference import stream
from reference.stream import Device

from mig.errors import MismatchError
from mig.savevm.devices import DeviceState, DeviceTail
from mig.savevm.registry import DeviceRegistry


class Toy:
    """A device whose state is bytes."""

    def __init__(self, state: bytes = b"") -> None:
        self.state = state
        self.loaded: list[tuple[bytes, int]] = []

    def save(self) -> bytes:
        return self.state

    def load(self, payload: bytes, version_id: int) -> None:
        self.loaded.append((payload, version_id))


def registry_of(**toys: Toy) -> DeviceRegistry:
    registry = DeviceRegistry()
    for name, toy in toys.items():
        registry.register(name, save=toy.save, load=toy.load, version_id=3)
    return registry


def cut(data: bytes, *, footers: bool = True) -> DeviceState:
    tail = DeviceTail(0, footers=footers)
    return tail.feed(data) or tail.finish()


@pytest.mark.parametrize("footers", [False, True])
def test_saved_devices_are_sections_end_and_description(footers):
    data = registry_of(uart=Toy(b"abc"), disk=Toy(b"")).save(4096, 5, footers=footers)
    made = [Device("uart", b"abc", 5, version_id=3), Device("disk", b"", 6, version_id=3)]
    sections = b"".join(d.encode(footers=footers) for d in made)
    assert data.startswith(sections + b"\x00\x06")
    state = cut(data, footers=footers)
    assert [(s.idstr, s.payload, s.section_id) for s in state.sections] == [
        ("uart", b"abc", 5),
        ("disk", b"", 6),
    ]


def test_devices_get_back_what_they_saved_with_its_version():
    data = registry_of(uart=Toy(b"abc"), disk=Toy(b"\x00\x06{")).save(4096, 2)
    uart, disk = Toy(), Toy()
    registry_of(disk=disk, uart=uart).load(cut(data))
    assert (uart.loaded, disk.loaded) == ([(b"abc", 3)], [(b"\x00\x06{", 3)])


def test_devices_are_loaded_in_the_order_of_the_stream():
    order = []
    registry = DeviceRegistry()
    for name in ("a", "b"):
        registry.register(name, save=bytes, load=lambda p, v, name=name: order.append(name))
    registry.load(cut(stream.device_state([Device("b", b"", 1), Device("a", b"", 2)])))
    assert order == ["b", "a"]


def test_instances_are_told_apart():
    registry, toys = DeviceRegistry(), [Toy(b"zero"), Toy(b"one")]
    for i, toy in enumerate(toys):
        registry.register("d", save=toy.save, load=toy.load, instance_id=i)
    registry.load(cut(registry.save(4096, 1)))
    assert [toy.loaded for toy in toys] == [[(b"zero", 1)], [(b"one", 1)]]


def test_a_device_is_registered_once():
    registry = registry_of(uart=Toy())
    with pytest.raises(ValueError, match="there already"):
        registry.register("uart", save=bytes, load=lambda p, v: None)
    registry.register("uart", save=bytes, load=lambda p, v: None, instance_id=1)


def mismatch(registry: DeviceRegistry, made: list[Device]) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        registry.load(cut(stream.device_state(made)))
    return caught.value


def test_a_device_that_the_guest_does_not_have_is_a_mismatch():
    assert mismatch(registry_of(uart=Toy()), [Device("disk", b"", 1)]).section == "disk"
    instance = Device("uart", b"", 1, instance_id=1)
    assert mismatch(registry_of(uart=Toy()), [instance]).section == "uart"


def test_a_newer_version_is_a_mismatch_and_an_older_one_is_loaded():
    toy = Toy()
    assert mismatch(registry_of(uart=toy), [Device("uart", b"", 1, version_id=4)])
    assert toy.loaded == []
    registry_of(uart=toy).load(cut(stream.device_state([Device("uart", b"x", 1, version_id=2)])))
    assert toy.loaded == [(b"x", 2)]


def test_state_in_one_piece_cannot_be_loaded():
    data = stream.device_state([Device("uart", b"", 1)], with_description=False)
    with pytest.raises(MismatchError, match="where one device ends"):
        registry_of(uart=Toy()).load(cut(data))


def test_what_a_device_raises_passes_through():
    registry = DeviceRegistry()

    def load(payload: bytes, version_id: int) -> None:
        raise MismatchError("not for me")

    registry.register("d", save=bytes, load=load)
    with pytest.raises(MismatchError, match="not for me"):
        registry.load(cut(stream.device_state([Device("d", b"", 1)])))


def test_a_registry_without_devices_saves_an_end():
    assert cut(DeviceRegistry().save(4096, 2)).sections == ()
