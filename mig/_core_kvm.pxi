# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "kvmvm.h" nogil:
    enum:
        MIG_KVM_PAGE
        MIG_KVM_MAX_VCPUS

    enum mig_kvm_log:
        MIG_KVM_LOG_BITMAP
        MIG_KVM_LOG_MANUAL
        MIG_KVM_LOG_RING

    enum mig_kvm_part:
        MIG_KVM_REGS
        MIG_KVM_SREGS
        MIG_KVM_XSAVE
        MIG_KVM_XCRS
        MIG_KVM_MSRS
        MIG_KVM_LAPIC
        MIG_KVM_MP_STATE
        MIG_KVM_EVENTS
        MIG_KVM_DEBUGREGS
        MIG_KVM_TSC_KHZ
        MIG_KVM_NPARTS

    struct mig_kvm_block:
        void *hva
        uint64_t npages

    struct mig_kvm_config:
        unsigned nvcpus
        mig_kvm_log log
        uint32_t ring_entries
        const mig_kvm_block *blocks
        size_t nblocks

    struct mig_kvm_counters:
        uint64_t heartbeats
        uint64_t last_beat
        uint64_t corrupt
        uint64_t corrupt_page
        uint64_t logged
        uint64_t naps
        bint failed
        int error
        uint32_t exit_reason
        uint32_t exit_detail

    struct mig_kvm:
        pass

    mig_kvm *mig_kvm_new()
    int mig_kvm_open(mig_kvm *vm, const mig_kvm_config *config)
    void mig_kvm_close(mig_kvm *vm)
    const char *mig_kvm_step(const mig_kvm *vm)
    int64_t mig_kvm_max_ring()
    int64_t mig_kvm_manual_flags()
    void mig_kvm_stop(mig_kvm *vm)
    void mig_kvm_resume(mig_kvm *vm)
    void mig_kvm_throttle(mig_kvm *vm, unsigned percent)
    void mig_kvm_limit(mig_kvm *vm, unsigned index, unsigned share)
    bint mig_kvm_wait(mig_kvm *vm, unsigned index, uint64_t count, int64_t timeout_ns)
    void mig_kvm_get_counters "mig_kvm_counters"(mig_kvm *vm, unsigned index,
                                                 mig_kvm_counters *counters)
    uint64_t mig_kvm_boot_pages(uint64_t npages)
    int mig_kvm_boot(mig_kvm *vm, uint64_t first, uint64_t npages, uint64_t key, uint64_t pace)
    size_t mig_kvm_part_size(const mig_kvm *vm, mig_kvm_part part)
    int mig_kvm_get(mig_kvm *vm, unsigned index, mig_kvm_part part, void *buf)
    int mig_kvm_set(mig_kvm *vm, unsigned index, mig_kvm_part part, const void *buf,
                    size_t nbytes)
    int mig_kvm_log_start(mig_kvm *vm)
    int mig_kvm_log_stop(mig_kvm *vm)
    int64_t mig_kvm_sync(mig_kvm *vm, size_t block, uint64_t *dirty)
    int mig_kvm_clear(mig_kvm *vm, size_t block, uint64_t first, uint64_t npages)
    int64_t mig_kvm_collect(mig_kvm *vm, uint64_t *logged)


KVM_PAGE = MIG_KVM_PAGE
KVM_MAX_VCPUS = MIG_KVM_MAX_VCPUS

cdef dict _KVM_LOGS = {
    "bitmap": MIG_KVM_LOG_BITMAP, "manual": MIG_KVM_LOG_MANUAL, "ring": MIG_KVM_LOG_RING,
}
cdef dict _KVM_PARTS = {
    "regs": MIG_KVM_REGS, "sregs": MIG_KVM_SREGS, "xsave": MIG_KVM_XSAVE, "xcrs": MIG_KVM_XCRS,
    "msrs": MIG_KVM_MSRS, "lapic": MIG_KVM_LAPIC, "mp_state": MIG_KVM_MP_STATE,
    "events": MIG_KVM_EVENTS, "debugregs": MIG_KVM_DEBUGREGS, "tsc_khz": MIG_KVM_TSC_KHZ,
}


cdef int64_t _nanoseconds(double seconds) except -1:
    """Not less than none, and not more than a clock can be ahead; ValueError for no number."""
    if seconds != seconds:
        raise ValueError("a timeout that is not a number")
    return <int64_t>(min(max(seconds, 0.0), 1e9) * 1e9)


def kvm_log_capabilities():
    """What /dev/kvm offers: (entries a vCPU's dirty ring may have, flags of manual clear).

    0 stands for a log that is not there. KvmUnavailableError when /dev/kvm cannot be opened.
    """
    cdef int64_t ring = mig_kvm_max_ring()
    if ring < 0:
        raise KvmUnavailableError(f"opening /dev/kvm: {_os.strerror(<int>-ring)}")
    return ring // 16, mig_kvm_manual_flags()


def kvm_boot_pages(uint64_t npages):
    """Pages that program and page tables take at the start of a guest of ``npages`` pages."""
    return mig_kvm_boot_pages(npages)


@cython.final
@cython.no_gc  # so that blocks is whole in __dealloc__
cdef class KvmVm:
    """A virtual machine of /dev/kvm whose vCPUs run mig's program (csrc/kvm_program.c).

    blocks: memory, in guest order; pinned until close()
    vcpus: number of vCPUs, each a thread that never holds the GIL
    log: "bitmap", "manual" or "ring"
    ring_entries: of each vCPU's ring, a power of two

    ``sync``, ``clear``, ``collect``, ``limit``, ``counters`` and ``wait`` may be called by any
    thread beside the others, ``close`` beside nothing.
    KvmUnavailableError when the machine cannot be made, KvmError when KVM refuses something later;
    ValueError after close().
    """
    cdef mig_kvm *vm
    cdef tuple blocks
    cdef readonly unsigned vcpus

    def __cinit__(self, blocks, *, unsigned vcpus=1, str log="bitmap", uint32_t ring_entries=4096):
        cdef mig_kvm_config config
        cdef mig_kvm_block *table
        cdef Pages pages
        cdef int rc
        if not 1 <= vcpus <= MIG_KVM_MAX_VCPUS:
            raise ValueError(f"{vcpus} vCPUs: 1 to {MIG_KVM_MAX_VCPUS} are possible")
        if ring_entries == 0 or ring_entries & (ring_entries - 1):
            raise ValueError(f"a ring of {ring_entries} entries: not a power of two")
        self.blocks = ()
        held = tuple(blocks)
        if not held:
            raise ValueError("a machine needs memory")
        table = <mig_kvm_block *>calloc(<size_t>len(held), sizeof(mig_kvm_block))
        self.vm = mig_kvm_new()
        if table == NULL or self.vm == NULL:
            free(table)
            raise MemoryError
        try:
            for i, pages in enumerate(held):
                self.check_block(pages)
                table[<size_t>i].hva = pages.c.base
                table[<size_t>i].npages = pages.c.npages
            config.nvcpus = vcpus
            config.log = _KVM_LOGS[log]
            config.ring_entries = ring_entries
            config.blocks = table
            config.nblocks = <size_t>len(held)
            with nogil:
                rc = mig_kvm_open(self.vm, &config)
        finally:
            free(table)
        if rc < 0:
            raise KvmUnavailableError(self.explain(rc))
        for pages in held:
            pages.pin()
        self.blocks = held
        self.vcpus = vcpus

    cdef int check_block(self, Pages pages) except -1:
        if (pages.c.page_size != MIG_KVM_PAGE or <size_t>pages.c.base % MIG_KVM_PAGE
                or pages.c.where != NULL or not pages.writable or pages.c.npages == 0):
            raise ValueError(f"KVM takes writable memory in pages of {MIG_KVM_PAGE} bytes,"
                             " aligned to them")
        return 0

    def __dealloc__(self):
        if self.blocks is not None:
            self.close()

    def close(self):
        """End the vCPUs and let go of the memory."""
        cdef mig_kvm *vm = self.vm
        cdef Pages pages
        self.vm = NULL
        if vm != NULL:
            with nogil:
                mig_kvm_close(vm)
        for pages in self.blocks:
            pages.unpin()
        self.blocks = ()

    cdef str explain(self, int64_t rc):
        step = mig_kvm_step(self.vm).decode("ascii")
        return f"{step}: {_os.strerror(<int>-rc)}"

    cdef int64_t checked(self, int64_t rc) except -1:
        if rc < 0:
            raise KvmError(self.explain(rc))
        return rc

    cdef mig_kvm *opened(self, unsigned index) except NULL:
        if self.vm == NULL:
            raise ValueError("the machine is closed")
        if index >= self.vcpus:
            raise IndexError(f"vCPU {index} of {self.vcpus}")
        return self.vm

    def boot(self, uint64_t first_page, uint64_t npages, *, uint64_t key, uint64_t pace=0):
        """Put the program into memory and every vCPU at its start.

        The vCPUs share guest pages first_page..first_page + npages; ``key`` is part of every value
        that they write; ``pace``: turns of an empty loop after each page.
        """
        cdef mig_kvm *vm = self.opened(0)
        self.checked(mig_kvm_boot(vm, first_page, npages, key, pace))

    def stop(self):
        """Return when all vCPUs are out of the guest."""
        cdef mig_kvm *vm = self.opened(0)
        with nogil:
            mig_kvm_stop(vm)

    def resume(self):
        """Let the vCPUs run."""
        mig_kvm_resume(self.opened(0))

    def throttle(self, unsigned percent):
        """Make every vCPU stand still for so much of its time, 0 to 99."""
        if percent > 99:
            raise ValueError(f"throttle of {percent} %: 0 to 99 are possible")
        mig_kvm_throttle(self.opened(0), percent)

    def limit(self, unsigned index, double share):
        """Make one vCPU stand still for this share of its time, 0 to 0.99."""
        cdef mig_kvm *vm = self.opened(index)
        if not 0 <= share <= 0.99:
            raise ValueError(f"a share of {share}: 0 to 0.99 are possible")
        mig_kvm_limit(vm, index, <unsigned>(share * 10000 + 0.5))

    def wait(self, unsigned index, uint64_t heartbeats, double timeout):
        """Wait for the vCPU's so-manieth heartbeat; False when it fails, or after ``timeout`` s."""
        cdef mig_kvm *vm = self.opened(index)
        cdef bint there
        cdef int64_t ns = _nanoseconds(timeout)
        with nogil:
            there = mig_kvm_wait(vm, index, heartbeats, ns)
        return there

    def counters(self, unsigned index):
        """What a vCPU has told, and what was told of it: a dict of struct mig_kvm_counters."""
        cdef mig_kvm_counters c
        mig_kvm_get_counters(self.opened(index), index, &c)
        return c

    def get_state(self, unsigned index, str part):
        """A part of the state as the kernel's structure, None when this KVM has no such part."""
        cdef mig_kvm *vm = self.opened(index)
        cdef mig_kvm_part which = _KVM_PARTS[part]
        cdef size_t nbytes = mig_kvm_part_size(vm, which)
        cdef bytes data = b"\0" * nbytes
        if nbytes == 0:
            return None
        self.checked(mig_kvm_get(vm, index, which, <uint8_t *>data))
        return data

    def set_state(self, unsigned index, str part, const uint8_t[::1] data not None):
        """Set what get_state() gave."""
        cdef mig_kvm *vm = self.opened(index)
        cdef mig_kvm_part which = _KVM_PARTS[part]
        cdef size_t nbytes = <size_t>data.shape[0]
        self.checked(mig_kvm_set(vm, index, which, &data[0] if nbytes else NULL, nbytes))

    def start_log(self):
        """Begin to log writes."""
        cdef mig_kvm *vm = self.opened(0)
        cdef int rc
        with nogil:
            rc = mig_kvm_log_start(vm)
        self.checked(rc)

    def stop_log(self):
        """End it."""
        cdef mig_kvm *vm = self.opened(0)
        cdef int rc
        with nogil:
            rc = mig_kvm_log_stop(vm)
        self.checked(rc)

    def sync(self, size_t block, Bitmap dirty not None):
        """Move what was written to block number ``block`` into ``dirty``.

        Returns how many bits were not set there.
        """
        cdef mig_kvm *vm = self.opened(0)
        cdef int64_t rc
        self.check_pages(block, 0, 0)
        if dirty.nbits != (<Pages>self.blocks[block]).c.npages:
            raise ValueError(f"a bitmap of {dirty.nbits} bits for another number of pages")
        with nogil:
            rc = mig_kvm_sync(vm, block, dirty.words)
        return self.checked(rc)

    def collect(self):
        """Empty the rings for the next sync(); returns how many entries each vCPU's has had."""
        cdef mig_kvm *vm = self.opened(0)
        cdef uint64_t[MIG_KVM_MAX_VCPUS] logged
        cdef int64_t rc
        cdef unsigned i
        with nogil:
            rc = mig_kvm_collect(vm, logged)
        self.checked(rc)
        return [logged[i] for i in range(self.vcpus)]

    def clear(self, size_t block, uint64_t first_page, uint64_t npages):
        """Have writes to these pages logged again, of those that sync() gave; manual log only."""
        cdef mig_kvm *vm = self.opened(0)
        cdef int rc
        self.check_pages(block, first_page, npages)
        with nogil:
            rc = mig_kvm_clear(vm, block, first_page, npages)
        self.checked(rc)

    cdef int check_pages(self, size_t block, uint64_t first, uint64_t npages) except -1:
        cdef Pages pages
        if block >= <size_t>len(self.blocks):
            raise IndexError(f"block {block} of {len(self.blocks)}")
        pages = self.blocks[block]
        if first > pages.c.npages or npages > pages.c.npages - first:
            raise IndexError(f"pages {first}..{first + npages} of {pages.c.npages}")
        return 0
