"""WriteTracker: every page that was written, none that was not, and nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mig
from mig import Bitmap, GuestMemory, WriteTracker, _core
from mig.dirty import track
from mig.errors import DirtyLogError

HOST = mmap.PAGESIZE
HUGE = 2 << 20
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def works(method: str) -> bool:
    try:
        _core.probe_write_log(method)
    except OSError:
        return False
    return True


def method_param(name: str) -> Any:
    return pytest.param(
        name, marks=pytest.mark.skipif(not works(name), reason=f"{name} does not work here")
    )


METHODS = [method_param(name) for name in track.METHODS]


def anonymous(nbytes: int, advice: int = mmap.MADV_NOHUGEPAGE) -> mmap.mmap:
    """Private memory, aligned for huge pages."""
    raw = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw.madvise(advice)
    return raw


def memfd(nbytes: int, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    fd = os.memfd_create("guest")
    try:
        os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes, flags=flags)
    finally:
        os.close(fd)


KINDS: dict[str, Callable[[int], mmap.mmap]] = {
    "small": anonymous,
    "huge": lambda n: anonymous(n, mmap.MADV_HUGEPAGE),
    "memfd": memfd,
    "private memfd": lambda n: memfd(n, mmap.MAP_PRIVATE),
}


class Guest:
    """One block, as bytes by page, and a tracker that is started."""

    def __init__(
        self,
        method: str,
        buffer: Any,
        page_size: int = HOST,
        *,
        fill: int | None = None,
        user_mode_only: bool = False,
    ) -> None:
        self.memory = GuestMemory(page_size)
        self.block = self.memory.add("a", len(buffer), buffer)
        self.pages = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, page_size)
        if fill is not None:
            self.pages[:] = fill
        self.tracker = WriteTracker(self.memory, method=method, user_mode_only=user_mode_only)
        self.tracker.start()

    def dirty(self) -> list[int]:
        """Pages that were written since the last call."""
        dirty = Bitmap(len(self.pages))
        count = self.tracker.sync("a", dirty)
        index: list[int] = dirty.indexes().tolist()
        assert count == len(index)
        return index

    def discard(self, first: int, npages: int) -> None:
        size = self.memory.page_size
        at = self.block.pages.hva + first * size
        assert LIBC.madvise(at, npages * size, mmap.MADV_DONTNEED) == 0

    def smaps(self) -> dict[str, str]:
        """What the kernel says of the mapping that the block is in."""
        found: dict[str, str] = {}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, value = line.partition(":")
            if "-" in name.split()[0] and not name[0].isupper():
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = start <= self.block.pages.hva < end
            elif inside:
                found[name] = value.strip()
        return found

    def mappings(self) -> int:
        """How many mappings the kernel has made of the block."""
        first, end = self.block.pages.hva, self.block.pages.hva + self.block.used_length
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines]
        return sum(int(low, 16) < end and int(high, 16) > first for low, high in spans)

    def resident_kib(self) -> int:
        return int(self.smaps()["Rss"].split()[0])


@pytest.fixture
def guests() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(*args: Any, **kwargs: Any) -> Guest:
        made.append(Guest(*args, **kwargs))
        return made[-1]

    yield make
    for guest in made:
        guest.tracker.stop()


def in_threads(*work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filled", [False, True], ids=["untouched", "filled"])
def test_exactly_the_written_pages_are_dirty(guests, method, kind, filled):
    if kind == "huge" and not filled:
        pytest.skip("the first write makes a huge page: see there")
    guest = guests(method, KINDS[kind](2 * HUGE), fill=1 if filled else None)
    npages, rng = len(guest.pages), np.random.default_rng(4)
    assert guest.dirty() == []
    for share in (0.001, 0.05, 0.6, 1):
        written = rng.random(npages) < share
        written[[0, npages - 1]] = True
        index = np.flatnonzero(written)
        offsets = rng.integers(0, HOST, len(index))

        def write(part: int, index: Any = index, offsets: Any = offsets) -> Callable[[], None]:
            def run() -> None:
                for at in (index * HOST + offsets)[part::3].tolist():
                    # without the GIL
                    LIBC.memset(ctypes.c_void_p(guest.block.pages.hva + at), 7, 1)

            return run

        in_threads(*map(write, range(3)))
        assert guest.dirty() == index.tolist()
        assert guest.dirty() == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_reading_dirties_nothing_and_takes_no_memory(guests, method, kind):
    guest = guests(method, KINDS[kind](16 * HUGE))
    if "memfd" not in kind:
        assert guest.dirty() == []
        assert guest.resident_kib() == 0
    assert int(guest.pages.sum(dtype=np.uint64)) == 0
    assert guest.dirty() == []
    assert guest.dirty() == []
    if "memfd" not in kind:
        assert guest.resident_kib() == 0
    guest.pages[[3, 1000]] = 1
    assert guest.dirty() == [3, 1000]


@pytest.mark.parametrize("method", METHODS)
def test_memory_that_nobody_touches_stays_untouched(guests, method):
    guest = guests(method, anonymous(128 * HUGE))
    for _ in range(3):
        assert guest.dirty() == []
    guest.pages[77, 0] = 1
    assert guest.dirty() == [77]
    assert guest.resident_kib() == HOST >> 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("page_size", [HOST, 16 * HOST, 256 * HOST])
def test_a_target_page_is_dirty_when_any_host_page_of_it_is(guests, method, page_size):
    guest = guests(method, anonymous(HUGE * 4), page_size, fill=1)
    npages = len(guest.pages)
    for offset in range(0, page_size, page_size // 8):
        for page in {0, 1, npages // 2, npages - 1}:
            guest.pages[page, offset] = 2
            assert guest.dirty() == [page]
    guest.pages[:, -1] = 3
    assert guest.dirty() == list(range(npages))


@pytest.mark.parametrize("method", METHODS)
def test_a_huge_page_is_dirty_where_it_was_written(guests, method):
    guest = guests(method, anonymous(4 * HUGE, mmap.MADV_HUGEPAGE), fill=1)
    if not int(guest.smaps()["AnonHugePages"].split()[0]):
        pytest.skip("the kernel gives no huge pages")
    assert guest.dirty() == []
    guest.pages[[5, 600, 601]] = 2
    assert guest.dirty() == [5, 600, 601]
    guest.pages[:] = 3
    assert guest.dirty() == list(range(len(guest.pages)))
    guest.pages[5] = 4
    assert guest.dirty() == [5]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_write_to_a_huge_page_may_dirty_all_of_it_and_no_more(guests, method):
    guest = guests(method, anonymous(8 * HUGE, mmap.MADV_HUGEPAGE))
    in_huge = HUGE // HOST
    guest.pages[3 * in_huge + 5, 1] = 1
    first = -(guest.block.pages.hva // HOST) % in_huge
    start = first + (3 * in_huge + 5 - first) // in_huge * in_huge
    dirty = guest.dirty()
    assert 3 * in_huge + 5 in dirty
    assert set(dirty) <= set(range(start, start + in_huge))
    assert guest.resident_kib() <= HUGE >> 10
    guest.pages[3 * in_huge + 7, 1] = 1
    assert guest.dirty() == [3 * in_huge + 7]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["small", "memfd"])
@pytest.mark.parametrize("filled", [False, True], ids=["untouched", "filled"])
def test_what_the_kernel_writes_is_dirty(guests, method, kind, filled, tmp_path):
    guest = guests(method, KINDS[kind](HUGE), fill=1 if filled else None)
    path = tmp_path / "data"
    path.write_bytes(b"x" * (2 * HOST))
    with path.open("rb") as file:
        into = memoryview(guest.pages.reshape(-1))[10 * HOST + 5 :][: 2 * HOST]
        assert os.preadv(file.fileno(), [into], 0) == 2 * HOST
    assert guest.dirty() == [10, 11, 12]
    assert bytes(into) == b"x" * (2 * HOST)


@pytest.mark.skipif(not works("userfaultfd"), reason="userfaultfd does not work here")
def test_without_privileges_faults_let_the_kernel_write_nothing(guests):
    guest = guests("userfaultfd", anonymous(HUGE), user_mode_only=True)
    guest.pages[3] = 1
    with Path("/dev/zero").open("rb") as file, pytest.raises(OSError, match="Bad address"):
        os.preadv(file.fileno(), [memoryview(guest.pages[7])], 0)
    assert guest.dirty() == [3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("touch", ["read", "write"])
def test_memory_given_back_is_dirty_once_it_is_used_again(guests, method, touch):
    """As a page is that the kernel replaces by its page of zeros."""
    guest = guests(method, anonymous(HUGE), fill=1)
    guest.discard(8, 4)
    if touch == "read":
        assert not guest.pages[9].any()
    else:
        guest.pages[9] = 1
    assert guest.dirty() == [9]
    assert guest.dirty() == []
    guest.pages[9] = 2
    assert guest.dirty() == [9]


def counters(guest: Guest) -> Any:
    return guest.pages.reshape(-1).view(np.uint64).reshape(len(guest.pages), -1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_write_is_lost_between_writers_and_syncs(guests, method, kind):
    """What is copied after each sync becomes equal to memory, whatever the writers do meanwhile."""
    guest = guests(method, KINDS[kind](2 * HUGE), fill=0)
    words, replica = counters(guest), counters(guest).copy()
    npages = len(words)
    done = threading.Event()

    def sweep(word: int) -> None:
        """All pages again and again; numpy lets go of the GIL for so many."""
        column = words[:, word]
        while not done.is_set():
            np.add(column, 1, out=column)

    def scatter(word: int) -> None:
        rng = np.random.default_rng(word)
        while not done.is_set():
            words[rng.integers(0, npages, 20), word] += 1

    def collect() -> int:
        dirty = Bitmap(npages)
        count = guest.tracker.sync("a", dirty)
        index = dirty.indexes()
        replica[index] = words[index]
        return count

    writers = [threading.Thread(target=sweep, args=(i,)) for i in (0, 511)]
    writers.append(threading.Thread(target=scatter, args=(100,)))
    for thread in writers:
        thread.start()
    try:
        rounds = moved = 0
        while rounds < 300 or moved < 10 * npages:
            moved += collect()
            rounds += 1
    finally:
        done.set()
        for thread in writers:
            thread.join()
    collect()
    assert np.array_equal(replica, words)
    assert collect() == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_write_before_a_sync_is_in_it(guests, method):
    """Not in the next: the last sync of a migration has no next. Writer and sync take turns."""
    guest = guests(method, anonymous(4 * HUGE), fill=0)
    hva, npages = guest.block.pages.hva, len(guest.pages)
    rng = np.random.default_rng(9)
    for _ in range(200):
        pages = rng.integers(0, npages, 8).tolist()
        # two writers at the same pages: what stops one must not let the other through unseen
        work = [
            lambda pages=pages: [LIBC.memset(ctypes.c_void_p(hva + p * HOST), 1, 1) for p in pages]
        ] * 2
        in_threads(*work)
        assert guest.dirty() == sorted(set(pages))


@pytest.mark.parametrize("method", METHODS)
def test_several_blocks_each_have_their_bits(method):
    memory = GuestMemory()
    # too small for huge pages
    blocks = [memory.add(name, n * HOST) for name, n in [("a", 3), ("b", 400), ("c", 64)]]
    memory.add("shared", 70 * HOST, memfd(70 * HOST))
    tracker = WriteTracker(memory, method=method)
    tracker.start()
    try:
        blocks[0].view[HOST] = 1
        blocks[1].view[399 * HOST] = 1
        memory["shared"].view[69 * HOST] = 1
        found = {}
        for block in memory:
            dirty = Bitmap(block.pages.npages)
            tracker.sync(block.idstr, dirty)
            found[block.idstr] = dirty.indexes().tolist()
        assert found == {"a": [1], "b": [399], "c": [], "shared": [69]}
    finally:
        tracker.stop()
    memory.close()


@pytest.mark.parametrize("method", METHODS)
def test_sync_adds_to_the_bitmap_and_counts_what_is_new(guests, method):
    guest = guests(method, anonymous(HUGE), fill=0)
    dirty = Bitmap(len(guest.pages))
    dirty.set(4)
    dirty.set(9)
    guest.pages[[4, 5]] = 1
    assert guest.tracker.sync("a", dirty) == 1
    assert dirty.indexes().tolist() == [4, 5, 9]


def footprint() -> tuple[int, int]:
    """Open descriptors and threads."""
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def assert_back_to(before: tuple[int, int]) -> None:
    """No more than before; the kernel may list a thread a little longer than until it was joined.

    So it may have listed one of another test before.
    """
    end = time.monotonic() + 10
    while any(map(int.__gt__, now := footprint(), before)) and time.monotonic() < end:
        time.sleep(0.001)
    assert now[0] <= before[0]
    assert now[1] <= before[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_tracking_starts_again_and_leaves_nothing_behind(guests, method, kind):
    guest = guests(method, KINDS[kind](HUGE), fill=0)
    guest.tracker.stop()
    mappings, before = guest.mappings(), footprint()
    for i in range(20):
        guest.pages[3] = i
        guest.tracker.start()
        guest.pages[7] = i
        assert guest.dirty() == [7]
        guest.pages[8] = i
        guest.tracker.stop()
        assert_back_to(before)
        assert not {"uw", "um"} & set(guest.smaps()["VmFlags"].split())
    assert guest.mappings() == mappings
    guest.tracker.start()
    guest.tracker.start()
    assert guest.dirty() == []
    guest.tracker.stop()
    guest.tracker.stop()
    assert_back_to(before)


@pytest.mark.parametrize("method", METHODS)
def test_writers_that_are_stopped_go_on_when_tracking_ends(guests, method):
    guest = guests(method, anonymous(4 * HUGE), fill=0)
    words, done = counters(guest), threading.Event()

    def sweep() -> None:
        while not done.is_set():
            np.add(words[:, 0], 1, out=words[:, 0])

    writer = threading.Thread(target=sweep)
    writer.start()
    for _ in range(30):
        guest.tracker.start()
        guest.tracker.sync("a", Bitmap(len(guest.pages)))
        guest.tracker.stop()
    done.set()
    writer.join(60)
    assert not writer.is_alive()


@pytest.mark.parametrize("method", METHODS)
def test_a_tracker_that_nobody_stopped_ends_with_its_object(method):
    memory = GuestMemory()
    memory.add("a", HUGE)
    before = footprint()
    tracker = WriteTracker(memory, method=method)
    tracker.start()
    with pytest.raises(BufferError):
        memory.close()
    del tracker
    assert_back_to(before)
    memory.close()


@pytest.mark.parametrize("method", METHODS)
def test_stop_works_when_the_memory_is_gone(method):
    at = LIBC.mmap(None, HUGE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    buffer = (ctypes.c_uint8 * HUGE).from_address(at)
    before = footprint()
    memory = GuestMemory()
    memory.add("a", HUGE, buffer)
    tracker = WriteTracker(memory, method=method)
    tracker.start()
    assert LIBC.munmap(at, HUGE) == 0
    tracker.stop()
    assert_back_to(before)
    memory.close()


@pytest.mark.parametrize("method", METHODS)
def test_memory_that_cannot_be_tracked_is_refused_and_stays_free(method):
    before = footprint()
    memory = GuestMemory()
    raw = anonymous(3 * HOST)
    memory.add("aligned", HOST, memoryview(raw)[:HOST])
    memory.add("odd", HOST, memoryview(raw)[HOST + 64 :][:HOST])
    tracker = WriteTracker(memory, method=method)
    with pytest.raises(ValueError, match="begin at a page of the host"):
        tracker.start()
    assert_back_to(before)
    with pytest.raises(DirtyLogError, match="start"):
        tracker.sync("aligned", Bitmap(1))
    memory.close()


def test_pages_smaller_than_the_hosts_are_refused():
    memory = GuestMemory(1024)
    memory.add("a", HUGE)
    with pytest.raises(ValueError, match="1024 bytes are smaller"):
        WriteTracker(memory)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments_are_refused(guests, method):
    guest = guests(method, anonymous(HUGE))
    with pytest.raises(KeyError):
        guest.tracker.sync("b", Bitmap(1))
    with pytest.raises(ValueError, match="512 pages"):
        guest.tracker.sync("a", Bitmap(1))
    with pytest.raises(ValueError, match="pagemap-scan, userfaultfd"):
        WriteTracker(guest.memory, method="magic")
    guest.tracker.stop()
    with pytest.raises(DirtyLogError, match="start"):
        guest.tracker.sync("a", Bitmap(512))
    assert guest.tracker.chunk_pages == 0
    guest.tracker.clear("a", 0, 512)


def refuse(**codes: int) -> Callable[..., None]:
    def probe(method: str, *, user_mode_only: bool = False) -> None:
        code = codes.get(method.replace("-", "_"))
        if code:
            raise OSError(code, os.strerror(code))

    return probe


def test_the_best_method_that_works_is_taken(monkeypatch):
    memory = GuestMemory()
    monkeypatch.setattr(_core, "probe_write_log", refuse())
    tracker = WriteTracker(memory)
    assert (tracker.method, tracker.reason) == ("pagemap-scan", None)
    tracker = WriteTracker(memory, method="userfaultfd")
    assert tracker.method == "userfaultfd"
    assert "asked for" in str(tracker.reason)
    monkeypatch.setattr(_core, "probe_write_log", refuse(pagemap_scan=errno.EOPNOTSUPP))
    tracker = WriteTracker(memory)
    assert tracker.method == "userfaultfd"
    assert "Linux 6.7" in str(tracker.reason)


def test_where_nothing_works_the_error_says_what_to_do(monkeypatch):
    memory = GuestMemory()
    both = refuse(pagemap_scan=errno.EOPNOTSUPP, userfaultfd=errno.EPERM)
    monkeypatch.setattr(_core, "probe_write_log", both)
    with pytest.raises(DirtyLogError) as raised:
        WriteTracker(memory)
    for word in ("6.7", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1", "/dev/userfaultfd"):
        assert word in str(raised.value)
    monkeypatch.setattr(_core, "probe_write_log", refuse(pagemap_scan=38, userfaultfd=38))
    with pytest.raises(DirtyLogError, match=r"^[^;]*CONFIG_USERFAULTFD$"):
        WriteTracker(memory)
    with pytest.raises(DirtyLogError, match="CONFIG_USERFAULTFD"):
        WriteTracker(memory, method="userfaultfd")


UNPRIVILEGED = """
import ctypes, os, mig, mmap
from pathlib import Path
libc = ctypes.CDLL(None)
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is this process's own again
memory = mig.GuestMemory(mmap.PAGESIZE)
block = memory.add("a", 600 * mmap.PAGESIZE)
block.view[:] = bytes(len(block.view))
def dirty(tracker):
    bits = mig.Bitmap(600); tracker.sync("a", bits); return bits.indexes().tolist()
tracker = mig.WriteTracker(memory)
tracker.start()
block.view[5 * mmap.PAGESIZE] = 1
with Path("/dev/zero").open("rb") as file:
    os.preadv(file.fileno(), [block.view[7 * mmap.PAGESIZE:][:10]], 0)
print(tracker.method, dirty(tracker))
tracker.stop()
try:
    mig.WriteTracker(memory, method="userfaultfd")
except mig.MigError as error:
    print(error)
tracker = mig.WriteTracker(memory, method="userfaultfd", user_mode_only=True)
tracker.start()
block.view[5 * mmap.PAGESIZE] = 1
print(tracker.method, dirty(tracker))
tracker.stop()
"""


@pytest.mark.skipif(not works("pagemap-scan"), reason="pagemap-scan does not work here")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its privileges")
def test_a_process_without_privileges_tracks_by_pagemap_scan():
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is set")
    # the package may lie where only root can read: it is imported before
    folder = str(Path(mig.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-P", "-c", UNPRIVILEGED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folder},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "pagemap-scan [5, 7]"
    assert "CAP_SYS_PTRACE" in lines[1]
    assert lines[2] == "userfaultfd [5]"
