"""The devices of a guest that a program builds for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mig.errors import MismatchError
from mig.records import SectionHeader, encode_footer
from mig.savevm.devices import DeviceState
from mig.savevm.vmdesc import DeviceDescription, encode_description
from mig.wire import SectionType

#: load(payload, version_id) raises MismatchError for a payload it cannot take
LoadDevice = Callable[[bytes, int], None]
SaveDevice = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Device:
    """A registered device; ``version_id`` is written, and the newest that can be loaded."""

    idstr: str
    instance_id: int
    version_id: int
    save: SaveDevice
    load: LoadDevice


class DeviceRegistry:
    """Devices in the order in which they are saved and loaded."""

    def __init__(self) -> None:
        self._devices: dict[tuple[str, int], Device] = {}

    def register(
        self,
        idstr: str,
        *,
        save: SaveDevice,
        load: LoadDevice,
        instance_id: int = 0,
        version_id: int = 1,
    ) -> None:
        """Add a device; ValueError when it is there already."""
        key = (idstr, instance_id)
        if key in self._devices:
            raise ValueError(f"device '{idstr}' instance {instance_id} is there already")
        self._devices[key] = Device(idstr, instance_id, version_id, save, load)

    def save(self, page_size: int, first_section_id: int, *, footers: bool = True) -> bytes:
        """Return the SECTION_FULL of every device, EOF and VMDESCRIPTION."""
        out, described = [], []
        for section_id, device in enumerate(self._devices.values(), first_section_id):
            payload = device.save()
            header = SectionHeader(section_id, device.idstr, device.instance_id, device.version_id)
            out += [header.encode(SectionType.FULL), payload]
            if footers:
                out.append(encode_footer(section_id))
            described.append(
                DeviceDescription(device.idstr, device.instance_id, device.version_id, len(payload))
            )
        out.append(bytes([SectionType.EOF]))
        out.append(encode_description(described, page_size))
        return b"".join(out)

    def load(self, state: DeviceState) -> None:
        """Give each section to its device; MismatchError when they do not fit each other."""
        if state.sections is None:
            raise MismatchError("the stream does not say where one device ends and the next begins")
        chosen = []
        for section in state.sections:
            device = self._devices.get((section.idstr, section.instance_id))
            if device is None:
                raise MismatchError(
                    f"this guest has no device '{section.idstr}' instance {section.instance_id}",
                    section=section.idstr,
                )
            if section.version_id > device.version_id:
                raise MismatchError(
                    f"device state of version {section.version_id}, this guest knows "
                    f"{device.version_id}",
                    section=section.idstr,
                )
            chosen.append((device, section))
        for device, section in chosen:
            device.load(section.payload, section.version_id)
