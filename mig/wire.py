"""Every number on the wire, each with the name QEMU gives it. All integers are big-endian.

Nothing else in the package spells a wire number; the constants of csrc/mig.h are compared with
these by a test.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

#: "QEVM", the first four bytes of a stream (QEMU_VM_FILE_MAGIC)
FILE_MAGIC: Final = 0x5145564D
#: the version that follows it (QEMU_VM_FILE_VERSION)
FILE_VERSION: Final = 3
#: obsolete (QEMU_VM_FILE_VERSION_COMPAT)
FILE_VERSION_COMPAT: Final = 2
#: first four bytes of a multifd channel (MULTIFD_MAGIC)
MULTIFD_MAGIC: Final = 0x11223344
MULTIFD_VERSION: Final = 1
#: bytes of the packet that introduces a channel (MultiFDInit_t)
MULTIFD_INIT: Final = 64
#: bytes of a packet before its offsets (MultiFDPacket_t)
MULTIFD_HEADER: Final = 320
#: bytes of the pages of a packet, at most (MULTIFD_PACKET_SIZE)
MULTIFD_DATA: Final = 512 << 10


#: version of the header of a block in a mapped-ram file (MAPPED_RAM_HDR_VERSION)
MAPPED_RAM_VERSION: Final = 1
#: what the place of a block's pages in such a file is rounded up to, in bytes
#: (MAPPED_RAM_FILE_OFFSET_ALIGNMENT)
MAPPED_RAM_ALIGNMENT: Final = 1 << 20
#: its bitmaps are made of words of so many bits
MAPPED_RAM_WORD_BITS: Final = 64


class SectionType(IntEnum):
    """The type byte before everything in the main stream (QEMU_VM_*)."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class CommandType(IntEnum):
    """Commands from source to destination (MIG_CMD_*)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


#: length of the data of each command, None where it varies
COMMAND_LENGTH: Final[dict[CommandType, int | None]] = {
    CommandType.OPEN_RETURN_PATH: 0,
    CommandType.PING: 4,
    CommandType.POSTCOPY_ADVISE: None,
    CommandType.POSTCOPY_LISTEN: 0,
    CommandType.POSTCOPY_RUN: 0,
    CommandType.POSTCOPY_RAM_DISCARD: None,
    CommandType.PACKAGED: 4,
    CommandType.ENABLE_COLO: 0,
    CommandType.POSTCOPY_RESUME: 0,
    CommandType.RECV_BITMAP: None,
    CommandType.SWITCHOVER_START: 0,
}


class ReturnType(IntEnum):
    """Messages from destination to source (MIG_RP_MSG_*)."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


#: length of the data of each return-path message, None where it varies
RETURN_LENGTH: Final[dict[ReturnType, int | None]] = {
    ReturnType.SHUT: 4,
    ReturnType.PONG: 4,
    ReturnType.REQ_PAGES_ID: None,
    ReturnType.REQ_PAGES: 12,
    ReturnType.RECV_BITMAP: None,
    ReturnType.RESUME_ACK: 4,
    ReturnType.SWITCHOVER_ACK: 0,
}

#: values of the PINGs that a source sends: before RAM; before the package of a postcopy, in it, and
#: behind it
PING_SETUP: Final = 1
PING_PACKAGE: Final = 2
PING_RUN: Final = 3
PING_POSTCOPY: Final = 4
#: what a destination says unasked, since QEMU 11.1, when it has loaded the package of a postcopy
PONG_LOADED: Final = 0x42


#: PING of a source of mig's that asks whether the destination is one of mig's, too, and takes
#: multifd-compression adaptive: then PONG with ADAPTIVE_READY comes before the answer to this
PING_ADAPTIVE: Final = 0x4D494741
ADAPTIVE_READY: Final = 0x4D494752


class RamFlag(IntFlag):
    """Low bits of the word that starts a RAM record (RAM_SAVE_FLAG_*)."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


class MultifdFlag(IntFlag):
    """Flags of a multifd packet (MULTIFD_FLAG_*)."""

    SYNC = 1
    ZLIB = 1 << 1
    ZSTD = 2 << 1


#: idstr and version of the RAM section
RAM_IDSTR: Final = "ram"
RAM_VERSION: Final = 4

#: target page size of every target whose stream does not say otherwise
DEFAULT_PAGE_BITS: Final = 12
#: page bits a target can have (QEMU's TARGET_PAGE_BITS_MIN is 10)
MIN_PAGE_BITS: Final = 10
MAX_PAGE_BITS: Final = 20

#: names of the subsections of the configuration section
SUBSECTION_PAGE_BITS: Final = "configuration/target-page-bits"
SUBSECTION_CAPABILITIES: Final = "configuration/capabilities"
SUBSECTION_UUID: Final = "configuration/uuid"
SUBSECTION_VERSION: Final = 1

# Limits on lengths that a peer names, checked before anything is allocated.

#: longest machine type name
MAX_MACHINE_NAME: Final = 255
#: most capabilities in the configuration section
MAX_CAPABILITIES: Final = 256
#: most RAM blocks in a block list (a record that names its block searches them)
MAX_RAM_BLOCKS: Final = 4096
#: most bytes of RAM in a block list
MAX_RAM_BYTES: Final = 1 << 44
#: longest VMDESCRIPTION
MAX_DESCRIPTION: Final = 64 << 20
#: most bytes between the end of RAM and the end of the stream
MAX_DEVICE_STATE: Final = 1 << 30
#: longest package of a postcopy
MAX_PACKAGE: Final = MAX_DEVICE_STATE
#: longest return-path message (QEMU reads them into 512 bytes)
MAX_RETURN_MESSAGE: Final = 512
#: most ranges in one POSTCOPY_RAM_DISCARD (MAX_DISCARDS_PER_COMMAND)
MAX_DISCARD_RANGES: Final = 12
#: version of that command (postcopy_ram_discard_version)
DISCARD_VERSION: Final = 0
#: what follows a bitmap on the return path (RAMBLOCK_RECV_BITMAP_ENDING)
RECV_BITMAP_END: Final = 0x0123456789ABCDEF
#: RESUME_ACK of a destination that is ready for the rest (MIGRATION_RESUME_ACK_VALUE)
RESUME_ACK_READY: Final = 1
