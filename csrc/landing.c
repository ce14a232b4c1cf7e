/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Pages that are read straight to where they belong: see landing.h. */
#include <string.h>

#include "endian.h"
#include "landing.h"

enum { AHEAD = 64, /* records that are expected at a time */ LIKELY = 8 };

/* ---- memory --------------------------------------------------------------------------------- */

static uint8_t *memory_slot(const struct mig_landing *l, size_t k)
{
    uint64_t page = l->next + k;

    if (page >= l->npages || mig_bitmap_test_atomic(l->received, page)) {
        return NULL;
    }
    return l->pages->base + page * l->page_size;
}

static bool memory_takes(const struct mig_landing *l, uint64_t page) { return page == l->next; }

static int memory_landed(struct mig_landing *l, uint64_t page)
{
    mig_bitmap_set_atomic(l->received, page, 1);
    l->next = page + 1;
    return 0;
}

static void memory_undo(uint8_t *slot, size_t nbytes) { memset(slot, 0, nbytes); }

void mig_land_in_memory(struct mig_landing *l, const struct mig_pages *pages, uint64_t *received,
                        uint64_t npages, uint64_t next)
{
    *l = (struct mig_landing){
        .slot = memory_slot,
        .takes = memory_takes,
        .landed = memory_landed,
        .undo = memory_undo,
        .page_size = pages->page_size,
        .npages = npages,
        .next = next,
        .pages = pages,
        .received = received,
    };
}

/* ---- a file --------------------------------------------------------------------------------- */

static uint8_t *file_slot(const struct mig_landing *l, size_t k)
{
    return mig_mappedlog_slot(l->writer, k);
}

static bool file_takes(const struct mig_landing *l, uint64_t page)
{
    return page < l->npages && mig_mappedlog_takes(l->writer, l->block, page);
}

static int file_landed(struct mig_landing *l, uint64_t page)
{
    return mig_mappedlog_landed(l->writer, l->block, page);
}

static void file_undo(uint8_t *slot, size_t nbytes)
{
    /* it is not part of the file yet */
    (void)slot;
    (void)nbytes;
}

void mig_land_in_file(struct mig_landing *l, struct mig_mappedlog_writer *w,
                      const struct mig_mappedlog_block *block, uint64_t npages)
{
    *l = (struct mig_landing){
        .slot = file_slot,
        .takes = file_takes,
        .landed = file_landed,
        .undo = file_undo,
        .page_size = w->file->page_size,
        .npages = npages,
        .writer = w,
        .block = block,
    };
}

/* ---- records -------------------------------------------------------------------------------- */

/* What is expected, and how much of it is there. */
struct run {
    struct mig_landing *l;
    size_t page_size, ahead;
    size_t have; /* bytes of the first record, its word included */
    uint8_t word[AHEAD][MIG_RAM_WORD];
    uint8_t *slot[AHEAD];
    size_t nslots;
    struct iovec iov[2 * AHEAD];
};

/* Whether the word is what was expected, and of which page. */
static bool is_expected(const struct run *r, const uint8_t *word, uint64_t *page)
{
    uint64_t value = mig_load_be64(word), mask = r->page_size - 1;

    *page = (value & ~mask) / r->page_size;
    return (value & mask) == (MIG_RAM_PAGE | MIG_RAM_CONTINUE) && r->l->takes(r->l, *page);
}

/* Expects what follows the bytes that are there; the number of iovecs, 0: nothing. */
static size_t expect(struct run *r)
{
    size_t niov = 0;

    for (r->nslots = 0; r->nslots < r->ahead; r->nslots++) {
        size_t have = r->nslots ? 0 : r->have;
        size_t word = have < MIG_RAM_WORD ? have : MIG_RAM_WORD;
        uint8_t *slot = r->l->slot(r->l, r->nslots);

        if (!slot) {
            break;
        }
        r->slot[r->nslots] = slot;
        if (word < MIG_RAM_WORD) {
            r->iov[niov++] = (struct iovec){.iov_base = r->word[r->nslots] + word,
                                            .iov_len = MIG_RAM_WORD - word};
        }
        r->iov[niov++] = (struct iovec){.iov_base = slot + (have - word),
                                        .iov_len = r->page_size - (have - word)};
    }
    return niov;
}

/* Moves what came behind the word of record k, and the word, into the buffer: so many bytes. */
static size_t put_back(const struct run *r, size_t k, size_t nbytes, uint8_t *buf)
{
    size_t held = 0;

    for (; nbytes && k < r->nslots; k++) {
        size_t word = nbytes < MIG_RAM_WORD ? nbytes : MIG_RAM_WORD, page;

        memcpy(buf + held, r->word[k], word);
        held += word;
        nbytes -= word;
        page = nbytes < r->page_size ? nbytes : r->page_size;
        if (page) {
            memcpy(buf + held, r->slot[k], page);
            r->l->undo(r->slot[k], page);
        }
        held += page;
        nbytes -= page;
    }
    return held;
}

/* Takes n more bytes that came; 1 to go on, 0 when another record came: then the rest is in the
 * buffer. */
static int take(struct run *r, size_t n, uint8_t *buf, struct mig_landed *result)
{
    const size_t whole = MIG_RAM_WORD + r->page_size;
    size_t k = 0;

    while (n) {
        size_t part = r->have < MIG_RAM_WORD ? MIG_RAM_WORD - r->have : whole - r->have;
        uint64_t page;
        int rc;

        part = n < part ? n : part;
        r->have += part;
        n -= part;
        if (r->have == MIG_RAM_WORD && !is_expected(r, r->word[k], &page)) {
            result->held = put_back(r, k, r->have + n, buf);
            return 0;
        }
        if (r->have < whole) {
            continue;
        }
        (void)is_expected(r, r->word[k], &page);
        rc = r->l->landed(r->l, page);
        if (rc < 0) {
            return rc;
        }
        result->npages++;
        r->have = 0;
        k++;
    }
    if (k && r->have) {
        memcpy(r->word[0], r->word[k], MIG_RAM_WORD);
    }
    return 1;
}

/* Takes the part of a record that the buffer has; false when it is none of a page that is
 * expected. */
static bool begin(struct run *r, const uint8_t *buf, size_t held)
{
    uint64_t page;
    uint8_t *slot = r->l->slot(r->l, 0);

    if (!slot || held >= MIG_RAM_WORD + r->page_size) {
        return false;
    }
    memcpy(r->word[0], buf, held < MIG_RAM_WORD ? held : MIG_RAM_WORD);
    if (held >= MIG_RAM_WORD) {
        if (!is_expected(r, r->word[0], &page)) {
            return false;
        }
        memcpy(slot, buf + MIG_RAM_WORD, held - MIG_RAM_WORD);
    }
    r->have = held;
    return true;
}

int mig_land(const struct mig_fd *fd, struct mig_landing *l, uint8_t *buf, size_t held,
             size_t capacity, struct mig_landed *result)
{
    struct run r = {.l = l, .page_size = l->page_size};
    size_t total = 0, niov;
    int rc = 1;

    *result = (struct mig_landed){.held = held};
    r.ahead = capacity / (MIG_RAM_WORD + l->page_size);
    r.ahead = r.ahead < AHEAD ? r.ahead : AHEAD;
    if (r.ahead == 0 || !begin(&r, buf, held)) {
        return 0;
    }
    while (rc == 1 && total < MIG_LAND_LIMIT && (niov = expect(&r))) {
        int64_t n = mig_fd_readv_some(fd, r.iov, niov);

        if (n <= 0) {
            rc = (int)n;
            result->held = put_back(&r, 0, r.have, buf);
            break;
        }
        total += (size_t)n;
        rc = take(&r, (size_t)n, buf, result);
    }
    if (rc == 1) {
        /* slots of the record that is begun are those of the last call */
        result->more = total >= MIG_LAND_LIMIT;
        if (expect(&r)) {
            result->held = put_back(&r, 0, r.have, buf);
        } else {
            result->held = 0;
        }
    }
    return rc < 0 ? rc : 0;
}

bool mig_land_likely(const struct mig_ram_parser *p, bool ordered)
{
    if (p->npages < LIKELY) {
        return false;
    }
    for (size_t i = 0; i < p->npages; i++) {
        if (p->kind[i] != MIG_RAM_PAGE || (ordered && i && p->page[i] != p->page[i - 1] + 1)) {
            return false;
        }
    }
    return true;
}
