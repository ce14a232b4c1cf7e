"""A guest that runs while its migration is made to fail, at a hundred random moments.

Each time it goes on running at the source, finds nothing wrong with its memory, and can be migrated
again; in the end it is.
"""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import streams

import mig
from mig.errors import MigError
from mig.guest import ProcessGuest

NBYTES = 4 << 20
#: nobody waits so long
FOREVER = 30.0
RUNS = 25

pytestmark = pytest.mark.timeout(250)


def made(dirty: str) -> ProcessGuest:
    log = mig.WriteTracker if dirty == "tracked" else "marked"
    return ProcessGuest(NBYTES, rate=100 << 20, pattern="full", dirty=log)


@pytest.fixture(params=["marked", "tracked"])
def guest(request: pytest.FixtureRequest) -> Iterator[ProcessGuest]:
    with made(request.param) as guest:
        guest.start()
        yield guest


class Relay:
    """Carries bytes from the source to the destination and back, and cuts both off."""

    def __init__(self, path: Path, destination: str) -> None:
        self.uri = f"unix:{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._destination = destination.removeprefix("unix:")
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self, limit: int) -> None:
        """Carry ``limit`` bytes of the stream."""
        thread = threading.Thread(target=self._accept, args=(limit,))
        thread.start()
        self._threads.append(thread)

    def _accept(self, limit: int) -> None:
        source, _ = self._listener.accept()
        destination = socket.socket(socket.AF_UNIX)
        destination.connect(self._destination)
        self._ends = [source, destination]
        back = threading.Thread(target=self._carry, args=(destination, source, None))
        back.start()
        self._carry(source, destination, limit)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        back.join()

    @staticmethod
    def _carry(from_: socket.socket, to: socket.socket, limit: int | None) -> None:
        with contextlib.suppress(OSError):
            while limit is None or limit > 0:
                data = from_.recv(1 << 16 if limit is None else min(limit, 1 << 16))
                if not data:
                    to.shutdown(socket.SHUT_WR)
                    return
                to.sendall(data)
                limit = None if limit is None else limit - len(data)

    def close(self) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join(FOREVER)
        for end in self._ends:
            end.close()


def mappings() -> int:
    """How many there are; 0 under AddressSanitizer, which keeps what is freed."""
    maps = Path("/proc/self/maps").read_text()
    return 0 if "libasan" in maps else len(maps.splitlines())


def goes_on(guest: ProcessGuest) -> None:
    """The guest runs: it ticks."""
    ticks, end = guest.counters().ticks, time.monotonic() + FOREVER
    while guest.counters().ticks <= ticks:
        assert time.monotonic() < end, "it stands still"
        time.sleep(0.001)


def arrives(guest: ProcessGuest, folder: Path) -> None:
    """After all that, the guest can be migrated."""
    assert guest.verify().ok
    with made("marked") as there:
        incoming = mig.IncomingMigration(there)
        incoming.listen(f"unix:{folder}/last")
        outgoing = mig.OutgoingMigration(
            guest, capabilities={"return-path"}, parameters={"max-bandwidth": 0}
        )
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
        there.resume()
        goes_on(there)
        assert there.verify().ok


#: a migration with one of these does not end by itself: the destination never agrees to the
#: switchover, or nobody says migrate-continue when the guest stands still
ENDLESS = ["switchover-ack", "pause-before-switchover"]


def outgoing_to(
    uri: str, guest: ProcessGuest, rng: random.Random, endless: list[str] = ENDLESS
) -> mig.OutgoingMigration:
    outgoing = mig.OutgoingMigration(
        guest,
        capabilities={"return-path", rng.choice(endless)},
        parameters={"max-bandwidth": rng.choice([0, 40 << 20])},
    )
    outgoing.start(uri)
    return outgoing


def test_a_connection_that_breaks_anywhere(guest, tmp_path):
    rng = random.Random(1)
    before = None
    for number in range(RUNS):
        with made("marked") as there:
            incoming = mig.IncomingMigration(there)
            incoming.listen(f"unix:{tmp_path}/{number}")
            relay = Relay(tmp_path / f"relay-{number}", incoming.uri)
            relay.start(rng.choice([rng.randrange(200), rng.randrange(2 * NBYTES)]))
            outgoing = outgoing_to(relay.uri, guest, rng, ENDLESS[:1])
            assert streams.outcome(outgoing) is not None
            assert streams.outcome(incoming) is not None
            relay.close()
        goes_on(guest)
        # the first run may make what is kept for good
        before = before or mappings()
    # threads' stacks and the allocator's come and go; what each run leaves behind adds up
    assert mappings() < before + RUNS // 2
    arrives(guest, tmp_path)


def test_a_destination_that_gives_up_at_any_moment(guest, tmp_path):
    rng = random.Random(2)
    for number in range(RUNS):
        with made("marked") as there:
            incoming = mig.IncomingMigration(there)
            incoming.listen(f"unix:{tmp_path}/{number}")
            outgoing = outgoing_to(incoming.uri, guest, rng)
            time.sleep(rng.uniform(0, 0.05))
            incoming.cancel()
            assert streams.outcome(outgoing) is not None
            assert streams.outcome(incoming) is not None
        goes_on(guest)
    arrives(guest, tmp_path)


DESTINATION = """
import sys, mig
guest = mig.ProcessGuest(int(sys.argv[2]))
incoming = mig.IncomingMigration(guest)
incoming.listen(sys.argv[1])
print(flush=True)
incoming.wait()
"""


def test_a_destination_that_is_killed(guest, tmp_path):
    rng = random.Random(3)
    for number in range(4):
        uri = f"unix:{tmp_path}/{number}"
        with subprocess.Popen(
            [sys.executable, "-P", "-c", DESTINATION, uri, str(NBYTES)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"\n"
            outgoing = outgoing_to(uri, guest, rng)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            assert streams.outcome(outgoing) is not None
        goes_on(guest)
    arrives(guest, tmp_path)


def test_a_disk_that_is_full(guest, tmp_path):
    rng = random.Random(4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(RUNS):
        file = tmp_path / f"{number}.mig"
        incoming = mig.IncomingMigration(mig.StreamCapture(file, direct_io=number % 2 == 0))
        incoming.listen(f"unix:{tmp_path}/{number}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(NBYTES), hard))
        try:
            outgoing = outgoing_to(incoming.uri, guest, rng, ENDLESS[:1])
            assert streams.outcome(outgoing) is not None
            assert streams.outcome(incoming) is not None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not file.exists()
        goes_on(guest)
    arrives(guest, tmp_path)


def test_a_migration_that_is_cancelled_at_any_moment(guest, tmp_path):
    rng = random.Random(5)
    for number in range(RUNS):
        with made("marked") as there:
            incoming = mig.IncomingMigration(there)
            incoming.listen(f"unix:{tmp_path}/{number}")
            outgoing = outgoing_to(incoming.uri, guest, rng)
            time.sleep(rng.choice([0, rng.uniform(0, 0.05)]))
            outgoing.cancel()
            with contextlib.suppress(MigError):
                outgoing.wait(FOREVER)
            assert outgoing.status == mig.Status.CANCELLED
            assert streams.outcome(incoming) is not None
        goes_on(guest)
    arrives(guest, tmp_path)
