"""What a machine type says about the connection of urgent pages (capability postcopy-preempt)."""

from __future__ import annotations

from dataclasses import dataclass

from mig.machine import machine_version


@dataclass(frozen=True, slots=True)
class PreemptDialect:
    """How a source treats this connection.

    early: it is opened behind the main one at once, also in a recovery (machine types up to 7.2);
           else when postcopy begins, once a PONG has shown that the destination has the main one,
           and in a recovery after the bitmaps of received pages
    ends:  it ends with EOS: a destination of 7.1 or 7.2 waits for it. Later ones end it themselves,
           but understand it, so it is also said where the name does not tell
    """

    early: bool
    ends: bool


def preempt_dialect(machine: str | None) -> PreemptDialect:
    """Return the dialect of a machine type; matches QEMU's property x-preempt-pre-7-2."""
    version = machine_version(machine)
    return PreemptDialect(
        early=version is not None and version <= (7, 2),
        ends=version is None or version <= (7, 2),
    )
