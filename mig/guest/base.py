"""The two sides of a guest, as protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable
from uuid import UUID

from mig import _core
from mig.dirty import DirtyLog
from mig.postcopy.commands import Advise
from mig.postcopy.times import PostcopyTimes
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


class VcpuThrottle(Protocol):
    """vCPUs whose writes are counted, and which are slowed down, one by one. Any thread."""

    @property
    def page_size(self) -> int:
        """Bytes of the pages that are counted."""

    @property
    def round_pages(self) -> int:
        """Entries of a vCPU's dirty ring; for statistics alone."""

    def dirty_pages(self) -> Sequence[int]:
        """Return how many pages each vCPU has made dirty up to now; only differences matter."""

    def throttle_vcpu(self, vcpu: int, share: float) -> None:
        """Make a vCPU stand still for this share of its time, 0 to 0.99.

        In turns of no more than 0.1 s or so: shares are chosen by what is written in 0.3 s.
        """


@runtime_checkable
class PerVcpuGuest(Protocol):
    """What a SourceGuest may have besides: capability dirty-limit needs it."""

    def vcpu_throttle(self) -> VcpuThrottle | None:
        """Return the vCPUs, None where they cannot be told apart. Called by who starts it."""


@runtime_checkable
class UnpluggingGuest(Protocol):
    """What a SourceGuest also has if devices of it must be unplugged before it migrates.

    As QEMU's failover primaries, which cannot migrate while their standby can. It takes part in
    mode normal. The migration stands in status wait-unplug as long as one of them is there.
    """

    @property
    def unplug_pending(self) -> bool:
        """Whether a device that was asked to go is still there."""

    def unplug(self, changed: Callable[[], None]) -> None:
        """Ask these devices to go, and return at once. Called by the migration's own thread.

        changed: to be called, by any thread, whenever unplug_pending has changed; at any time, also
                 after the migration
        """

    def replug(self) -> None:
        """Plug them in again: the migration failed or was cancelled. Called by its own thread.

        Called when they are gone, or when they did not go within 30 seconds.
        """


@runtime_checkable
class EarlyGuest(Protocol):
    """What a SourceGuest also has if devices of it go before memory (early setup)."""

    def save_early_devices(self) -> bytes:
        """Return their sections, footers and all; it may run. save_devices() leaves them out."""


@runtime_checkable
class BlockingGuest(Protocol):
    """What a SourceGuest also has if it can have devices that cannot migrate."""

    @property
    def blocked_reasons(self) -> Sequence[str]:
        """What stands against its migration, in words. Any thread."""


@runtime_checkable
class ReleasingGuest(Protocol):
    """What a SourceGuest may have besides: memory that capability release-ram gives back."""

    def release_pages(self, idstr: str, first: int, npages: int) -> None:
        """Let the host have these pages of a block: nobody will read them here any more.

        Whole host pages. Called in postcopy by each thread that sends, one call at a time for a
        page. OSError, ValueError: not possible with this block.
        """


class DestinationGuest(LoadTarget, Protocol):
    """A guest that can be received. All methods are called by the migration's own thread.

    Between configure() and commit() or abort() the guest must not run.
    """

    def commit(self) -> None:
        """Everything is loaded: make it last. The source is told after this returns."""

    def abort(self) -> None:
        """The migration failed or was cancelled: leave nothing behind. Never after commit()."""


@runtime_checkable
class PostcopyTarget(Protocol):
    """What a DestinationGuest needs besides for capability postcopy-ram.

    Called by the migration's own thread in this order: advise, open_blocks and the precopy pages,
    discard, listen, load_devices, run, end, commit. From listen on put() is called by other threads
    at the same time, one for each connection, each with a parser of its own; a page comes once.
    After run() there is no abort(), since the guest lives here, unless its owner gives it up: then
    abandon and abort() follow.
    """

    def postcopy_probe(self) -> str | None:
        """Return why this host cannot do it, None when it can. Called by who starts to listen."""

    def postcopy_advise(self, advise: Advise) -> None:
        """Postcopy may come; MismatchError when it cannot be done with these page sizes."""

    def postcopy_discard(self, idstr: str, start: int, nbytes: int) -> None:
        """Forget these bytes of a block, whatever was put there; they come again."""

    def postcopy_listen(self, requests: _core.PageRequests) -> None:
        """From now on serve accesses to what is not there; ``requests`` asks the source."""

    def postcopy_run(self) -> None:
        """Everything but memory is loaded: let the guest run, if it is one that does."""

    def postcopy_server(self) -> _core.FaultServer | None:
        """Return what places pages without Python; None: put() does. From listen to end."""

    def postcopy_received(self, idstr: str) -> _core.Bitmap:
        """Return which pages of a block are there, for a recovery; KeyError. No put() meanwhile."""

    def postcopy_ask_again(self) -> None:
        """Ask again for all that is missing: it was asked for on a connection that broke."""

    def postcopy_times(self) -> PostcopyTimes:
        """Return how long the guest waited for pages. Any thread."""

    def postcopy_end(self) -> None:
        """All pages have come, or, after a failure before run(), none will."""

    def postcopy_abandon(self) -> None:
        """The owner gives the guest up: stop it, and end every wait for pages; abort() follows.

        It may wait for pages and can only stop when these waits end, with whatever memory holds.
        """


@runtime_checkable
class BalloonedGuest(Protocol):
    """What a DestinationGuest may have besides: a balloon, which makes pages missing.

    Called by the migration's own thread.
    """

    def inhibit_balloon(self, inhibited: bool) -> None:
        """True when pages begin to be served in postcopy, after listen; False after its end."""


@runtime_checkable
class LockedGuest(Protocol):
    """What a DestinationGuest may have besides: memory that is locked (mlock)."""

    def unlock_memory(self) -> None:
        """Unlock it: postcopy may come, and needs pages that are missing. OSError when it cannot.

        Called by who starts to listen with capability postcopy-ram.
        """

    def lock_memory(self) -> None:
        """Lock it again: the migration has ended, whichever way. Called by its own thread."""


@runtime_checkable
class LaneTarget(Protocol):
    """What a DestinationGuest needs besides for capability multifd."""

    @property
    def uuid(self) -> UUID | None:
        """Which machine it is, if it knows."""

    def open_lanes(
        self, receiver: _core.MultifdReceiver, parser: _core.RamParser, section_id: int
    ) -> None:
        """Say where the pages of each block go: `to_memory`, `to_log`, `to_file` or, for blocks
        that are not to be sent, `refuse`. Follows open_blocks().

        section_id: of `ram`
        """


@runtime_checkable
class MappedTarget(Protocol):
    """What a DestinationGuest needs besides for capability mapped-ram."""

    def mapped_blocks(self) -> Sequence[tuple[_core.Pages, bool]]:
        """Return where the pages of each block go, in the order of the block list, and whether
        all of them are zero as yet. Follows open_blocks(), once.
        """
