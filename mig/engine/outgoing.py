"""OutgoingMigration: the source."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from mig.channel import Channel
from mig.engine.agreement import agree_to_adapt
from mig.engine.blockers import Blockers, Moment, Notifier
from mig.engine.convergence import Convergence, ConvergencePolicy, Period, PolicyMaker
from mig.engine.dirtylimit import DirtyLimit
from mig.engine.encoding import Encoding, adapts
from mig.engine.goover import PostcopyPolicy
from mig.engine.outcheck import check_outgoing, reasons_of, uses_return_path
from mig.engine.outlanes import open_lanes
from mig.engine.outmemory import SourceMemory
from mig.engine.outstats import SentBytes, source_stats
from mig.engine.postcopysource import PostcopySource
from mig.engine.preamble import preamble
from mig.engine.precopy import Precopy
from mig.engine.rate import RateLimit
from mig.engine.recovery import RecoveryPolicy
from mig.engine.snapshot import SnapshotPhase
from mig.engine.unplug import Unplugging
from mig.errors import BlockedError, ChannelError
from mig.events import Event, PassStarted
from mig.guest import SourceGuest, UnpluggingGuest
from mig.options import OUTGOING_CAPABILITIES, Capability, MigMode, Options
from mig.ram.encode import PageEncoder
from mig.ram.save import RamSaver
from mig.ram.search import PageSearch
from mig.records import Command
from mig.state import OUTGOING, Input, Status, Table
from mig.stats import MigrationInfo, RamStats
from mig.stream.writer import StreamWriter
from mig.wire import CommandType


class OutgoingMigration(PostcopySource):
    """Sends a guest; matches the source side of QEMU's precopy.

    capabilities: names that are on, or a mapping of names to on/off
    parameters:   values by QMP name
    policy:       when to stop the guest and how far to slow it down, or what makes such a policy,
                  as the class Patient does; QEMU's when None
    postcopy:     when to go over to postcopy (AfterPasses, WhenStuck); start_postcopy() alone when
                  None
    recovery:     what to do when a postcopy is paused (Retry); its owner sees to it when None
    blockers:     reasons against it, shared by all that migrate this guest
    notifiers:    told of the moments of precopy; they may veto
    on_event:     told of every event (see mig.events)

    When the migration fails or is cancelled the guest runs again and nothing of it is lost. With
    capability ``return-path`` completed means that the destination has confirmed; without, that
    every byte has been handed over. With capability ``background-snapshot`` the guest stays here
    and runs on: what is sent is what it was at one moment.
    """

    table: ClassVar[Table] = OUTGOING
    thread_name = "mig-outgoing"
    supported = OUTGOING_CAPABILITIES

    def __init__(
        self,
        guest: SourceGuest,
        *,
        capabilities: Iterable[str] | Mapping[str, bool] = (),
        parameters: Mapping[str, object] | None = None,
        policy: ConvergencePolicy | PolicyMaker | None = None,
        postcopy: PostcopyPolicy | None = None,
        recovery: RecoveryPolicy | None = None,
        blockers: Blockers | None = None,
        notifiers: Sequence[Notifier] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        options = Options.choose(capabilities, parameters, self.supported)
        super().__init__(guest, options, on_event, goes_over=postcopy, recovery=recovery)
        self._policy = self._choose_policy(Convergence if policy is None else policy)
        self._blockers = blockers or Blockers()
        self._notifiers = tuple(notifiers)
        self._memory: SourceMemory | None = None
        self._precopy: Precopy | None = None
        self._saver: RamSaver | None = None
        self._dirty_limit: DirtyLimit | None = None
        self._unplugging: Unplugging | None = None
        self._go_on = threading.Event()
        self._stopped = False
        self._was_running = True
        self._running_bytes: int | None = None
        self._snapshot: SnapshotPhase | None = None

    def _choose_policy(self, policy: ConvergencePolicy | PolicyMaker) -> ConvergencePolicy:
        if not callable(policy):
            return policy
        auto_converge = Capability.AUTO_CONVERGE in self.capabilities
        return policy(lambda: self.parameters, auto_converge=auto_converge)

    def start(self, uri: str, *, resume: bool = False) -> None:
        """Begin to migrate to ``uri``; returns at once.

        resume: the destination is in status postcopy-paused: another process had sent it the same
                guest (which must not have run since), and this one sends what is missing

        UriError when it cannot be read, OptionError when it cannot do what a capability needs,
        BlockedError when something stands against it.
        """
        check_outgoing(uri, self.capabilities, self.parameters, self._guest)
        self._check_postcopy(resume)
        self._require_status(Status.NONE, Input.START)
        if not resume and (reasons := reasons_of(self._guest)):
            raise BlockedError("; ".join(reasons))
        if Capability.DIRTY_LIMIT in self.capabilities:
            self._dirty_limit = DirtyLimit.of(
                self._guest, lambda: self.parameters, self._peer_failed
            )
        self._uri, self._resumes = uri, resume
        # the mode that is asked about is the one it has: from here on it cannot change
        with self._lock:
            self._blockers.begin(self.parameters.mode)
            self._handed_over = 0 if resume else None
            try:
                self._launch(Input.RECOVER if resume else Input.START)
            except BaseException:
                self._handed_over = None
                self._blockers.end()
                raise

    def migrate_continue(self) -> None:
        """Go on from status pre-switchover (QMP command migrate-continue); StateError elsewhere."""
        self._require_status(Status.PRE_SWITCHOVER, Input.SWITCHOVER)
        self._go_on.set()

    def set_parameters(self, values: Mapping[str, object]) -> None:
        """As every migration's; the XBZRLE cache may not become smaller than a page, either."""
        with self._lock:
            if self._encoding is not None:
                self._encoding.check(self.parameters.read(values)[0])
            super().set_parameters(values)

    def query(self) -> MigrationInfo:
        """Return a snapshot of status and statistics."""
        reasons = self._blockers.reasons_for(self.parameters.mode) + reasons_of(self._guest)
        info = replace(super().query(), blocked_reasons=reasons)
        if self._dirty_limit is not None:
            info = self._dirty_limit.report(info)
        if self.status == Status.POSTCOPY_PAUSED and self._break is not None:
            info = replace(info, error=str(self._break))
        if self._snapshot is not None:
            return self._snapshot.report(info)
        precopy, saver = self._precopy, self._saver
        if precopy is None or saver is None:
            return info
        info = saver.report(info)
        expected = precopy.expected_downtime
        return replace(
            info,
            expected_downtime=info.expected_downtime if expected is None else expected,
            cpu_throttle_percentage=precopy.throttle or None,
        )

    def block_resized(self, idstr: str) -> None:
        """Say that a block has another size now: the migration is cancelled, with that reason."""
        self.cancel(f"RAM block '{idstr}' resized during precopy.")

    def hint_free(self, idstr: str, first_page: int, npages: int) -> None:
        """Say that nobody needs what these pages of a block hold; no effect before the first pass.

        To be called before they can be used again: what is written to them later is sent.
        """
        if self._precopy is not None:
            self._precopy.hint_free(idstr, first_page, npages)

    # ---- phases -----------------------------------------------------------------------------

    def _run(self) -> None:
        if self._resumes:
            if self._guest.running:
                # it runs, or will run, at the destination
                self._stop_guest()
            search, _ = self._prepare_search()
            # no block list is sent
            self._counters.total = sum(block.used_length for block in search.blocks)
            self._postcopy(search).run(None)
            return
        channel = self._connect()
        writer = self._writer = StreamWriter(channel)
        self._notify(Moment.SETUP)
        search, encoding = self._prepare_search()
        self._send_start(channel, writer, search)
        if Capability.BACKGROUND_SNAPSHOT in self.capabilities:
            self._save_snapshot(channel, writer, search, encoding)
            self._confirm(channel)
            return
        encoder = self._choose_encoder(channel, writer, search, encoding)
        saver = self._saver = self._make_saver(writer, encoder)
        saver.start()
        self._link_urgent_early()
        self._become_active()
        precopy = self._precopy = self._prepare_precopy(search, saver)
        precopy.run()
        if self._wants_postcopy:
            # while the guest runs
            self._link_urgent()
        self._switch_over()
        precopy.sync(guest_runs=False)
        self._notify(Moment.COMPLETE)
        if self._guest.switchover_start:
            writer.put(Command(CommandType.SWITCHOVER_START).encode())
        if self._wants_postcopy:
            self._go_on_in_postcopy(channel, writer, search)
        else:
            self._complete(writer, saver)
            self._confirm(channel)

    def _save_snapshot(
        self, channel: Channel, writer: StreamWriter, search: PageSearch, encoding: Encoding
    ) -> None:
        mapped = Capability.MAPPED_RAM in self.capabilities
        encoder = encoding.mapped(channel) if mapped else encoding.plain(writer)
        saver = self._saver = self._make_saver(writer, encoder)
        saver.start()
        self._snapshot = SnapshotPhase(
            self._guest,
            search,
            saver,
            lambda: self.parameters,
            cancel=self._cancel,
            wake=self._wake,
        )
        with self._snapshot:
            self._become_active()
            devices = self._snapshot.freeze()
            self._snapshot.save_memory()
        saver.end()
        writer.put(devices)
        writer.flush()

    def _prepare_search(self) -> tuple[PageSearch, Encoding]:
        self._begin_unplug()
        if self.parameters.mode == MigMode.CPR_REBOOT:
            self._stop_guest()
        memory = self._memory = SourceMemory(self._guest, self.capabilities)
        search = self._search = memory.take()
        if self.faults is not None and self.faults.order is not None:
            search.follow(self.faults.order)
        self._requests = self._page_requests(search)
        encoding = self._encoding = Encoding(
            search,
            self._counters,
            self.capabilities,
            lambda: self.parameters,
            lambda: self._stopped,
        )
        return search, encoding

    def _make_saver(self, writer: StreamWriter, encoder: PageEncoder) -> RamSaver:
        assert self._search is not None
        saver = RamSaver(writer, self._search, encoder, self._guest.ram_section_id, self._counters)
        saver.footers = self._guest.footers
        saver.names_host_pages = Capability.POSTCOPY_RAM in self.capabilities
        return saver

    def _choose_encoder(
        self, channel: Channel, writer: StreamWriter, search: PageSearch, encoding: Encoding
    ) -> PageEncoder:
        if Capability.MAPPED_RAM in self.capabilities:
            return encoding.mapped(channel)
        if Capability.MULTIFD not in self.capabilities or not search.listed:
            return encoding.main_stream(writer)
        if adapts(self.parameters):
            assert self._return_path is not None
            agree_to_adapt(writer, self._return_path, self.parameters.timeout)
        configuration = self._guest.configuration
        lanes = open_lanes(
            self._uri,
            self._cancel,
            self.parameters,
            search.listed[0].pages.page_size,
            configuration.uuid.bytes if configuration and configuration.uuid else bytes(16),
            zero_copy=Capability.ZERO_COPY_SEND in self.capabilities,
            splice=self._return_path is not None,
            on_error=self._lane_failed,
        )
        with self._lock:
            self._lanes = lanes
        lanes.start()
        machine = configuration.machine if configuration else None
        return encoding.multifd(writer, lanes, machine)

    def _period_over(self, period: Period, guest_runs: bool) -> None:
        if self._saver is not None:
            self._saver.end_period()
        if self._dirty_limit is not None and guest_runs:
            self._dirty_limit.period_over(period)

    # ---- precopy ----------------------------------------------------------------------------

    def _postcopy_saver(self, writer: StreamWriter) -> RamSaver:
        assert self._encoding is not None
        if self._channel is not None:
            self._channel.keep_queue_short()
        saver = self._saver = self._make_saver(
            writer, self._encoding.plain(writer, shared=self._preempt is None)
        )
        return saver

    def _begin_unplug(self) -> None:
        guest = self._guest
        if self.parameters.mode == MigMode.NORMAL and isinstance(guest, UnpluggingGuest):
            self._unplugging = Unplugging(guest, self._cancel)
            self._unplugging.begin()

    def _become_active(self) -> None:
        unplugging = self._unplugging
        if unplugging is None or not unplugging.pending:
            self._move(Input.CONNECTED)
        else:
            self._move(Input.UNPLUG)
            unplugging.wait()
            self._move(Input.UNPLUGGED)
        self._mark("connected")

    def _send_start(self, channel: Channel, writer: StreamWriter, search: PageSearch) -> None:
        if uses_return_path(self.capabilities):
            self._open_return_path(channel)
        for data in preamble(self._guest, self.capabilities, search):
            writer.put(data)
        # a destination looks at this before it looks at channels that connect
        writer.flush()

    def _prepare_precopy(self, search: PageSearch, saver: RamSaver) -> Precopy:
        return Precopy(
            search,
            saver,
            RateLimit(lambda: self.parameters.max_bandwidth, self._sleep),
            self._policy,
            throttle=self._guest.throttle,
            may_leave=self._may_switch_over,
            notify=self._notify,
            on_period=self._period_over,
            on_pass=self._pass_begins,
            leave_now=lambda: self._wants_postcopy,
            sleep=self._sleep,
        )

    def _pass_begins(self, number: int) -> None:
        self._emit(PassStarted(number))
        remaining = self._search.remaining if self._search else 0
        if not self._stopped and remaining and remaining >= self._policy.threshold:
            self._consider_postcopy(number - 1, remaining)

    def _may_switch_over(self) -> bool:
        """Whether the destination has agreed, if it is to be asked (capability switchover-ack)."""
        if Capability.SWITCHOVER_ACK not in self.capabilities:
            return True
        return self._return_path is not None and self._return_path.acked

    def _stop_guest(self) -> None:
        if self._stopped:
            return
        self._mark("stopped")
        self._stopped = True
        self._running_bytes = self._saver.nbytes if self._saver else 0
        self._was_running = self._guest.running
        self._guest.stop()
        if self._dirty_limit is not None:
            self._dirty_limit.end()

    def _switch_over(self) -> None:
        self._stop_guest()
        if Capability.PAUSE_BEFORE_SWITCHOVER in self.capabilities:
            self._move(Input.PAUSE)
            self._go_on.wait()
            if self._error is not None:
                # the destination failed meanwhile: nobody has said that it may go on
                raise self._error
        self._move(Input.SWITCHOVER)

    def _complete(self, writer: StreamWriter, saver: RamSaver) -> None:
        saver.end()
        if self._lanes is not None:
            self._lanes.finish()
        devices = self._guest.save_devices()
        if self._return_path is not None:
            self._return_path.may_confirm = True
        with self._lock:
            self._all_said = True
        writer.put(devices)
        try:
            writer.flush()
        except ChannelError:
            # who has all he needs may close before he has read the last bytes
            if self._return_path is None or not self._return_path.has_confirmed(1.0):
                raise

    def _confirm(self, channel: Channel) -> None:
        if self._return_path is None:
            channel.finish()
        else:
            # the connection stays open in this direction: QEMU reads on until it closes
            self._return_path.wait_shut(self.parameters.timeout)

    # ---- ends -------------------------------------------------------------------------------

    def _cleanup(self, *, failed: bool) -> None:
        """Let go of everything, the last first, whatever of it fails."""
        with contextlib.ExitStack() as stack:
            for notifier in self._notifiers:
                stack.callback(notifier, Moment.CLEANUP)
            if self._unplugging is not None:
                stack.callback(self._unplugging.close)
                if failed and self._handed_over is None:
                    stack.callback(self._unplugging.undo)
            if failed and self._stopped and self._was_running and self._handed_over is None:
                stack.callback(self._guest.resume)
            if self._precopy is not None and self._precopy.throttle:
                stack.callback(self._guest.throttle, 0)
            if self._dirty_limit is not None:
                stack.callback(self._dirty_limit.end)
            if self._memory is not None:
                stack.callback(self._memory.release)
            stack.callback(self._close_requests)
            stack.callback(self._close_channel)
            if failed and self._return_path is not None and self._handed_over is None:
                stack.callback(self._prefer_peer_error, self._return_path)

    def _ending(self) -> contextlib.AbstractContextManager[None]:
        return self._blockers.ending()

    def _notify(self, moment: Moment) -> None:
        for notifier in self._notifiers:
            notifier(moment)

    def _interrupt(self) -> None:
        with self._lock:
            self._cancel.set()
            self._go_on.set()
            self._cut_off_soon()

    def _ram_stats(self) -> RamStats:
        beside = self._saver.nbytes_beside if self._saver else 0
        main = self._sent_before + (self._writer.offset if self._writer else 0)
        sent = SentBytes(
            total=main + beside + self._urgent_bytes,
            running=self._running_bytes,
            here=self._handed_over,
            channels=beside if Capability.MULTIFD in self.capabilities else 0,
        )
        return source_stats(
            sent,
            (self._counters, self._answered),
            self._search,
            self._precopy,
            remaining=self._remaining,
            requests=self._requests.total if self._requests is not None else 0,
            missed_zero_copy=self._lanes.copied if self._lanes else 0,
        )
