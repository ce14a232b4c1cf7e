"""Background snapshots of a test: guests that know what they were, and what is in a file."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mig import GuestMemory, MemoryGuest, OutgoingMigration, ProcessGuest, open_image
from mig.dirty.track import refusal

PAGE = 4096
MIB = 1 << 20
#: nobody waits so long; a test that does has found a wait without an end
FOREVER = 20.0
REFUSAL = refusal("userfaultfd")
#: of a module whose tests take snapshots
MARKS = [
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
    pytest.mark.usefixtures("nothing_is_left"),
]
LIBC = ctypes.CDLL(None)
LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def protected() -> int:
    """Bytes of this process's memory that a userfaultfd write-protects, or could."""
    total = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:") and "uw" in line.split():
            total += size
    return total


def threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return names


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Look afterwards whether anything is still protected, or a thread still there."""
    yield
    assert protected() == 0
    assert "mig-snapshot" not in threads()


def await_writes(guest: ProcessGuest, more: int) -> None:
    enough, end = guest.counters().writes + more, time.monotonic() + FOREVER
    while guest.counters().writes < enough:
        assert time.monotonic() < end, "it does not write"
        time.sleep(0.001)


def check_runs_on(guest: ProcessGuest, more: int) -> None:
    """Check that it writes as if there had never been a snapshot."""
    assert guest.running
    assert protected() == 0
    await_writes(guest, more)
    assert guest.verify().ok


def snapshot(guest, uri: str, *, also=(), **parameters) -> OutgoingMigration:
    """Start one; ``also``: further capabilities."""
    values = {"max-bandwidth": 0, **{k.replace("_", "-"): v for k, v in parameters.items()}}
    capabilities = {"background-snapshot", *also}
    outgoing = OutgoingMigration(guest, capabilities=capabilities, parameters=values)
    outgoing.start(uri)
    return outgoing


def await_frozen(outgoing: OutgoingMigration) -> None:
    """Return when the guest runs on after the pause."""
    end = time.monotonic() + FOREVER
    while outgoing.query().snapshot is None or outgoing.query().snapshot.pause is None:
        assert time.monotonic() < end
        time.sleep(0.001)


class Remembering(ProcessGuest):
    """Knows what its memory was when its devices were saved: when it stood still."""

    def save_devices(self) -> bytes:
        assert not self.running
        self.memory_then = {b.idstr: bytes(b.view) for b in self.memory}
        self.writes_then = self.counters().writes
        self.devices_then = super().save_devices()
        return self.devices_then


def image_memory(path: Path) -> dict[str, bytes]:
    with open_image(path) as image:
        return {
            b.idstr: b"".join(
                image.page(b.idstr, i) or b"missing" for i in range(b.used_length // PAGE)
            )
            for b in image.blocks
        }


class Block:
    """A MemoryGuest that native threads write, which stand still when it is stopped."""

    def __init__(self, nbytes: int = 2 * MIB, **block) -> None:
        self.memory = GuestMemory()
        self.memory.add("ram", nbytes, **block)
        self.view = np.frombuffer(self.memory["ram"].view, dtype=np.uint8)
        self.address = self.memory["ram"].pages.hva
        self.nbytes = nbytes
        self.then: bytes | None = None
        self.paused, self.idle = threading.Event(), threading.Semaphore(0)
        self.go_on, self.ended = threading.Event(), threading.Event()
        self.writers: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.guest = MemoryGuest("m", self.memory, on_stop=self._stop, on_resume=self._resume)

    def _stop(self) -> None:
        self.go_on.clear()
        self.paused.set()
        for _ in self.writers:
            assert self.idle.acquire(timeout=FOREVER)
        self.then = bytes(self.view)

    def _resume(self) -> None:
        self.paused.clear()
        self.go_on.set()

    def start(self, write, count: int, seed: int) -> None:
        def loop(rng: random.Random) -> None:
            try:
                while not self.ended.is_set():
                    if self.paused.is_set():
                        self.idle.release()
                        assert self.go_on.wait(FOREVER)
                    write(self, rng)
            except BaseException as error:
                self.errors.append(error)

        for number in range(count):
            thread = threading.Thread(target=loop, args=(random.Random(f"{seed} {number}"),))
            self.writers.append(thread)
            thread.start()

    def close(self) -> None:
        self.ended.set()
        for thread in self.writers:
            thread.join(FOREVER)
            assert not thread.is_alive()
        assert not self.errors
        del self.view
        self.memory.close()


@contextlib.contextmanager
def closed_blocks():
    """Makes blocks, and ends them and their writers."""
    made: list[Block] = []

    def make(*args, **options) -> Block:
        made.append(Block(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def write_natively(block: Block, rng: random.Random) -> None:
    """Without Python's lock, anywhere, over the ends of pages."""
    for _ in range(20):
        n = rng.choice([1, 8, 100, PAGE, 3 * PAGE + 5])
        at = rng.randrange(block.nbytes - n)
        LIBC.memset(block.address + at, rng.randrange(256), n)


def write_in_python(block: Block, rng: random.Random) -> None:
    """With Python's lock, which who writes has while he waits for his page."""
    at = rng.randrange(block.nbytes - 5 * PAGE)
    block.view[at : at + 5 * PAGE] = rng.randrange(256)
    time.sleep(0)
