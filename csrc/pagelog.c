/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The RAM records of a stream file that holds each page once: see mig.h. */
#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

#include "endian.h"
#include "mig.h"

enum { RUN_IOV = 256 };

/* Bytes that follow each other in the file, not yet written. */
struct run {
    int fd;
    int64_t start, end;
    struct iovec iov[RUN_IOV];
    size_t niov;
    uint8_t heads[RUN_IOV * 16]; /* headers made here; naming ones are written at once */
    size_t used;
};

int mig_pwrite_all(int fd, const void *bytes, size_t nbytes, int64_t offset)
{
    const uint8_t *p = bytes;

    while (nbytes) {
        ssize_t n = pwrite(fd, p, nbytes, (off_t)offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -ENOSPC;
        }
        p += n;
        nbytes -= (size_t)n;
        offset += n;
    }
    return 0;
}

static int run_flush(struct run *run)
{
    struct iovec *iov = run->iov;
    size_t left = run->niov;
    int64_t at = run->start;

    while (left) {
        ssize_t n = pwritev(run->fd, iov, (int)left, (off_t)at);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -ENOSPC;
        }
        at += n;
        while (left && (size_t)n >= iov->iov_len) {
            n -= (ssize_t)iov->iov_len;
            iov++;
            left--;
        }
        if (left) {
            iov->iov_base = (uint8_t *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    run->niov = 0;
    run->used = 0;
    run->start = run->end = -1;
    return 0;
}

static void run_add(struct run *run, const uint8_t *bytes, size_t nbytes)
{
    struct iovec *last = run->niov ? &run->iov[run->niov - 1] : NULL;

    if (last && (const uint8_t *)last->iov_base + last->iov_len == bytes) {
        last->iov_len += nbytes;
    } else {
        run->iov[run->niov].iov_base = (void *)(uintptr_t)bytes;
        run->iov[run->niov].iov_len = nbytes;
        run->niov++;
    }
    run->end += (int64_t)nbytes;
}

/* Room for one record at file offset `at`: flushes unless the run goes on there. */
static int run_reach(struct run *run, int64_t at)
{
    if (run->end != at || run->niov + 2 > RUN_IOV || run->used + MIG_RAM_WORD > sizeof(run->heads)) {
        int rc = run_flush(run);

        if (rc < 0) {
            return rc;
        }
        run->start = run->end = at;
    }
    return 0;
}

/* The header of a record that says CONTINUE. When the same bytes stand before the page in the
 * buffer, as they mostly do, they are taken from there: then a run is one iovec. */
static void run_add_record(struct run *run, uint64_t page, size_t page_size, const uint8_t *bytes,
                           bool in_buffer)
{
    uint8_t *head = run->heads + run->used;

    mig_store_be64(head, page * page_size | MIG_RAM_PAGE | MIG_RAM_CONTINUE);
    if (in_buffer && memcmp(bytes - MIG_RAM_WORD, head, MIG_RAM_WORD) == 0) {
        run_add(run, bytes - MIG_RAM_WORD, MIG_RAM_WORD + page_size);
        return;
    }
    run->used += MIG_RAM_WORD;
    run_add(run, head, MIG_RAM_WORD);
    run_add(run, bytes, page_size);
}

/* Writes the header that enters a block and moves the tail past it. */
static int enter_block(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                       uint64_t word)
{
    uint8_t head[MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME];
    size_t nbytes = MIG_RAM_WORD + 1 + block->name_len;
    int rc;

    mig_store_be64(head, word);
    head[MIG_RAM_WORD] = (uint8_t)block->name_len;
    memcpy(head + MIG_RAM_WORD + 1, block->name, block->name_len);
    rc = mig_pwrite_all(log->fd, head, nbytes, log->tail);
    if (rc == 0) {
        log->tail += (int64_t)nbytes;
        log->current = number;
    }
    return rc;
}

/* A page with contents: in its place, or in a new record at the tail. */
static int put_page(struct mig_pagelog *log, struct run *run, int64_t number,
                    const struct mig_ram_block *block, int64_t *where, uint64_t page,
                    const uint8_t *bytes, bool in_buffer)
{
    int64_t at = where[page];
    int rc;

    if (at <= 0 && log->current != number) {
        rc = run_flush(run);
        if (rc == 0) {
            rc = enter_block(log, number, block, page * log->page_size | MIG_RAM_PAGE);
        }
        if (rc < 0) {
            return rc;
        }
        where[page] = log->tail;
        log->tail += (int64_t)log->page_size;
        return mig_pwrite_all(log->fd, bytes, log->page_size, where[page]);
    }
    if (at <= 0) {
        at = where[page] = log->tail + MIG_RAM_WORD;
        log->tail = at + (int64_t)log->page_size;
    } else if (run->end + MIG_RAM_WORD != at) {
        /* the header there may name the block: only the page is rewritten */
        rc = run_reach(run, at);
        if (rc == 0) {
            run_add(run, bytes, log->page_size);
        }
        return rc;
    }
    rc = run_reach(run, at - MIG_RAM_WORD);
    if (rc == 0) {
        run_add_record(run, page, log->page_size, bytes, in_buffer);
    }
    return rc;
}

int mig_pagelog_put(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                    int64_t *where, const uint8_t *buf, const uint64_t *index,
                    const int64_t *src, size_t n)
{
    struct run run = {.fd = log->fd, .start = -1, .end = -1};
    int rc = 0;

    for (size_t i = 0; i < n && rc == 0; i++) {
        if (src[i] >= 0) {
            rc = put_page(log, &run, number, block, where, index[i], buf + src[i],
                          src[i] >= MIG_RAM_WORD);
        } else if (src[i] == -1) {
            if (where[index[i]] > 0) {
                rc = put_page(log, &run, number, block, where, index[i], log->zeros, false);
            } else {
                where[index[i]] = MIG_PAGE_ZERO;
            }
        } else {
            return -EINVAL; /* a fill byte: the caller spells the page out */
        }
    }
    return rc < 0 ? rc : run_flush(&run);
}

int mig_pagelog_zeros(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                      const int64_t *where)
{
    enum { RECORD = MIG_RAM_WORD + 1, BATCH = 1024 };
    uint8_t records[BATCH * RECORD] = {0};
    uint64_t page = 0;
    int rc = 0;

    while (page < block->npages) {
        size_t used = 0;

        for (; page < block->npages && used < sizeof(records); page++) {
            uint64_t word = page * log->page_size | MIG_RAM_ZERO;

            if (where[page] != MIG_PAGE_ZERO) {
                continue;
            }
            if (log->current != number) {
                static const uint8_t fill = 0;

                rc = enter_block(log, number, block, word);
                if (rc == 0) {
                    rc = mig_pwrite_all(log->fd, &fill, 1, log->tail++);
                }
                if (rc < 0) {
                    return rc;
                }
                continue;
            }
            mig_store_be64(records + used, word | MIG_RAM_CONTINUE);
            used += RECORD; /* the fill byte stays 0 */
        }
        rc = mig_pwrite_all(log->fd, records, used, log->tail);
        if (rc < 0) {
            return rc;
        }
        log->tail += (int64_t)used;
    }
    return 0;
}
