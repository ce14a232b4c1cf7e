"""Live postcopies whose links are cut, and whose sources are killed, at random moments.

The guest writes its memory all the time, and looks at each page before it writes it again.

MIG_FAULT_ROUNDS: how many cuts, and how many kills, there are to be; 100 take some minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults.cutter import Cutter
from unit.boxes import FOREVER

import mig
from mig import IncomingMigration, OutgoingMigration, ProcessGuest
from mig.errors import MigError, StateError
from mig.guest.process import LEDGER, RAM
from mig.options import OUTGOING_CAPABILITIES

SIZE = 2 << 20
CUTS = int(os.environ.get("MIG_FAULT_ROUNDS", "12"))
#: a process takes its time on a machine that has others to run
PATIENCE = 60.0
KILLS = int(os.environ.get("MIG_FAULT_ROUNDS", "4"))
SEED = 20

ENDED = frozenset({"completed", "failed"})
GOES_ON = frozenset({"postcopy-active", "completed"})
STANDS = ENDED | {"postcopy-paused"}


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


def stands(migration, *statuses: str) -> str:
    """Wait until nothing more happens by itself, or for one of these."""
    until(lambda: migration.status in (statuses or STANDS), f"none of {statuses or STANDS}")
    return migration.status


def pages(block) -> np.ndarray:
    return np.frombuffer(block.view, dtype=np.uint8).reshape(block.pages.npages, -1)


def assert_whole(guest: ProcessGuest, ram: np.ndarray, ledger: np.ndarray) -> None:
    """The guest goes on; what it has not written since is as it was, the rest as it should be."""
    writes = guest.counters().writes
    while guest.counters().writes < writes + 200:
        pass
    guest.stop()
    report = guest.verify()
    assert report.ok, report
    entries, npages = guest.memory[LEDGER], len(ram)
    before = ledger.reshape(-1).view("<u8")[:npages]
    after = pages(entries).reshape(-1).view("<u8")[:npages]
    assert (after >= before).all()
    same = after == before
    assert same.sum() >= npages // 2
    assert (pages(guest.memory[RAM])[same] == ram[same]).all()


class Round:
    """One guest that moves, however often the link is cut."""

    def __init__(
        self, folder: Path, rng: random.Random, cuts: int, capabilities: set[str]
    ) -> None:
        self.folder, self.rng, self.left = folder, rng, cuts
        self.numbers = itertools.count()
        self.cutters: list[Cutter] = []
        self.mine = ProcessGuest(SIZE, workers=2, rate=0, working_set=0.5, seed=rng.randrange(99))
        self.other = ProcessGuest(SIZE)
        self.incoming = IncomingMigration(self.other, capabilities=capabilities)
        self.outgoing = OutgoingMigration(
            self.mine,
            capabilities=capabilities,
            # else all of it is on its way before the guest runs
            parameters={"max-postcopy-bandwidth": 16 << 20},
        )

    def link(self) -> str:
        """A new way to the destination, which may not be long."""
        limits = {}
        if self.left > 0:
            # within a handshake: the beginning, or that of a recovery
            short = self.rng.random() < (0.3 if self.cutters else 0.1)
            if self.rng.random() < 0.7:
                limits["forward"] = self.rng.randrange(1000 if short else SIZE // 2)
            else:
                limits["backward"] = self.rng.randrange(200 if short else 2000)
        path = self.folder / f"link{next(self.numbers)}"
        self.cutters.append(Cutter(path, self.incoming.uri, **limits))
        return self.cutters[-1].uri

    def run(self) -> int:
        """Return how often it was cut."""
        self.mine.start()
        self.incoming.listen(f"unix:{self.folder / 'in'}")
        self.outgoing.start_postcopy()
        self.outgoing.start(self.link())
        while self.goes_on():
            pass
        return sum(cutter.cuts for cutter in self.cutters)

    def goes_on(self) -> bool:
        there, here = stands(self.incoming), stands(self.outgoing)
        self.left -= self.cutters[-1].cuts
        if there == "failed":
            # before it was handed over, or in the middle of the package: no guest runs there
            assert not self.other.running
            if here == "postcopy-paused":
                self.give_up()
                self.mine.resume()
            self.stays()
            return False
        if there == "completed":
            if here == "postcopy-paused":
                # the last word was lost
                self.give_up()
            assert not self.mine.running
            assert_whole(self.other, pages(self.mine.memory[RAM]), pages(self.mine.memory[LEDGER]))
            return False
        assert here == "postcopy-paused", here
        assert self.other.running
        assert not self.mine.running
        with contextlib.suppress(StateError):
            # it may still listen: the link was cut before it came there
            self.incoming.recover(f"unix:{self.folder / f'again{next(self.numbers)}'}")
        self.outgoing.recover(self.link())
        stands(self.outgoing, "postcopy-active", *STANDS)
        return True

    def give_up(self) -> None:
        self.outgoing.abandon()
        with contextlib.suppress(MigError):
            self.outgoing.wait(FOREVER)

    def stays(self) -> None:
        """The guest runs here as if nothing had happened."""
        assert self.mine.running
        writes = self.mine.counters().writes
        while self.mine.counters().writes < writes + 50:
            pass
        assert self.mine.verify().ok

    def close(self) -> None:
        for migration in (self.outgoing, self.incoming):
            with contextlib.suppress(MigError):
                migration.abandon()
            with contextlib.suppress(MigError):
                migration.wait(FOREVER)
        for cutter in self.cutters:
            cutter.close()
        self.mine.close()
        self.other.close()


#: with a connection for urgent pages, too, where the source can have one
WAYS = {"plain": {"postcopy-ram"}}
if "postcopy-preempt" in OUTGOING_CAPABILITIES:
    WAYS["preempt"] = {"postcopy-ram", "postcopy-preempt"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capabilities", WAYS.values(), ids=WAYS)
def test_a_link_that_is_cut_at_random(tmp_path, capabilities):
    rng, cuts, moved = random.Random(SEED), 0, 0
    for number in itertools.count():
        if cuts >= CUTS:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.closing(Round(folder, rng, rng.randrange(1, 5), capabilities)) as one:
            cuts += one.run()
            moved += one.incoming.status == "completed"
    print(f"{cuts} cuts in {number} migrations, of which {moved} arrived")
    assert moved


# ---- sources that are killed -----------------------------------------------------------------


class Server:
    """`mig send --postcopy`, which serves a guest from a file."""

    def __init__(self, file: Path, uri: str, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "mig", "send", str(file), uri, "--postcopy"]
        self._process = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def ended(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def served(self) -> bool:
        """Whether it came to its end; the connection may have met one that was killed."""
        return self._process.wait(PATIENCE) == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stderr.close()


class Kept:
    """A guest in a file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "vm.mig"
        incoming = IncomingMigration(mig.StreamCapture(self.file))
        incoming.listen(f"unix:{folder / 'in'}")
        with ProcessGuest(SIZE, workers=2, rate=0, working_set=0.5) as guest:
            guest.start()
            outgoing = OutgoingMigration(guest, capabilities={"return-path"})
            outgoing.start(incoming.uri)
            assert outgoing.wait(FOREVER)
            assert incoming.wait(FOREVER)
            self.ram, self.ledger = (pages(guest.memory[name]).copy() for name in (RAM, LEDGER))


def run_from_file(kept: Kept, folder: Path, rng: random.Random, kills: int) -> int:
    """Run the guest from the file, and kill who serves it so often; how often it was."""
    numbers, killed = itertools.count(), 0
    with ProcessGuest(SIZE) as guest:
        incoming = IncomingMigration(guest, capabilities={"postcopy-ram"})
        incoming.listen(f"unix:{folder / 'in'}")
        options = ["--background", "4M"]
        while stands(incoming, *STANDS, "setup") != "completed":
            assert incoming.status != "failed", incoming.query().error
            with contextlib.suppress(StateError):
                # not the first time, and not where nobody came
                incoming.recover(f"unix:{folder / f'again{next(numbers)}'}")
            with contextlib.closing(Server(kept.file, incoming.uri, *options)) as server:
                if killed < kills:
                    # before the guest runs, the owner of the file begins anew
                    until(lambda: guest.running, "a guest that runs")
                    if "--resume" in options and rng.random() < 0.25:
                        # while it starts, connects, asks what is here
                        killed += not server.ended(0.3 + rng.random() * 0.5)
                    else:
                        until(lambda: server.ended(0) or incoming.status in GOES_ON, "a recovery")
                        killed += not server.ended(rng.random() * 0.3)
                elif server.served():
                    break
            stands(incoming)
            options = ["--resume"] if killed >= kills else ["--background", "4M", "--resume"]
        assert incoming.wait(FOREVER)
        assert_whole(guest, kept.ram, kept.ledger)
    return killed


@pytest.mark.timeout(900)
def test_a_source_that_is_killed_at_random(tmp_path):
    kept, rng, killed = Kept(tmp_path), random.Random(SEED), 0
    for number in itertools.count():
        if killed >= KILLS:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        killed += run_from_file(kept, folder, rng, min(rng.randrange(1, 5), KILLS - killed))
    print(f"{killed} kills in {number} restores")
