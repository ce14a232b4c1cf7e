"""Events that a migration reports to its ``on_event`` callback.

The migration's own thread reports them, but for the status ``cancelling``: that is reported by
the thread that called cancel(), and ``setup`` before it when nobody did so yet. Statuses are
reported in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from mig.state import Status


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """The migration has a new status (QMP event MIGRATION)."""

    status: Status


@dataclass(frozen=True, slots=True)
class PassStarted:
    """The outgoing side starts pass ``number`` over dirty memory (QMP event MIGRATION_PASS)."""

    number: int


@dataclass(frozen=True, slots=True)
class Listening:
    """The incoming side can be connected to at ``uri``."""

    uri: str


Event = StatusChanged | PassStarted | Listening
