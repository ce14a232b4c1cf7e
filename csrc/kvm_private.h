/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private to kvm_*.c: what a machine is made of. */
#ifndef MIG_KVM_PRIVATE_H
#define MIG_KVM_PRIVATE_H

#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "kvmvm.h"

enum {
    MIG_KVM_MAX_MSRS = 512,
    MIG_KVM_MAX_XSAVE = 1 << 20,
    MIG_KVM_PORT_BEAT = 0x10,
    MIG_KVM_PORT_CORRUPT = 0x11,
    MIG_KVM_WHOLE = 10000, /* all of a vCPU's time, in the unit of mig_kvm_limit() */
};

/* The program sees memory without a gap; guest physical addresses leave out the last GiB below
 * 4 GiB, where the local APIC and KVM's own pages are. */
#define MIG_KVM_HOLE UINT64_C(0xC0000000)
#define MIG_KVM_HOLE_END UINT64_C(0x100000000)

struct mig_kvm_slot {
    size_t block;
    uint64_t first; /* page of the block that it begins with */
    uint64_t npages;
    uint64_t gpa;
    uint8_t *hva;
    /* Under vm->log_lock. Manual clear: what a sync has reported and nobody has cleared since;
     * ring: what was reaped and no sync has taken yet. */
    uint64_t *bits;
};

struct mig_kvm_vcpu {
    struct mig_kvm *vm;
    unsigned index;
    int fd;
    struct kvm_run *run;
    struct kvm_dirty_gfn *ring;
    uint32_t ring_next; /* under vm->log_lock */
    uint64_t logged;    /* the same */
    pthread_t thread;
    bool has_thread;
    /* of the thread itself */
    timer_t timer;
    bool has_timer;
    int64_t slice_ns;
    int64_t slice_end, nap_end; /* monotonic ns; 0: none */
    /* under vm->lock */
    bool parked; /* not in KVM_RUN, and looks at vm->run before it goes there */
    bool kicked; /* since it left KVM_RUN last */
    uint64_t exits;
    unsigned limit;
    struct mig_kvm_counters counters;
};

struct mig_kvm {
    int kvm_fd, vm_fd;
    const char *step;
    enum mig_kvm_log log;
    uint32_t ring_entries;
    uint64_t manual_flags;
    size_t run_bytes, xsave_bytes;
    bool has_lapic, has_xcrs, has_debugregs;
    struct mig_kvm_slot *slots;
    size_t nslots;
    uint64_t npages;
    uint32_t msrs[MIG_KVM_MAX_MSRS]; /* those that can be set */
    size_t nmsrs;
    struct mig_kvm_vcpu *vcpus;
    unsigned nvcpus;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, closing;
    unsigned throttle;
    int kick_signal; /* blocked in vCPU threads except within KVM_RUN: needs no handler */

    pthread_mutex_t log_lock; /* taken before lock */
    uint64_t *scratch;        /* a bitmap for the largest slot */
    bool logging;
};

static inline int64_t mig_kvm_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Notes what failed. */
int mig_kvm_fail(struct mig_kvm *vm, const char *step);
/* kvm_run.c */
int mig_kvm_start_threads(struct mig_kvm *vm);
void mig_kvm_end_threads(struct mig_kvm *vm);
/* kvm_state.c */
int mig_kvm_find_msrs(struct mig_kvm *vm);
/* Parks nobody: whether the vCPU is out of the guest. */
bool mig_kvm_is_parked(struct mig_kvm *vm, unsigned index);

#endif
