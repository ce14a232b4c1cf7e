/* SPDX-License-Identifier: LGPL-2.1-or-later
 * How long threads wait for pages: see uffd.h. The caller holds the lock.
 *
 * All vCPUs are blocked together from the moment the last one of them stops to the moment the
 * first one goes on. */
#include <string.h>

#include "uffd.h"

size_t mig_waits_bucket(uint64_t microseconds)
{
    unsigned log2;
    size_t bucket;

    if (microseconds < 4) {
        return (size_t)microseconds;
    }
    log2 = 63 - (unsigned)__builtin_clzll(microseconds);
    bucket = 4 * (size_t)(log2 - 1) + (size_t)(microseconds >> (log2 - 2) & 3);
    return bucket < MIG_UFFD_BUCKETS ? bucket : MIG_UFFD_BUCKETS - 1;
}

uint64_t mig_waits_limit(size_t bucket)
{
    uint64_t step;

    if (bucket < 4) {
        return bucket + 1;
    }
    step = UINT64_C(1) << (bucket / 4 - 1);
    return (4 + bucket % 4 + 1) * step;
}

static int64_t vcpu_of(struct mig_waits *w, uint32_t thread)
{
    for (size_t i = 0; i < w->nvcpus; i++) {
        if (w->vcpus[i] == 0) {
            w->vcpus[i] = thread;
        }
        if (w->vcpus[i] == thread) {
            return (int64_t)i;
        }
    }
    return -1;
}

void mig_waits_vcpus(struct mig_waits *w, const uint32_t *vcpus, size_t n)
{
    w->nvcpus = n < MIG_UFFD_VCPUS ? n : MIG_UFFD_VCPUS;
    memcpy(w->vcpus, vcpus, w->nvcpus * sizeof(*vcpus));
    memset(w->blocked, 0, sizeof(w->blocked));
    w->all_blocked = 0;
    w->down = 0;
    for (size_t i = 0; i < w->n; i++) {
        w->down += vcpu_of(w, w->wait[i].thread) >= 0;
    }
}

/* Takes the i-th wait out of the list; whether it was that of a vCPU. */
static bool finish(struct mig_waits *w, size_t i, int64_t now)
{
    int64_t waited = now - w->wait[i].since, vcpu = vcpu_of(w, w->wait[i].thread);

    w->bucket[mig_waits_bucket((uint64_t)waited / 1000)]++;
    w->wait[i] = w->wait[--w->n];
    if (vcpu < 0) {
        return false;
    }
    w->blocked[vcpu] += waited;
    w->down--;
    return true;
}

/* Ends the waits at an address, or, where that is 0, those of a thread. */
static void finish_all(struct mig_waits *w, uint64_t address, uint32_t thread, int64_t now)
{
    bool all_down = w->nvcpus && w->down == w->nvcpus, one_of_them = false;

    for (size_t i = 0; i < w->n;) {
        if (address ? w->wait[i].address == address : w->wait[i].thread == thread) {
            one_of_them |= finish(w, i, now);
        } else {
            i++;
        }
    }
    if (all_down && one_of_them) {
        w->all_blocked += now - w->last_begin;
    }
}

void mig_waits_begin(struct mig_waits *w, uint64_t address, uint32_t thread, int64_t now)
{
    for (size_t i = 0; i < w->n; i++) {
        if (w->wait[i].thread == thread && w->wait[i].address == address) {
            return;
        }
    }
    /* woken, and here again before who woke it could say so */
    finish_all(w, 0, thread, now);
    if (w->n == MIG_UFFD_WAITS) {
        return;
    }
    w->wait[w->n++] = (struct mig_wait){.address = address, .since = now, .thread = thread};
    if (vcpu_of(w, thread) >= 0) {
        w->down++;
        w->last_begin = now;
    }
}

void mig_waits_end(struct mig_waits *w, uint64_t address, int64_t now)
{
    finish_all(w, address, 0, now);
}
