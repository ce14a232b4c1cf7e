/* SPDX-License-Identifier: LGPL-2.1-or-later
 * A mapped-ram file while it is written: see mappedlog.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include "aio.h"
#include "mappedlog.h"

int mig_mappedlog_open(struct mig_mappedlog_writer *w, const struct mig_mappedlog *file)
{
    size_t page_size = file->page_size, buffer, nbytes;
    void *memory;

    memset(w, 0, sizeof(*w));
    w->file = file;
    w->capacity = page_size < MIG_MAPPEDLOG_BUFFER ? MIG_MAPPEDLOG_BUFFER / page_size : 1;
    buffer = w->capacity * page_size;
    nbytes = MIG_MAPPEDLOG_NBUFFERS * buffer;
    memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return MIG_E_NOMEM;
    }
    w->bytes = memory;
    w->pages = calloc(MIG_MAPPEDLOG_NBUFFERS * w->capacity, sizeof(*w->pages));
    if (!w->pages) {
        return MIG_E_NOMEM;
    }
    for (size_t i = 0; i < MIG_MAPPEDLOG_NBUFFERS; i++) {
        w->buffers[i].bytes = w->bytes + i * buffer;
        w->buffers[i].page = w->pages + i * w->capacity;
    }
    /* without AIO writes are made one by one */
    if (file->direct_fd >= 0) {
        w->aio = mig_aio_open(MIG_MAPPEDLOG_NBUFFERS * w->capacity);
    }
    return 0;
}

void mig_mappedlog_close(struct mig_mappedlog_writer *w)
{
    mig_aio_close(w->aio);
    if (w->bytes) {
        munmap(w->bytes, MIG_MAPPEDLOG_NBUFFERS * w->capacity * w->file->page_size);
    }
    free(w->pages);
    memset(w, 0, sizeof(*w));
}

/* Writes that go to the kernel, and come back, at a time. */
enum { BATCH = 64 };

/* ---- writes --------------------------------------------------------------------------------- */

/* What a write is of: pages first ... first + n - 1 of a buffer. */
static uint64_t tag(size_t buffer, size_t first, size_t n)
{
    return ((uint64_t)n << 32 | first) * MIG_MAPPEDLOG_NBUFFERS + buffer;
}

/* Writes what a write has left of its pages, through the page cache: a file system may open files
 * with O_DIRECT, and not take such writes. */
static int write_rest(const struct mig_mappedlog_writer *w, const struct mig_mappedlog_buffer *b,
                      size_t first, size_t n, size_t written)
{
    size_t page_size = w->file->page_size;
    int64_t at = b->block->offset + (int64_t)(b->page[first] * page_size);

    return mig_pwrite_all(w->file->fd, b->bytes + first * page_size + written,
                          n * page_size - written, at + (int64_t)written);
}

static int check_write(struct mig_mappedlog_writer *w, const struct io_event *event)
{
    struct mig_mappedlog_buffer *b = &w->buffers[event->data % MIG_MAPPEDLOG_NBUFFERS];
    uint64_t run = event->data / MIG_MAPPEDLOG_NBUFFERS;
    size_t first = (uint32_t)run, n = run >> 32;

    b->pending--;
    if (event->res < 0 && event->res != -EINVAL) {
        return (int)event->res;
    }
    if (event->res == (int64_t)(n * w->file->page_size)) {
        return 0;
    }
    return write_rest(w, b, first, n, event->res < 0 ? 0 : (size_t)event->res);
}

/* Waits for at least one write; notes the first error. */
static int reap(struct mig_mappedlog_writer *w)
{
    struct io_event events[BATCH];
    int64_t n = mig_aio_reap(w->aio, 1, events, BATCH);

    if (n < 0) {
        return (int)n;
    }
    for (int64_t i = 0; i < n; i++) {
        int rc = check_write(w, &events[i]);

        if (rc < 0 && w->error == 0) {
            w->error = rc;
        }
    }
    return w->error;
}

static int wait_for(struct mig_mappedlog_writer *w, const struct mig_mappedlog_buffer *b)
{
    int rc = w->error;

    while (b->pending && rc == 0) {
        rc = reap(w);
    }
    return rc;
}

/* How many pages from the i-th on follow each other in the file. */
static size_t run_at(const struct mig_mappedlog_buffer *b, size_t i)
{
    size_t n = 1;

    while (i + n < b->npages && b->page[i + n] == b->page[i] + n) {
        n++;
    }
    return n;
}

/* Whether writes are to come back, besides n that have not gone yet. */
static bool is_waiting(const struct mig_mappedlog_writer *w, size_t n)
{
    size_t pending = 0;

    for (size_t i = 0; i < MIG_MAPPEDLOG_NBUFFERS; i++) {
        pending += w->buffers[i].pending;
    }
    return pending > n;
}

static int submit(struct mig_mappedlog_writer *w, struct iocb **list, size_t n)
{
    while (n) {
        int64_t done = mig_aio_submit(w->aio, list, n);
        int rc = done < 0 ? (int)done : 0;

        if (done > 0) {
            list += done;
            n -= (size_t)done;
        } else if (rc == -EAGAIN && is_waiting(w, n)) {
            /* where none is to come back the kernel never takes any */
            rc = reap(w);
        }
        if (rc < 0) {
            /* those that never went do not come back */
            w->buffers[w->current].pending -= n;
            w->error = rc;
            return rc;
        }
    }
    return 0;
}

static int write_behind(struct mig_mappedlog_writer *w, struct mig_mappedlog_buffer *b)
{
    size_t page_size = w->file->page_size, i = 0;
    struct iocb io[BATCH], *list[BATCH];

    while (i < b->npages) {
        size_t n = 0;
        int rc;

        for (; n < BATCH && i < b->npages; n++) {
            size_t npages = run_at(b, i);

            io[n] = mig_aio_write(w->file->direct_fd, b->bytes + i * page_size, npages * page_size,
                                  b->block->offset + (int64_t)(b->page[i] * page_size),
                                  tag(w->current, i, npages));
            list[n] = &io[n];
            i += npages;
        }
        b->pending += n;
        rc = submit(w, list, n);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

static int write_now(struct mig_mappedlog_writer *w, struct mig_mappedlog_buffer *b)
{
    size_t page_size = w->file->page_size;

    for (size_t i = 0; i < b->npages;) {
        size_t n = run_at(b, i);
        int rc = -EINVAL;

        if (w->file->direct_fd >= 0) {
            rc = mig_pwrite_all(w->file->direct_fd, b->bytes + i * page_size, n * page_size,
                                b->block->offset + (int64_t)(b->page[i] * page_size));
        }
        if (rc == -EINVAL) {
            rc = write_rest(w, b, i, n, 0);
        }
        if (rc < 0) {
            return rc;
        }
        i += n;
    }
    return 0;
}

/* Writes what the current buffer has, and goes on to the next. */
static int next_buffer(struct mig_mappedlog_writer *w)
{
    struct mig_mappedlog_buffer *b = &w->buffers[w->current];
    int rc = w->aio ? write_behind(w, b) : write_now(w, b);

    if (w->aio) {
        w->current = (w->current + 1) % MIG_MAPPEDLOG_NBUFFERS;
        b = &w->buffers[w->current];
    }
    if (rc == 0) {
        rc = wait_for(w, b);
    }
    b->npages = 0;
    return rc;
}

int mig_mappedlog_flush(struct mig_mappedlog_writer *w)
{
    int rc = w->buffers[w->current].npages ? next_buffer(w) : w->error;

    for (size_t i = 0; i < MIG_MAPPEDLOG_NBUFFERS && rc == 0; i++) {
        rc = wait_for(w, &w->buffers[i]);
    }
    return rc;
}

/* ---- whole buffers -------------------------------------------------------------------------- */

/* `page` may have been written before, and that may still be under way. */
static bool is_under_way(const struct mig_mappedlog_writer *w,
                         const struct mig_mappedlog_block *block, uint64_t page)
{
    if (!mig_bitmap_test_atomic(block->written, page)) {
        return false;
    }
    for (size_t i = 0; i < MIG_MAPPEDLOG_NBUFFERS; i++) {
        const struct mig_mappedlog_buffer *b = &w->buffers[i];

        if (b->block != block || (i != w->current && b->pending == 0)) {
            continue;
        }
        for (size_t j = 0; j < b->npages; j++) {
            if (b->page[j] == page) {
                return true;
            }
        }
    }
    return false;
}

static void note(const struct mig_mappedlog_block *block, uint64_t page)
{
    mig_bitmap_set_atomic(block->written, page, 1);
    mig_bitmap_set_atomic(block->present, page, 1);
}

int mig_mappedlog_room(struct mig_mappedlog_writer *w, uint8_t **bytes)
{
    int rc = w->buffers[w->current].npages ? next_buffer(w) : w->error;

    *bytes = w->buffers[w->current].bytes;
    return rc;
}

int mig_mappedlog_write(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block,
                       const uint64_t *page, size_t n)
{
    struct mig_mappedlog_buffer *b = &w->buffers[w->current];
    bool again = false;
    int rc = 0;

    b->block = block;
    for (b->npages = 0; b->npages < n; b->npages++) {
        b->page[b->npages] = page[b->npages];
        again = again || is_under_way(w, block, page[b->npages]);
        note(block, page[b->npages]);
    }
    if (!again) {
        return next_buffer(w);
    }
    /* writes that are under way overtake each other: this one is behind all, and in order */
    for (size_t i = 0; i < MIG_MAPPEDLOG_NBUFFERS && rc == 0; i++) {
        rc = wait_for(w, &w->buffers[i]);
    }
    if (rc == 0) {
        rc = write_now(w, b);
    }
    b->npages = 0;
    return rc;
}

/* ---- pages that come one by one ------------------------------------------------------------- */

int mig_mappedlog_expect(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block)
{
    struct mig_mappedlog_buffer *b = &w->buffers[w->current];
    int rc = w->error;

    if (rc == 0 && b->npages && (b->npages == w->capacity || b->block != block)) {
        rc = next_buffer(w);
    }
    return rc;
}

uint8_t *mig_mappedlog_slot(const struct mig_mappedlog_writer *w, size_t k)
{
    const struct mig_mappedlog_buffer *b = &w->buffers[w->current];

    return b->npages + k < w->capacity ? b->bytes + (b->npages + k) * w->file->page_size : NULL;
}

bool mig_mappedlog_takes(const struct mig_mappedlog_writer *w,
                        const struct mig_mappedlog_block *block, uint64_t page)
{
    return !is_under_way(w, block, page);
}

int mig_mappedlog_landed(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block,
                        uint64_t page)
{
    struct mig_mappedlog_buffer *b = &w->buffers[w->current];

    b->block = block;
    b->page[b->npages++] = page;
    note(block, page);
    return b->npages == w->capacity ? next_buffer(w) : 0;
}

/* ---- bursts --------------------------------------------------------------------------------- */

static int put_page(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block,
                    uint64_t page, const uint8_t *bytes)
{
    int rc = is_under_way(w, block, page) ? mig_mappedlog_flush(w) : mig_mappedlog_expect(w, block);

    if (rc < 0) {
        return rc;
    }
    memcpy(mig_mappedlog_slot(w, 0), bytes, w->file->page_size);
    return mig_mappedlog_landed(w, block, page);
}

/* What the file has of a page, into `bytes`. */
static int read_back(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block,
                     uint64_t page, uint8_t *bytes)
{
    size_t page_size = w->file->page_size;
    int64_t at = block->offset + (int64_t)(page * page_size);
    int rc = 0;

    if (!mig_bitmap_test_atomic(block->present, page)) {
        memset(bytes, 0, page_size);
        return 0;
    }
    if (is_under_way(w, block, page)) {
        rc = mig_mappedlog_flush(w);
    }
    return rc < 0 ? rc : mig_pread_all(w->file->fd, bytes, page_size, at);
}

static int put_record(struct mig_mappedlog_writer *w, const struct mig_ram_parser *p,
                      const uint8_t *buf, size_t i, size_t *packed, uint8_t *scratch)
{
    const struct mig_mappedlog_block *block = &w->file->blocks[p->current];
    size_t page_size = w->file->page_size;
    uint64_t page = p->page[i];
    int64_t rc;

    switch (p->kind[i]) {
    case MIG_RAM_PAGE:
        return put_page(w, block, page, buf + p->src[i]);
    case MIG_RAM_COMPRESS:
        return put_page(w, block, page, p->unpacked + (*packed)++ * page_size);
    case MIG_RAM_XBZRLE:
        rc = read_back(w, block, page, scratch);
        if (rc == 0) {
            rc = w->file->kernels->xbzrle_decode(buf + p->src[i], p->length[i], scratch, page_size);
        }
        return rc < 0 ? (int)rc : put_page(w, block, page, scratch);
    }
    if (p->src[i] < -1) {
        return MIG_E_RAM_BAD_FILL; /* a page without contents reads as zeros */
    }
    mig_bitmap_clear_atomic(block->present, page, 1);
    return 0;
}

int mig_mappedlog_put(struct mig_mappedlog_writer *w, struct mig_ram_parser *p, const uint8_t *buf)
{
    const struct mig_mappedlog_block *block = &w->file->blocks[p->current];
    size_t page_size = w->file->page_size, packed = 0;
    uint8_t *scratch = NULL;
    int rc = 0;

    for (size_t i = 0; i < p->npages; i++) {
        if (p->kind[i] != MIG_RAM_XBZRLE) {
            continue;
        }
        if (!scratch) {
            scratch = malloc(page_size);
            if (!scratch) {
                return MIG_E_NOMEM;
            }
        }
        if (mig_bitmap_test_atomic(block->present, p->page[i])) {
            int64_t at = block->offset + (int64_t)(p->page[i] * page_size);

            (void)posix_fadvise(w->file->fd, (off_t)at, (off_t)page_size, POSIX_FADV_WILLNEED);
        }
    }
    for (size_t i = 0; i < p->npages && rc == 0; i++) {
        rc = put_record(w, p, buf, i, &packed, scratch);
        p->wrong = i;
    }
    free(scratch);
    return rc;
}
