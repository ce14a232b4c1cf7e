/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Copying the pages of a snapshot before they change: see snapshot.h. A page is copied once, by
 * whoever comes first, under the lock; so who finds it copied may lift its protection. */
#include "snapshot.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "protect.h"
#include "thread.h"

enum {
    MAX_MESSAGES = 64,
    /* pages that the walk copies under the lock at once, while who writes waits: 10 us or so */
    MAX_CHUNK = 16,
    /* pages that were copied before, and are passed over in the middle of others */
    MAX_GAP = 512,
    /* pages for which a system call is worth while */
    MIN_POPULATE = 32,
    /* how long a writer waits for room when no copy is taken (s) */
    PATIENCE = 1,
};

/* ---- with the lock --------------------------------------------------------------------------- */

static void save_page(struct mig_snapshot *s, struct mig_snapshot_block *block, uint64_t page)
{
    const uint8_t *from = block->base + page * s->page_size;

    if (s->detect_zero && s->k->is_zero(from, s->page_size)) {
        block->where[page] = MIG_PAGE_ZERO;
    } else {
        uint64_t slot = s->nfree ? s->free_slots[--s->nfree] : s->nused++;
        uint64_t at = MIG_SNAPSHOT_GAP + slot * (s->page_size + MIG_SNAPSHOT_GAP);

        memcpy(s->store + at, from, s->page_size);
        block->where[page] = (int64_t)at;
        s->nstored++;
    }
    mig_bitmap_clear(block->pending, page, 1);
    mig_bitmap_put(block->ready, page);
    block->lowest = page < block->lowest ? page : block->lowest;
}

/* Finds the next span of units in pages [*first, end) of which every page is copied, and so stays
 * copied: *first to *stop. */
static bool next_copied(const struct mig_snapshot *s, const struct mig_snapshot_block *block,
                        uint64_t *first, uint64_t *stop, uint64_t end)
{
    uint64_t per_unit = block->unit / s->page_size, next;

    *first -= *first % per_unit;
    end = (end + per_unit - 1) / per_unit * per_unit;
    end = end < block->npages ? end : block->npages;
    for (; *first < end; *first += per_unit) {
        next = mig_bitmap_next_set(block->pending, end, *first);
        *stop = next < end ? next - next % per_unit : end;
        if (*stop > *first) {
            return true;
        }
    }
    return false;
}

static int unprotect(const struct mig_snapshot *s, const struct mig_snapshot_block *block,
                     uint64_t first, uint64_t stop)
{
    return mig_snapshot_change(s, block->base + first * s->page_size,
                               (stop - first) * s->page_size, false);
}

/* Nobody may wait for ever: memory is as any other again, and the snapshot is spoilt. */
static void give_up(struct mig_snapshot *s, int error)
{
    if (s->error == 0) {
        s->error = error;
        mig_snapshot_unregister(s);
    }
}

/* Waits until so many pages can be copied; the lock is free meanwhile. */
static void wait_for_room(struct mig_snapshot *s, uint64_t npages)
{
    uint64_t most = s->limit > npages ? s->limit - npages : 0;

    s->nwaits += !s->unlimited && s->nstored > most;
    while (!s->unlimited && s->nstored > most && !s->stopping) {
        struct timespec end;

        clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_sec += PATIENCE;
        if (pthread_cond_timedwait(&s->room, &s->lock, &end)) {
            s->unlimited = true;
        }
    }
}

/* Says that there is much to take, once until it is taken. */
static void signal_ready(struct mig_snapshot *s)
{
    if (s->nstored > s->limit / 4 && !s->signalled) {
        s->signalled = true;
        eventfd_write(s->ready_fd, 1);
    }
}

/* ---- the fault thread ------------------------------------------------------------------------ */

static void serve_page(struct mig_snapshot *s, struct mig_snapshot_block *block, uint64_t page)
{
    uint64_t per_unit = block->unit / s->page_size, first = page - page % per_unit;
    uint64_t end = first + per_unit < block->npages ? first + per_unit : block->npages;
    int rc;

    pthread_mutex_lock(&s->lock);
    if (!s->frozen) {
        mig_bitmap_set(block->bare, first, end - first);
    } else if (mig_bitmap_next_set(block->pending, end, first) < end) {
        wait_for_room(s, per_unit);
    }
    for (uint64_t i = first; s->frozen && i < end; i++) {
        if (mig_bitmap_test(block->pending, i)) {
            save_page(s, block, i);
            s->nfaults++;
        }
    }
    rc = s->error ? 0 : unprotect(s, block, first, end);
    if (rc < 0) {
        give_up(s, rc);
    }
    signal_ready(s);
    pthread_mutex_unlock(&s->lock);
}

static void serve(struct mig_snapshot *s, const struct uffd_msg *msg)
{
    uint64_t address = msg->arg.pagefault.address;

    if (msg->event != UFFD_EVENT_PAGEFAULT) {
        return;
    }
    for (size_t i = 0; i < s->nblocks; i++) {
        struct mig_snapshot_block *block = s->blocks + i;
        uint64_t offset = address - (uintptr_t)block->base;

        if (address >= (uintptr_t)block->base && offset / s->page_size < block->npages) {
            serve_page(s, block, offset / s->page_size);
            return;
        }
    }
}

static void *serve_all(void *argument)
{
    struct mig_snapshot *s = argument;
    struct uffd_msg messages[MAX_MESSAGES];

    while (mig_protect_await(s->uffd, s->stop_fd)) {
        /* a page of a message may be copied by now; lifting its protection again does no harm */
        ssize_t got = read(s->uffd, messages, sizeof(messages));

        for (size_t i = 0; got > 0 && i < (size_t)got / sizeof(*messages); i++) {
            serve(s, messages + i);
        }
    }
    return NULL;
}

int mig_snapshot_start(struct mig_snapshot *s)
{
    int rc = mig_thread_start(&s->thread, serve_all, s, "mig-snapshot");

    s->has_thread = rc == 0;
    return rc;
}

void mig_snapshot_stop(struct mig_snapshot *s)
{
    if (!s->has_thread) {
        return;
    }
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    pthread_cond_broadcast(&s->room);
    pthread_mutex_unlock(&s->lock);
    eventfd_write(s->stop_fd, 1);
    pthread_join(s->thread, NULL);
    s->has_thread = false;
}

/* ---- the walk -------------------------------------------------------------------------------- */

/* The end of the run of numbers without large gaps that begins at `from`. */
static size_t end_of_run(const uint64_t *index, size_t from, size_t n, uint64_t max_gap)
{
    for (from++; from < n && index[from] - index[from - 1] <= max_gap + 1; from++) {
    }
    return from;
}

/* A page of anonymous memory that nobody has touched is there after a read, with a fault for each;
 * this is faster. What cannot be is left to the copying. */
static void populate(const struct mig_snapshot *s, const struct mig_snapshot_block *block,
                     const uint64_t *index, size_t n)
{
    if (s->populates || !block->anonymous) {
        return;
    }
    for (size_t i = 0, end; i < n; i = end) {
        end = end_of_run(index, i, n, 0);
        if (end - i >= MIN_POPULATE) {
            madvise(block->base + index[i] * s->page_size, (end - i) * s->page_size,
                    MIG_POPULATE_READ);
        }
    }
}

/* Copies those of the pages that are pending. */
static int64_t save_chunk(struct mig_snapshot *s, struct mig_snapshot_block *block,
                          const uint64_t *index, size_t n)
{
    int64_t saved = 0;

    pthread_mutex_lock(&s->lock);
    for (size_t i = 0; s->error == 0 && i < n; i++) {
        if (mig_bitmap_test(block->pending, index[i])) {
            save_page(s, block, index[i]);
            saved++;
        }
    }
    saved = s->error ? s->error : saved;
    pthread_mutex_unlock(&s->lock);
    return saved;
}

/* Lifts the protection of what is copied of pages [first, end). */
static int release(struct mig_snapshot *s, const struct mig_snapshot_block *block, uint64_t first,
                   uint64_t end)
{
    bool found = true;
    int rc = 0;

    while (found && rc == 0) {
        uint64_t stop = end;

        pthread_mutex_lock(&s->lock);
        found = next_copied(s, block, &first, &stop, end);
        pthread_mutex_unlock(&s->lock);
        if (found) {
            rc = unprotect(s, block, first, stop);
            first = stop;
        }
    }
    if (rc < 0) {
        pthread_mutex_lock(&s->lock);
        give_up(s, rc);
        pthread_mutex_unlock(&s->lock);
    }
    return rc;
}

int64_t mig_snapshot_save(struct mig_snapshot *s, size_t number, const uint64_t *index, size_t n)
{
    struct mig_snapshot_block *block = s->blocks + number;
    int64_t total = 0;

    populate(s, block, index, n);
    for (size_t done = 0, some; done < n; done += some) {
        int64_t saved;

        some = n - done < MAX_CHUNK ? n - done : MAX_CHUNK;
        saved = save_chunk(s, block, index + done, some);
        if (saved < 0) {
            return saved;
        }
        total += saved;
    }
    /* in large pieces, so that huge pages stay whole */
    for (size_t i = 0, end; i < n; i = end) {
        int rc;

        end = end_of_run(index, i, n, MAX_GAP);
        rc = release(s, block, index[i], index[end - 1] + 1);
        if (rc < 0) {
            return rc;
        }
    }
    return total;
}

int64_t mig_snapshot_take(struct mig_snapshot *s, size_t number, uint64_t *index, size_t max)
{
    struct mig_snapshot_block *block = s->blocks + number;
    uint64_t signals;
    int64_t n;

    pthread_mutex_lock(&s->lock);
    n = s->error;
    if (n == 0 && max && block->lowest < block->npages) {
        n = (int64_t)s->k->take(block->ready, block->npages, block->lowest, index, max);
        block->lowest = n == (int64_t)max ? index[n - 1] + 1 : block->npages;
    }
    if (s->signalled && read(s->ready_fd, &signals, sizeof(signals)) > 0) {
        s->signalled = false;
    }
    pthread_mutex_unlock(&s->lock);
    return n;
}

void mig_snapshot_free(struct mig_snapshot *s, size_t number, const uint64_t *index, size_t n)
{
    const struct mig_snapshot_block *block = s->blocks + number;

    pthread_mutex_lock(&s->lock);
    for (size_t i = 0; i < n; i++) {
        if (block->where[index[i]] > 0) {
            uint64_t at = (uint64_t)block->where[index[i]] - MIG_SNAPSHOT_GAP;

            s->free_slots[s->nfree++] = at / (s->page_size + MIG_SNAPSHOT_GAP);
            s->nstored--;
            block->where[index[i]] = MIG_PAGE_NONE;
        }
    }
    s->unlimited = false;
    pthread_cond_signal(&s->room);
    pthread_mutex_unlock(&s->lock);
}
