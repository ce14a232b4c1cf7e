"""The migration state machines, as tables: a pair that is not listed raises StateError.

docs/states.md is document().
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from mig.errors import StateError


class Status(StrEnum):
    """Status of a migration, with QMP's names (MigrationStatus)."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Input(StrEnum):
    """What can happen to a migration."""

    START = "start"
    CONNECTED = "connected"
    PAUSE = "pause"
    SWITCHOVER = "switchover"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


Table = Mapping[tuple[Status, Input], Status]

#: The guest runs again in failed and cancelled. Once the destination has confirmed (finish) it
#: owns the guest: a cancel that comes at that moment is too late.
OUTGOING: Final[Table] = {
    (Status.NONE, Input.START): Status.SETUP,
    (Status.SETUP, Input.CONNECTED): Status.ACTIVE,
    (Status.ACTIVE, Input.PAUSE): Status.PRE_SWITCHOVER,
    (Status.ACTIVE, Input.SWITCHOVER): Status.DEVICE,
    (Status.PRE_SWITCHOVER, Input.SWITCHOVER): Status.DEVICE,
    (Status.DEVICE, Input.FINISH): Status.COMPLETED,
    (Status.SETUP, Input.FAIL): Status.FAILED,
    (Status.ACTIVE, Input.FAIL): Status.FAILED,
    (Status.PRE_SWITCHOVER, Input.FAIL): Status.FAILED,
    (Status.DEVICE, Input.FAIL): Status.FAILED,
    (Status.SETUP, Input.CANCEL): Status.CANCELLING,
    (Status.ACTIVE, Input.CANCEL): Status.CANCELLING,
    (Status.PRE_SWITCHOVER, Input.CANCEL): Status.CANCELLING,
    (Status.DEVICE, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CONNECTED): Status.CANCELLING,
    (Status.CANCELLING, Input.PAUSE): Status.CANCELLING,
    (Status.CANCELLING, Input.SWITCHOVER): Status.CANCELLING,
    (Status.CANCELLING, Input.FINISH): Status.COMPLETED,
    (Status.CANCELLING, Input.FAIL): Status.CANCELLED,
}

#: The incoming side has no device phase of its own: everything between the first byte and the
#: last is active.
INCOMING: Final[Table] = {
    (Status.NONE, Input.START): Status.SETUP,
    (Status.SETUP, Input.CONNECTED): Status.ACTIVE,
    (Status.ACTIVE, Input.FINISH): Status.COMPLETED,
    (Status.SETUP, Input.FAIL): Status.FAILED,
    (Status.ACTIVE, Input.FAIL): Status.FAILED,
    (Status.SETUP, Input.CANCEL): Status.CANCELLING,
    (Status.ACTIVE, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CONNECTED): Status.CANCELLING,
    (Status.CANCELLING, Input.FINISH): Status.COMPLETED,
    (Status.CANCELLING, Input.FAIL): Status.CANCELLED,
}

#: a migration that has come here does not move any more
FINAL: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class Machine:
    """A status that moves by a table. Not locked: the engine guards it."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.status = Status.NONE

    def reset(self) -> None:
        """Be as at the beginning: what was to begin did not."""
        self.status = Status.NONE

    def feed(self, input_: Input) -> Status:
        """Move by ``input_`` and return the new status; StateError when it is not listed."""
        try:
            self.status = self._table[self.status, input_]
        except KeyError:
            raise StateError(self.status, input_) from None
        return self.status


def diagram(table: Table) -> str:
    """Return the table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Status.NONE}"]
    lines += [f"    {old} --> {new}: {input_}" for (old, input_), new in table.items()]
    ends = [s for s in Status if s in FINAL and s in table.values()]
    lines += [f"    {status} --> [*]" for status in ends]
    return "\n".join(lines)


def document() -> str:
    """Return the text of docs/states.md."""
    parts = [
        "# States of a migration",
        "",
        "Generated: `python -c 'from mig.state import document; print(document(), end=\"\")'`.",
        "",
    ]
    for title, table in (("Outgoing", OUTGOING), ("Incoming", INCOMING)):
        parts += [f"## {title}", "", "```mermaid", diagram(table), "```", ""]
    return "\n".join(parts)
