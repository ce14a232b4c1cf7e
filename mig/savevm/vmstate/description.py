"""Description: what a device's state consists of, in versions and subsections."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from mig.errors import MismatchError, StreamError
from mig.records import counted
from mig.savevm.vmstate import access
from mig.savevm.vmstate.describe import DEFAULT_DIALECT, JsonObject
from mig.savevm.vmstate.fields import Field
from mig.savevm.vmstate.limits import MAX_NAME
from mig.savevm.vmstate.streams import StateReader, StateWriter
from mig.stream.reader import StreamReader
from mig.wire import SectionType

_VERSION = struct.Struct(">I")


class Priority(IntEnum):
    """Devices of higher priority are saved, and so loaded, first (MigrationPriority)."""

    LOW = 1
    DEFAULT = 2
    IOMMU = 3
    PCI_BUS = 4
    VIRTIO_MEM = 5
    APIC = 6
    GICV3_ITS = 7
    GICV3 = 8


class Description:
    """A device, a struct in one, or a subsection of either; QEMU's VMStateDescription.

    name:            of the device; of a subsection: ``device/what``
    version:         that is written, and the newest that can be loaded
    minimum_version: the oldest that can be loaded; without: `version`
    fields:          in the order of the stream
    subsections:     sent where their ``needed(state)`` says so; who does not know one that comes
                     cannot load the device
    needed:          of a device: whether it is sent at all
    pre_save, post_save, pre_load: called with the state; post_load with state and version. They
                     raise to refuse, MismatchError or ValueError when loading
    priority:        order among the devices
    early_setup:     send it before memory, while the guest still runs
    unmigratable:    a guest that has this device cannot migrate
    make:            returns an empty state, for a struct that is loaded where there is none;
                     without, it is a SimpleNamespace, or a dict in a dict
    minimum_version_old, load_old: versions below `minimum_version`, down to this one, are loaded
                     by ``load_old(state, reader, version_id)``

    ValueError for what cannot be.
    """

    def __init__(
        self,
        name: str,
        *,
        version: int = 1,
        minimum_version: int | None = None,
        fields: Sequence[Field] = (),
        subsections: Sequence[Description] = (),
        needed: Callable[[Any], bool] | None = None,
        pre_save: Callable[[Any], object] | None = None,
        post_save: Callable[[Any], object] | None = None,
        pre_load: Callable[[Any], object] | None = None,
        post_load: Callable[[Any, int], object] | None = None,
        priority: Priority = Priority.DEFAULT,
        early_setup: bool = False,
        unmigratable: bool = False,
        make: Callable[[], Any] | None = None,
        minimum_version_old: int | None = None,
        load_old: Callable[[Any, StreamReader, int], object] | None = None,
    ) -> None:
        if not name or not name.isascii() or not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(f"{name!r} is no name of 1 to {MAX_NAME} ASCII characters")
        self.name = name
        self.version = version
        self.minimum_version = version if minimum_version is None else minimum_version
        self.fields = tuple(fields)
        self.subsections = tuple(subsections)
        self.needed = needed
        self.priority = priority
        self.early_setup = early_setup
        self.unmigratable = unmigratable
        self.make = make
        self._pre_save, self._post_save = pre_save, post_save
        self._pre_load, self._post_load = pre_load, post_load
        self._minimum_version_old, self._load_old = minimum_version_old, load_old
        self._check()
        self._named = list(zip(self.fields, _unique_names(self.fields), strict=True))

    def __repr__(self) -> str:
        return f"<Description {self.name!r} version {self.version}>"

    def _check(self) -> None:
        if not 0 <= self.minimum_version <= self.version < 1 << 32:
            raise ValueError(
                f"'{self.name}' of version {self.version}, minimum {self.minimum_version}"
            )
        if (self._load_old is None) != (self._minimum_version_old is None):
            raise ValueError(f"'{self.name}': `load_old` goes with `minimum_version_old`")
        for sub in self.subsections:
            if not sub.name.startswith(f"{self.name}/"):
                raise ValueError(
                    f"subsection '{sub.name}': its name must begin with '{self.name}/'"
                )
        names = [sub.name for sub in self.subsections]
        if len(set(names)) < len(names):
            raise ValueError(f"'{self.name}' has two subsections of one name")

    @property
    def alike(self) -> bool:
        """Whether its state always looks the same; matches vmsd_can_compress()."""
        return not self.subsections and all(field.alike for field in self.fields)

    def is_needed(self, state: Any) -> bool:
        """Whether it is sent at all."""
        return self.needed is None or bool(self.needed(state))

    # ---- whole devices ----------------------------------------------------------------------

    def save(
        self, state: Any, *, dialect: tuple[int, int] = DEFAULT_DIALECT
    ) -> tuple[bytes, JsonObject]:
        """Return the payload of a device, and what the VMDESCRIPTION says of it.

        dialect: QEMU whose description is written, (major, minor): they differ in arrays

        DeviceStateError, which names the field, for a state that is not as described.
        """
        out, body = StateWriter(self.name, dialect), JsonObject()
        self.put(out, state, body)
        return out.data(), body

    def load(self, payload: bytes, state: Any = None, version_id: int | None = None) -> Any:
        """Load a device of `version_id` (this version, if not given); returns its state.

        state: what it is loaded into; without, something empty that `make` returns, or a dict

        StreamError, with offset in the payload, when it is something else. Then the state is partly
        loaded, and good for nothing.
        """
        reader = StreamReader(data=payload)
        reader.section = self.name
        if state is None:
            state = self.make() if self.make else {}
        self.load_from(reader, state, self.version if version_id is None else version_id)
        if reader.available:
            raise reader.error(f"{self.name}: {reader.available} bytes too many")
        return state

    def load_from(self, reader: StreamReader, state: Any, version_id: int) -> None:
        """Load a device from where a reader is; what follows it is left alone."""
        self.get(StateReader(self.name, reader), state, version_id)

    def check_version(self, version_id: int) -> str | None:
        """Return why a stream of this version cannot be loaded, in QEMU's words."""
        if version_id > self.version:
            return (
                f"{self.name}: incoming version_id {version_id} is too new "
                f"for local version_id {self.version}"
            )
        oldest = self.minimum_version
        if self._minimum_version_old is not None:
            oldest = min(oldest, self._minimum_version_old)
        if version_id < oldest:
            return (
                f"{self.name}: incoming version_id {version_id} is too old "
                f"for local minimum version_id {oldest}"
            )
        return None

    # ---- saving: matches vmstate_save_state_v() ---------------------------------------------

    def put(
        self, out: StateWriter, state: Any, body: JsonObject, version_id: int | None = None
    ) -> None:
        """Write a state, and into ``body`` what it consists of."""
        version_id = self.version if version_id is None else version_id
        if self._pre_save is not None:
            try:
                self._pre_save(state)
            except ValueError as error:
                raise out.error(f"pre_save failed: {error}") from error
        try:
            self._put(out, state, body, version_id)
        finally:
            if self._post_save is not None:
                self._post_save(state)

    def _put(self, out: StateWriter, state: Any, body: JsonObject, version_id: int) -> None:
        described: list[JsonObject] = []
        body.pairs += [("vmsd_name", self.name), ("version", version_id), ("fields", described)]
        for field, name in self._named:
            if field.exists(state, version_id):
                with out.at(f".{field.name}"):
                    field.save(out, state, name, described)
            elif field.must_exist:
                raise out.error(f"Output state validation failed: {self.name}/{field.name}")
        subsections = []
        for sub in self.subsections:
            if sub.is_needed(state):
                out.put(bytes([SectionType.SUBSECTION]) + counted(sub.name))
                out.put(_VERSION.pack(sub.version))
                inner = JsonObject()
                with out.at(sub.name.removeprefix(self.name)):
                    sub.put(out, state, inner)
                subsections.append(inner)
        if subsections:
            body.add("subsections", subsections)

    # ---- loading: matches vmstate_load_state() ----------------------------------------------

    def get(self, source: StateReader, state: Any, version_id: int) -> None:
        """Read a state; StreamError for what cannot be loaded."""
        if (reason := self.check_version(version_id)) is not None:
            raise MismatchError(reason, offset=source.reader.offset, section=source.reader.section)
        if version_id < self.minimum_version and self._load_old is not None:
            self._refuses(source, "load_old", self._load_old, state, source.reader, version_id)
            return
        if self._pre_load is not None:
            self._refuses(source, "pre_load", self._pre_load, state)
        for field in self.fields:
            if field.exists(state, version_id):
                with source.at(f".{field.name}"):
                    field.load(source, state)
            elif field.must_exist:
                raise source.error(f"Input validation failed: {self.name}/{field.name}")
        while (sub := self._next_subsection(source)) is not None:
            with source.at(sub.name.removeprefix(self.name)):
                sub.get(source, state, _VERSION.unpack(source.read(4))[0])
        if self._post_load is not None:
            self._refuses(source, "post_load", self._post_load, state, version_id)

    def _next_subsection(self, source: StateReader) -> Description | None:
        """Consume the name of a subsection of this state, None when none follows."""
        reader = source.reader
        if reader.peek() != SectionType.SUBSECTION or not reader.fill(2):
            return None
        start = reader.window[0]
        length = reader.buffer[start + 1]
        if not reader.fill(2 + length):
            return None
        start = reader.window[0] + 2
        raw = bytes(reader.buffer[start : start + length])
        for sub in self.subsections:
            if sub.name.encode() == raw:
                reader.advance(2 + length)
                return sub
        if raw.startswith(f"{self.name}/".encode()):
            name = raw.decode("ascii", "backslashreplace")
            raise source.error(f"VM subsection '{name}' in '{self.name}' does not exist")
        # of a state that this one is part of
        return None

    @staticmethod
    def _refuses(
        source: StateReader, name: str, hook: Callable[..., object], *arguments: Any
    ) -> None:
        """Call a hook; what it raises to refuse names the place."""
        try:
            hook(*arguments)
        except StreamError as error:
            if error.offset is not None:
                raise
            raise source.error(f"{name} failed: {error.message}") from error
        except ValueError as error:
            raise source.error(f"{name} failed: {error}") from error

    def blank(self, parent: Any) -> Any:
        """Return an empty state, in a place where there is none."""
        return access.blank(parent) if self.make is None else self.make()


def _unique_names(fields: Sequence[Field]) -> list[str]:
    """Names as the VMDESCRIPTION has them: numbered where one comes again."""
    names = [field.name for field in fields]
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        number = seen.get(name, 0)
        seen[name] = number + 1
        unique.append(f"{name}[{number}]" if names.count(name) > 1 else name)
    return unique
