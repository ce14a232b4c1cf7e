/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A small virtual machine on /dev/kvm whose vCPUs run one program of ours (kvm_program.c), each in
 * a thread of its own. x86-64 only; elsewhere mig_kvm_open() returns -ENOSYS (kvm_none.c).
 *
 * Calls on one machine come from one thread at a time, except mig_kvm_sync(), _clear(), _reap(),
 * _collect(), _limit() and the counters, which may be called beside everything but mig_kvm_close().
 */
#ifndef MIG_KVMVM_H
#define MIG_KVMVM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MIG_KVM_PAGE = 4096, /* what KVM's logs count in */
    MIG_KVM_MAX_VCPUS = 64,
    MIG_KVM_CODE_PAGE = 1, /* guest page that holds the program; page 0 is not mapped */
};

enum mig_kvm_log {
    MIG_KVM_LOG_BITMAP, /* KVM_GET_DIRTY_LOG, which clears */
    MIG_KVM_LOG_MANUAL, /* KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG */
    MIG_KVM_LOG_RING,   /* one ring for each vCPU */
};

struct mig_kvm_block {
    void *hva; /* page-aligned */
    uint64_t npages;
};

struct mig_kvm_config {
    unsigned nvcpus;
    enum mig_kvm_log log;
    uint32_t ring_entries; /* of each vCPU, a power of two; with MIG_KVM_LOG_RING */
    const struct mig_kvm_block *blocks;
    size_t nblocks;
};

struct mig_kvm;

struct mig_kvm *mig_kvm_new(void);
/* Makes the machine; its vCPUs are stopped. 0 or -errno, then mig_kvm_step() says of what. */
int mig_kvm_open(struct mig_kvm *vm, const struct mig_kvm_config *config);
/* Ends the threads and frees everything, vm too. */
void mig_kvm_close(struct mig_kvm *vm);
/* What failed last. */
const char *mig_kvm_step(const struct mig_kvm *vm);
/* What KVM_CHECK_EXTENSION says of the logs: bytes a ring may have, 0 none; flags of manual clear,
 * 0 none. Negative: -errno of opening /dev/kvm. */
int64_t mig_kvm_max_ring(void);
int64_t mig_kvm_manual_flags(void);

/* ---- running (kvm_run.c) -------------------------------------------------------------------- */

/* Returns when every vCPU is out of the guest, with no port access half done. */
void mig_kvm_stop(struct mig_kvm *vm);
void mig_kvm_resume(struct mig_kvm *vm);
/* Every vCPU stands still for `percent` (0..99) of its time, in slices of 10 ms of running. */
void mig_kvm_throttle(struct mig_kvm *vm, unsigned percent);
/* The same for one vCPU, for `share` (0..9900) ten-thousandths of its time; of the two the larger
 * share counts. Any thread. */
void mig_kvm_limit(struct mig_kvm *vm, unsigned index, unsigned share);
/* Makes every vCPU leave the guest once, if it is in there. */
void mig_kvm_kick(struct mig_kvm *vm);
/* Waits until the vCPU has sent `count` heartbeats in all; false when it failed or time is up. */
bool mig_kvm_wait(struct mig_kvm *vm, unsigned index, uint64_t count, int64_t timeout_ns);

struct mig_kvm_counters {
    uint64_t heartbeats, last_beat; /* last_beat: the value it came with */
    uint64_t corrupt, corrupt_page; /* reports, and the guest page of the first */
    uint64_t logged;                /* entries of its dirty ring */
    uint64_t naps;                  /* times it was made to stand still */
    /* why it left KVM_RUN for good: -errno, or 0 and an exit reason with its detail */
    bool failed;
    int error;
    uint32_t exit_reason, exit_detail;
};

void mig_kvm_counters(struct mig_kvm *vm, unsigned index, struct mig_kvm_counters *counters);

/* ---- the program (kvm_program.c) ------------------------------------------------------------ */

/* Guest-linear pages that the program, its page tables and page 0 take for npages of memory. */
uint64_t mig_kvm_boot_pages(uint64_t npages);
/* Writes program and page tables to the start of the first block, and sets every vCPU to begin:
 * vCPU i walks the i-th share of pages first..first + npages. key: 8 bytes that make what it writes
 * different from any other guest's; pace: turns of an empty loop after each page. */
int mig_kvm_boot(struct mig_kvm *vm, uint64_t first, uint64_t npages, uint64_t key, uint64_t pace);

/* ---- state of a vCPU (kvm_state.c): the kernel's structures -------------------------------- */

enum mig_kvm_part {
    MIG_KVM_REGS,
    MIG_KVM_SREGS,
    MIG_KVM_XSAVE,
    MIG_KVM_XCRS,
    MIG_KVM_MSRS, /* struct kvm_msr_entry[] */
    MIG_KVM_LAPIC,
    MIG_KVM_MP_STATE,
    MIG_KVM_EVENTS,
    MIG_KVM_DEBUGREGS,
    MIG_KVM_TSC_KHZ, /* one uint32_t */
    MIG_KVM_NPARTS,
};

/* Bytes that mig_kvm_get() gives; 0: this machine has no such part. */
size_t mig_kvm_part_size(const struct mig_kvm *vm, enum mig_kvm_part part);
/* 0 or -errno; -EBUSY while the vCPU runs. buf has mig_kvm_part_size() bytes. */
int mig_kvm_get(struct mig_kvm *vm, unsigned index, enum mig_kvm_part part, void *buf);
/* The same; of MSRs any number of entries may be given, of other parts nbytes is their size. An
 * MSR that is not known here is passed over when it is 0. */
int mig_kvm_set(struct mig_kvm *vm, unsigned index, enum mig_kvm_part part, const void *buf,
                size_t nbytes);

/* ---- dirty logs (kvm_log.c) ----------------------------------------------------------------- */

int mig_kvm_log_start(struct mig_kvm *vm);
int mig_kvm_log_stop(struct mig_kvm *vm);
/* Moves what was written to the block into dirty[]; how many bits were not set there, or -errno. */
int64_t mig_kvm_sync(struct mig_kvm *vm, size_t block, uint64_t *dirty);
/* Has writes to these pages logged again; with MIG_KVM_LOG_MANUAL. */
int mig_kvm_clear(struct mig_kvm *vm, size_t block, uint64_t first, uint64_t npages);
/* Empties the rings into what mig_kvm_sync() takes; entries found or -errno. */
int64_t mig_kvm_reap(struct mig_kvm *vm);
/* The same, of all that was written before the call; logged[] gets what each vCPU's ring has had. */
int64_t mig_kvm_collect(struct mig_kvm *vm, uint64_t *logged);

#endif
