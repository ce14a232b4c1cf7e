"""Will a target load it? Reasons, before anybody pauses a guest."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeAlias

from mig.analysis.analyze import analyze
from mig.analysis.knowledge import Knowledge, KnownField, KnownState
from mig.analysis.report import Analysis, errors_of
from mig.analysis.target import Target
from mig.errors import ChannelError
from mig.savevm.fields import Device, Field, State

#: sections that are registered by code, not by a device type: a dump does not have them
_BY_CODE: Final = frozenset(
    {
        "PCIBUS",
        "acpi_build",
        "apic",
        "audio",
        "cpu",
        "cpu_common",
        "globalstate",
        "i2c_bus",
        "ide",
        "kvmclock",
        "replay",
        "slirp",
        "timer",
    }
)
# what QEMU appends to names that are not unique in a description
_NUMBERED: Final = re.compile(r"\[\d+\]$")
# idstr of a PCI device's section
_PCI_PLACE: Final = re.compile(r"^([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])/")
_MUST_AGREE: Final = ("x-ignore-shared", "mapped-ram")


class Level(StrEnum):
    """error: it will not load. warning: it may load into something else. note: cannot be told."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that was found; subject: what it is about (a device, a block, the machine)."""

    level: Level
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.subject}: {self.message}"

    def to_json(self) -> dict[str, str]:
        """Return all of it."""
        return {"level": str(self.level), "subject": self.subject, "message": self.message}


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict.

    against: what it was compared with, in words; None: with nothing but itself
    """

    analysis: Analysis
    against: str | None
    reasons: tuple[Reason, ...]

    @property
    def loads(self) -> bool:
        """Whether nothing was found that keeps it from loading."""
        return not any(reason.level == Level.ERROR for reason in self.reasons)

    def to_json(self) -> dict[str, Any]:
        """Return verdict and reasons, and what the target needs."""
        ram = self.analysis.ram
        return {
            "loads": self.loads,
            "against": self.against,
            "machine": self.analysis.machine,
            "blocks": {b.idstr: b.used_length for b in ram.blocks} if ram else {},
            "devices": [
                {"name": d.idstr, "instance-id": d.instance_id, "version-id": d.version_id}
                for d in self.analysis.devices
            ],
            "reasons": [reason.to_json() for reason in self.reasons],
        }


def check(name: str | os.PathLike[str], against: str | None = None) -> Check:
    """Say whether a captured VM will load, and why not.

    name:    as `analyze` takes it
    against: a QMP socket (a path or HOST:PORT) of the target QEMU, started as it will be when the
             VM comes, or a file with its -dump-vmstate; None: only whether the file is in order

    Each tells other things: the socket about machine, RAM blocks, processors and PCI devices that
    are there, the dump about versions, fields and subsections that are known.
    """
    analysis = analyze(name)
    reasons = [
        Reason(Level.ERROR, finding.section or "stream", str(finding).partition(": ")[2])
        for finding in errors_of(analysis.findings)
    ]
    if against is None:
        return Check(analysis, None, tuple(reasons))
    if _is_socket(against):
        target = Target.ask(against)
        reasons += against_target(analysis, target)
        return Check(analysis, f"QEMU {target.version} at {against}", tuple(reasons))
    knowledge = Knowledge.load(against)
    reasons += against_knowledge(analysis, knowledge)
    return Check(analysis, f"{against} of {knowledge.machine}", tuple(reasons))


def _is_socket(against: str) -> bool:
    if against.startswith(("unix:", "tcp:")):
        return True
    try:
        return stat.S_ISSOCK(Path(against).stat().st_mode)
    except FileNotFoundError:
        if re.fullmatch(r"[^/]*:\d+", against):
            return True
        raise ChannelError(f"{against}: no such file or socket") from None


# ---- a running target ------------------------------------------------------------------------


def against_target(analysis: Analysis, target: Target) -> Iterator[Reason]:
    """Yield what a QEMU says about machine, capabilities, blocks, processors and PCI devices."""
    yield from _machine(analysis, target)
    theirs = analysis.configuration.capabilities if analysis.configuration else None
    for name in _MUST_AGREE:
        received, local = name in (theirs or ()), name in target.capabilities
        if received != local:
            yield Reason(
                Level.ERROR,
                name,
                f"Capability {name} is {_on(local)}, but received capability is {_on(received)}",
            )
    yield from _blocks(analysis, target)
    yield from _processors(analysis, target)
    yield from _pci_devices(analysis, target)


def _on(state: bool) -> str:
    return "on" if state else "off"


def _machine(analysis: Analysis, target: Target) -> Iterator[Reason]:
    machine = analysis.machine
    if machine is None:
        yield Reason(Level.NOTE, "machine", "the stream does not name its machine type")
    elif machine not in target.machines:
        yield Reason(
            Level.ERROR, "machine", f"QEMU {target.version} has no machine type '{machine}'"
        )
    elif target.machine is not None and target.machine != machine:
        yield Reason(
            Level.ERROR,
            "machine",
            f"Machine type received is '{machine}' and local is '{target.machine}'",
        )


def _blocks(analysis: Analysis, target: Target) -> Iterator[Reason]:
    if target.blocks is None or analysis.ram is None:
        yield Reason(Level.NOTE, "ram", "the target does not tell its RAM blocks")
        return
    for block in analysis.ram.blocks:
        there = target.blocks.get(block.idstr)
        if there is None:
            yield Reason(Level.ERROR, block.idstr, "the target has no such RAM block")
        elif block.used_length != there.used_length and (
            there.used_length == there.max_length or block.used_length > there.max_length
        ):
            yield Reason(
                Level.ERROR,
                block.idstr,
                f"RAM block of {block.used_length:#x} bytes, the target's has "
                f"{there.used_length:#x}",
            )
    names = {block.idstr for block in analysis.ram.blocks}
    for name in target.blocks:
        if name not in names:
            yield Reason(Level.WARNING, name, "only the target has this RAM block")


def _processors(analysis: Analysis, target: Target) -> Iterator[Reason]:
    count = sum(device.idstr == "cpu_common" for device in analysis.devices)
    if not count or target.ncpus is None or count == target.ncpus:
        return
    # QEMU refuses the section that is too many; processors without one stay as they were reset
    level = Level.ERROR if count > target.ncpus else Level.WARNING
    yield Reason(level, "cpu", f"{count} processors, the target has {target.ncpus}")


def _pci_devices(analysis: Analysis, target: Target) -> Iterator[Reason]:
    if target.pci is None:
        yield Reason(Level.NOTE, "pci", "the target does not tell its PCI devices")
        return
    places: dict[str, Device] = {}
    for device in analysis.devices:
        if match := _PCI_PLACE.match(device.idstr):
            places.setdefault(match[1], device)
    for place, device in places.items():
        # the numbers of buses behind bridges are the guest's to choose
        if place.startswith("0000:00:") and place not in target.pci:
            yield Reason(
                Level.ERROR,
                device.idstr,
                f"Unknown savevm section or instance '{device.idstr}' {device.instance_id}: the "
                f"target has no PCI device at {place}",
            )
    for place in sorted(target.pci):
        if place.startswith("0000:00:") and place not in places:
            yield Reason(Level.WARNING, place, "only the target has this PCI device")


# ---- what a target knows ---------------------------------------------------------------------


def against_knowledge(analysis: Analysis, knowledge: Knowledge) -> Iterator[Reason]:
    """Yield what a dump says about the machine type and every device."""
    if analysis.machine is not None and analysis.machine != knowledge.machine:
        yield Reason(
            Level.ERROR,
            "machine",
            f"Machine type received is '{analysis.machine}' and local is '{knowledge.machine}'",
        )
    for device in analysis.devices:
        yield from _device(device, knowledge)


def _device(device: Device, knowledge: Knowledge) -> Iterator[Reason]:
    name = device.state.vmsd_name if device.state else device.idstr.rpartition("/")[2]
    known = knowledge.states.get(name)
    if known is None:
        if name in _BY_CODE:
            text = "registered by code: a dump does not tell about it"
            yield Reason(Level.NOTE, device.idstr, text)
        else:
            # a type of devices may register its state by code, too, and be in no dump
            text = f"the dump does not have '{name}': the target may not know this device"
            yield Reason(Level.WARNING, device.idstr, text)
        return
    # several types of devices share a name: one of them has to take it
    tries = [list(_against(device, state)) for state in known]
    if all(any(r.level == Level.ERROR for r in reasons) for reasons in tries):
        yield from min(tries, key=len)
    else:
        yield from next(t for t in tries if not any(r.level == Level.ERROR for r in t))


def _against(device: Device, known: KnownState) -> Iterator[Reason]:
    version = device.version_id
    if version > known.version_id:
        text = f"unsupported version {version} for '{device.idstr}' v{known.version_id}"
        yield Reason(Level.ERROR, device.idstr, text)
    elif version < known.minimum_version_id:
        text = (
            f"incoming version_id {version} is too old for local minimum version_id "
            f"{known.minimum_version_id}"
        )
        yield Reason(Level.ERROR, device.idstr, text)
    elif device.state is not None:
        for level, text in _state(device.state, known, version):
            yield Reason(level, device.idstr, text)


_Remark: TypeAlias = tuple[Level, str]


def _state(state: State, known: KnownState, version: int) -> Iterator[_Remark]:
    """What a target would stumble over in a state of that version."""
    yield from _fields(state, known, version)
    subsections = {sub.name: sub for sub in known.subsections}
    for sub in state.subsections:
        theirs = subsections.get(sub.vmsd_name)
        if theirs is None:
            yield Level.ERROR, f"the target does not know subsection '{sub.vmsd_name}'"
        elif not theirs.minimum_version_id <= sub.version_id <= theirs.version_id:
            yield (
                Level.ERROR,
                f"subsection '{sub.vmsd_name}' of version {sub.version_id}, the target takes "
                f"{theirs.minimum_version_id} to {theirs.version_id}",
            )
        else:
            yield from _state(sub, theirs, sub.version_id)


def _fields(state: State, known: KnownState, version: int) -> Iterator[_Remark]:
    """Both have the fields in one order; the target may leave out conditional and newer ones."""
    at = 0
    for item in state.fields:
        names = (item.name, _NUMBERED.sub("", item.name))
        rest = range(at, len(known.fields))
        found = next((i for i in rest if known.fields[i].name in names), None)
        if found is None:
            found = next((i for i in rest if _may_be_renamed(item, known.fields[i])), None)
            what = f"field '{item.name}' of '{state.vmsd_name}'"
            if found is None:
                yield Level.ERROR, f"the target does not know {what}"
                return
            yield Level.NOTE, f"{what} may be '{known.fields[found].name}' at the target"
        match, at = known.fields[found], found + 1
        if match.version_id > version and not match.conditional:
            text = f"field '{item.name}' is of version {match.version_id}, the section of {version}"
            yield Level.ERROR, text
        yield from _inner(item, match)


def _may_be_renamed(item: Field, known: KnownField) -> bool:
    """Names are not on the wire: a field of the same size may only have got another one."""
    count = len(item.value) if isinstance(item.value, tuple) else 1
    return not known.conditional and count > 0 and known.nbytes * count == item.nbytes


def _inner(item: Field, known: KnownField) -> Iterator[_Remark]:
    values = item.value if isinstance(item.value, tuple) else (item.value,)
    for value in values[:1]:
        if known.description is not None and isinstance(value, State):
            yield from _state(value, known.description, value.version_id)
