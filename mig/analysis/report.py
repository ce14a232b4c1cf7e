"""What an analysis finds, as dataclasses and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from mig.analysis.values import state_as_json, value_as_json
from mig.errors import StreamError
from mig.image.libvirt import LibvirtSave
from mig.records import Configuration
from mig.savevm.fields import Device, State

#: most findings and commands that are kept; more are only counted
MAX_FINDINGS: Final = 1000
MAX_COMMANDS: Final = 10_000


class Severity(StrEnum):
    """error: the bytes are wrong. warning: a loader takes them, yet no source should write them."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    offset: in the stream, in bytes; None when it is not at one place
    """

    severity: Severity
    message: str
    offset: int | None = None
    section: str | None = None
    block: str | None = None

    def __str__(self) -> str:
        error = StreamError(
            self.message, offset=self.offset, section=self.section, block=self.block
        )
        return f"{self.severity}: {error}"

    def to_json(self) -> dict[str, Any]:
        """Return what there is to say."""
        return {
            "severity": str(self.severity),
            "message": self.message,
            "offset": self.offset,
            "section": self.section,
            "block": self.block,
        }


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """What a file has of one RAM block.

    pages:   data: the last that is known has contents; zero: is zeros; missing: never sent
    records: normal, zero, xbzrle, compressed; repeated: those of pages that had one before;
             filled: zero records with another byte than 0
    bytes:   record_nbytes: of all records; xbzrle_nbytes, compressed_nbytes: of encodings
    address: guest-physical, in a stream with x-ignore-shared
    host_page_size: of its pages in bytes where the stream says so (postcopy-ram)
    """

    idstr: str
    used_length: int
    data_pages: int = 0
    zero_pages: int = 0
    missing_pages: int = 0
    normal: int = 0
    zero: int = 0
    xbzrle: int = 0
    compressed: int = 0
    repeated: int = 0
    filled: int = 0
    record_nbytes: int = 0
    xbzrle_nbytes: int = 0
    compressed_nbytes: int = 0
    address: int | None = None
    host_page_size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "name": self.idstr,
            "used-length": self.used_length,
            "data-pages": self.data_pages,
            "zero-pages": self.zero_pages,
            "missing-pages": self.missing_pages,
            "records": {
                "normal": self.normal,
                "zero": self.zero,
                "xbzrle": self.xbzrle,
                "compressed": self.compressed,
                "repeated": self.repeated,
                "filled": self.filled,
            },
            "record-nbytes": self.record_nbytes,
            "xbzrle-nbytes": self.xbzrle_nbytes,
            "compressed-nbytes": self.compressed_nbytes,
            "address": self.address,
            "host-page-size": self.host_page_size,
        }


@dataclass(frozen=True, slots=True)
class RamSummary:
    """RAM as a whole.

    total:   bytes of all blocks
    parts:   sections it came in; flushes: MULTIFD_FLUSH records
    """

    total: int
    blocks: tuple[BlockCounts, ...]
    parts: int
    flushes: int

    @property
    def records(self) -> int:
        """Records of pages."""
        return sum(b.normal + b.zero + b.xbzrle + b.compressed for b in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "total": self.total,
            "records": self.records,
            "parts": self.parts,
            "multifd-flushes": self.flushes,
            "blocks": [block.to_json() for block in self.blocks],
        }


@dataclass(slots=True)
class SectionItem:
    """One section.

    kind:     "full", or "start" for one that comes in parts
    offset:   of its type byte; nbytes: of all its parts, headers and footers included
    parts:    how many
    packaged: whether it is in the package of a postcopy
    device:   its payload, and its values where the stream describes them; None for RAM
    """

    kind: str
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    offset: int
    nbytes: int = 0
    parts: int = 1
    packaged: bool = False
    device: Device | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it; the payload itself only where nothing describes it."""
        out: dict[str, Any] = {
            "kind": self.kind,
            "section-id": self.section_id,
            "name": self.idstr,
            "instance-id": self.instance_id,
            "version-id": self.version_id,
            "offset": self.offset,
            "nbytes": self.nbytes,
            "parts": self.parts,
            "packaged": self.packaged,
        }
        if self.device is not None:
            state = self.device.state
            out["state"] = None if state is None else state_as_json(state)
            if state is None:
                out["payload"] = value_as_json(self.device.section.payload)
        return out


@dataclass(frozen=True, slots=True)
class CommandItem:
    """One command. ``arguments``: what it carries, by name."""

    name: str
    offset: int
    arguments: dict[str, Any]
    packaged: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "name": self.name,
            "offset": self.offset,
            "arguments": self.arguments,
            "packaged": self.packaged,
        }


@dataclass(slots=True)
class Analysis:
    """Everything that was found in a file.

    start:  byte of the file where the stream starts, or its compressed form does
    nbytes: of the stream, as far as it was understood; of the file: file_nbytes
    packing: how the stream is compressed; None when it is not
    format: "stream" or "mapped-ram"
    complete: the stream was understood to its end
    """

    file: str
    file_nbytes: int
    start: int = 0
    nbytes: int = 0
    packing: str | None = None
    libvirt: LibvirtSave | None = None
    format: str = "stream"
    configuration: Configuration | None = None
    configuration_state: State | None = None
    page_size: int = 0
    ram: RamSummary | None = None
    sections: list[SectionItem] = field(default_factory=list)
    commands: list[CommandItem] = field(default_factory=list)
    ncommands: int = 0
    description_nbytes: int | None = None
    complete: bool = False
    findings: list[Finding] = field(default_factory=list)
    nfindings: int = 0

    @property
    def machine(self) -> str | None:
        """Machine type, None when the stream does not say."""
        return self.configuration.machine if self.configuration else None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.complete and not any(f.severity == Severity.ERROR for f in self.findings)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices in their order."""
        return tuple(s.device for s in self.sections if s.device is not None)

    def device(self, idstr: str, instance_id: int = 0) -> Device:
        """Return one device; KeyError."""
        for device in self.devices:
            if (device.idstr, device.instance_id) == (idstr, instance_id):
                return device
        raise KeyError(f"{idstr} {instance_id}")

    def add(self, finding: Finding) -> None:
        """Note a finding."""
        self.nfindings += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as one object."""
        return {
            "file": self.file,
            "format": self.format,
            "file-nbytes": self.file_nbytes,
            "start": self.start,
            "nbytes": self.nbytes,
            "packing": self.packing,
            "libvirt": self._libvirt(),
            "complete": self.complete,
            "ok": self.ok,
            "machine": self.machine,
            "configuration": self._configuration(),
            "page-size": self.page_size,
            "ram": None if self.ram is None else self.ram.to_json(),
            "sections": [section.to_json() for section in self.sections],
            "commands": [command.to_json() for command in self.commands],
            "command-count": self.ncommands,
            "description-nbytes": self.description_nbytes,
            "findings": [finding.to_json() for finding in self.findings],
            "finding-count": self.nfindings,
        }

    def _configuration(self) -> dict[str, Any] | None:
        found = self.configuration
        if found is None:
            return None
        return {
            "machine": found.machine,
            "page-bits": found.page_bits,
            "capabilities": None if found.capabilities is None else list(found.capabilities),
            "uuid": None if found.uuid is None else str(found.uuid),
        }

    def _libvirt(self) -> dict[str, Any] | None:
        save = self.libvirt
        if save is None:
            return None
        return {
            "version": save.version,
            "was-running": save.was_running,
            "format": save.format.name.lower(),
            "stream-offset": save.stream_offset,
            "domain": save.domain,
            "xml": save.xml,
            "cookie": save.cookie,
        }


def errors_of(findings: list[Finding]) -> Iterator[Finding]:
    """Yield those that are errors."""
    return (finding for finding in findings if finding.severity == Severity.ERROR)
