"""libvirt's save files (``virsh save``, managed save): a header, the domain's XML, then a stream.

    offset  bytes
         0     16  "LibvirtQemudSave"; "LibvirtQemudPart" while it is written
        16      4  version: 1 or 2
        20      4  data_len: bytes of XML, cookie and padding, which follow the header
        24      4  was_running: 1 when the guest is to run after it is restored
        28      4  format of the stream: see `SaveFormat`
        32      4  cookie_offset: from the start of the XML; 0: there is no cookie
        36     56  0

The integers are of the byte order of the host that wrote them. XML and cookie end with a NUL each.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from xml.etree import ElementTree

from mig.errors import StreamError, TruncatedError

MAGIC: Final = b"LibvirtQemudSave"
PARTIAL: Final = b"LibvirtQemudPart"
HEADER_SIZE: Final = 92
_NEWEST: Final = 2
#: most bytes of XML, cookie and padding
MAX_DATA: Final = 64 << 20


class SaveFormat(IntEnum):
    """How the stream is kept (virQEMUSaveFormat)."""

    RAW = 0
    GZIP = 1
    BZIP2 = 2
    XZ = 3
    LZOP = 4
    ZSTD = 5
    SPARSE = 6


@dataclass(frozen=True, slots=True)
class LibvirtSave:
    """What is in front of the stream.

    xml, cookie: as they were written; cookie None when there is none
    stream_offset: where the stream starts, in bytes
    """

    version: int
    was_running: bool
    format: SaveFormat
    xml: str
    cookie: str | None
    stream_offset: int

    @property
    def domain(self) -> dict[str, str]:
        """Name, uuid, machine, memory (KiB) and vcpu as the XML says; what it lacks is left out."""
        # an entity could become anything, and libvirt writes none
        if "<!" in self.xml.replace("<!--", ""):
            return {}
        try:
            root = ElementTree.fromstring(self.xml)
        except (ElementTree.ParseError, ValueError, RecursionError):
            return {}
        texts = {name: root.findtext(name) for name in ("name", "uuid", "memory", "vcpu")}
        out = {name: text.strip() for name, text in texts.items() if text}
        kind = root.find("os/type")
        machine = kind.get("machine") if kind is not None else None
        return out if machine is None else {**out, "machine": machine}


def is_libvirt_save(start: bytes) -> bool:
    """Whether a file that starts so is one, be it complete or not."""
    return start.startswith((MAGIC, PARTIAL))


def parse_save(data: bytes | memoryview) -> LibvirtSave:
    """Read what a file starts with (all up to the stream, or more); StreamError.

    Offsets of errors are the file's.
    """
    if len(data) < HEADER_SIZE:
        raise TruncatedError(f"save file ends after {len(data)} bytes, inside its header", offset=0)
    magic = bytes(data[: len(MAGIC)])
    if magic == PARTIAL:
        raise StreamError("save file is incomplete: libvirt was still writing it", offset=0)
    if magic != MAGIC:
        raise StreamError("not a save file of libvirt", offset=0)
    numbers = struct.unpack_from("<5I", data, len(MAGIC))
    if numbers[0] > _NEWEST:
        numbers = struct.unpack_from(">5I", data, len(MAGIC))
    version, data_len, was_running, number, cookie_offset = numbers
    if not 0 < version <= _NEWEST:
        raise StreamError(f"save file of version {version}", offset=16)
    if not 0 < data_len <= MAX_DATA:
        raise StreamError(f"save file with {data_len} bytes of XML", offset=20)
    if version == 1:
        # it had no field for this
        number = SaveFormat.RAW
    if number not in set(SaveFormat):
        raise StreamError(f"save file of unknown format {number}", offset=28)
    if cookie_offset > data_len:
        raise StreamError(f"cookie at {cookie_offset} of {data_len} bytes", offset=32)
    end = HEADER_SIZE + data_len
    if len(data) < end:
        raise TruncatedError(
            f"save file ends after {len(data)} bytes, inside its XML", offset=HEADER_SIZE
        )
    xml = _text(data, HEADER_SIZE, HEADER_SIZE + (cookie_offset or data_len))
    cookie = _text(data, HEADER_SIZE + cookie_offset, end) if cookie_offset else None
    return LibvirtSave(version, was_running != 0, SaveFormat(number), xml, cookie, end)


def _text(data: bytes | memoryview, start: int, end: int) -> str:
    raw = bytes(data[start:end]).partition(b"\0")[0]
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise StreamError("XML is not UTF-8", offset=start + error.start) from error
