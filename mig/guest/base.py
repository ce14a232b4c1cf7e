"""The two sides of a guest, as protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable
from uuid import UUID

from mig import _core
from mig.dirty import DirtyLog
from mig.ram.search import SourceBlock
from mig.records import Configuration
from mig.savevm.load import LoadTarget


class SourceGuest(Protocol):
    """A guest that can be sent. All methods are called by the migration's own thread.

    configuration:    for the configuration section, None to send none
    ram_section_id:   section id of `ram`
    footers:          whether sections end with footers
    switchover_start: whether the stream announces the switchover (machine types since 10.0)
    """

    configuration: Configuration | None
    ram_section_id: int
    footers: bool
    switchover_start: bool

    @property
    def running(self) -> bool:
        """Whether the vCPUs run: a guest that fails to migrate goes on as it was."""

    def source_blocks(self) -> Sequence[SourceBlock]:
        """Return the RAM blocks, every page that must be sent marked dirty."""

    def dirty_log(self) -> DirtyLog | None:
        """Return the log of writes, None when memory does not change."""

    def throttle(self, percent: int) -> None:
        """Make every vCPU stand still for so much of its time; 0: let it run.

        0 to 99. Called while the guest runs, by capability auto-converge.
        """

    def stop(self) -> None:
        """Stop the vCPUs: from now on nothing writes memory."""

    def resume(self) -> None:
        """Undo stop(): the migration failed or was cancelled."""

    def save_devices(self) -> bytes:
        """Return the device sections, EOF and description. Called after stop()."""


class DestinationGuest(LoadTarget, Protocol):
    """A guest that can be received. All methods are called by the migration's own thread.

    Between configure() and commit() or abort() the guest must not run.
    """

    def commit(self) -> None:
        """Everything is loaded: make it last. The source is told after this returns."""

    def abort(self) -> None:
        """The migration failed or was cancelled: leave nothing behind. Never after commit()."""


@runtime_checkable
class LaneTarget(Protocol):
    """What a DestinationGuest needs besides for capability multifd."""

    @property
    def uuid(self) -> UUID | None:
        """Which machine it is, if it knows."""

    def open_lanes(
        self, receiver: _core.MultifdReceiver, parser: _core.RamParser, section_id: int
    ) -> None:
        """Say where the pages of each block go: `to_memory` or `to_log`. Follows open_blocks().

        section_id: of `ram`
        """
