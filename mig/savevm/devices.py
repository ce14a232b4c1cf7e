"""Device state: what stands between the end of RAM and the end of a stream, cut into sections.

A device's payload carries no length. The description at the end of the stream gives it; where
there is none, the footers alone tell whether the state is complete, and it is kept as one piece.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from mig import wire
from mig.errors import StreamError, TruncatedError
from mig.savevm.vmdesc import Description, DescriptionError
from mig.wire import SectionType

_HEADER = struct.Struct(">BI")
_INSTANCE_VERSION = struct.Struct(">II")
# type byte, id, counted idstr, instance and version
_MAX_HEADER = _HEADER.size + 1 + 255 + _INSTANCE_VERSION.size
_DESCRIPTION_MARK = bytes([SectionType.EOF, SectionType.VMDESCRIPTION])


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """One device's section as it was on the wire, payload opaque.

    offset: of the section's type byte from the start of the device state
    """

    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    payload: bytes
    offset: int

    @property
    def payload_offset(self) -> int:
        """Offset of the payload from the start of the device state."""
        return self.offset + 6 + len(self.idstr) + _INSTANCE_VERSION.size


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Everything after RAM, through EOF and VMDESCRIPTION.

    offset:      stream offset of the first byte
    raw:         the bytes as received, ready to be sent again
    sections:    the devices one by one; None when the stream had no description (then the state
                 is one piece)
    description: the JSON, b"" when the stream had none
    """

    offset: int
    raw: bytes
    sections: tuple[DeviceSection, ...] | None
    description: bytes


@dataclass(frozen=True, slots=True)
class _Header:
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    end: int


def _parse_header(raw: bytes | bytearray, at: int) -> _Header | None:
    """Header of a FULL section at ``at``; None when there is none or not all of it."""
    if len(raw) < at + 6 or raw[at] != SectionType.FULL:
        return None
    length = raw[at + 5]
    end = at + 6 + length + _INSTANCE_VERSION.size
    name = bytes(raw[at + 6 : at + 6 + length])
    if len(raw) < end or not name or not name.isascii() or not name.decode().isprintable():
        return None
    instance_id, version_id = _INSTANCE_VERSION.unpack_from(raw, end - _INSTANCE_VERSION.size)
    section_id: int = _HEADER.unpack_from(raw, at)[1]
    return _Header(section_id, name.decode(), instance_id, version_id, end)


@dataclass(slots=True)
class FooterWalk:
    """Follows the sections by their footers alone.

    A section ends at the first footer of its id behind which another section with a new id
    stands, or the end: an EOF byte that is the last byte, or is followed by a description.

    at:   start of the section whose footer is looked for
    idstr: of that section, None before its header is there
    """

    at: int = 0
    idstr: str | None = None
    _from: int = 0  # no footer of that section before this offset
    _seen: set[int] = field(default_factory=set)

    def advance(self, raw: bytes | bytearray) -> None:
        """Go past the sections that end in ``raw`` whatever may follow it."""
        self._follow(raw, final=False)

    def end(self, raw: bytes | bytearray) -> int | None:
        """Return the offset behind EOF if ``raw`` is all there is, None if it has no such end."""
        rest = FooterWalk(self.at, self.idstr, self._from, set(self._seen))
        return rest._follow(raw, final=True)

    def _follow(self, raw: bytes | bytearray, *, final: bool) -> int | None:
        while not _is_end(raw, self.at):
            header = _parse_header(raw, self.at)
            if header is None or header.section_id in self._seen:
                self.idstr = None
                return None
            self.idstr = header.idstr
            self._seen.add(header.section_id)
            footer = _HEADER.pack(SectionType.FOOTER, header.section_id)
            found = raw.find(footer, max(self._from, header.end))
            while found >= 0 and not self._ends_section(raw, found + len(footer), final):
                if not final and len(raw) < found + len(footer) + _MAX_HEADER:
                    break  # what follows may not be all there yet
                found = raw.find(footer, found + 1)
            if found < 0 or not self._ends_section(raw, found + len(footer), final):
                self._seen.discard(header.section_id)
                self._from = max(header.end, len(raw) - len(footer) + 1) if found < 0 else found
                return None
            self.at, self._from = found + len(footer), 0
        return self.at + 1

    def _ends_section(self, raw: bytes | bytearray, at: int, final: bool) -> bool:
        """Whether what stands at ``at`` can follow a section."""
        after = _parse_header(raw, at)
        if after is not None:
            return after.section_id not in self._seen
        return final and _is_end(raw, at)


def footer_walk(raw: bytes | bytearray) -> int | None:
    """Return the offset behind EOF of a whole device state, None when it is none."""
    return FooterWalk().end(raw)


def cut_by_footers(raw: bytes) -> tuple[DeviceSection, ...] | None:
    """Cut a whole device state without description by its footers; None where they do not fit."""
    sections: list[DeviceSection] = []
    seen: set[int] = set()
    at = 0
    while not _is_end(raw, at):
        header = _parse_header(raw, at)
        if header is None or header.section_id in seen:
            return None
        seen.add(header.section_id)
        footer = _HEADER.pack(SectionType.FOOTER, header.section_id)
        found = raw.find(footer, header.end)
        while found >= 0 and not _can_follow(raw, found + len(footer), seen):
            found = raw.find(footer, found + 1)
        if found < 0:
            return None
        names = (header.section_id, header.idstr, header.instance_id, header.version_id)
        sections.append(DeviceSection(*names, raw[header.end : found], at))
        at = found + len(footer)
    return tuple(sections)


def _can_follow(raw: bytes, at: int, seen: set[int]) -> bool:
    """Whether what stands at ``at`` can follow a section."""
    after = _parse_header(raw, at)
    return _is_end(raw, at) if after is None else after.section_id not in seen


def _is_end(raw: bytes | bytearray, at: int) -> bool:
    if raw[at : at + 1] != bytes([SectionType.EOF]):
        return False
    return len(raw) == at + 1 or raw[at + 1] == SectionType.VMDESCRIPTION


#: most places in the device state that may look like the start of a description at a time
MAX_CANDIDATES = 256


class DeviceTail:
    """Collects the bytes after RAM as they arrive and finds their end.

    offset:  stream offset of the first byte, for errors
    footers: whether the sections of this stream have footers
    """

    def __init__(self, offset: int, *, footers: bool = True) -> None:
        self._offset = offset
        self._footers = footers
        self._raw = bytearray()
        self._scanned = 0
        self._candidates: list[int] = []
        self._walk = FooterWalk()
        # place of the description that was found last and does not fit, its end, and why
        self._misfit: tuple[int, int, StreamError] | None = None

    def __len__(self) -> int:
        return len(self._raw)

    def feed(self, data: bytes | bytearray | memoryview) -> DeviceState | None:
        """Add bytes; return the state once a description that fits it is complete."""
        if len(self._raw) + len(data) > wire.MAX_DEVICE_STATE:
            raise StreamError("device state is past the limit", offset=self._offset)
        self._raw += data
        self._find_candidates()
        waiting = []
        for at in self._candidates:
            text = self._description_at(at)
            if text is None:
                waiting.append(at)
                continue
            # a device's payload may look like a description, or even be one
            try:
                return self._cut(at, text, Description.parse(text))
            except DescriptionError:
                continue
            except StreamError as error:
                self._misfit = (at, at + 6 + len(text), error)
        self._candidates = waiting
        return None

    def _find_candidates(self) -> None:
        """Places that look like EOF, VMDESCRIPTION, a length within limits and JSON."""
        while True:
            at = self._raw.find(_DESCRIPTION_MARK, self._scanned)
            if at < 0:
                self._scanned = max(self._scanned, len(self._raw) - 1)
                return
            if len(self._raw) < at + 7:
                self._scanned = at
                return
            length = int.from_bytes(self._raw[at + 2 : at + 6], "big")
            if length <= wire.MAX_DESCRIPTION and self._raw[at + 6] == ord("{"):
                if len(self._candidates) == MAX_CANDIDATES:
                    raise StreamError(
                        "device state full of what looks like descriptions", offset=self._offset
                    )
                self._candidates.append(at)
            self._scanned = at + 1

    def _description_at(self, at: int) -> bytes | None:
        length = int.from_bytes(self._raw[at + 2 : at + 6], "big")
        end = at + 6 + length
        return bytes(self._raw[at + 6 : end]) if len(self._raw) >= end else None

    def _cut(self, at: int, text: bytes, description: Description) -> DeviceState:
        """The state whose description is at ``at``; StreamError unless they agree."""
        raw = bytes(self._raw[: at + 6 + len(text)])
        return DeviceState(self._offset, raw, self._split(raw, at, description), text)

    def _end_with_misfit(self, raw: bytes, at: int, error: StreamError) -> DeviceState:
        """The state that ends with a description, at ``at``, which does not agree with it.

        QEMU never checks the sizes, so a slip in a device's description must not cost the VM as
        long as the footers lead to its end.
        """
        if not self._footers or footer_walk(raw) != at + 1:
            raise error
        return DeviceState(self._offset, raw, None, raw[at + 6 :])

    def _split(self, raw: bytes, end: int, description: Description) -> tuple[DeviceSection, ...]:
        """Cut raw[:end] into the described devices; StreamError where they do not agree."""
        sections, at = [], 0
        described = iter(description.devices)
        while at < end:
            header = _parse_header(raw, at)
            if header is None:
                raise StreamError("no device section here", offset=self._offset + at)
            key = (header.idstr, header.instance_id)
            # devices that were saved before RAM are described too, but are not here
            device = next((d for d in described if (d.idstr, d.instance_id) == key), None)
            if device is None:
                raise StreamError(
                    "device is not in the description",
                    offset=self._offset + at,
                    section=header.idstr,
                )
            stop = header.end + device.nbytes
            following = stop + (_HEADER.size if self._footers else 0)
            footer = _HEADER.pack(SectionType.FOOTER, header.section_id)
            if following > end or (self._footers and raw[stop:following] != footer):
                raise StreamError(
                    f"footer of section {header.section_id} is missing after "
                    f"{device.nbytes} bytes of payload",
                    offset=self._offset + min(stop, end),
                    section=header.idstr,
                )
            sections.append(
                DeviceSection(
                    header.section_id,
                    header.idstr,
                    header.instance_id,
                    header.version_id,
                    raw[header.end : stop],
                    at,
                )
            )
            at = following
        return tuple(sections)

    def ends_here(self) -> bool:
        """Whether the source may have nothing more to say.

        That is when the bytes so far are a whole device state without a description, or end with
        a description that does not fit.
        """
        if self._misfit is not None and self._misfit[1] == len(self._raw):
            return True
        if not self._footers or self._raw[-1:] != bytes([SectionType.EOF]):
            return False
        self._walk.advance(self._raw)
        return self._walk.end(self._raw) == len(self._raw)

    def finish(self) -> DeviceState:
        """The stream has ended: return the state as one piece, or raise what is wrong.

        Accepts what QEMU's loader accepts: a stream that ends with its EOF byte.
        """
        raw = bytes(self._raw)
        if self._misfit is not None and self._misfit[1] == len(raw):
            return self._end_with_misfit(raw, self._misfit[0], self._misfit[2])
        if self._footers:
            end = footer_walk(raw)
        else:
            # without footers and without a description only the last byte can be checked
            end = len(raw) if raw[-1:] == bytes([SectionType.EOF]) else None
        if end == len(raw):
            return DeviceState(self._offset, raw, None, b"")
        raise self._why(raw, end)

    def _why(self, raw: bytes, end: int | None) -> StreamError:
        """The most exact thing that can be said of a tail that is not a device state."""
        if end is not None:
            return TruncatedError(
                f"stream ends after {self._offset + len(raw)} bytes, inside the description",
                offset=self._offset + end,
            )
        walk = FooterWalk()
        walk.advance(raw)
        return TruncatedError(
            f"stream ends after {self._offset + len(raw)} bytes, inside the device state",
            offset=self._offset + walk.at,
            section=walk.idstr,
        )


def sections_of(raw: bytes) -> bytes:
    """Return a whole device state without EOF and description; StreamError when it is not whole."""
    tail = DeviceTail(0)
    state = tail.feed(raw) or tail.finish()
    # section type and be32 length stand before the description
    end = len(state.description) + 5 if state.description else 0
    return raw[: len(state.raw) - end - 1]
