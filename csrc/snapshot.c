/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The memory of a snapshot, from registering it until it is let go: see snapshot.h. */
#include "snapshot.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "protect.h"
#include "track.h"

/* of Linux 6.4; the headers of a distribution are older than the kernel it may run on */
#define FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)

enum {
    /* bytes that are protected at once while the guest runs: 0.2 ms or so */
    ARM_PIECE = 8 << 20,
    /* pages that are protected again where that saves a system call */
    MAX_GAP = 16,
};

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

typedef int (*span_fn)(struct mig_snapshot *s, struct mig_snapshot_block *block, uint64_t first,
                       uint64_t end);

/* Calls fn for all spans of pages that have bits. They end with units, and gaps are taken in. */
static int for_spans(struct mig_snapshot *s, struct mig_snapshot_block *block,
                     const uint64_t *bits, uint64_t max_gap, span_fn fn)
{
    uint64_t per_unit = block->unit / s->page_size, n = block->npages;
    uint64_t first = mig_bitmap_next_set(bits, n, 0);
    int rc = 0;

    while (rc == 0 && first < n) {
        uint64_t end, next = first;

        do {
            end = mig_bitmap_next_clear(bits, n, next);
            end = (end + per_unit - 1) / per_unit * per_unit;
            end = end < n ? end : n;
            next = mig_bitmap_next_set(bits, n, end);
        } while (next < n && next - end <= max_gap);
        rc = fn(s, block, first - first % per_unit, end);
        first = next;
    }
    return rc;
}

/* A read gives untouched anonymous memory the kernel's page of zeros, which takes a page table entry
 * and no memory. Page tables remember the protection of shared memory that is not there. */
static int populate_span(struct mig_snapshot *s, struct mig_snapshot_block *block, uint64_t first,
                         uint64_t end)
{
    uint8_t *at = block->base + first * s->page_size;
    uint64_t nbytes = (end - first) * s->page_size;

    if (!block->anonymous || madvise(at, nbytes, MIG_POPULATE_READ) == 0) {
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

static int populate(struct mig_snapshot *s)
{
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < s->nblocks; i++) {
        rc = for_spans(s, s->blocks + i, s->blocks[i].pending, 0, populate_span);
    }
    return rc;
}

/* Piece by piece, so that who writes meanwhile need not wait long. */
static int arm_span(struct mig_snapshot *s, struct mig_snapshot_block *block, uint64_t first,
                    uint64_t end)
{
    uint64_t piece = block->unit > ARM_PIECE ? block->unit : ARM_PIECE;
    int rc = 0;

    while (rc == 0 && first < end) {
        const uint8_t *at = block->base + first * s->page_size;
        /* pieces end at multiples of their size in memory: huge pages stay whole */
        uint64_t npages = (piece - (uintptr_t)at % piece) / s->page_size;

        npages = npages < end - first ? npages : end - first;
        pthread_mutex_lock(&s->lock);
        rc = s->error ? s->error : mig_snapshot_change(s, at, npages * s->page_size, true);
        if (rc == 0) {
            mig_bitmap_clear(block->bare, first, npages);
        }
        pthread_mutex_unlock(&s->lock);
        first += npages;
    }
    return rc;
}

int mig_snapshot_arm(struct mig_snapshot *s)
{
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < s->nblocks; i++) {
        rc = for_spans(s, s->blocks + i, s->blocks[i].pending, 0, arm_span);
    }
    return rc;
}

static int protect_span(struct mig_snapshot *s, struct mig_snapshot_block *block, uint64_t first,
                        uint64_t end)
{
    return mig_snapshot_change(s, block->base + first * s->page_size,
                               (end - first) * s->page_size, true);
}

int mig_snapshot_protect(struct mig_snapshot *s)
{
    int rc;

    pthread_mutex_lock(&s->lock);
    /* from now on the fault thread copies, and leaves `bare` as it is */
    s->frozen = true;
    rc = s->error;
    pthread_mutex_unlock(&s->lock);
    for (size_t i = 0; rc == 0 && i < s->nblocks; i++) {
        rc = for_spans(s, s->blocks + i, s->blocks[i].bare, MAX_GAP, protect_span);
    }
    return rc;
}

int mig_snapshot_change(const struct mig_snapshot *s, const uint8_t *at, uint64_t nbytes, bool on)
{
    int rc = mig_protect(s->uffd, at, nbytes, on);

    /* what was let go is not protected */
    return !on && (rc == -ENOENT || rc == -ESRCH) ? 0 : rc;
}

/* ---- from beginning to end ------------------------------------------------------------------- */

static int make_room(struct mig_snapshot *s)
{
    for (size_t i = 0; i < s->nblocks; i++) {
        struct mig_snapshot_block *block = s->blocks + i;
        size_t nwords = mig_bitmap_nwords(block->npages);

        block->lowest = block->npages;
        block->bare = malloc(nwords * sizeof(*block->bare) + 1);
        if (block->bare == NULL) {
            return MIG_E_NOMEM;
        }
        memcpy(block->bare, block->pending, nwords * sizeof(*block->bare));
    }
    s->free_slots = calloc((size_t)s->nslots + 1, sizeof(*s->free_slots));
    return s->free_slots ? 0 : MIG_E_NOMEM;
}

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
    rc = make_room(s);
    if (rc == 0) {
        rc = open_locks(s);
    }
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
    for (size_t i = 0; i < s->nblocks; i++) {
        free(s->blocks[i].bare);
        s->blocks[i].bare = NULL;
    }
    free(s->free_slots);
    s->free_slots = NULL;
}
