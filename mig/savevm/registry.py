"""The devices of a guest that a program builds for itself."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, overload

from mig.errors import BlockedError, MismatchError, UnsupportedError
from mig.records import SectionHeader, encode_footer
from mig.savevm.devices import DeviceState
from mig.savevm.vmstate.describe import DEFAULT_DIALECT, JsonObject
from mig.savevm.vmstate.description import Description, Priority
from mig.savevm.vmstate.limits import MAX_NAME
from mig.stream.reader import StreamReader
from mig.wire import SectionType

#: load(payload, version_id) raises MismatchError for a payload it cannot take
LoadDevice = Callable[[bytes, int], None]
SaveDevice = Callable[[], bytes]
#: idstr and instance id
Key = tuple[str, int]


class Device(ABC):
    """A registered device.

    number:     how many were registered before it
    version_id: is written, and the newest that can be loaded
    """

    priority = Priority.DEFAULT
    early_setup = False
    #: what it is called in streams without its path
    compat: Key | None = None

    def __init__(
        self, number: int, key: Key, version_id: int, aliases: frozenset[Key] = frozenset()
    ) -> None:
        self.number = number
        self.idstr, self.instance_id = key
        self.version_id = version_id
        self.aliases = aliases

    @property
    def is_needed(self) -> bool:
        """Whether it is sent."""
        return True

    @abstractmethod
    def save(self, dialect: tuple[int, int]) -> tuple[bytes, JsonObject]:
        """Return the payload, and what the VMDESCRIPTION says of it behind name and instance."""

    @abstractmethod
    def why_not(self, version_id: int) -> str | None:
        """Return why a section of this version cannot be loaded."""

    @abstractmethod
    def load(self, payload: bytes, version_id: int, offset: int) -> None:
        """Take the payload, which stands at ``offset`` of the stream."""


class OpaqueDevice(Device):
    """A device whose state is bytes of its owner's."""

    def __init__(
        self, number: int, key: Key, version_id: int, save: SaveDevice, load: LoadDevice
    ) -> None:
        super().__init__(number, key, version_id)
        self._save = save
        self._load = load

    def save(self, dialect: tuple[int, int]) -> tuple[bytes, JsonObject]:
        """Return what the owner returns, described as QEMU describes old-style devices."""
        payload = self._save()
        nbytes = len(payload)
        data = JsonObject(("name", "data"), ("size", nbytes), ("type", "buffer"))
        body = JsonObject(("version", self.version_id), ("size", nbytes), ("fields", [data]))
        return payload, body

    def why_not(self, version_id: int) -> str | None:
        """Only what is too new is refused."""
        if version_id <= self.version_id:
            return None
        return f"device state of version {version_id}, this guest knows {self.version_id}"

    def load(self, payload: bytes, version_id: int, offset: int) -> None:
        """Have the owner take it."""
        self._load(payload, version_id)


class DescribedDevice(Device):
    """A device whose state is as a description says."""

    def __init__(
        self,
        number: int,
        key: Key,
        description: Description,
        state: Any,
        aliases: frozenset[Key],
    ) -> None:
        super().__init__(number, key, description.version, aliases)
        self.description = description
        self.priority = description.priority
        self.early_setup = description.early_setup
        self._state = state

    @property
    def is_needed(self) -> bool:
        """What the description's `needed` says."""
        return self.description.is_needed(self._state)

    def save(self, dialect: tuple[int, int]) -> tuple[bytes, JsonObject]:
        """Return the state; DeviceStateError if it is not as described."""
        return self.description.save(self._state, dialect=dialect)

    def why_not(self, version_id: int) -> str | None:
        """What is too new, or too old."""
        return self.description.check_version(version_id)

    def load(self, payload: bytes, version_id: int, offset: int) -> None:
        """Load all of the payload."""
        reader = StreamReader(data=payload)
        reader.went_past(offset)
        reader.section = self.idstr
        self.load_from(reader, version_id)
        if reader.available:
            raise reader.error(f"{self.description.name}: {reader.available} bytes too many")

    def load_from(self, reader: StreamReader, version_id: int) -> None:
        """Load the state from where a reader is."""
        self.description.load_from(reader, self._state, version_id)


class DeviceRegistry:
    """The devices of one guest; they are saved by priority, then in the order of registration.

    only_migratable: refuse devices that cannot migrate, as QEMU's ``-only-migratable`` does
    """

    def __init__(self, *, only_migratable: bool = False) -> None:
        self._only_migratable = only_migratable
        self._devices: dict[Key, Device] = {}
        self._registered = 0
        # what was sent before memory, and is said at the end
        self._sent_early: dict[Key, JsonObject] = {}

    # ---- registration -----------------------------------------------------------------------

    @overload
    def register(
        self,
        device: str,
        *,
        save: SaveDevice,
        load: LoadDevice,
        instance_id: int = 0,
        version_id: int = 1,
    ) -> None: ...

    @overload
    def register(
        self,
        device: Description,
        state: Any,
        *,
        instance_id: int | None = None,
        path: str | None = None,
        aliases: Iterable[Key] = (),
    ) -> None: ...

    def register(
        self,
        device: str | Description,
        state: Any = None,
        *,
        save: SaveDevice | None = None,
        load: LoadDevice | None = None,
        instance_id: int | None = None,
        version_id: int = 1,
        path: str | None = None,
        aliases: Iterable[Key] = (),
    ) -> None:
        """Add a device: a description with the state it is of, or an idstr with save and load.

        instance_id: without, the first of an idstr is 0, the next 1; of an idstr with save and
                     load always 0
        path:        of a bus and a place there, as QEMU's devices have; the idstr is
                     ``path/name``, and what is sent without path is loaded, too
        aliases:     more idstrs and instance ids under which it may be in a stream

        ValueError when it is there already, or cannot be; BlockedError: `only_migratable`.
        """
        if isinstance(device, Description):
            self._register_described(device, state, instance_id, path, aliases)
            return
        if save is None or load is None:
            raise ValueError(f"device '{device}' has no description: it needs save and load")
        key = self._free(device, instance_id or 0)
        self._add(OpaqueDevice(self._registered, key, version_id, save, load))

    def _register_described(
        self,
        description: Description,
        state: Any,
        instance_id: int | None,
        path: str | None,
        aliases: Iterable[Key],
    ) -> None:
        name, known = description.name, set(aliases)
        if description.unmigratable and self._only_migratable:
            raise BlockedError(
                f"Device {name} is not migratable, but --only-migratable was specified"
            )
        idstr = name if path is None else f"{path}/{name}"
        compat = None
        if path is not None:
            others = [d.compat for d in self._devices.values() if d.compat is not None]
            compat = (name, _next_id(name, others) if instance_id is None else instance_id)
            known.add(compat)
            instance_id = None
        if instance_id is None:
            instance_id = _next_id(idstr, self._devices)
        key = self._free(idstr, instance_id)
        device = DescribedDevice(self._registered, key, description, state, frozenset(known))
        device.compat = compat
        self._add(device)

    def _free(self, idstr: str, instance_id: int) -> Key:
        if not idstr or not idstr.isascii() or not idstr.isprintable() or len(idstr) > MAX_NAME:
            raise ValueError(f"{idstr!r} is no idstr of 1 to {MAX_NAME} ASCII characters")
        if not 0 <= instance_id < 1 << 32:
            raise ValueError(f"instance id {instance_id} has not 32 bits")
        key = (idstr, instance_id)
        if key in self._devices:
            raise ValueError(f"device '{idstr}' instance {instance_id} is there already")
        return key

    def _add(self, device: Device) -> None:
        self._devices[_key(device)] = device
        self._registered += 1

    def unregister(self, idstr: str, instance_id: int = 0) -> None:
        """Take a device away; KeyError if it is not there."""
        del self._devices[(idstr, instance_id)]

    @property
    def blocked_reasons(self) -> tuple[str, ...]:
        """What stands against a migration: devices that cannot migrate. Any thread."""
        return tuple(
            f"State blocked by non-migratable device '{device.idstr}'"
            for device in tuple(self._devices.values())
            if isinstance(device, DescribedDevice) and device.description.unmigratable
        )

    # ---- saving -----------------------------------------------------------------------------

    def begin(self) -> None:
        """A migration begins: nothing of it was sent."""
        self._sent_early.clear()

    def save_early(
        self,
        first_section_id: int,
        *,
        footers: bool = True,
        dialect: tuple[int, int] = DEFAULT_DIALECT,
    ) -> bytes:
        """Return the sections of the devices that go before memory; save() then leaves them out."""
        self.begin()
        out, early = [], {}
        for device in self._in_order():
            if device.early_setup and device.is_needed:
                section, described = _save(device, first_section_id, footers, dialect)
                out.append(section)
                early[_key(device)] = described
        self._sent_early = early
        return b"".join(out)

    def save(
        self,
        page_size: int,
        first_section_id: int,
        *,
        footers: bool = True,
        dialect: tuple[int, int] = DEFAULT_DIALECT,
    ) -> bytes:
        """Return the SECTION_FULL of every device, EOF and VMDESCRIPTION.

        first_section_id: that of the device that was registered first
        dialect:          QEMU whose description is written, (major, minor)

        DeviceStateError for a state that is not as it is described.
        """
        early, self._sent_early = self._sent_early, {}
        out, described = [], list(early.values())
        for device in self._in_order():
            if _key(device) not in early and device.is_needed:
                section, said = _save(device, first_section_id, footers, dialect)
                out.append(section)
                described.append(said)
        text = JsonObject(
            (
                "configuration",
                JsonObject(("vmsd_name", "configuration"), ("version", 1), ("fields", [])),
            ),
            ("page_size", page_size),
            ("devices", described),
        ).text()
        out.append(bytes([SectionType.EOF]))
        out.append(struct.pack(">BI", SectionType.VMDESCRIPTION, len(text)) + text.encode("ascii"))
        return b"".join(out)

    def _in_order(self) -> list[Device]:
        return sorted(self._devices.values(), key=lambda device: -device.priority)

    # ---- loading ----------------------------------------------------------------------------

    def load(self, state: DeviceState) -> None:
        """Give each section to its device; StreamError when they do not fit each other.

        A state that its description does not cut into sections can be loaded if all of its devices
        were registered with descriptions.
        """
        if state.sections is None:
            self._load_one_by_one(state)
            return
        chosen = []
        for section in state.sections:
            key, at = (section.idstr, section.instance_id), state.offset + section.offset
            device = self._find(key, section.version_id, at)
            chosen.append((device, section, at + _header_nbytes(section.idstr)))
        for device, section, offset in chosen:
            device.load(section.payload, section.version_id, offset)

    def load_early(self, header: SectionHeader, reader: StreamReader) -> None:
        """Load a device that comes before memory from where a reader is."""
        at = reader.offset - _header_nbytes(header.idstr)
        device = self._find((header.idstr, header.instance_id), header.version_id, at)
        if not isinstance(device, DescribedDevice):
            raise UnsupportedError(
                f"device '{header.idstr}' was saved before RAM: its length is not known",
                offset=at,
                section=header.idstr,
            )
        device.load_from(reader, header.version_id)

    def _load_one_by_one(self, state: DeviceState) -> None:
        reader = StreamReader(data=state.raw)
        reader.went_past(state.offset)
        while (kind := reader.u8("the device state")) != SectionType.EOF:
            at = reader.offset - 1
            if kind != SectionType.FULL:
                raise reader.error("no device section here", offset=at)
            header = SectionHeader.read(reader)
            device = self._find((header.idstr, header.instance_id), header.version_id, at)
            if not isinstance(device, DescribedDevice):
                raise MismatchError(
                    "the stream does not say where one device ends and the next begins",
                    offset=at,
                    section=header.idstr,
                )
            device.load_from(reader, header.version_id)
            if reader.peek() == SectionType.FOOTER:
                at = reader.offset
                reader.u8("a footer")
                if (found := reader.u32("a footer")) != header.section_id:
                    raise reader.error(
                        f"footer of section {found} where {header.section_id} ends", offset=at
                    )
            reader.section = None

    def _find(self, key: Key, version_id: int, offset: int) -> Device:
        """The device that a section is of; MismatchError for none, or of another version."""
        idstr, instance_id = key
        device = self._devices.get(key)
        if device is None:
            device = next((d for d in self._devices.values() if key in d.aliases), None)
        if device is None:
            raise MismatchError(
                f"Unknown savevm section or instance '{idstr}' {instance_id}. Make sure that your "
                "current VM setup matches your saved VM setup, including any hotplugged devices",
                offset=offset,
                section=idstr,
            )
        if (reason := device.why_not(version_id)) is not None:
            raise MismatchError(reason, offset=offset, section=idstr)
        return device


def _next_id(idstr: str, taken: Iterable[Key]) -> int:
    """One more than the greatest that is taken; matches calculate_new_instance_id()."""
    return max((number + 1 for name, number in taken if name == idstr), default=0)


def _header_nbytes(idstr: str) -> int:
    """Bytes of a section before its payload: type, id, counted idstr, instance and version."""
    return 14 + len(idstr)


def _key(device: Device) -> Key:
    return device.idstr, device.instance_id


def _save(
    device: Device, first_section_id: int, footers: bool, dialect: tuple[int, int]
) -> tuple[bytes, JsonObject]:
    """The section of a device, and what is said of it."""
    payload, body = device.save(dialect)
    section_id = first_section_id + device.number
    header = SectionHeader(section_id, device.idstr, device.instance_id, device.version_id)
    section = header.encode(SectionType.FULL) + payload
    described = JsonObject(("name", device.idstr), ("instance_id", device.instance_id))
    described.pairs += body.pairs
    return section + (encode_footer(section_id) if footers else b""), described
