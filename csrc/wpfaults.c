/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Tracking writes by write-protect faults: a writer stops at a protected page until a thread has
 * set the page's bit and lifted the protection. Works from Linux 5.7 on, shmem from 5.19.
 *
 * Bit and protection change together, under one lock: else a sync between the two would leave a
 * page that is neither dirty nor protected. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "protect.h"
#include "thread.h"
#include "track.h"

enum {
    /* what one sync does under the lock at most, while writers wait */
    MAX_RUNS = 64,
    MAX_PAGES = 4096,
    MAX_MESSAGES = 64,
    MAX_ENTRIES = 512,
};

/* An entry of /proc/self/pagemap of a page that is neither present nor swapped has both clear. */
static const uint64_t PAGEMAP_MAPPED = UINT64_C(3) << 62;

/* Untouched anonymous memory cannot be protected (before Linux 6.4): a read gives it the kernel's
 * page of zeros, which takes a page table entry and no memory. */
static int map_zeros(const struct mig_track *t, const struct mig_track_block *block)
{
    uint64_t entries[MAX_ENTRIES], nhost = mig_track_nbytes(block) / t->host_page;
    uint64_t first = (uintptr_t)block->base / t->host_page;

    for (uint64_t done = 0; done < nhost;) {
        size_t want = nhost - done < MAX_ENTRIES ? (size_t)(nhost - done) : MAX_ENTRIES;
        ssize_t got = pread(t->pagemap, entries, want * sizeof(*entries),
                            (off_t)((first + done) * sizeof(*entries)));

        if (got <= 0) {
            return got < 0 ? -errno : -EFAULT;
        }
        for (size_t i = 0; i < (size_t)got / sizeof(*entries); i++) {
            if (!(entries[i] & PAGEMAP_MAPPED)) {
                (void)*(volatile const uint8_t *)(block->base + (done + i) * t->host_page);
            }
        }
        done += (uint64_t)got / sizeof(*entries);
    }
    return 0;
}

int mig_wpfaults_prepare(struct mig_track *t)
{
    for (size_t i = 0; i < t->nblocks; i++) {
        int rc = t->blocks[i].anonymous ? map_zeros(t, t->blocks + i) : 0;

        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* A page that was given back and is used again: it reads as zeros now, which is a change. */
static int put_zeros(const struct mig_track *t, uint64_t address)
{
    struct uffdio_zeropage arg = {.range = {.start = address, .len = t->host_page}};

    while (ioctl(t->uffd, UFFDIO_ZEROPAGE, &arg) < 0) {
        if (errno == EEXIST || errno == ENOENT || errno == ESRCH) {
            ioctl(t->uffd, UFFDIO_WAKE, &arg.range);
            return 0;
        }
        if (errno != EAGAIN) {
            return -errno;
        }
        sched_yield();
    }
    return 0;
}

/* The caller holds the lock. */
static void serve(struct mig_track *t, const struct uffd_msg *msg)
{
    uint64_t address = msg->arg.pagefault.address & ~(uint64_t)(t->host_page - 1);

    if (msg->event != UFFD_EVENT_PAGEFAULT) {
        return;
    }
    for (size_t i = 0; i < t->nblocks; i++) {
        const struct mig_track_block *block = t->blocks + i;
        uint64_t offset = address - (uintptr_t)block->base, page = offset / block->page_size;
        int rc;

        if (address < (uintptr_t)block->base || offset >= mig_track_nbytes(block)) {
            continue;
        }
        mig_bitmap_put(block->bits, page);
        rc = msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP
                 ? mig_track_protect(t, block->base + page * block->page_size, block->page_size,
                                     false)
                 : put_zeros(t, address);
        if (rc < 0 && t->error == 0) {
            /* nobody may wait for ever: the log ends, and every sync says so from now on */
            t->error = rc;
            mig_track_unregister(t);
        }
        return;
    }
}

static void *serve_all(void *argument)
{
    struct mig_track *t = argument;
    struct uffd_msg messages[MAX_MESSAGES];

    while (mig_protect_await(t->uffd, t->stop_fd)) {
        ssize_t got;

        /* A message that is read stays, also when its writer was woken with another's: without a
         * sync in between it says nothing new, and one that nobody has read goes with its writer.
         * So no page is dirty again that nobody wrote again. */
        pthread_mutex_lock(&t->lock);
        got = read(t->uffd, messages, sizeof(messages));
        for (size_t i = 0; got > 0 && i < (size_t)got / sizeof(*messages); i++) {
            serve(t, messages + i);
        }
        pthread_mutex_unlock(&t->lock);
    }
    return NULL;
}

static int start_thread(struct mig_track *t)
{
    int rc = pthread_mutex_init(&t->lock, NULL);

    if (rc) {
        return -rc;
    }
    rc = mig_thread_start(&t->thread, serve_all, t, "mig-dirty");
    if (rc < 0) {
        pthread_mutex_destroy(&t->lock);
    }
    t->has_thread = rc == 0;
    return rc;
}

int mig_wpfaults_start(struct mig_track *t)
{
    int rc;

    t->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (t->stop_fd < 0) {
        return -errno;
    }
    rc = start_thread(t);
    for (size_t i = 0; rc == 0 && i < t->nblocks; i++) {
        rc = mig_track_protect(t, t->blocks[i].base, mig_track_nbytes(t->blocks + i), true);
    }
    return rc;
}

void mig_wpfaults_stop(struct mig_track *t)
{
    if (t->has_thread) {
        eventfd_write(t->stop_fd, 1);
        pthread_join(t->thread, NULL);
        pthread_mutex_destroy(&t->lock);
        t->has_thread = false;
    }
    if (t->stop_fd >= 0) {
        close(t->stop_fd);
        t->stop_fd = -1;
    }
}

/* Protects the next runs of written pages again and takes their bits; returns their number. */
static int64_t take_runs(struct mig_track *t, const struct mig_kernels *k,
                         const struct mig_track_block *block, uint64_t from, uint64_t *runs)
{
    int64_t n;
    int rc;

    pthread_mutex_lock(&t->lock);
    n = (int64_t)mig_bitmap_runs(k, block->bits, block->npages, from, runs, MAX_RUNS, MAX_PAGES);
    rc = t->error;
    for (int64_t i = 0; rc == 0 && i < n; i++) {
        uint64_t first = runs[2 * i], npages = runs[2 * i + 1] - first;

        rc = mig_track_protect(t, block->base + first * block->page_size,
                               npages * block->page_size, true);
        if (rc == 0) {
            mig_bitmap_clear(block->bits, first, npages);
        }
    }
    pthread_mutex_unlock(&t->lock);
    return rc < 0 ? rc : n;
}

int64_t mig_wpfaults_sync(struct mig_track *t, const struct mig_kernels *k,
                          const struct mig_track_block *block, uint64_t *dirty)
{
    uint64_t runs[2 * MAX_RUNS], from = 0, fresh = 0;
    int64_t n;

    while ((n = take_runs(t, k, block, from, runs)) > 0) {
        for (int64_t i = 0; i < n; i++) {
            fresh += mig_bitmap_set_atomic(dirty, runs[2 * i], runs[2 * i + 1] - runs[2 * i]);
        }
        from = runs[2 * n - 1];
    }
    return n < 0 ? n : (int64_t)fresh;
}
