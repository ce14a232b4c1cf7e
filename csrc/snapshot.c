/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The memory of a snapshot, from registering it until it is let go: see snapshot.h. */
#include "snapshot.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "track.h"

/* of Linux 6.4; the headers of a distribution are older than the kernel it may run on */
#define FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
enum { MAX_RUNS = 64 };

static uint64_t nbytes_of(const struct mig_snapshot *s, const struct mig_snapshot_block *block)
{
    return block->npages * s->page_size;
}

static int open_userfaultfd(struct mig_snapshot *s, bool populate)
{
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    bool any_anonymous = false;

    for (size_t i = 0; i < s->nblocks; i++) {
        any_anonymous = any_anonymous || s->blocks[i].anonymous;
        if (!s->blocks[i].anonymous) {
            features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        }
    }
    s->populates = populate || !any_anonymous;
    if (!s->populates) {
        s->uffd = mig_track_userfaultfd(features | FEATURE_WP_UNPOPULATED, false);
        s->populates = s->uffd == -EOPNOTSUPP;
    }
    if (s->populates) {
        s->uffd = mig_track_userfaultfd(features, false);
    }
    return s->uffd < 0 ? s->uffd : 0;
}

static int open_descriptors(struct mig_snapshot *s, bool populate)
{
    int rc = open_userfaultfd(s, populate);

    if (rc < 0) {
        return rc;
    }
    s->stop_fd = eventfd(0, EFD_CLOEXEC);
    s->ready_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return s->stop_fd < 0 || s->ready_fd < 0 ? -errno : 0;
}

static int open_locks(struct mig_snapshot *s)
{
    pthread_condattr_t clock;
    int rc = pthread_condattr_init(&clock);

    if (rc) {
        return -rc;
    }
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    rc = pthread_mutex_init(&s->lock, NULL);
    if (rc == 0) {
        rc = pthread_cond_init(&s->room, &clock);
        if (rc) {
            pthread_mutex_destroy(&s->lock);
        }
    }
    pthread_condattr_destroy(&clock);
    s->has_lock = rc == 0;
    return -rc;
}

static int register_blocks(struct mig_snapshot *s)
{
    for (; s->nregistered < s->nblocks; s->nregistered++) {
        const struct mig_snapshot_block *block = s->blocks + s->nregistered;
        struct uffdio_register range = {
            .range = {.start = (uintptr_t)block->base, .len = nbytes_of(s, block)},
            .mode = UFFDIO_REGISTER_MODE_WP,
        };

        if (ioctl(s->uffd, UFFDIO_REGISTER, &range) < 0) {
            return -errno;
        }
        if (!(range.ioctls & UINT64_C(1) << _UFFDIO_WRITEPROTECT)) {
            s->nregistered++;
            return -EOPNOTSUPP;
        }
    }
    return 0;
}

/* ---- all pages that are wanted --------------------------------------------------------------- */

typedef int (*span_fn)(const struct mig_snapshot *s, uint8_t *at, uint64_t nbytes);

/* Calls fn for all spans of memory with pending pages; they end with units. */
static int for_spans(const struct mig_snapshot *s, const struct mig_snapshot_block *block,
                     span_fn fn)
{
    uint64_t runs[2 * MAX_RUNS], from = 0, per_unit = block->unit / s->page_size;
    size_t n;

    while ((n = mig_bitmap_runs(s->k, block->pending, block->npages, from, runs, MAX_RUNS,
                                UINT64_MAX))) {
        for (size_t i = 0; i < n; i++) {
            uint64_t first = runs[2 * i] - runs[2 * i] % per_unit;
            uint64_t end = (runs[2 * i + 1] + per_unit - 1) / per_unit * per_unit;
            int rc = fn(s, block->base + first * s->page_size, (end - first) * s->page_size);

            if (rc < 0) {
                return rc;
            }
        }
        from = runs[2 * n - 1];
    }
    return 0;
}

/* A read gives untouched anonymous memory the kernel's page of zeros, which takes a page table entry
 * and no memory. */
static int populate_span(const struct mig_snapshot *s, uint8_t *at, uint64_t nbytes)
{
    if (madvise(at, nbytes, MIG_POPULATE_READ) == 0) {
        return 0;
    }
    if (errno != EINVAL) {
        return -errno;
    }
    for (uint64_t i = 0; i < nbytes; i += s->host_page) {
        (void)*(volatile const uint8_t *)(at + i);
    }
    return 0;
}

static int protect_span(const struct mig_snapshot *s, uint8_t *at, uint64_t nbytes)
{
    return mig_snapshot_change(s, at, nbytes, true);
}

/* Page tables remember the protection of shared memory that is not there. */
static int populate(const struct mig_snapshot *s)
{
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < s->nblocks; i++) {
        rc = s->blocks[i].anonymous ? for_spans(s, s->blocks + i, populate_span) : 0;
    }
    return rc;
}

int mig_snapshot_protect(struct mig_snapshot *s)
{
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < s->nblocks; i++) {
        rc = for_spans(s, s->blocks + i, protect_span);
    }
    return rc;
}

int mig_snapshot_change(const struct mig_snapshot *s, const uint8_t *at, uint64_t nbytes, bool on)
{
    struct uffdio_writeprotect arg = {
        .range = {.start = (uintptr_t)at, .len = nbytes},
        .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };

    while (ioctl(s->uffd, UFFDIO_WRITEPROTECT, &arg) < 0) {
        if (!on && (errno == ENOENT || errno == ESRCH)) {
            return 0; /* it was let go */
        }
        if (errno != EAGAIN) {
            return -errno;
        }
        sched_yield();
    }
    return 0;
}

/* ---- from beginning to end ------------------------------------------------------------------- */

int mig_snapshot_open(struct mig_snapshot *s, const struct mig_kernels *k,
                      struct mig_snapshot_block *blocks, size_t nblocks, size_t page_size,
                      uint8_t *store, uint64_t nslots, uint64_t limit, bool detect_zero,
                      bool populate_all)
{
    int rc;

    memset(s, 0, sizeof(*s));
    s->uffd = s->stop_fd = s->ready_fd = -1;
    s->k = k;
    s->blocks = blocks;
    s->nblocks = nblocks;
    s->page_size = page_size;
    s->host_page = (size_t)sysconf(_SC_PAGESIZE);
    s->store = store;
    s->nslots = nslots;
    s->limit = limit;
    s->detect_zero = detect_zero;
    for (size_t i = 0; i < nblocks; i++) {
        blocks[i].lowest = blocks[i].npages;
    }
    s->free_slots = calloc((size_t)nslots + 1, sizeof(*s->free_slots));
    rc = s->free_slots ? open_locks(s) : MIG_E_NOMEM;
    if (rc == 0) {
        rc = open_descriptors(s, populate_all);
    }
    if (rc == 0) {
        rc = mig_snapshot_start(s);
    }
    if (rc == 0) {
        rc = register_blocks(s);
    }
    if (rc == 0 && s->populates) {
        rc = populate(s);
    }
    if (rc < 0) {
        mig_snapshot_close(s);
    }
    return rc;
}

void mig_snapshot_unregister(struct mig_snapshot *s)
{
    for (size_t i = 0; i < s->nregistered; i++) {
        struct uffdio_range range = {.start = (uintptr_t)s->blocks[i].base,
                                     .len = nbytes_of(s, s->blocks + i)};

        /* also lifts the protection and wakes who waits; it fails where memory is mapped no more */
        ioctl(s->uffd, UFFDIO_UNREGISTER, &range);
    }
}

static void close_fd(int *fd)
{
    if (*fd >= 0) {
        close(*fd);
    }
    *fd = -1;
}

void mig_snapshot_close(struct mig_snapshot *s)
{
    mig_snapshot_unregister(s);
    s->nregistered = 0;
    mig_snapshot_stop(s);
    close_fd(&s->uffd);
    close_fd(&s->stop_fd);
    close_fd(&s->ready_fd);
    if (s->has_lock) {
        pthread_cond_destroy(&s->room);
        pthread_mutex_destroy(&s->lock);
        s->has_lock = false;
    }
    free(s->free_slots);
    s->free_slots = NULL;
}
