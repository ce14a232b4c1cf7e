/* SPDX-License-Identifier: LGPL-2.1-or-later
 * See tally.h. */
#include "tally.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static void note_fault(struct mig_walk *w, const uint8_t *buf, size_t i, int error)
{
    const struct mig_ram_parser *p = w->parser;

    if (w->nfaults < MIG_TALLY_FAULTS) {
        struct mig_tally_fault *fault = &w->faults[w->nfaults];

        fault->offset = w->consumed + mig_ram_record_offset(p, buf, i);
        fault->block = p->current;
        fault->error = error;
    }
    w->nfaults++;
}

/* nbytes: of the records of the burst */
static void count_pages(struct mig_walk *w, size_t nbytes)
{
    const struct mig_ram_parser *p = w->parser;
    struct mig_tally *t = &w->blocks[p->current];

    for (size_t i = 0; t->sent && i < p->npages; i++) {
        uint64_t page = p->page[i], bit = UINT64_C(1) << (page % 64);
        uint64_t *sent = &t->sent[page / 64], *zero = &t->zero[page / 64];
        bool is_zero = p->src[i] == -1;

        if (*sent & bit) {
            t->repeated++;
        } else {
            *sent |= bit;
            t->npages++;
        }
        if (is_zero != ((*zero & bit) != 0)) {
            *zero ^= bit;
            t->nzero += is_zero ? 1 : UINT64_MAX;
        }
    }
    t->fill += p->nfill;
    t->xbzrle += p->nxbzrle;
    t->compressed += p->npacked;
    t->normal += p->npages - p->nfill - p->nxbzrle - p->npacked;
    t->record_bytes += nbytes;
}

static void count_fills(struct mig_walk *w)
{
    const struct mig_ram_parser *p = w->parser;
    struct mig_tally *t = &w->blocks[p->current];

    for (size_t i = 0; p->nfill && i < p->npages; i++) {
        t->filled += p->src[i] < -1;
    }
}

/* An encoding is tried on any page: which bytes are below it does not matter. */
static void try_encodings(struct mig_walk *w, const uint8_t *buf)
{
    const struct mig_ram_parser *p = w->parser;
    struct mig_tally *t = &w->blocks[p->current];

    for (size_t i = 0; p->nxbzrle && i < p->npages; i++) {
        if (p->kind[i] == MIG_RAM_XBZRLE) {
            int64_t rc = w->kernels->xbzrle_decode(buf + p->src[i], p->length[i], w->page,
                                                   p->page_size);

            t->xbzrle_bytes += p->length[i];
            if (rc < 0) {
                note_fault(w, buf, i, (int)rc);
            }
        }
    }
}

static int try_compressed(struct mig_walk *w, const uint8_t *buf)
{
    struct mig_ram_parser *p = w->parser;
    int rc;

    if (!p->npacked) {
        return 0;
    }
    if (!p->unpacked) {
        p->unpacked = malloc(p->max_packed * p->page_size);
    }
    rc = w->inflating ? 0 : mig_decompressor_open(&w->inflating, w->threads);
    if (!p->unpacked || rc < 0) {
        return rc < 0 ? rc : MIG_E_NOMEM;
    }
    rc = mig_decompress(w->inflating, p, buf);
    for (size_t i = 0; i < p->npacked; i++) {
        w->blocks[p->current].compressed_bytes += p->length[p->packed[i]];
        if (rc == MIG_E_RAM_BAD_ZLIB && !p->intact[i]) {
            note_fault(w, buf, p->packed[i], rc);
        }
    }
    return rc == MIG_E_RAM_BAD_ZLIB ? 0 : rc;
}

static int count_burst(struct mig_walk *w, const uint8_t *buf, int stop)
{
    size_t end = stop == MIG_RAM_STOP_EOS ? MIG_RAM_WORD : 0;

    if (!w->parser->npages) {
        return 0;
    }
    count_pages(w, w->parser->consumed - end);
    count_fills(w);
    try_encodings(w, buf);
    return try_compressed(w, buf);
}

/* One burst; after an error once more without the record that is wrong. */
static int parse_burst(struct mig_walk *w, const uint8_t *buf, size_t len)
{
    struct mig_ram_parser *p = w->parser;
    int64_t current = p->current;
    int stop = mig_ram_parse(p, buf, len);

    if (stop < 0) {
        w->wrong_block = p->current;
        p->current = current;
        mig_ram_parse(p, buf, p->consumed);
    }
    return stop;
}

/* Lets go the whole pages of buf[from..to): a file that is walked over takes no more memory than a
 * window of it. They stay in the page cache. */
static void let_go(const uint8_t *buf, size_t from, size_t to)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = ((uintptr_t)buf + from + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)buf + to) / page * page;

    if (start < end) {
        madvise((void *)start, end - start, MADV_DONTNEED);
    }
}

int mig_walk(struct mig_walk *w, const uint8_t *buf, size_t len)
{
    size_t kept = 0, window = 0;

    w->consumed = w->nfaults = 0;
    w->wrong_block = -1;
    for (;;) {
        int stop, rc;

        if (w->consumed >= window) {
            if (w->mapped) {
                let_go(buf, kept, w->consumed);
                kept = w->consumed;
            }
            window = len - w->consumed < MIG_TALLY_WINDOW ? len : w->consumed + MIG_TALLY_WINDOW;
        }
        stop = parse_burst(w, buf + w->consumed, window - w->consumed);
        rc = count_burst(w, buf + w->consumed, stop);
        w->consumed += w->parser->consumed;
        if (rc < 0) {
            return rc;
        }
        if (stop == MIG_RAM_STOP_MORE && window < len) {
            /* the record goes on in the next window */
            window = w->consumed;
        } else if (stop != MIG_RAM_STOP_FULL && stop != MIG_RAM_STOP_SWITCH) {
            if (w->mapped) {
                let_go(buf, kept, w->consumed);
            }
            return stop;
        }
    }
}
