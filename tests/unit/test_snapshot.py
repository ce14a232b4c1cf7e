"""Background snapshots: every page that is sent is the one at the pause, and the guest runs on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mig import (
    GuestMemory,
    IncomingMigration,
    MemoryGuest,
    OutgoingMigration,
    ProcessGuest,
    SharedDirtyLog,
    Status,
    _core,
    open_image,
)
from mig.dirty.track import refusal
from mig.errors import CancelledError, ChannelError, KvmUnavailableError, OptionError
from mig.guest.kvm import KvmGuest, probe
from mig.snapshot import memory as snapshot_memory
from mig.stats import SnapshotStats

PAGE = 4096
MIB = 1 << 20
#: nobody waits so long; a test that does has found a wait without an end
FOREVER = 20.0
LIBC = ctypes.CDLL(None)
LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

REFUSAL = refusal("userfaultfd")
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


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


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert protected() == 0
    assert "mig-snapshot" not in threads()


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def await_writes(guest: ProcessGuest, more: int) -> None:
    enough, end = guest.counters().writes + more, time.monotonic() + FOREVER
    while guest.counters().writes < enough:
        assert time.monotonic() < end, "it does not write"
        time.sleep(0.001)


def snapshot(guest, uri: str, **parameters) -> OutgoingMigration:
    values = {"max-bandwidth": 0, **{k.replace("_", "-"): v for k, v in parameters.items()}}
    outgoing = OutgoingMigration(
        guest, capabilities={"background-snapshot"}, parameters=values
    )
    outgoing.start(uri)
    return outgoing


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


# ---- what is saved ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("pattern", ["full", "words", "sequential", "hot"])
def test_every_page_is_the_one_at_the_pause(stack, tmp_path, pattern, workers, seed):
    guest = stack.enter_context(
        Remembering(4 * MIB, workers=workers, pattern=pattern, rate=0, seed=seed, fill="half")
    )
    guest.start()
    await_writes(guest, 300)
    outgoing = snapshot(guest, f"file:{tmp_path / 'vm'}")
    assert outgoing.wait(FOREVER)
    assert guest.running
    await_writes(guest, 300)
    assert image_memory(tmp_path / "vm") == guest.memory_then
    assert guest.verify().ok

    restored = stack.enter_context(ProcessGuest(4 * MIB))
    incoming = IncomingMigration(restored)
    incoming.listen(f"file:{tmp_path / 'vm'}")
    assert incoming.wait(FOREVER)
    report = restored.verify()
    assert report.ok
    assert report.writes == guest.writes_then
    restored.resume()
    await_writes(restored, 300)
    assert restored.verify().ok


def test_memory_comes_first_each_page_once_then_the_devices_of_the_pause(stack, tmp_path):
    guest = stack.enter_context(Remembering(2 * MIB, rate=0, fill="half"))
    guest.start()
    outgoing = snapshot(guest, f"file:{tmp_path / 'vm'}")
    outgoing.wait(FOREVER)
    data = (tmp_path / "vm").read_bytes()
    # SECTION_END of ram: nothing was left, EOS, footer
    assert data.endswith(
        b"\x03\0\0\0\1" + b"\0\0\0\0\0\0\0\x10" + b"\x7e\0\0\0\1" + guest.devices_then
    )
    info = outgoing.query()
    npages = sum(block.pages.npages for block in guest.memory)
    assert info.ram.normal + info.ram.duplicate == npages
    assert info.ram.transferred == len(data)
    assert info.ram.remaining == 0
    assert info.status == Status.COMPLETED
    assert info.downtime == info.snapshot.pause > 0
    assert info.to_qmp()["status"] == "completed"


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


@pytest.fixture
def block():
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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("write", [write_natively, write_in_python])
def test_random_writes_of_several_threads(block, tmp_path, write, seed):
    some = block()
    some.start(write, 3, seed)
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}")
    assert outgoing.wait(FOREVER)
    assert image_memory(tmp_path / "vm") == {"ram": some.then}


@pytest.mark.parametrize("populate", [False, True], ids=["", "populate"])
@pytest.mark.parametrize("kind", ["anonymous", "touched", "memfd", "larger pages"])
def test_kinds_of_memory(block, tmp_path, monkeypatch, kind, populate):
    """Also memory that nobody had touched, of which the kernel has no page to protect."""
    core = _core.Snapshot
    monkeypatch.setattr(
        _core, "Snapshot", lambda *a, **k: core(*a, **{**k, "populate": populate})
    )
    options: dict = {}
    if kind == "memfd":
        options["fd"] = os.memfd_create("ram")
    elif kind == "larger pages":
        options["host_page_size"] = 16 * PAGE
    some = block(4 * MIB, **options)
    if kind == "memfd":
        os.close(options["fd"])
    if kind == "touched":
        some.view[:] = 7
    some.view[MIB : MIB + 100] = 9
    some.start(write_natively, 2, 5)
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", max_bandwidth=64 * MIB)
    assert outgoing.wait(FOREVER)
    assert image_memory(tmp_path / "vm") == {"ram": some.then}
    assert outgoing.query().snapshot.faults > 0


def test_untouched_memory_takes_none(block, tmp_path):
    some = block(64 * MIB)
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}")
    outgoing.wait(FOREVER)
    assert (tmp_path / "vm").stat().st_size < MIB
    info = outgoing.query()
    assert info.ram.duplicate == 64 * MIB // PAGE
    assert info.ram.normal == 0


def test_without_detection_zero_pages_are_pages(block, tmp_path):
    some = block()
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", zero_page_detection="none")
    outgoing.wait(FOREVER)
    assert outgoing.query().ram.duplicate == 0
    assert image_memory(tmp_path / "vm") == {"ram": bytes(2 * MIB)}


def test_memory_that_is_not_plugged_in_is_neither_read_nor_protected(block, tmp_path):
    some = block()
    some.guest.discarded = {"ram": [(0, 100), (300, 212)]}
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", max_bandwidth=PAGE)
    await_faultable(outgoing)
    some.view[: 100 * PAGE] = 1
    some.view[300 * PAGE :] = 1
    assert outgoing.query().snapshot.faults == 0
    some.view[100 * PAGE : 300 * PAGE] = 1
    assert outgoing.wait(FOREVER)
    with open_image(tmp_path / "vm") as image:
        (summary,) = image.blocks
        assert (summary.data, summary.zero, summary.missing) == (0, 200, 312)


def await_faultable(outgoing: OutgoingMigration) -> None:
    """Return when the guest runs on after the pause."""
    end = time.monotonic() + FOREVER
    while outgoing.query().snapshot is None or outgoing.query().snapshot.pause is None:
        assert time.monotonic() < end
        time.sleep(0.001)


# ---- the guest runs on -----------------------------------------------------------------------


def test_pages_that_are_written_to_are_not_held_up_by_the_bandwidth(block, tmp_path):
    """At a page a second the rest would take minutes."""
    some = block()
    some.view[:] = 3
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", max_bandwidth=PAGE)
    await_faultable(outgoing)
    some.view[:] = 4
    assert outgoing.wait(FOREVER)
    assert outgoing.query().snapshot.faults > 500
    assert image_memory(tmp_path / "vm") == {"ram": b"\3" * 2 * MIB}


def test_a_guest_that_stands_still_stays_so(block, tmp_path):
    some = block()
    some.guest.stop()
    resumed = []
    some.guest._on_resume = lambda: resumed.append(True)
    snapshot(some.guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    assert not some.guest.running
    assert not resumed


def test_to_a_destination_that_runs_it(stack, tmp_path):
    """Two guests of one origin."""
    guest = stack.enter_context(ProcessGuest(2 * MIB, workers=2, rate=0))
    guest.start()
    clone = stack.enter_context(ProcessGuest(2 * MIB))
    incoming = IncomingMigration(clone)
    incoming.listen(f"unix:{tmp_path / 's'}")
    outgoing = snapshot(guest, f"unix:{tmp_path / 's'}")
    assert incoming.wait(FOREVER)
    assert outgoing.wait(FOREVER)
    clone.resume()
    await_writes(clone, 100)
    await_writes(guest, 100)
    assert clone.verify().ok
    assert guest.verify().ok


def test_into_a_command(stack, tmp_path):
    guest = stack.enter_context(Remembering(2 * MIB, rate=0))
    guest.start()
    snapshot(guest, f"exec:cat > {tmp_path / 'vm'}").wait(FOREVER)
    assert image_memory(tmp_path / "vm") == guest.memory_then


def test_again_and_again(stack, tmp_path):
    guest = stack.enter_context(Remembering(MIB, rate=0))
    guest.start()
    for number in range(5):
        snapshot(guest, f"file:{tmp_path / str(number)}").wait(FOREVER)
        assert image_memory(tmp_path / str(number)) == guest.memory_then
    assert guest.verify().ok


def test_the_log_of_an_ordinary_migration_is_left_alone(stack, tmp_path):
    class Log(SharedDirtyLog):
        def start(self) -> None:
            raise AssertionError

    guest = stack.enter_context(
        ProcessGuest(MIB, dirty=lambda memory: Log({b.idstr: b.pages.npages for b in memory}))
    )
    guest.start()
    assert snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)


# ---- a destination that does not read --------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch):
    """The URI of a connection that takes a little, and then nothing."""
    monkeypatch.setattr(snapshot_memory, "LIMIT", 64 * PAGE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        yield f"fd:{ours.fileno()}"


@pytest.mark.parametrize("write", [write_natively, write_in_python])
def test_who_writes_does_not_wait_for_ever(block, stuck, write):
    # the walk has 4 MiB of them when it gets stuck
    some = block(16 * MIB)
    some.view[:] = 1
    outgoing = snapshot(some.guest, stuck)
    await_faultable(outgoing)
    if write is write_natively:
        LIBC.memset(some.address, 2, some.nbytes)
    else:
        some.view[:] = 2
    assert outgoing.query().snapshot.waits > 0
    outgoing.cancel()
    with pytest.raises(CancelledError):
        outgoing.wait(FOREVER)
    assert (some.view == 2).all()


def test_a_cancel_wakes_who_waits(stack, stuck):
    guest = stack.enter_context(ProcessGuest(8 * MIB, workers=3, rate=0, seed=8))
    guest.start()
    outgoing = snapshot(guest, stuck)
    end = time.monotonic() + FOREVER
    while outgoing.query().snapshot is None or not outgoing.query().snapshot.waits:
        assert time.monotonic() < end
        time.sleep(0.001)
    outgoing.cancel()
    with pytest.raises(CancelledError):
        outgoing.wait(FOREVER)
    assert outgoing.status == Status.CANCELLED
    assert guest.running
    assert protected() == 0
    await_writes(guest, 5000)
    assert guest.verify().ok


@pytest.mark.parametrize("bandwidth", [0, MIB])
@pytest.mark.parametrize("command", ["false", "head -c 100000 >/dev/null", "exit 3; cat"])
def test_a_failure_leaves_the_guest_as_it_was(stack, command, bandwidth):
    guest = stack.enter_context(ProcessGuest(4 * MIB, workers=2, rate=0, seed=9))
    guest.start()
    outgoing = snapshot(guest, f"exec:{command}", max_bandwidth=bandwidth)
    with pytest.raises(ChannelError):
        outgoing.wait(FOREVER)
    assert outgoing.status == Status.FAILED
    assert guest.running
    assert protected() == 0
    await_writes(guest, 2000)
    assert guest.verify().ok


@pytest.mark.parametrize("where", ["stop", "save_devices", "resume"])
def test_what_fails_at_the_pause_leaves_nothing_behind(stack, tmp_path, where, monkeypatch):
    guest = stack.enter_context(ProcessGuest(MIB, rate=0))
    guest.start()
    original, failed = getattr(guest, where), []

    def fail() -> bytes:
        result = original()
        if not failed:
            failed.append(True)
            raise RuntimeError("on purpose")
        return result

    monkeypatch.setattr(guest, where, fail)
    with pytest.raises(Exception, match="on purpose"):
        snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    assert guest.running
    await_writes(guest, 100)
    assert guest.verify().ok


def test_a_cancel_at_any_time(stack, tmp_path):
    guest = stack.enter_context(ProcessGuest(4 * MIB, workers=2, rate=0, seed=10))
    guest.start()
    rng = random.Random(1)
    for number in range(12):
        outgoing = snapshot(guest, f"file:{tmp_path / str(number)}", max_bandwidth=200 * MIB)
        time.sleep(rng.random() * 0.02)
        outgoing.cancel()
        with contextlib.suppress(CancelledError):
            outgoing.wait(FOREVER)
        assert outgoing.status in (Status.CANCELLED, Status.COMPLETED)
        assert guest.running
    await_writes(guest, 500)
    assert guest.verify().ok


# ---- what cannot be --------------------------------------------------------------------------


CONFLICTS = [
    "postcopy-ram",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "compress",
    "xbzrle",
    "validate-uuid",
]


@pytest.mark.parametrize("other", CONFLICTS)
def test_what_it_does_not_go_with_in_the_words_of_qemu(block, other):
    with pytest.raises(OptionError, match=f"Background-snapshot is not compatible with {other}"):
        OutgoingMigration(block().guest, capabilities={"background-snapshot", other})


def test_a_kernel_that_does_not_do_it(block, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot_memory, "refusal", lambda method: "Linux 5.7 can")
    outgoing = OutgoingMigration(block().guest, capabilities={"background-snapshot"})
    with pytest.raises(
        OptionError, match="Background-snapshot is not supported by host kernel: Linux 5.7 can"
    ):
        outgoing.start(f"file:{tmp_path / 'vm'}")
    assert outgoing.status == Status.NONE


def test_memory_that_cannot_be_protected(tmp_path):
    buffer = bytearray(64 * PAGE + 1)
    memory = GuestMemory()
    memory.add("ram", 32 * PAGE, memoryview(buffer)[1 : 32 * PAGE + 1])
    guest = MemoryGuest("m", memory)
    with pytest.raises(
        OptionError,
        match="Background-snapshot is not compatible with guest memory configuration: the memory",
    ):
        snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    assert guest.running
    memory.close()


def test_an_image_cannot_be_one(stack, tmp_path):
    guest = stack.enter_context(ProcessGuest(MIB))
    guest.start()
    snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    with open_image(tmp_path / "vm") as image, pytest.raises(OptionError, match="memory"):
        snapshot(image, f"file:{tmp_path / 'again'}").wait(FOREVER)


# ---- KVM -------------------------------------------------------------------------------------


def test_a_virtual_machine(stack, tmp_path):
    try:
        probe()
    except KvmUnavailableError as error:
        pytest.skip(f"KVM: {error}")

    def make() -> KvmGuest:
        memory = GuestMemory()
        memory.add("ram0", 1024 * PAGE)
        memory.add("ram1", 77 * PAGE)
        stack.callback(memory.close)
        guest = KvmGuest(memory, vcpus=2)
        stack.callback(guest.close)
        return guest

    guest = make()
    guest.boot()
    guest.resume()
    assert guest.wait_heartbeats(2, FOREVER)
    outgoing = snapshot(guest, f"file:{tmp_path / 'vm'}", max_bandwidth=20 * MIB)
    assert outgoing.wait(FOREVER)
    assert outgoing.query().snapshot.faults > 0
    assert guest.wait_heartbeats(2, FOREVER)
    guest.check()

    restored = make()
    incoming = IncomingMigration(restored)
    incoming.listen(f"file:{tmp_path / 'vm'}")
    assert incoming.wait(FOREVER)
    assert restored.verify() == []
    restored.resume()
    assert restored.wait_heartbeats(2, FOREVER)
    restored.stop()
    restored.check()
    assert restored.verify() == []


# ---- FrozenMemory and its kernels ------------------------------------------------------------


def frozen(some: Block, **options) -> snapshot_memory.FrozenMemory:
    memory = snapshot_memory.FrozenMemory(some.guest.source_blocks(), **options)
    memory.freeze()
    return memory


def test_statistics_of_a_snapshot_that_has_not_begun():
    assert SnapshotStats(pause=None, faults=0, waits=0).pause is None


def test_copies_are_taken_by_ascending_page_and_their_room_is_used_again(block):
    some = block()
    some.view[:] = 1
    blocks = some.guest.source_blocks()
    memory = snapshot_memory.FrozenMemory(blocks)
    memory.freeze()
    try:
        for first in (300, 5, 100):
            LIBC.memset(some.address + first * PAGE + 17, 2, 2 * PAGE)
        taken = [(batch.index.tolist(), cleared) for batch, cleared in memory.copies()]
        assert taken == [([5, 6, 7, 100, 101, 102, 300, 301, 302], 9)]
        assert memory.faults == 9
        assert not blocks[0].dirty[5]
        assert blocks[0].dirty[4]
        assert memory._core.waiting_bytes == 0
        assert list(memory.copies()) == []
    finally:
        memory.close()


def test_memory_is_frozen_once(block):
    """A second userfaultfd cannot have it."""
    some = block()
    first = frozen(some)
    try:
        with pytest.raises(OptionError, match="guest memory configuration"):
            frozen(some)
        LIBC.memset(some.address, 1, PAGE)
        assert first.faults == 1
    finally:
        first.close()


def test_it_holds_memory_until_it_is_closed(block):
    some = block()
    memory = frozen(some)
    with pytest.raises(BufferError):
        some.memory["ram"].pages.release()
    memory.close()
    memory.close()
    assert memory.fd == -1
    with pytest.raises(ValueError, match="closed"):
        memory.freeze()


def test_numbers_are_checked(block):
    some = block()
    memory = frozen(some)
    core = memory._core
    index = np.array([512], dtype=np.uint64)
    try:
        with pytest.raises(IndexError):
            core.save(0, index)
        with pytest.raises(IndexError):
            core.save(1, index[:0])
        with pytest.raises(IndexError):
            core.free(0, index)
        with pytest.raises(ValueError, match="bitmap"):
            core.take(0, index, _core.Bitmap(5))
        assert core.save(0, index[:0]) == 0
        assert core.take(0, index[:0], _core.Bitmap(512)) == (0, 0)
    finally:
        memory.close()
