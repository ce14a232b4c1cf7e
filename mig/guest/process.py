"""ProcessGuest: memory of this process that native threads write, and check before they do."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from mig import _core
from mig.dirty import DirtyLog, SharedDirtyLog
from mig.errors import MigError, MismatchError
from mig.guest import clock
from mig.guest.base import VcpuThrottle
from mig.guest.vcpus import VcpuGuest
from mig.memory import GuestMemory
from mig.records import BlockInfo
from mig.savevm.devices import DeviceState
from mig.savevm.registry import DeviceRegistry
from mig.wire import DEFAULT_PAGE_BITS

RAM = "ram"
LEDGER = "ledger"
_MACHINE = "mig-process"
_DEVICE = "workers"
_ENTRY = 8  # bytes of the ledger for each page
_ROUND_PAGES = 4096  # nothing is taken off a worker: as many as KVM guests' rings have
_FIELD = {name: column for column, name in enumerate(_core.WORKER_FIELDS)}


@dataclass(frozen=True, slots=True)
class CorruptPage:
    """A page of `ram` that is not what the ledger says.

    count:    how often it was written, by the ledger
    offset:   bytes from the page's start to the first 8 that are wrong
    expected, found: these 8 bytes, as little-endian numbers
    """

    page_index: int
    count: int
    offset: int
    expected: int
    found: int

    def __str__(self) -> str:
        return (
            f"page {self.page_index} after {self.count} writes: {self.found:#018x} at offset "
            f"{self.offset}, not {self.expected:#018x}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestCounters:
    """What the guest's workers have done, at the source and here.

    ticks:          how often workers came around their loops; each does every millisecond
    writes:         pages written
    bytes_written:  the memory that this dirtied: whole pages, whatever of them changed
    longest_gap:    seconds between two ticks of one worker at most, verify() apart
    switchover_gap: seconds between the last tick at the source and the first here, None when the
                    guest was not migrated, has not run since, or comes from another boot
    refused:        writes that were left out because the page was corrupt
    first_refused:  the first of them of each worker
    """

    ticks: int
    writes: int
    bytes_written: int
    longest_gap: float
    switchover_gap: float | None
    refused: int
    first_refused: tuple[CorruptPage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestReport(GuestCounters):
    """What verify() found.

    npages:    pages of `ram` that were checked: all
    ncorrupt:  how many are not what the ledger says
    corrupt:   the first few of them
    ledger_ok: whether the ledger has the checksum that the workers' own state has
    """

    npages: int
    ncorrupt: int
    corrupt: tuple[CorruptPage, ...]
    ledger_ok: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and nothing was found wrong before."""
        return self.ledger_ok and not self.ncorrupt and not self.refused


@dataclass(frozen=True, slots=True)
class _Load:
    """The configuration as the device state has it; names of fields as in ProcessGuest."""

    seed: int
    npages: int
    set_pages: int
    rate: int
    page_size: int
    workers: int
    pattern: str
    fill: str

    # seed, npages, set_pages, rate, page size, workers, pattern, fill, boot id
    FORMAT: ClassVar = struct.Struct(">QQQQIHBB16s")

    def check(self) -> None:
        """ValueError where it cannot be."""
        for name, value, known in (
            ("pattern", self.pattern, _core.PATTERNS),
            ("fill", self.fill, _core.FILLS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
        if not 1 <= self.workers <= _core.MAX_WORKERS:
            raise ValueError(f"{self.workers} workers: 1 to {_core.MAX_WORKERS} can be")
        if not self.workers <= self.set_pages <= self.npages:
            raise ValueError(
                f"a working set of {self.set_pages} of {self.npages} pages for {self.workers} "
                f"workers"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed} is not a 64-bit number")
        _check_rate(self.rate)

    def encode(self, boot_id: bytes) -> bytes:
        return self.FORMAT.pack(
            self.seed,
            self.npages,
            self.set_pages,
            self.rate,
            self.page_size,
            self.workers,
            _core.PATTERNS[self.pattern],
            _core.FILLS[self.fill],
            boot_id,
        )

    @classmethod
    def decode(cls, payload: bytes) -> tuple[_Load, bytes]:
        """Return the configuration and the boot id; ValueError where it cannot be."""
        if len(payload) < cls.FORMAT.size:
            raise ValueError(f"{len(payload)} bytes are no state of a process guest")
        *words, page_size, workers, pattern, fill, boot_id = cls.FORMAT.unpack_from(payload)
        patterns = {number: name for name, number in _core.PATTERNS.items()}
        fills = {number: name for name, number in _core.FILLS.items()}
        seed, npages, set_pages, rate = words
        load = cls(
            seed=seed,
            npages=npages,
            set_pages=set_pages,
            rate=rate,
            page_size=page_size,
            workers=workers,
            pattern=patterns.get(pattern, str(pattern)),
            fill=fills.get(fill, str(fill)),
        )
        load.check()
        return load, boot_id


class _Workers:
    """VcpuThrottle of workers. A page counts at every write, in a ring once until it is taken."""

    round_pages = _ROUND_PAGES

    def __init__(self, workload: _core.Workload) -> None:
        self._workload = workload
        self.page_size = workload.ram.page_size

    def dirty_pages(self) -> Sequence[int]:
        writes = self._workload.state()[:, _FIELD["writes"]]
        return [int(count) for count in writes]

    def throttle_vcpu(self, vcpu: int, share: float) -> None:
        self._workload.limit(vcpu, share)


class ProcessGuest(VcpuGuest):
    """A guest whose vCPUs are threads of this process, which write its memory.

    nbytes:      of RAM block `ram`; block `ledger` comes on top, 8 bytes for each page
    workers:     number of threads; each owns a part of the pages
    rate:        bytes of dirtied memory per second of running, of all workers; 0: no limit
    pattern:     'full': whole pages, random order; 'words': one word in every 512 bytes of a page,
                 random order; 'sequential': whole pages in order; 'hot': whole pages, nine of ten
                 writes in the first tenth of the working set
    working_set: the part of `ram` that is written: a share (float) or bytes (int)
    fill:        what pages hold before they are first written: 'random', 'zero', or 'half': every
                 second page is zero; 'compressible': the second half of each page repeats a word,
                 also after it was written
    seed:        of all that is random
    dirty:       'marked': the workers mark what they write; or what makes a log for the memory

    What a page holds follows from seed, page, and the page's count in the ledger. A worker checks
    the page before it writes it again; one that is wrong stays as it is, for verify() to find.

    A source is begun with start(). A destination needs the same nbytes and page size only, all
    else comes from the stream; resume() then lets its workers go on from where the source stopped.

    ValueError for what cannot be. Methods may be called by any thread, close() after all others.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        page_size: int = 1 << DEFAULT_PAGE_BITS,
        workers: int = 1,
        rate: int = 50 << 20,
        pattern: str = "full",
        working_set: float = 1.0,
        fill: str = "random",
        seed: int = 1,
        dirty: Literal["marked"] | Callable[[GuestMemory], DirtyLog] = "marked",
    ) -> None:
        memory = GuestMemory(page_size)
        npages = nbytes // page_size
        set_pages = _working_set(working_set, npages, page_size)
        self._load = _Load(seed, npages, set_pages, rate, page_size, workers, pattern, fill)
        self._load.check()
        memory.add(RAM, nbytes)
        memory.add(LEDGER, -(-npages * _ENTRY // page_size) * page_size)
        self._marks: tuple[_core.Bitmap, _core.Bitmap] | None = None
        devices = DeviceRegistry()
        devices.register(_DEVICE, save=self._save_workers, load=self._load_workers)
        super().__init__(_MACHINE, memory, devices, dirty=self._make_log(memory, dirty))
        self._workload: _core.Workload | None = None
        self._running = False

    def _make_log(
        self, memory: GuestMemory, dirty: Literal["marked"] | Callable[[GuestMemory], DirtyLog]
    ) -> DirtyLog:
        if dirty != "marked":
            return dirty(memory)
        log = SharedDirtyLog({block.idstr: block.pages.npages for block in memory})
        self._marks = log.bitmap(RAM), log.bitmap(LEDGER)
        return log

    # ---- running ----------------------------------------------------------------------------

    @property
    def rate(self) -> int:
        """Bytes of dirtied memory per second of running; may be set at any time."""
        return self._load.rate

    @rate.setter
    def rate(self, rate: int) -> None:
        _check_rate(rate)
        self._load = replace(self._load, rate=rate)
        if self._workload is not None:
            self._workload.set_rate(rate)

    def start(self) -> None:
        """Fill the memory and let the workers run. MigError unless the guest is new."""
        if self._workload is not None or self._incomplete:
            raise MigError("this guest was started, or is being loaded, already")
        for block in self.memory:
            block.take_fresh()  # from now on it is not zeros
        workload = self._make_workload(self._load)
        workload.fill()
        self._workload = workload
        self.resume()

    def stop(self) -> None:
        """Return when no worker writes any more, marks included. Not longer than one write."""
        if self._workload is not None:
            self._workload.pause()
        self._running = False

    def resume(self) -> None:
        """Let the workers run. MigError for a guest that is not there, or not yet."""
        if self._incomplete:
            raise MigError("this guest is being loaded")
        self._existing().resume()
        self._running = True

    def throttle(self, percent: int) -> None:
        """Have each worker stand still for ``percent`` (0 to 99) of the time, like QEMU's vCPUs.

        It runs for 10 ms at a time. The rate is that of running time.
        """
        self._existing().throttle(percent)

    def vcpu_throttle(self) -> VcpuThrottle | None:
        """Return the workers for dirty-limit, None for a guest that is not there."""
        return None if self._workload is None else _Workers(self._workload)

    def counters(self) -> GuestCounters:
        """Return what the workers have done; they go on meanwhile."""
        return GuestCounters(**self._count(self._existing().state()))

    def verify(self) -> GuestReport:
        """Check every page and the ledger; each worker stands still while its pages are checked."""
        workload = self._existing()
        npages, ncorrupt, nledger, corrupt = workload.verify()
        return GuestReport(
            npages=npages,
            ncorrupt=ncorrupt,
            corrupt=tuple(CorruptPage(*page) for page in corrupt),
            ledger_ok=nledger == 0,
            **self._count(workload.state()),
        )

    def close(self) -> None:
        """End the workers and release the memory; BufferError while a migration uses it."""
        self._drop_workload()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- destination ------------------------------------------------------------------------

    @property
    def _nvcpus(self) -> int:
        return self._load.workers

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """MismatchError unless the blocks are this guest's. Its workers are given up."""
        super().open_blocks(blocks, page_size)
        self._drop_workload()

    def abort(self) -> None:
        """Release the memory, with nobody to write it: the guest runs on at the source."""
        super().abort()
        if self._incomplete:
            self._drop_workload()
        self._incomplete = False

    def load_devices(self, state: DeviceState) -> None:
        """Give the sections to the devices; MismatchError when there are no workers in them."""
        super().load_devices(state)
        if self._workload is None:
            raise MismatchError("the stream lacks this guest's workers", section=_DEVICE)

    # ---- device -----------------------------------------------------------------------------

    def _save_workers(self) -> bytes:
        """Configuration and boot id, then each worker's words, big-endian."""
        return self._load.encode(clock.boot_id()) + self._existing().state().astype(">u8").tobytes()

    def _load_workers(self, payload: bytes, version_id: int) -> None:
        if self._workload is not None:
            raise MismatchError("the stream has the workers twice", section=_DEVICE)
        try:
            load, boot_id = _Load.decode(payload)
            if (load.npages, load.page_size) != (self._load.npages, self._load.page_size):
                raise ValueError(f"{load.npages} pages of {load.page_size} bytes are not its own")
            words = np.frombuffer(payload[_Load.FORMAT.size :], dtype=">u8")
            state = words.astype(np.uint64).reshape(load.workers, len(_FIELD))
            if boot_id == clock.NO_BOOT or boot_id != clock.boot_id():
                # times of another clock
                state[:, _FIELD["last_tick"]] = 0
            self._workload = self._make_workload(load)
            self._workload.set_state(state)
        except (ValueError, OSError) as error:
            # OSError: this machine does not let it have so many threads
            self._drop_workload()
            raise MismatchError(str(error), section=_DEVICE) from error
        self._load = load

    # ---- workload ---------------------------------------------------------------------------

    def _make_workload(self, load: _Load) -> _core.Workload:
        return _core.Workload(
            self.memory[RAM].pages,
            self.memory[LEDGER].pages,
            seed=load.seed,
            set_pages=load.set_pages,
            rate=load.rate,
            nworkers=load.workers,
            pattern=load.pattern,
            fill=load.fill,
            marks=self._marks,
        )

    def _existing(self) -> _core.Workload:
        if self._workload is None:
            raise MigError("this guest was neither started nor loaded")
        return self._workload

    def _drop_workload(self) -> None:
        workload, self._workload, self._running = self._workload, None, False
        if workload is not None:
            workload.close()

    def _count(self, state: NDArray[np.uint64]) -> dict[str, Any]:
        """Fields of GuestCounters by name."""
        writes = int(state[:, _FIELD["writes"]].sum())
        at, refused = _FIELD["page"], state[:, _FIELD["refused"]]
        gap = int(state[:, _FIELD["switchover_gap"]].max())
        return {
            "ticks": int(state[:, _FIELD["ticks"]].sum()),
            "writes": writes,
            "bytes_written": writes * self._load.page_size,
            "longest_gap": int(state[:, _FIELD["longest_gap"]].max()) / 1e9,
            "switchover_gap": gap / 1e9 if gap else None,
            "refused": int(refused.sum()),
            "first_refused": tuple(
                CorruptPage(*map(int, row[at : at + 5])) for row in state[refused > 0]
            ),
        }


def _working_set(working_set: float, npages: int, page_size: int) -> int:
    """Return the number of pages of a share or of a number of bytes."""
    if isinstance(working_set, float):
        return max(1, round(npages * working_set))
    return -(-working_set // page_size)


def _check_rate(rate: int) -> None:
    if not 0 <= rate < 1 << 63:
        raise ValueError(f"a rate of {rate} bytes per second")
