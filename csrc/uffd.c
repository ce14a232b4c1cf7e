/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Memory whose missing pages are served: see uffd.h. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "track.h"
#include "uffd.h"

static uint64_t nbytes_of(const struct mig_uffd *u, const struct mig_uffd_block *block)
{
    return block->npages * u->page_size;
}

int mig_uffd_probe(void)
{
    int fd = mig_track_userfaultfd(UFFD_FEATURE_THREAD_ID, false);

    if (fd < 0) {
        return fd;
    }
    close(fd);
    return 0;
}

int mig_uffd_discard(uint8_t *at, size_t nbytes, bool anonymous)
{
    /* what a file has stays there when it is only unmapped */
    return madvise(at, nbytes, anonymous ? MADV_DONTNEED : MADV_REMOVE) < 0 ? -errno : 0;
}

static int register_block(const struct mig_uffd *u, struct mig_uffd_block *block)
{
    struct uffdio_register range = {
        .range = {.start = (uintptr_t)block->base, .len = nbytes_of(u, block)},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };

    /* else the kernel would fill what is missing around a page with it; where there are no huge
     * pages that is no error */
    madvise(block->base, nbytes_of(u, block), MADV_NOHUGEPAGE);
    if (ioctl(u->fd, UFFDIO_REGISTER, &range) < 0) {
        return -errno;
    }
    block->can_zero = range.ioctls & (UINT64_C(1) << _UFFDIO_ZEROPAGE);
    return 0;
}

static int make_room(struct mig_uffd *u)
{
    size_t largest = 1;

    for (size_t i = 0; i < u->nblocks; i++) {
        struct mig_uffd_block *block = u->blocks + i;
        uint64_t nunits = nbytes_of(u, block) / block->unit;

        largest = block->unit > largest ? block->unit : largest;
        block->wanted = calloc(mig_bitmap_nwords(nunits) + 1, sizeof(*block->wanted));
        if (block->wanted == NULL) {
            return MIG_E_NOMEM;
        }
    }
    u->zeros = calloc(1, largest);
    return u->zeros ? 0 : MIG_E_NOMEM;
}

static int open_locks(struct mig_uffd *u)
{
    int rc = pthread_mutex_init(&u->lock, NULL);

    if (rc == 0) {
        rc = pthread_cond_init(&u->arrived, NULL);
        if (rc) {
            pthread_mutex_destroy(&u->lock);
        }
    }
    u->has_lock = rc == 0;
    return -rc;
}

int mig_uffd_open(struct mig_uffd *u, struct mig_uffd_block *blocks, size_t nblocks,
                  size_t page_size, struct mig_reply *reply)
{
    int rc;

    u->blocks = blocks;
    u->nblocks = nblocks;
    u->page_size = page_size;
    u->reply = reply;
    u->news_fd = -1;
    u->fd = mig_track_userfaultfd(UFFD_FEATURE_THREAD_ID, false);
    rc = u->fd < 0 ? u->fd : open_locks(u);
    if (rc == 0) {
        rc = make_room(u);
    }
    if (rc == 0) {
        u->news_fd = eventfd(0, EFD_CLOEXEC);
        rc = u->news_fd < 0 ? -errno : mig_uffd_start(u);
    }
    for (; rc == 0 && u->nregistered < nblocks; u->nregistered += rc == 0) {
        rc = register_block(u, blocks + u->nregistered);
    }
    if (rc < 0) {
        mig_uffd_close(u);
    }
    return rc;
}

static void unregister_blocks(struct mig_uffd *u)
{
    for (size_t i = 0; i < u->nregistered; i++) {
        struct mig_uffd_block *block = u->blocks + i;
        struct uffdio_range range = {.start = (uintptr_t)block->base, .len = nbytes_of(u, block)};

        ioctl(u->fd, UFFDIO_UNREGISTER, &range);
        if (block->huge) {
            madvise(block->base, nbytes_of(u, block), MADV_HUGEPAGE);
        }
    }
    u->nregistered = 0;
}

static void close_fd(int *fd)
{
    if (*fd >= 0) {
        close(*fd);
    }
    *fd = -1;
}

void mig_uffd_close(struct mig_uffd *u)
{
    unregister_blocks(u);
    if (u->has_thread) {
        pthread_mutex_lock(&u->lock);
        u->stopping = true;
        u->nclients = 0;
        pthread_mutex_unlock(&u->lock);
        eventfd_write(u->news_fd, 1);
        pthread_join(u->thread, NULL);
        u->has_thread = false;
    }
    close_fd(&u->fd);
    close_fd(&u->news_fd);
    if (u->has_lock) {
        pthread_cond_destroy(&u->arrived);
        pthread_mutex_destroy(&u->lock);
        u->has_lock = false;
    }
    for (size_t i = 0; i < u->nblocks; i++) {
        free(u->blocks[i].wanted);
        u->blocks[i].wanted = NULL;
    }
    free(u->zeros);
    u->zeros = NULL;
}

/* ---- placing --------------------------------------------------------------------------------- */

static int wake(const struct mig_uffd *u, uint64_t start, size_t nbytes)
{
    struct uffdio_range range = {.start = start, .len = nbytes};

    return ioctl(u->fd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

/* The kernel copies page by page and may stop in between; a page that is there already is passed
 * over, since a page is the guest's from the moment it is there. */
static int fill(const struct mig_uffd *u, const struct mig_uffd_block *block, uint64_t start,
                const uint8_t *bytes)
{
    /* hugetlbfs has no page of zeros, and is there whole or not at all */
    size_t nbytes = block->unit, step = block->can_zero ? (size_t)sysconf(_SC_PAGESIZE) : nbytes;
    bool was_there = false;
    size_t done = 0;

    while (done < nbytes) {
        struct uffdio_copy copy = {
            .dst = start + done, .src = (uintptr_t)bytes + done, .len = nbytes - done};

        if (ioctl(u->fd, UFFDIO_COPY, &copy) == 0) {
            break;
        }
        if (copy.copy > 0) {
            done += (size_t)copy.copy;
        } else if (errno == EEXIST) {
            was_there = true;
            done += step;
        } else if (errno == EAGAIN) {
            sched_yield();
        } else {
            return -errno;
        }
    }
    return was_there ? wake(u, start, nbytes) : 0;
}

static int fill_zeros(const struct mig_uffd *u, const struct mig_uffd_block *block, uint64_t start)
{
    struct uffdio_zeropage zero = {.range = {.start = start, .len = block->unit}};

    if (block->can_zero && ioctl(u->fd, UFFDIO_ZEROPAGE, &zero) == 0) {
        return 0;
    }
    /* on hugetlbfs, where some of it is there, or where the kernel stopped in between */
    return fill(u, block, start, u->zeros);
}

int mig_uffd_supply(struct mig_uffd *u, const struct mig_uffd_block *block, uint64_t unit)
{
    return fill_zeros(u, block, (uintptr_t)block->base + unit * block->unit);
}

int mig_uffd_place(struct mig_uffd *u, size_t number, uint64_t unit, const uint8_t *bytes)
{
    struct mig_uffd_block *block = u->blocks + number;
    uint64_t start = (uintptr_t)block->base + unit * block->unit;
    uint64_t pages = block->unit / u->page_size;
    int rc = bytes ? fill(u, block, start, bytes) : fill_zeros(u, block, start);

    if (rc < 0) {
        return rc;
    }
    pthread_mutex_lock(&u->lock);
    mig_bitmap_set_atomic(block->received, unit * pages, pages);
    if (mig_bitmap_test(block->wanted, unit)) {
        mig_bitmap_clear(block->wanted, unit, 1);
        u->nwanted--;
        pthread_cond_broadcast(&u->arrived);
        mig_waits_end(&u->waits, start, mig_uffd_now());
        mig_uffd_wake_clients(u, number, unit);
    }
    pthread_mutex_unlock(&u->lock);
    return 0;
}

int mig_uffd_drain(struct mig_uffd *u)
{
    int rc;

    pthread_mutex_lock(&u->lock);
    while (u->nwanted && !u->interrupted) {
        pthread_cond_wait(&u->arrived, &u->lock);
    }
    rc = u->nwanted ? MIG_E_UFFD_MISSING : 0;
    pthread_mutex_unlock(&u->lock);
    return rc;
}

int mig_uffd_await_readers(struct mig_uffd *u, size_t n, int64_t timeout_ns)
{
    struct timespec end;
    int64_t ns;
    int rc = 0;

    clock_gettime(CLOCK_REALTIME, &end);
    ns = end.tv_nsec + (timeout_ns < 0 ? 0 : timeout_ns);
    end.tv_sec += (time_t)(ns / 1000000000);
    end.tv_nsec = (long)(ns % 1000000000);
    pthread_mutex_lock(&u->lock);
    while (u->nreaders < n && !u->interrupted && rc == 0) {
        rc = timeout_ns < 0 ? pthread_cond_wait(&u->arrived, &u->lock)
                            : pthread_cond_timedwait(&u->arrived, &u->lock, &end);
    }
    rc = u->nreaders >= n;
    pthread_mutex_unlock(&u->lock);
    return rc;
}

bool mig_uffd_settle(struct mig_uffd *u)
{
    bool given_up;

    pthread_mutex_lock(&u->lock);
    u->settled = true;
    given_up = u->given_up;
    pthread_cond_broadcast(&u->arrived);
    pthread_mutex_unlock(&u->lock);
    return !given_up;
}

void mig_uffd_enter(struct mig_uffd *u)
{
    pthread_mutex_lock(&u->lock);
    u->nreaders++;
    u->nactive++;
    pthread_cond_broadcast(&u->arrived);
    pthread_mutex_unlock(&u->lock);
}

void mig_uffd_leave(struct mig_uffd *u)
{
    pthread_mutex_lock(&u->lock);
    u->nactive--;
    while (!u->settled && u->nactive == 0 && u->nwanted == 0) {
        pthread_cond_wait(&u->arrived, &u->lock);
    }
    if (!u->settled && u->nactive == 0) {
        u->given_up = true;
        unregister_blocks(u);
    }
    pthread_mutex_unlock(&u->lock);
}

void mig_uffd_interrupt(struct mig_uffd *u, bool on)
{
    pthread_mutex_lock(&u->lock);
    u->interrupted = on;
    pthread_cond_broadcast(&u->arrived);
    pthread_mutex_unlock(&u->lock);
}
