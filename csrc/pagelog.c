/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The RAM records of a stream file that holds each page once: see mig.h. */
#include <errno.h>

#include "endian.h"
#include "mig.h"

/* Appends the word of a record, and the name of its block unless the tail is in that block. */
static int append_header(struct mig_pagelog *log, int64_t number,
                         const struct mig_ram_block *block, uint64_t word)
{
    uint8_t head[MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME];
    size_t nbytes = MIG_RAM_WORD;

    if (log->current == number) {
        word |= MIG_RAM_CONTINUE;
    } else {
        head[MIG_RAM_WORD] = (uint8_t)block->name_len;
        memcpy(head + MIG_RAM_WORD + 1, block->name, block->name_len);
        nbytes += 1 + block->name_len;
        log->current = number;
    }
    mig_store_be64(head, word);
    return mig_append(&log->file, head, nbytes);
}

/* How many of src[0..n) are new pages of `where` whose records stand in the buffer exactly as
 * they go into the file, one behind the other: mostly all of them, and then one copy does. */
static size_t verbatim(const struct mig_pagelog *log, const int64_t *where, const uint8_t *buf,
                       const uint64_t *index, const int64_t *src, size_t n)
{
    const int64_t stride = (int64_t)(MIG_RAM_WORD + log->page_size);
    size_t i;

    for (i = 0; i < n; i++) {
        uint64_t word = index[i] * log->page_size | MIG_RAM_PAGE | MIG_RAM_CONTINUE;

        if (where[index[i]] > 0 || src[i] != src[0] + (int64_t)i * stride ||
            src[i] < MIG_RAM_WORD || mig_load_be64(buf + src[i] - MIG_RAM_WORD) != word) {
            break;
        }
        /* the same page again, in this very run: its second record must find the first */
        if (i && index[i] <= index[i - 1]) {
            break;
        }
    }
    return i;
}

static int put_run(struct mig_pagelog *log, int64_t *where, const uint8_t *buf,
                   const uint64_t *index, const int64_t *src, size_t n)
{
    const size_t stride = MIG_RAM_WORD + log->page_size;
    int64_t at = mig_appender_tail(&log->file) + MIG_RAM_WORD;

    for (size_t i = 0; i < n; i++) {
        where[index[i]] = at + (int64_t)(i * stride);
    }
    return mig_append(&log->file, buf + src[0] - MIG_RAM_WORD, n * stride);
}

static int put_page(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                    int64_t *where, uint64_t page, const uint8_t *bytes)
{
    int rc;

    if (where[page] > 0) {
        return mig_overwrite(&log->file, where[page], bytes, log->page_size);
    }
    rc = append_header(log, number, block, page * log->page_size | MIG_RAM_PAGE);
    if (rc < 0) {
        return rc;
    }
    where[page] = mig_appender_tail(&log->file);
    return mig_append(&log->file, bytes, log->page_size);
}

int mig_pagelog_put(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                    int64_t *where, const uint8_t *buf, const uint64_t *index,
                    const int64_t *src, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (src[i] < -1) {
            return -EINVAL; /* a fill byte that is not 0 has no record that keeps its place */
        }
        if (where[index[i]] > 0) {
            mig_overwrite_soon(&log->file, where[index[i]], log->page_size);
        }
    }
    for (size_t i = 0; i < n;) {
        size_t run = 0;
        int rc = 0;

        if (log->current == number) {
            run = verbatim(log, where, buf, index + i, src + i, n - i);
        }
        if (run) {
            rc = put_run(log, where, buf, index + i, src + i, run);
        } else if (src[i] >= 0) {
            rc = put_page(log, number, block, where, index[i], buf + src[i]);
        } else if (where[index[i]] > 0) {
            rc = put_page(log, number, block, where, index[i], log->zeros);
        } else {
            where[index[i]] = MIG_PAGE_ZERO;
        }
        if (rc < 0) {
            return rc;
        }
        i += run ? run : 1;
    }
    return 0;
}

int mig_pagelog_zeros(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                      const int64_t *where)
{
    for (uint64_t page = 0; page < block->npages; page++) {
        static const uint8_t fill = 0;
        int rc = 0;

        if (where[page] == MIG_PAGE_ZERO) {
            rc = append_header(log, number, block, page * log->page_size | MIG_RAM_ZERO);
            if (rc == 0) {
                rc = mig_append(&log->file, &fill, 1);
            }
        }
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}
