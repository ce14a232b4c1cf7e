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
    WAIT_UNPLUG = "wait-unplug"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COLO = "colo"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Input(StrEnum):
    """What can happen to a migration.

    start:      its owner starts it
    connected:  there is a channel; at the source also: all that comes before memory is sent
    unplug:     devices must be unplugged first
    unplugged:  they are
    pause:      the guest is stopped, and the owner is to say when to go on
    switchover: what the guest still has is sent
    postcopy:   the guest runs at the destination, with some of its memory still at the source
    interrupt:  the connection breaks, or does not come about
    recover:    the owner gives a postcopy that was interrupted another connection
    resumed:    both sides have agreed on what is still to be sent
    colo:       from now on the destination is a replica of the source
    failover:   the replication ends, whoever of them runs on
    finish:     all is done
    fail:       something went wrong
    cancel:     the owner wants it no more
    """

    START = "start"
    CONNECTED = "connected"
    UNPLUG = "unplug"
    UNPLUGGED = "unplugged"
    PAUSE = "pause"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    INTERRUPT = "interrupt"
    RECOVER = "recover"
    RESUMED = "resumed"
    COLO = "colo"
    FAILOVER = "failover"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


Table = Mapping[tuple[Status, Input], Status]

#: The guest runs again in failed and cancelled. Once the destination has confirmed (finish) it
#: owns the guest: a cancel that comes at that moment is too late. In postcopy it is too late from
#: the beginning, and a broken connection is no failure: half of the guest is on either side.
OUTGOING: Final[Table] = {
    (Status.NONE, Input.START): Status.SETUP,
    # another process has begun
    (Status.NONE, Input.RECOVER): Status.POSTCOPY_RECOVER_SETUP,
    (Status.SETUP, Input.CONNECTED): Status.ACTIVE,
    (Status.SETUP, Input.UNPLUG): Status.WAIT_UNPLUG,
    (Status.WAIT_UNPLUG, Input.UNPLUGGED): Status.ACTIVE,
    (Status.ACTIVE, Input.PAUSE): Status.PRE_SWITCHOVER,
    (Status.ACTIVE, Input.SWITCHOVER): Status.DEVICE,
    (Status.PRE_SWITCHOVER, Input.SWITCHOVER): Status.DEVICE,
    (Status.DEVICE, Input.FINISH): Status.COMPLETED,
    # a background snapshot has the devices from the beginning
    (Status.ACTIVE, Input.FINISH): Status.COMPLETED,
    (Status.DEVICE, Input.POSTCOPY): Status.POSTCOPY_ACTIVE,
    (Status.POSTCOPY_ACTIVE, Input.FINISH): Status.COMPLETED,
    (Status.POSTCOPY_ACTIVE, Input.INTERRUPT): Status.POSTCOPY_PAUSED,
    (Status.POSTCOPY_PAUSED, Input.RECOVER): Status.POSTCOPY_RECOVER_SETUP,
    (Status.POSTCOPY_RECOVER_SETUP, Input.CONNECTED): Status.POSTCOPY_RECOVER,
    (Status.POSTCOPY_RECOVER_SETUP, Input.INTERRUPT): Status.POSTCOPY_PAUSED,
    (Status.POSTCOPY_RECOVER, Input.RESUMED): Status.POSTCOPY_ACTIVE,
    (Status.POSTCOPY_RECOVER, Input.INTERRUPT): Status.POSTCOPY_PAUSED,
    (Status.DEVICE, Input.COLO): Status.COLO,
    (Status.COLO, Input.FAILOVER): Status.COMPLETED,
    (Status.SETUP, Input.FAIL): Status.FAILED,
    (Status.WAIT_UNPLUG, Input.FAIL): Status.FAILED,
    (Status.ACTIVE, Input.FAIL): Status.FAILED,
    (Status.PRE_SWITCHOVER, Input.FAIL): Status.FAILED,
    (Status.DEVICE, Input.FAIL): Status.FAILED,
    (Status.POSTCOPY_ACTIVE, Input.FAIL): Status.FAILED,
    # only where the owner gives the guest up
    (Status.POSTCOPY_PAUSED, Input.FAIL): Status.FAILED,
    (Status.POSTCOPY_RECOVER_SETUP, Input.FAIL): Status.FAILED,
    (Status.POSTCOPY_RECOVER, Input.FAIL): Status.FAILED,
    (Status.SETUP, Input.CANCEL): Status.CANCELLING,
    (Status.WAIT_UNPLUG, Input.CANCEL): Status.CANCELLING,
    (Status.ACTIVE, Input.CANCEL): Status.CANCELLING,
    (Status.PRE_SWITCHOVER, Input.CANCEL): Status.CANCELLING,
    (Status.DEVICE, Input.CANCEL): Status.CANCELLING,
    (Status.COLO, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CONNECTED): Status.CANCELLING,
    (Status.CANCELLING, Input.UNPLUG): Status.CANCELLING,
    (Status.CANCELLING, Input.UNPLUGGED): Status.CANCELLING,
    (Status.CANCELLING, Input.PAUSE): Status.CANCELLING,
    (Status.CANCELLING, Input.SWITCHOVER): Status.CANCELLING,
    (Status.CANCELLING, Input.POSTCOPY): Status.CANCELLING,
    (Status.CANCELLING, Input.COLO): Status.CANCELLING,
    (Status.CANCELLING, Input.FAILOVER): Status.CANCELLING,
    (Status.CANCELLING, Input.FINISH): Status.COMPLETED,
    (Status.CANCELLING, Input.FAIL): Status.CANCELLED,
}

#: The incoming side has no device phase of its own: everything between the first byte and the
#: last is active. It is postcopy-paused while it waits for another connection. QEMU has no cancel
#: on this side.
INCOMING: Final[Table] = {
    (Status.NONE, Input.START): Status.SETUP,
    (Status.SETUP, Input.CONNECTED): Status.ACTIVE,
    (Status.ACTIVE, Input.FINISH): Status.COMPLETED,
    (Status.ACTIVE, Input.POSTCOPY): Status.POSTCOPY_ACTIVE,
    (Status.POSTCOPY_ACTIVE, Input.FINISH): Status.COMPLETED,
    (Status.POSTCOPY_ACTIVE, Input.INTERRUPT): Status.POSTCOPY_PAUSED,
    (Status.POSTCOPY_PAUSED, Input.CONNECTED): Status.POSTCOPY_RECOVER,
    (Status.POSTCOPY_RECOVER, Input.RESUMED): Status.POSTCOPY_ACTIVE,
    (Status.POSTCOPY_RECOVER, Input.INTERRUPT): Status.POSTCOPY_PAUSED,
    (Status.ACTIVE, Input.COLO): Status.COLO,
    (Status.COLO, Input.FAILOVER): Status.COMPLETED,
    (Status.SETUP, Input.FAIL): Status.FAILED,
    (Status.ACTIVE, Input.FAIL): Status.FAILED,
    (Status.POSTCOPY_ACTIVE, Input.FAIL): Status.FAILED,
    # only where the owner gives the guest up
    (Status.POSTCOPY_PAUSED, Input.FAIL): Status.FAILED,
    (Status.POSTCOPY_RECOVER, Input.FAIL): Status.FAILED,
    (Status.SETUP, Input.CANCEL): Status.CANCELLING,
    (Status.ACTIVE, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Input.CONNECTED): Status.CANCELLING,
    (Status.CANCELLING, Input.POSTCOPY): Status.CANCELLING,
    (Status.CANCELLING, Input.COLO): Status.CANCELLING,
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


#: what is left out of the diagram, where it would hide the rest: it is in the list below it
_ASIDE: Final = frozenset({Input.FAIL, Input.CANCEL})


def _identifier(status: Status) -> str:
    """A word that mermaid takes for a state; it knows no hyphens."""
    return status.replace("-", "_")


def diagram(table: Table) -> str:
    """Return the ways of the table as a mermaid state diagram, without fail and cancel."""
    edges: dict[tuple[Status, Status], list[Input]] = {}
    for (old, input_), new in table.items():
        if input_ not in _ASIDE and Status.CANCELLING not in (old, new):
            edges.setdefault((old, new), []).append(input_)
    known = [status for status in Status if any(status in edge for edge in edges)]
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{s}" as {_identifier(s)}' for s in known if "-" in s]
    lines += [f"    [*] --> {Status.NONE}"]
    lines += [
        f"    {_identifier(old)} --> {_identifier(new)}: {', '.join(inputs)}"
        for (old, new), inputs in edges.items()
    ]
    lines += [f"    {status} --> [*]" for status in known if status in FINAL]
    return "\n".join(lines)


def listing(table: Table) -> str:
    """Return every entry of the table, as a table in Markdown."""
    lines = ["| status | input: new status |", "|---|---|"]
    for status in Status:
        moves: dict[Status, list[Input]] = {}
        for (old, input_), new in table.items():
            if old == status:
                moves.setdefault(new, []).append(input_)
        if moves:
            cells = [f"{', '.join(inputs)}: **{new}**" for new, inputs in moves.items()]
            lines.append(f"| {status} | {'; '.join(cells)} |")
    return "\n".join(lines)


def document() -> str:
    """Return the text of docs/states.md."""
    parts = [
        "# States of a migration",
        "",
        "Generated: `python -c 'from mig.state import document; print(document(), end=\"\")'`.",
        "",
        "The diagrams leave out fail and cancel; the lists have everything. What they do not have",
        "raises StateError.",
        "",
    ]
    for title, table in (("Outgoing", OUTGOING), ("Incoming", INCOMING)):
        parts += [f"## {title}", "", "```mermaid", diagram(table), "```", "", listing(table), ""]
    return "\n".join(parts)
