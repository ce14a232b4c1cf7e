"""The capabilities (MigrationCapability), with QMP's names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Capability(StrEnum):
    """Those of QEMU 10.0, in its order, then those that older ones had."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    ZERO_BLOCKS = "zero-blocks"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"
    SWITCHOVER_ACK = "switchover-ack"
    DIRTY_LIMIT = "dirty-limit"
    MAPPED_RAM = "mapped-ram"
    COMPRESS = "compress"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class CapabilityInfo:
    """What a capability is.

    doc:   what it switches on
    since: first QEMU that knows the name
    until: first QEMU that does not, None while 10.0 does
    """

    doc: str
    since: str
    until: str | None = None


CAPABILITIES: Final[dict[Capability, CapabilityInfo]] = {
    Capability.XBZRLE: CapabilityInfo(
        "a page sent before goes as its difference to what was sent last", "1.2"
    ),
    Capability.RDMA_PIN_ALL: CapabilityInfo(
        "RDMA pins all guest memory at the start instead of piece by piece", "2.0"
    ),
    Capability.AUTO_CONVERGE: CapabilityInfo(
        "slow the guest's CPUs down until its memory can be sent faster than it is written", "1.6"
    ),
    Capability.ZERO_BLOCKS: CapabilityInfo(
        "short form for zeroes in block migration, which is gone since QEMU 9.1", "1.6"
    ),
    Capability.EVENTS: CapabilityInfo("report every change of status as an event", "2.4"),
    Capability.POSTCOPY_RAM: CapabilityInfo(
        "the guest may run at the destination before all of its memory is there", "2.6"
    ),
    Capability.X_COLO: CapabilityInfo(
        "keep a second machine in step for ever (COLO; experimental)", "2.8"
    ),
    Capability.RELEASE_RAM: CapabilityInfo(
        "the source frees memory as soon as it is sent in postcopy", "2.9"
    ),
    Capability.RETURN_PATH: CapabilityInfo(
        "the destination answers on the same connection, and confirms the end", "2.10"
    ),
    Capability.PAUSE_BEFORE_SWITCHOVER: CapabilityInfo(
        "wait for migrate-continue before the devices are saved", "2.11"
    ),
    Capability.MULTIFD: CapabilityInfo("send memory over several connections at once", "4.0"),
    Capability.DIRTY_BITMAPS: CapabilityInfo("take named dirty bitmaps of disks along", "2.12"),
    Capability.POSTCOPY_BLOCKTIME: CapabilityInfo(
        "measure how long each vCPU waits for pages in postcopy", "3.0"
    ),
    Capability.LATE_BLOCK_ACTIVATE: CapabilityInfo(
        "the destination takes hold of disks when the guest starts, not when it is loaded", "3.0"
    ),
    Capability.X_IGNORE_SHARED: CapabilityInfo(
        "leave out memory that the destination shares with the source (experimental)", "4.0"
    ),
    Capability.VALIDATE_UUID: CapabilityInfo("refuse a destination with another UUID", "4.2"),
    Capability.BACKGROUND_SNAPSHOT: CapabilityInfo(
        "save the guest as it is at the start while it runs on", "6.0"
    ),
    Capability.ZERO_COPY_SEND: CapabilityInfo(
        "the kernel sends pages from where they are, without a copy", "7.1"
    ),
    Capability.POSTCOPY_PREEMPT: CapabilityInfo(
        "pages asked for in postcopy overtake all others on a connection of their own", "7.1"
    ),
    Capability.SWITCHOVER_ACK: CapabilityInfo(
        "the guest is not stopped before the destination's devices agree", "8.1"
    ),
    Capability.DIRTY_LIMIT: CapabilityInfo(
        "slow down only the vCPUs that write much, by KVM's dirty ring", "8.1"
    ),
    Capability.MAPPED_RAM: CapabilityInfo(
        "each page has its fixed place in a file instead of a turn in a stream", "9.0"
    ),
    Capability.COMPRESS: CapabilityInfo("compress each page in a thread of its own", "2.4", "9.1"),
    Capability.BLOCK: CapabilityInfo("migrate disks, too", "2.11", "9.1"),
}

#: those that a stream names, in this order, since both sides must have them alike
#: (configuration_validate_capabilities())
AGREED: Final = (Capability.X_IGNORE_SHARED, Capability.MAPPED_RAM)

#: never switched on by mig: what became of them
REMOVED_CAPABILITIES: Final[dict[Capability, str]] = {
    Capability.BLOCK: "only QEMU before 9.1 has it; the successor is blockdev-mirror",
    Capability.ZERO_BLOCKS: "it is a part of block migration, which only QEMU before 9.1 has",
}
