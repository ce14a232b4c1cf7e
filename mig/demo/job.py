"""What `mig demo` does, without the command line."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mig.demo.guests import Options, make_show
from mig.engine import OutgoingMigration, PolicyMaker
from mig.errors import ChannelError, MigError, PeerError, StateError
from mig.events import Event, StatusChanged
from mig.options import INCOMING_CAPABILITIES
from mig.state import Status
from mig.stats import MigrationInfo

#: seconds that the guest runs before it moves, and after
SETTLE = 0.5
#: seconds between two looks at the migration
LOOK = 0.1
#: seconds in which a destination that failed may say why
_LAST_WORDS = 2.0


class DemoError(MigError):
    """The guest did not arrive as it left."""


class _Destination:
    """The process at the other end; how: arguments of its IncomingMigration."""

    def __init__(self, uri: str, options: Options, how: Mapping[str, object]) -> None:
        # -P: the package that this is, not one in the folder where somebody happens to stand
        command = [sys.executable, "-P", "-m", "mig.demo.destination", uri, options.to_json()]
        command.append(json.dumps(how))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.uri = str(self.hear("uri"))
        except BaseException:
            self.kill()
            self.close()
            raise

    def hear(self, name: str | None = None) -> Any:
        """Return what it says next, or one field of it; MigError when that is an error."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        said = json.loads(line) if line else {"error": "the destination's process ended"}
        if "error" in said:
            raise MigError(said["error"])
        return said if name is None else said[name]

    def why(self) -> str | None:
        """Return its error, None when it has none to tell."""
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], _LAST_WORDS)[0]:
            try:
                self.hear()
            except MigError as error:
                return str(error)
        return None

    def verify(self) -> dict[str, Any]:
        """Have the guest check itself there; return its report."""
        assert self._process.stdin is not None
        self._process.stdin.write("verify\n")
        self._process.stdin.flush()
        report: dict[str, Any] = self.hear()
        return report

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True, slots=True)
class PostcopyReport:
    """How the guest waited for its memory, in seconds.

    time_to_run:  from the start of the migration until the guest ran at the destination
    requests:     pages that the destination asked for
    faults:       accesses that waited for a page
    p50, p99:     what this share of these waits did not exceed, None without any
    blocktime:    in which all vCPUs waited at the same time
    vcpus:        in which each vCPU waited
    """

    time_to_run: float
    requests: int
    faults: int
    p50: float | None
    p99: float | None
    blocktime: float
    vcpus: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DemoReport:
    """How it went.

    info:        the migration, as the source saw it
    postcopy:    how the guest waited for its memory, None when it came before the guest
    source:      the guest's report of itself where it was stopped
    destination: and where it ran on, some time later
    """

    options: Options
    info: MigrationInfo
    source: dict[str, Any]
    destination: dict[str, Any]
    postcopy: PostcopyReport | None = None

    @property
    def guest_downtime(self) -> float | None:
        """Seconds between the guest's last tick here and its first one there."""
        gap: float | None = self.destination["switchover_gap"]
        return gap


class Demo:
    """Moves a running guest from this process to another one.

    capabilities, parameters, policy: of the outgoing migration; the destination gets those that it
    needs, too. With pause-before-switchover the migration goes on at once.
    postcopy: let the guest run at the destination at once, and send its memory then; needs
              capability postcopy-ram
    on_start: the migration runs inside the context that it returns
    on_look:  told how it stands ten times a second

    ValueError and OptionError: options that cannot be.
    """

    def __init__(
        self,
        options: Options,
        *,
        capabilities: Mapping[str, bool],
        parameters: Mapping[str, object],
        on_start: Callable[[OutgoingMigration], contextlib.AbstractContextManager[object]],
        on_look: Callable[[MigrationInfo], None],
        policy: PolicyMaker | None = None,
        postcopy: bool = False,
    ) -> None:
        self._options = options
        self._postcopy = postcopy
        agreed = {name: on for name, on in capabilities.items() if name in INCOMING_CAPABILITIES}
        self._how = {"capabilities": agreed, "parameters": dict(parameters)}
        self._show = make_show(options)
        try:
            self._outgoing = OutgoingMigration(
                self._show.guest,
                capabilities=capabilities,
                parameters=parameters,
                policy=policy,
                on_event=self._go_on,
            )
            if postcopy:
                self._outgoing.start_postcopy()
        except BaseException:
            self._show.close()
            raise
        self._on_start = on_start
        self._on_look = on_look

    def run(self) -> DemoReport:
        """Do it; DemoError when anything of the guest is wrong in the end."""
        with contextlib.closing(self._show) as show, self._destination() as destination:
            show.start()
            time.sleep(SETTLE)
            began = time.monotonic()
            try:
                self._migrate(destination.uri)
            except (PeerError, ChannelError) as error:
                if why := destination.why():
                    raise DemoError(f"{error}; the destination says: {why}") from error
                raise
            arrived = destination.hear()
            source = show.verify()
            time.sleep(SETTLE)
            info = self._outgoing.query()
            report = DemoReport(
                self._options,
                info,
                source,
                destination.verify(),
                _postcopy_report(arrived, began) if self._postcopy else None,
            )
        check(report)
        return report

    @contextlib.contextmanager
    def _destination(self) -> Iterator[_Destination]:
        with tempfile.TemporaryDirectory(prefix="mig-demo-") as folder:
            destination = _Destination(f"unix:{Path(folder, 'socket')}", self._options, self._how)
            try:
                yield destination
            except BaseException:
                destination.kill()
                raise
            finally:
                destination.close()

    def _go_on(self, event: Event) -> None:
        if isinstance(event, StatusChanged) and event.status == Status.PRE_SWITCHOVER:
            self._outgoing.migrate_continue()

    def _migrate(self, uri: str) -> None:
        with self._on_start(self._outgoing):
            self._outgoing.start(uri)
            try:
                while not self._outgoing.wait(LOOK):
                    self._on_look(self._outgoing.query())
                    if self._outgoing.status == Status.POSTCOPY_PAUSED:
                        # the other process is gone, and the guest with it
                        self._outgoing.abandon()
            except BaseException:
                for end in (self._outgoing.cancel, self._outgoing.abandon):
                    with contextlib.suppress(StateError):
                        end()
                with contextlib.suppress(MigError):
                    self._outgoing.wait()
                raise


def _postcopy_report(arrived: Mapping[str, Any], began: float) -> PostcopyReport:
    p50, p99 = arrived["latencies"]
    blocktime, *vcpus = arrived["blocktimes"]
    return PostcopyReport(
        arrived["resumed_at"] - began,
        arrived["requests"],
        arrived["faults"],
        p50,
        p99,
        blocktime,
        tuple(vcpus),
    )


def check(report: DemoReport) -> None:
    """DemoError when anything of the guest is wrong."""
    for where, said in (("source", report.source), ("destination", report.destination)):
        if not said["ok"]:
            raise DemoError(f"the guest is corrupt at the {where}: {'; '.join(said['corrupt'])}")
    if report.destination["rest"] != report.source["rest"]:
        raise DemoError("memory that the guest does not write is not the same at either end")
    if report.destination["ticks"] <= report.source["ticks"]:
        raise DemoError("the guest does not tick at the destination")
