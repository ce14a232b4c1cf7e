/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Pages at their fixed places of a file: see mapped.h. */
#include "mapped.h"

#include <errno.h>
#include <string.h>

enum {
    /* bytes of pages that one thread takes on at a time */
    PIECE = 1 << 20,
    /* pieces of memory that go with one call: pages of a guest's memory mostly are one */
    MAX_PIECES = 256,
    /* what O_DIRECT asks of addresses, offsets and lengths: no disk has larger sectors */
    ALIGNMENT = 4096,
    /* words of a bitmap that are looked at together */
    BITMAP_WORDS = 8192,
};

struct job {
    struct mig_mapped *m;
    const struct mig_pages *pages;
    const uint64_t *index, *zero;
    uint64_t *stored;       /* of a write */
    const uint64_t *wanted; /* of a read */
    uint64_t first, end;    /* of index[], or of the pages */
    uint64_t per_item;
    int64_t offset;
    bool fresh;
    int error; /* the first one */
    uint64_t nbytes;
};

struct run {
    struct iovec iov[MAX_PIECES];
    int niov;
    uint64_t page, npages;
    size_t nbytes;
};

/* ---- one run of pages that are one behind the other in the file ------------------------------ */

static int64_t once(int fd, bool write, const struct iovec *iov, int niov, int64_t offset)
{
    ssize_t n;

    do {
        n = write ? pwritev(fd, iov, niov, offset) : preadv(fd, iov, niov, offset);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return -errno;
    }
    return n == 0 && !write ? MIG_E_MAPPED_SHORT : n;
}

/* To the end, with the iovecs consumed. */
static int transfer(int fd, bool write, struct iovec *iov, int niov, int64_t offset)
{
    while (niov > 0) {
        int64_t n = once(fd, write, iov, niov, offset);

        if (n < 0) {
            return (int)n;
        }
        offset += n;
        for (; niov > 0 && (size_t)n >= iov->iov_len; iov++, niov--) {
            n -= (int64_t)iov->iov_len;
        }
        if (niov > 0) {
            iov->iov_base = (uint8_t *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

static bool is_aligned(const struct iovec *iov, int niov, int64_t offset)
{
    uintptr_t bits = (uintptr_t)offset;

    for (int i = 0; i < niov; i++) {
        bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    }
    return bits % ALIGNMENT == 0;
}

static int transfer_run(struct mig_mapped *m, bool write, struct run *run, int64_t offset)
{
    if (m->direct_fd >= 0 && !__atomic_load_n(&m->no_direct, __ATOMIC_RELAXED) &&
        is_aligned(run->iov, run->niov, offset)) {
        int64_t n = once(m->direct_fd, write, run->iov, run->niov, offset);

        if (n == (int64_t)run->nbytes) {
            return 0;
        }
        if (n < 0 && n != -EINVAL) {
            return (int)n;
        }
        if (n < 0) {
            __atomic_store_n(&m->no_direct, true, __ATOMIC_RELAXED);
        }
        /* what is left of a short one need not be aligned: once more, all of it */
    }
    return transfer(m->fd, write, run->iov, run->niov, offset);
}

/* Whether the page was appended to the run. */
static bool extend(struct run *run, uint64_t page, const uint8_t *bytes, size_t page_size)
{
    struct iovec *last = &run->iov[run->niov - (run->niov > 0)];

    if (run->npages && page != run->page + run->npages) {
        return false;
    }
    if (run->niov && (uint8_t *)last->iov_base + last->iov_len == bytes) {
        last->iov_len += page_size;
    } else if (run->niov == MAX_PIECES) {
        return false;
    } else {
        run->iov[run->niov++] = (struct iovec){(void *)(uintptr_t)bytes, page_size};
    }
    run->page = run->npages ? run->page : page;
    run->npages++;
    run->nbytes += page_size;
    return true;
}

static int flush(struct job *job, struct run *run)
{
    int rc = 0;

    if (run->npages) {
        int64_t at = job->offset + (int64_t)(run->page * job->pages->page_size);

        rc = transfer_run(job->m, job->stored != NULL, run, at);
    }
    if (rc == 0 && run->npages) {
        if (job->stored) {
            /* other threads may have bits of the same word */
            mig_bitmap_set_atomic(job->stored, run->page, run->npages);
        }
        __atomic_fetch_add(&job->nbytes, run->nbytes, __ATOMIC_RELAXED);
    }
    run->niov = 0;
    run->npages = 0;
    run->nbytes = 0;
    return rc;
}

static int add(struct job *job, struct run *run, uint64_t page, const uint8_t *bytes)
{
    int rc = 0;

    if (!extend(run, page, bytes, job->pages->page_size)) {
        rc = flush(job, run);
        extend(run, page, bytes, job->pages->page_size);
    }
    return rc;
}

/* ---- pieces ---------------------------------------------------------------------------------- */

static int write_piece(struct job *job, uint64_t first, uint64_t end)
{
    struct run run = {.niov = 0};
    int rc = 0;

    for (uint64_t i = first; i < end && rc == 0; i++) {
        const uint8_t *bytes = mig_page(job->pages, job->index[i]);

        if (!bytes || (job->zero && mig_bitmap_test(job->zero, i))) {
            mig_bitmap_clear_atomic(job->stored, job->index[i], 1);
        } else {
            rc = add(job, &run, job->index[i], bytes);
        }
    }
    return rc < 0 ? rc : flush(job, &run);
}

static void blank(struct job *job, uint64_t first, uint64_t end)
{
    size_t page_size = job->pages->page_size;

    for (uint64_t i = first; i < end && !job->fresh; i++) {
        uint8_t *page = job->pages->base + i * page_size;

        /* what is zero already may have no memory, and need not get it */
        if (!job->m->kernels->is_zero(page, page_size)) {
            memset(page, 0, page_size);
        }
    }
}

static int read_piece(struct job *job, uint64_t first, uint64_t end)
{
    size_t page_size = job->pages->page_size;
    struct run run = {.niov = 0};
    int rc = 0;

    while (first < end && rc == 0) {
        uint64_t begin = mig_bitmap_next_set(job->wanted, end, first);
        uint64_t stop = begin < end ? mig_bitmap_next_clear(job->wanted, end, begin) : end;

        blank(job, first, begin);
        if (begin < stop) {
            run.page = begin;
            run.npages = stop - begin;
            run.nbytes = run.npages * page_size;
            run.niov = 1;
            run.iov[0] = (struct iovec){job->pages->base + begin * page_size, run.nbytes};
            rc = flush(job, &run);
        }
        first = stop;
    }
    return rc;
}

static void do_item(void *context, unsigned thread, size_t item)
{
    struct job *job = context;
    uint64_t first = job->first + item * job->per_item, end = first + job->per_item;
    int rc, none = 0;

    (void)thread;
    if (__atomic_load_n(&job->error, __ATOMIC_RELAXED)) {
        return;
    }
    end = end < job->end ? end : job->end;
    rc = job->stored ? write_piece(job, first, end) : read_piece(job, first, end);
    if (rc < 0) {
        __atomic_compare_exchange_n(&job->error, &none, rc, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED);
    }
}

static int64_t run_job(struct job *job)
{
    size_t per_item = PIECE / job->pages->page_size, n;

    job->per_item = per_item ? per_item : 1;
    n = (size_t)((job->end - job->first + job->per_item - 1) / job->per_item);
    if (job->m->pool && n > 1) {
        mig_pool_start(job->m->pool, do_item, job, n);
        mig_pool_wait(job->m->pool);
    } else {
        for (size_t i = 0; i < n; i++) {
            do_item(job, 0, i);
        }
    }
    return job->error ? job->error : (int64_t)job->nbytes;
}

int64_t mig_mapped_write(struct mig_mapped *m, const struct mig_pages *pages,
                         const uint64_t *index, size_t n, const uint64_t *zero, uint64_t *stored,
                         int64_t offset)
{
    struct job job = {
        .m = m, .pages = pages, .index = index, .zero = zero, .stored = stored,
        .end = n, .offset = offset,
    };

    return run_job(&job);
}

int64_t mig_mapped_read(struct mig_mapped *m, const struct mig_pages *pages,
                        const uint64_t *stored, uint64_t first, uint64_t end, int64_t offset,
                        bool fresh)
{
    struct job job = {
        .m = m, .pages = pages, .wanted = stored, .first = first, .end = end,
        .offset = offset, .fresh = fresh,
    };

    return run_job(&job);
}

/* ---- bitmaps --------------------------------------------------------------------------------- */

int mig_mapped_bitmap(const struct mig_mapped *m, uint64_t *words, uint64_t nbits, int64_t offset)
{
    size_t nwords = mig_bitmap_nwords(nbits);
    uint8_t bytes[BITMAP_WORDS * 8];

    for (size_t first = 0; first < nwords; first += BITMAP_WORDS) {
        size_t n = nwords - first < BITMAP_WORDS ? nwords - first : BITMAP_WORDS;
        struct iovec iov = {bytes, n * 8};
        int rc = transfer(m->fd, false, &iov, 1, offset + (int64_t)(first * 8));

        if (rc < 0) {
            return rc;
        }
        if (!m->kernels->is_zero(bytes, n * 8)) {
            uint64_t bits = nbits - first * 64;

            mig_bitmap_from_wire(words + first, bits < n * 64 ? bits : n * 64, bytes);
        }
    }
    return 0;
}

int mig_mapped_put(const struct mig_mapped *m, const uint8_t *bytes, size_t nbytes, int64_t offset)
{
    struct iovec iov = {(void *)(uintptr_t)bytes, nbytes};

    return transfer(m->fd, true, &iov, 1, offset);
}
