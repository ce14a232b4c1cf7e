"""What a machine type says about multifd on the wire: more than the version of QEMU does."""

from __future__ import annotations

from dataclasses import dataclass

from mig.machine import machine_version


@dataclass(frozen=True, slots=True)
class Dialect:
    """How two ends that share a machine type speak.

    sync_every_section: the channels are synchronised where a section of `ram` ends, unsaid (machine
                        types up to 8.0); else where the main stream says MULTIFD_FLUSH
    zero_in_packets:    packets may name zero pages (machine types since 9.0)
    """

    sync_every_section: bool
    zero_in_packets: bool


def dialect_of(machine: str | None) -> Dialect:
    """Return the dialect of a machine type, the newest for one without a version in its name.

    Matches QEMU's compatibility properties multifd-flush-after-each-section and
    zero-page-detection.
    """
    version = machine_version(machine)
    return Dialect(
        sync_every_section=version is not None and version <= (8, 0),
        zero_in_packets=version is None or version >= (9, 0),
    )
