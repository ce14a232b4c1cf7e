/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The RAM records of a stream file that holds each page once: see mig.h. */
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

/* How many records from the i-th on are new pages of `where` whose records stand in the buffer
 * exactly as they go into the file, one behind the other: mostly all of them, and then one copy
 * does. */
static size_t verbatim(const struct mig_pagelog *log, const struct mig_ram_parser *p,
                       const int64_t *where, const uint8_t *buf, size_t i)
{
    const int64_t stride = (int64_t)(MIG_RAM_WORD + log->page_size);
    int64_t src = p->src[i];
    size_t n;

    for (n = 0; i < p->npages; i++, n++, src += stride) {
        uint64_t page = p->page[i];
        uint64_t word = page * log->page_size | MIG_RAM_PAGE | MIG_RAM_CONTINUE;

        if (p->kind[i] != MIG_RAM_PAGE || where[page] > 0 || p->src[i] != src ||
            src < MIG_RAM_WORD || mig_load_be64(buf + src - MIG_RAM_WORD) != word) {
            break;
        }
        /* the same page again, in this very run: its second record must find the first */
        if (n && page <= p->page[i - 1]) {
            break;
        }
    }
    return n;
}

static int put_run(struct mig_pagelog *log, int64_t *where, const uint8_t *bytes,
                   const uint64_t *index, size_t n)
{
    const size_t stride = MIG_RAM_WORD + log->page_size;
    int64_t at = mig_appender_tail(&log->file) + MIG_RAM_WORD;

    for (size_t i = 0; i < n; i++) {
        where[index[i]] = at + (int64_t)(i * stride);
    }
    return mig_append(&log->file, bytes - MIG_RAM_WORD, n * stride);
}

static int put_page(struct mig_pagelog *log, const struct mig_ram_parser *p, int64_t *where,
                    uint64_t page, const uint8_t *bytes)
{
    int rc;

    if (where[page] > 0) {
        return mig_overwrite(&log->file, where[page], bytes, log->page_size);
    }
    rc = append_header(log, p->current, &p->blocks[p->current],
                       page * log->page_size | MIG_RAM_PAGE);
    if (rc < 0) {
        return rc;
    }
    where[page] = mig_appender_tail(&log->file);
    return mig_append(&log->file, bytes, log->page_size);
}

/* A difference to what the file has of the page, which is zeros when it has nothing. */
static int put_delta(struct mig_pagelog *log, const struct mig_ram_parser *p, int64_t *where,
                     uint64_t page, const uint8_t *bytes, size_t nbytes)
{
    int64_t rc = 0;

    if (where[page] > 0) {
        rc = mig_read_back(&log->file, where[page], log->scratch, log->page_size);
    } else {
        memset(log->scratch, 0, log->page_size);
    }
    if (rc == 0) {
        rc = log->kernels->xbzrle_decode(bytes, nbytes, log->scratch, log->page_size);
    }
    return rc < 0 ? (int)rc : put_page(log, p, where, page, log->scratch);
}

static int put_record(struct mig_pagelog *log, const struct mig_ram_parser *p, int64_t *where,
                      const uint8_t *buf, size_t i, size_t *packed)
{
    uint64_t page = p->page[i];

    switch (p->kind[i]) {
    case MIG_RAM_PAGE:
        return put_page(log, p, where, page, buf + p->src[i]);
    case MIG_RAM_COMPRESS:
        return put_page(log, p, where, page, p->unpacked + (*packed)++ * log->page_size);
    case MIG_RAM_XBZRLE:
        return put_delta(log, p, where, page, buf + p->src[i], p->length[i]);
    }
    if (p->src[i] < -1) {
        return MIG_E_RAM_BAD_FILL; /* it has no record that keeps its place */
    }
    if (where[page] > 0) {
        return put_page(log, p, where, page, log->zeros);
    }
    where[page] = MIG_PAGE_ZERO;
    return 0;
}

int mig_pagelog_put(struct mig_pagelog *log, struct mig_ram_parser *p, int64_t *where,
                    const uint8_t *buf)
{
    size_t packed = 0;

    for (size_t i = 0; i < p->npages; i++) {
        if (where[p->page[i]] > 0) {
            mig_overwrite_soon(&log->file, where[p->page[i]], log->page_size);
        }
    }
    for (size_t i = 0; i < p->npages;) {
        size_t run = log->current == p->current ? verbatim(log, p, where, buf, i) : 0;
        int rc;

        if (run) {
            rc = put_run(log, where, buf + p->src[i], p->page + i, run);
        } else {
            rc = put_record(log, p, where, buf, i, &packed);
        }
        if (rc < 0) {
            p->wrong = i;
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
