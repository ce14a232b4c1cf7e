"""Where things end whose length is not told, and where to go on behind what is wrong."""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Final

from mig.errors import StreamError
from mig.savevm.layout import MachineLayout
from mig.savevm.vmdesc import Description, DescriptionError
from mig.stream.reader import StreamReader
from mig.wire import (
    COMMAND_LENGTH,
    MAX_DESCRIPTION,
    RAM_IDSTR,
    RAM_VERSION,
    CommandType,
    SectionType,
)

#: bytes looked through at a time
_STEP: Final = 1 << 20
#: how far is looked for the end of something in what cannot be looked through freely (unpacked)
_FAR: Final = 1 << 30
#: places that look like the start of a description, looked at from the end of a file
_MOST_CANDIDATES: Final = 4096
_MARK: Final = bytes([SectionType.EOF, SectionType.VMDESCRIPTION])
_RAM_NAME: Final = bytes([len(RAM_IDSTR)]) + RAM_IDSTR.encode() + struct.pack(">II", 0, RAM_VERSION)


class TooWrongError(StreamError):
    """So much is wrong that looking for where to go on would take for ever."""


class Scanner:
    """Looks ahead in a stream without consuming it. Offsets are the stream's.

    In all it looks through a few times as many bytes as there are: TooWrongError past that.
    """

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        self._left = _FAR if reader.source is not None else 4 * reader.available + 64 * _STEP

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        """Return up to so many bytes from an offset that is not before the cursor."""
        reader = self._reader
        ahead = offset - reader.offset
        if reader.source is None or ahead + nbytes <= _FAR:
            reader.fill(ahead + nbytes)
        start, end = reader.window
        return bytes(reader.buffer[start + ahead : min(start + ahead + nbytes, end)])

    def find(self, pattern: bytes, offset: int, limit: int | None = None) -> int | None:
        """Return where the pattern stands next from an offset on, before ``limit``."""
        while limit is None or offset < limit:
            step = _STEP if limit is None else min(_STEP, limit - offset)
            piece = self.bytes_at(offset, step + len(pattern) - 1)
            self._left -= len(piece)
            if self._left < 0:
                raise TooWrongError("too much is wrong to go on", offset=self._reader.offset)
            found = piece.find(pattern)
            if found >= 0:
                return offset + found
            if len(piece) < step + len(pattern) - 1:
                return None
            offset += step
        return None

    def footer_of(
        self, section_id: int, offset: int, seen: Collection[int], limit: int | None = None
    ) -> int | None:
        """Return where a footer of a section stands behind which something can follow."""
        footer = struct.pack(">BI", SectionType.FOOTER, section_id)
        while True:
            found = self.find(footer, offset, limit)
            if found is None or self.can_follow(found + len(footer), seen, limit):
                return found
            offset = found + 1

    def can_follow(self, offset: int, seen: Collection[int], limit: int | None = None) -> bool:
        """Whether what stands at an offset can follow a section.

        seen: ids of the sections so far; limit: where a package ends, None outside of one
        """
        if offset == limit:
            return True
        head = self.bytes_at(offset, 6 + 255 + 8)
        if not head:
            return False
        kind = head[0]
        if kind in (SectionType.START, SectionType.FULL):
            return _is_header(head, seen)
        if kind in (SectionType.PART, SectionType.END):
            return len(head) >= 5 and struct.unpack_from(">I", head, 1)[0] in seen
        if kind == SectionType.COMMAND:
            return _is_command(head)
        return kind == SectionType.EOF and head[1:2] in (b"", b"\x06")

    def ram_start(self, offset: int) -> int | None:
        """Return where a START of `ram` stands at or behind an offset."""
        while True:
            found = self.find(_RAM_NAME, offset)
            if found is None:
                return None
            start = found - 5
            if start >= self._reader.offset and self.bytes_at(start, 1) == b"\x01":
                return start
            offset = found + 1


def _is_header(head: bytes, seen: Collection[int]) -> bool:
    """Whether it is that of a section which has not been before."""
    if len(head) < 6 or len(head) < 6 + head[5] + 8:
        return False
    name = head[6 : 6 + head[5]]
    if not name or not name.isascii() or not name.decode().isprintable():
        return False
    return struct.unpack_from(">I", head, 1)[0] not in seen


def _is_command(head: bytes) -> bool:
    if len(head) < 5:
        return False
    number, length = struct.unpack_from(">HH", head, 1)
    if number not in set(CommandType):
        return False
    return COMMAND_LENGTH[CommandType(number)] in (None, length)


def find_description(data: memoryview) -> tuple[int, bytes] | None:
    """Find the VMDESCRIPTION that ends a stream, from its end: where its EOF is, and the JSON.

    The JSON has no byte 0, so the last 00 06 before the end is the mark in front of it, unless
    the stream has none.
    """
    low = max(0, len(data) - MAX_DESCRIPTION - 6)
    end = len(data)
    for _ in range(_MOST_CANDIDATES):
        found = _rfind(data, low, end)
        if found is None:
            return None
        length = int.from_bytes(data[found + 2 : found + 6], "big")
        if found + 6 + length == len(data) and length:
            text = bytes(data[found + 6 :])
            try:
                Description.parse(text)
            except DescriptionError:
                pass
            else:
                return found, text
        end = found + 1
    return None


def _rfind(data: memoryview, low: int, end: int) -> int | None:
    """The last mark in data[low:end]."""
    while end > low:
        start = max(low, end - _STEP)
        found = bytes(data[start:end]).rfind(_MARK)
        if found >= 0:
            return start + found
        if start == low:
            return None
        end = start + 1
    return None


class Lengths:
    """How long payloads are, by a description. ``layout``: the same as a tree."""

    def __init__(self, text: bytes) -> None:
        """Read the JSON; DescriptionError."""
        described = Description.parse(text)
        self._nbytes = {(d.idstr, d.instance_id): d.nbytes for d in reversed(described.devices)}
        self.page_size = described.page_size
        self.layout = MachineLayout.parse(text)

    def of(self, idstr: str, instance_id: int) -> int | None:
        """Return the bytes of a section's payload, None when it is not described."""
        return self._nbytes.get((idstr, instance_id))
