"""What outgoing and incoming migrations have in common: state, thread, errors, waiting."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mig.channel.open import Cancel
from mig.engine.wake import Wake
from mig.errors import CancelledError, MigError, StateError, as_mig_error
from mig.events import Event, StatusChanged
from mig.options import Capability, Options, capabilities_to_qmp, unsupported
from mig.state import FINAL, Input, Machine, Status, Table
from mig.stats import InetAddress, MigrationInfo, RamCounters, RamStats, UnixAddress


class Migration(ABC):
    """One migration, run by a thread of its own.

    on_event: told of every event (see mig.events); it must not wait for the migration

    The first error wins; `wait` raises it.
    """

    table: ClassVar[Table]
    thread_name: ClassVar[str]
    incoming: ClassVar[bool] = False
    #: the capabilities that this side does
    supported: ClassVar[frozenset[Capability]]

    def __init__(self, options: Options, on_event: Callable[[Event], None] | None) -> None:
        self.capabilities = options.capabilities
        #: replaced as a whole by set_parameters(): read it at each use
        self.parameters = options.parameters
        self._on_event = on_event
        self._machine = Machine(self.table)
        # a signal handler may call cancel() while the same thread is in it
        self._lock = threading.RLock()
        self._done = threading.Event()
        # made by _launch(): a migration that never starts holds nothing
        self._cancel: Cancel
        self._first: Status
        self._wake: Wake
        self._thread: threading.Thread | None = None
        self._error: MigError | None = None
        self._cancel_reason: str | None = None
        self._exit_on_error = False
        self._setup_said = False
        self._counters = RamCounters()
        self._clock: dict[str, float] = {}

    # ---- for the owner; any thread ----------------------------------------------------------

    @property
    def status(self) -> Status:
        """Where the migration stands."""
        return self._machine.status

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False when ``timeout`` seconds pass before.

        Raises the error of a failed migration, CancelledError for a cancelled one.
        """
        if not self._done.wait(timeout):
            return False
        if self.status == Status.CANCELLED:
            raise CancelledError(self._cancel_reason or "the migration was cancelled")
        if self.status == Status.FAILED and self._error is not None:
            raise self._error
        return True

    def cancel(self, reason: str | None = None) -> None:
        """Give up; returns at once, `wait` tells when it is done. No effect after the end.

        reason: what `wait` raises says, unless it was cancelled before

        StateError in postcopy: half of the guest is on either side.
        """
        with self._lock:
            if self.status in FINAL or self.status == Status.NONE:
                return
            first = self.status != Status.CANCELLING
            status = self._machine.feed(Input.CANCEL)
            if first:
                self._cancel_reason = reason
            self._interrupt()
            if first:
                self._say_setup()
                self._emit(StatusChanged(status))

    def set_parameters(self, values: Mapping[str, object]) -> None:
        """Change parameters, by QMP names; those that can change in flight at any time.

        OptionError lists everything that is wrong, and then nothing changes. After the end it is
        without effect.
        """
        with self._lock:
            running = self.status != Status.NONE
            options = Options(self.capabilities, self.parameters).changed(values, running=running)
            self.parameters = options.parameters
            if running:
                self._wake.set()

    def query(self) -> MigrationInfo:
        """Return a snapshot of status and statistics."""
        clock = dict(self._clock)
        start, end = clock.get("start"), clock.get("end")
        now = time.monotonic() if end is None else end
        connected, stopped = clock.get("connected"), clock.get("stopped")
        # in postcopy the guest goes on long before the end
        goes_on = clock.get("handed over", end)
        return MigrationInfo(
            status=self.status,
            total_time=None if start is None else now - start,
            setup_time=None if start is None or connected is None else connected - start,
            downtime=None if goes_on is None or stopped is None else goes_on - stopped,
            ram=self._ram_stats(),
            error=str(self._error) if self.status == Status.FAILED else None,
            incoming=self.incoming,
            # until something better is known QEMU expects what it was told
            expected_downtime=self.parameters.downtime_limit / 1000,
            socket_address=self._socket_addresses(),
        )

    def query_capabilities(self) -> list[dict[str, Any]]:
        """Return what query-migrate-capabilities answers: every name of QEMU 10.0, on or off."""
        return capabilities_to_qmp(self.capabilities)

    def query_parameters(self) -> dict[str, Any]:
        """Return what query-migrate-parameters answers: values by every name of QEMU 10.0."""
        return self.parameters.to_qmp()

    def query_unsupported(self) -> list[str]:
        """Return the capabilities and parameters of QEMU 10.0 that mig does not do on this side."""
        return unsupported(self.supported)

    # ---- for the subclasses -----------------------------------------------------------------

    def _launch(self, begin: Input = Input.START) -> None:
        with self._lock, contextlib.ExitStack() as undo:
            self._cancel = Cancel()
            undo.callback(self._cancel.close)
            self._wake = Wake()
            undo.callback(self._wake.close)
            self._first = self._machine.feed(begin)
            undo.callback(self._machine.reset)
            self._mark("start")
            self._thread = threading.Thread(target=self._main, name=self.thread_name, daemon=True)
            self._thread.start()
            undo.pop_all()

    def _main(self) -> None:
        outcome = Input.FINISH
        try:
            self._say_setup()
            self._run()
        except BaseException as error:
            self._fail(as_mig_error(error))
            outcome = Input.FAIL
        try:
            self._cleanup(failed=outcome == Input.FAIL)
        except BaseException as error:
            # what was confirmed stays confirmed; a failure keeps its first error
            self._fail(as_mig_error(error))
        finally:
            self._finish(outcome)

    def _finish(self, outcome: Input) -> None:
        self._mark("end")
        with self._lock:
            with self._ending():
                status = self._machine.feed(outcome)
            self._cancel.close()
            self._wake.close()
            try:
                self._emit(StatusChanged(status))
            finally:
                if status == Status.FAILED and self._exit_on_error:
                    print(f"mig: {self._error}", file=sys.stderr, flush=True)
                    # at once: nobody who waits for the migration is to go on
                    os._exit(1)
                self._done.set()

    def _ending(self) -> contextlib.AbstractContextManager[None]:
        """Return what is entered while the final status becomes visible."""
        return contextlib.nullcontext()

    def _fail(self, error: MigError) -> None:
        """Note the first error. Any thread."""
        with self._lock:
            if self._error is None:
                self._error = error

    def _move(self, input_: Input) -> None:
        """Feed the state machine; CancelledError when the migration is being cancelled."""
        with self._lock:
            status = self._machine.feed(input_)
            if status == Status.CANCELLING:
                raise CancelledError("cancelled")
            self._emit(StatusChanged(status))

    def _say_setup(self) -> None:
        """Emit the first event; whoever has the second one to tell comes here before."""
        with self._lock:
            if not self._setup_said:
                self._setup_said = True
                self._emit(StatusChanged(self._first))

    def _mark(self, moment: str) -> None:
        self._clock[moment] = time.monotonic()

    def _emit(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _require_status(self, status: Status, input_: Input) -> None:
        if self.status != status:
            raise StateError(self.status, input_)

    @abstractmethod
    def _run(self) -> None:
        """Do the work; the list of phases."""

    @abstractmethod
    def _cleanup(self, *, failed: bool) -> None:
        """Release everything; after a failure restore what the owner had."""

    @abstractmethod
    def _interrupt(self) -> None:
        """End every wait of the migration's threads."""

    def _socket_addresses(self) -> tuple[InetAddress | UnixAddress, ...]:
        """Return what is listened on."""
        return ()

    @abstractmethod
    def _ram_stats(self) -> RamStats:
        """Return the present statistics."""
