"""KvmGuest: a small real virtual machine on /dev/kvm, which dirties its memory and checks it."""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mig import _core
from mig.dirty.kvm import CHUNK_PAGES, KvmDirtyLog, KvmDirtyRing, choose_log
from mig.errors import KvmError, KvmUnavailableError, MigError, MismatchError
from mig.guest.base import VcpuThrottle
from mig.guest.clock import decode_moment, encode_moment
from mig.guest.kvmstate import IDSTR, PARTS, VERSION, decode_state, encode_state
from mig.guest.vcpus import VcpuGuest
from mig.memory import GuestMemory
from mig.savevm.devices import DeviceState

MACHINE = "mig-kvm"
# idstr of the section that says when the vCPUs were stopped
_MOMENT = "kvm-stopped-at"

_PROBE_BYTES = 1 << 20
_PROBE_PASSES = 3
_PROBE_SECONDS = 5.0
_RING_ENTRIES = 4096

# where the program (csrc/kvm_program.c) keeps what it knows: numbers in struct kvm_regs, and the
# place of xmm15 in an XSAVE area
_REGS = struct.Struct("<18Q")
_RBX, _RSI, _R13, _R15 = 1, 4, 13, 15
_KEY = struct.Struct("<400xQ")
_MASK = (1 << 64) - 1
_VERIFY_PAGES = 4096


def probe() -> None:
    """Run a small guest for a moment; KvmUnavailableError says why that is not possible here."""
    memory = GuestMemory(_core.KVM_PAGE)
    block = memory.add("probe", _PROBE_BYTES)
    npages = block.pages.npages
    boot = _core.kvm_boot_pages(npages)
    try:
        vm = _core.KvmVm([block.pages])
        try:
            vm.boot(boot, npages - boot, key=secrets.randbits(64))
            vm.start_log()
            vm.resume()
            ran = vm.wait(0, _PROBE_PASSES, _PROBE_SECONDS)
            vm.stop()
            dirty = _core.Bitmap(npages)
            vm.sync(0, dirty)
            counters = vm.counters(0)
        finally:
            vm.close()
    except KvmUnavailableError:
        raise
    except KvmError as error:
        raise KvmUnavailableError(str(error)) from error
    finally:
        memory.close()
    if not ran:
        raise KvmUnavailableError(f"the probe program did not run: {_why(0, counters)}")
    if counters["corrupt"]:
        raise KvmUnavailableError("the probe program did not find in memory what it had written")
    if dirty.count(boot) != npages - boot:
        raise KvmUnavailableError("the dirty log lacks pages that the probe program had written")


def _why(index: int, counters: _core._KvmCounters) -> str:
    if not counters["failed"]:
        return f"vCPU {index} sent {counters['heartbeats']} heartbeats in {_PROBE_SECONDS:g} s"
    if counters["error"]:
        return f"vCPU {index}: KVM_RUN failed with errno {-counters['error']}"
    return (
        f"vCPU {index} left the guest for exit reason {counters['exit_reason']}"
        f" ({counters['exit_detail']:#x})"
    )


@dataclass(frozen=True, slots=True)
class VcpuProgress:
    """Where a vCPU's program is.

    first, end:    its share of guest pages
    next_page:     the page that it is at
    passes:        whole rounds over its share
    pages_written: in all rounds
    """

    first: int
    end: int
    next_page: int
    passes: int
    pages_written: int


class _RingVcpus:
    """VcpuThrottle of a machine with dirty rings."""

    page_size = _core.KVM_PAGE

    def __init__(self, vm: _core.KvmVm, ring_entries: int) -> None:
        self._vm = vm
        self.round_pages = ring_entries

    def dirty_pages(self) -> Sequence[int]:
        return self._vm.collect()

    def throttle_vcpu(self, vcpu: int, share: float) -> None:
        self._vm.limit(vcpu, share)


class KvmGuest(VcpuGuest):
    """A MemoryGuest whose memory is written by vCPUs of /dev/kvm.

    memory:       its RAM, of pages of 4 KiB; the first block holds the program
    vcpus:        number of vCPUs
    dirty_log:    "bitmap", "manual", "ring", or None for the best bitmap of this machine's KVM
    chunk_pages:  pages cleared at once with "manual", a power of two and at least 64
    ring_entries: of each vCPU's ring with "ring", a power of two

    It is made stopped. A source calls boot() and resume(); a destination has its state loaded, then
    resume(). What was loaded in part only does not run, until it is loaded whole or booted.

    Each vCPU walks its share of memory again and again: it checks that a page holds what it wrote
    last, and fills it with another value; `corrupt` counts the pages that did not. With "ring" the
    guest can be migrated with capability dirty-limit.

    KvmUnavailableError, with what failed, where KVM cannot run it.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        vcpus: int = 1,
        machine: str = MACHINE,
        dirty_log: str | None = None,
        chunk_pages: int = CHUNK_PAGES,
        ring_entries: int = _RING_ENTRIES,
    ) -> None:
        probe()
        kind = choose_log(dirty_log, ring_entries)
        self._vm = vm = _core.KvmVm(
            [block.pages for block in memory], vcpus=vcpus, log=kind, ring_entries=ring_entries
        )
        try:
            names = [block.idstr for block in memory]
            self._log: KvmDirtyLog | KvmDirtyRing = (
                KvmDirtyRing(vm, names)
                if kind == "ring"
                else KvmDirtyLog(vm, names, chunk_pages if kind == "manual" else 0)
            )
            super().__init__(
                machine,
                memory,
                dirty=self._log,
                on_stop=vm.stop,
                on_resume=vm.resume,
                on_throttle=vm.throttle,
            )
        except BaseException:
            vm.close()
            raise
        self._running = False
        # of time.monotonic(): when it was asked to stop here, and where it comes from
        self._asked_at = 0.0
        self._stopped_at: float | None = None
        #: seconds that it stood still when it was migrated, as the vCPUs saw it; None: it was not,
        #: or comes from another boot, or has not run since
        self.switchover_gap: float | None = None
        self._ring = _RingVcpus(vm, ring_entries) if kind == "ring" else None
        #: identities of the vCPUs
        self.vcpus: Sequence[int] = range(vcpus)
        for index in self.vcpus:
            self._register(index)
        self.devices.register(_MOMENT, save=self._save_moment, load=self._load_moment)

    def boot(
        self, *, working_set: int | None = None, key: int | None = None, pace: int = 0
    ) -> None:
        """Put the program into memory and every vCPU at its start; to be called while stopped.

        working_set: bytes that the vCPUs write, at the end of memory; all that is free when None
        key:         64-bit part of every value written, random when None
        pace:        turns of an empty loop after each page

        ValueError for a working set that memory has no room for, MigError while it is loaded.
        """
        if self._loading:
            raise MigError("this guest is being loaded")
        npages = sum(block.pages.npages for block in self.memory)
        boot = _core.kvm_boot_pages(npages)
        count = npages - boot
        if working_set is not None:
            count = working_set // _core.KVM_PAGE
        if not len(self.vcpus) <= count <= npages - boot:
            raise ValueError(
                f"a working set of {count} pages in memory of {npages}, of which the program takes"
                f" {boot}, for {len(self.vcpus)} vCPUs"
            )
        for block in self.memory:
            block.take_fresh()
        self._vm.boot(
            npages - count, count, key=secrets.randbits(64) if key is None else key, pace=pace
        )
        self._incomplete = False

    def resume(self) -> None:
        """Let the vCPUs run; MigError while its state is there in part only."""
        if self._incomplete:
            raise MigError("this guest is loaded in part only: it can be loaded again, or booted")
        super().resume()
        if self._stopped_at is not None:
            self.switchover_gap = time.monotonic() - self._stopped_at
            self._stopped_at = None

    def stop(self) -> None:
        """Return when no vCPU runs."""
        self._asked_at = time.monotonic()
        super().stop()

    def vcpu_throttle(self) -> VcpuThrottle | None:
        """Return what dirty-limit needs, None without dirty rings."""
        return self._ring

    def close(self) -> None:
        """End the vCPUs. The memory stays its owner's."""
        self._vm.close()

    # ---- what the guest says ----------------------------------------------------------------

    @property
    def corrupt(self) -> int:
        """Pages that did not hold what they should, as the vCPUs have reported here."""
        return sum(self._vm.counters(index)["corrupt"] for index in self.vcpus)

    @property
    def first_corrupt_page(self) -> int | None:
        """Number of the first such page of a vCPU, counted over all blocks; None: there is none."""
        for index in self.vcpus:
            counters = self._vm.counters(index)
            if counters["corrupt"]:
                return counters["corrupt_page"]
        return None

    def check(self) -> None:
        """KvmError when a vCPU has failed, or has reported corruption."""
        for index in self.vcpus:
            counters = self._vm.counters(index)
            if counters["failed"]:
                raise KvmError(_why(index, counters))
        page = self.first_corrupt_page
        if page is not None:
            raise KvmError(f"guest page {page} did not hold what the guest had written")

    def heartbeats(self, vcpu: int) -> int:
        """Return how many rounds the vCPU has ended here."""
        return self._vm.counters(vcpu)["heartbeats"]

    def wait_heartbeats(self, more: int, timeout: float) -> bool:
        """Wait until every vCPU has ended ``more`` rounds from now; False: not in ``timeout`` s."""
        end = time.monotonic() + timeout
        goals = {index: self.heartbeats(index) + more for index in self.vcpus}
        return all(
            self._vm.wait(index, goal, end - time.monotonic()) for index, goal in goals.items()
        )

    def progress(self, vcpu: int) -> VcpuProgress:
        """Return where a vCPU is; KvmError while it runs."""
        regs = _REGS.unpack(self._state(vcpu, "regs"))
        first, end = regs[_RSI] // _core.KVM_PAGE, regs[_RBX] // _core.KVM_PAGE
        # of the registers that tell this, one alone changes between two instructions
        passes, done = divmod(regs[_R13], max(end - first, 1))
        return VcpuProgress(first, end, first + done, passes, regs[_R13])

    def verify(self) -> list[int]:
        """Return the guest pages that do not hold what they should; KvmError while it runs.

        Of the page that a vCPU is at, either of its two values is right everywhere.
        """
        bad: list[int] = []
        for vcpu in self.vcpus:
            where = self.progress(vcpu)
            multiplier = _REGS.unpack(self._state(vcpu, "regs"))[_R15]
            (key,) = _KEY.unpack_from(self._state(vcpu, "xsave"))
            old, new = (
                np.uint64((passes * multiplier & _MASK) ^ key)
                for passes in (where.passes, where.passes + 1)
            )
            at = where.next_page
            bad += self._wrong(where.first, at, [new])
            if where.passes:
                bad += self._wrong(at, at + 1, [old, new])
                bad += self._wrong(at + 1, where.end, [old])
        return bad

    def _wrong(self, first: int, end: int, values: list[np.uint64]) -> list[int]:
        """Pages first..end, counted over all blocks, with a word that is none of the values."""
        bad: list[int] = []
        before, size = 0, _core.KVM_PAGE
        for block in self.memory:
            words = np.frombuffer(block.view, dtype="<u8").reshape(-1, size // 8)
            last = min(end, before + len(words))
            for start in range(max(first, before), last, _VERIFY_PAGES):
                stop = min(start + _VERIFY_PAGES, last)
                addresses = np.arange(start, stop, dtype=np.uint64)[:, None] * np.uint64(size)
                found = words[start - before : stop - before] ^ addresses
                right = np.isin(found, np.array(values, dtype=np.uint64)).all(axis=1)
                bad += [start + int(i) for i in np.flatnonzero(~right)]
            before += len(words)
        return bad

    # ---- devices ------------------------------------------------------------------------------

    @property
    def _nvcpus(self) -> int:
        return len(self.vcpus)

    def load_devices(self, state: DeviceState) -> None:
        """Give the sections to the devices; MismatchError unless every vCPU has one."""
        super().load_devices(state)
        given = {s.instance_id for s in state.sections or () if s.idstr == IDSTR}
        for index in self.vcpus:
            if index not in given:
                raise MismatchError(f"the stream lacks vCPU {index} of this guest", section=IDSTR)

    def _state(self, vcpu: int, part: str) -> bytes:
        data = self._vm.get_state(vcpu, part)
        assert data is not None, part
        return data

    def _register(self, index: int) -> None:
        self.devices.register(
            IDSTR,
            save=lambda: self._save(index),
            load=lambda payload, version: self._load(index, payload),
            instance_id=index,
            version_id=VERSION,
        )

    def _save(self, index: int) -> bytes:
        found = ((part, self._vm.get_state(index, part.name)) for part in PARTS)
        return encode_state((part, data) for part, data in found if data is not None)

    def _save_moment(self) -> bytes:
        return encode_moment(self._asked_at)

    def _load_moment(self, payload: bytes, version_id: int) -> None:
        try:
            self._stopped_at = decode_moment(payload)
        except ValueError as error:
            raise MismatchError(str(error), section=_MOMENT) from error

    def _load(self, index: int, payload: bytes) -> None:
        state = decode_state(payload)
        mine = {part.name for part in PARTS if self._vm.get_state(index, part.name) is not None}
        given = {part.name for part, _ in state}
        if mine != given:
            raise MismatchError(
                f"vCPU state has {', '.join(sorted(given))}, this machine's KVM has "
                f"{', '.join(sorted(mine))}",
                section=IDSTR,
            )
        for part, data in state:
            try:
                self._vm.set_state(index, part.name, data)
            except KvmError as error:
                raise MismatchError(f"vCPU {index}: {error}", section=IDSTR) from error
