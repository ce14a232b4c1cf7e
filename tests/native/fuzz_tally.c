/* SPDX-License-Identifier: LGPL-2.1-or-later
 * libFuzzer target: RAM records from a hostile file, walked over and counted.
 *
 *   clang -g -O1 -std=gnu11 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
 *       -D_GNU_SOURCE -Icsrc -o fuzz_tally tests/native/fuzz_tally.c $(ls csrc/[a-z]*.c) -lz -lzstd
 *   ./fuzz_tally -max_len=8192 -max_total_time=60 CORPUS_FOLDER
 *
 * The first byte of the input chooses page size, capacity and where the rest is cut; the rest are
 * records. Checked: the walk goes on behind a record that is wrong, what is counted adds up, and a
 * walk in two pieces counts the same. */
#include <stdint.h>
#include <string.h>

#include "check.h"
#include "tally.h"

enum { NBLOCKS = 3, UNKNOWN = 2, MAX_PAGES = 70, MAX_PACKED = 3, MAX_CAPACITY = 64 };

static const struct mig_ram_block blocks[NBLOCKS] = {
    {.name = "a", .name_len = 1, .npages = 3},
    {.name = "ram", .name_len = 3, .npages = MAX_PAGES},
    {.name = "", .name_len = SIZE_MAX, .npages = UINT64_MAX},
};

static void walk_open(struct mig_walk *w, size_t page_size, size_t capacity)
{
    struct mig_ram_parser *p = malloc(sizeof(*p));

    *p = (struct mig_ram_parser){
        .blocks = blocks, .nblocks = NBLOCKS, .page_size = page_size, .current = -1,
        .page = malloc(capacity * sizeof(uint64_t)), .src = malloc(capacity * sizeof(int64_t)),
        .length = malloc(capacity * sizeof(uint32_t)), .kind = malloc(capacity * sizeof(uint16_t)),
        .packed = malloc(MAX_PACKED * sizeof(uint32_t)), .intact = malloc(MAX_PACKED * sizeof(int)),
        .max_packed = MAX_PACKED, .capacity = capacity,
    };
    *w = (struct mig_walk){
        .parser = p, .threads = 1, .kernels = &mig_kernels_scalar,
        .blocks = calloc(NBLOCKS, sizeof(struct mig_tally)), .page = calloc(1, page_size),
    };
    for (int i = 0; i < UNKNOWN; i++) {
        w->blocks[i].sent = calloc(mig_bitmap_nwords(blocks[i].npages), sizeof(uint64_t));
        w->blocks[i].zero = calloc(mig_bitmap_nwords(blocks[i].npages), sizeof(uint64_t));
    }
}

static void walk_close(struct mig_walk *w)
{
    struct mig_ram_parser *p = w->parser;

    for (int i = 0; i < UNKNOWN; i++) {
        free(w->blocks[i].sent);
        free(w->blocks[i].zero);
    }
    mig_decompressor_close(w->inflating);
    free(w->blocks);
    free(w->page);
    free(p->page);
    free(p->src);
    free(p->length);
    free(p->kind);
    free(p->packed);
    free(p->intact);
    free(p->unpacked);
    free(p);
}

/* All of it; where a record is wrong, the byte it begins with is left out. Returns the bytes that
 * are left for the next piece. */
static size_t walk_all(struct mig_walk *w, const uint8_t *buf, size_t len, size_t *nfaults)
{
    while (len) {
        int stop = mig_walk(w, buf, len);

        CHECK(w->consumed <= len);
        CHECK(w->wrong_block >= -1 && w->wrong_block < NBLOCKS);
        *nfaults += w->nfaults;
        for (size_t i = 0; i < w->nfaults && i < MIG_TALLY_FAULTS; i++) {
            CHECK(w->faults[i].offset < w->consumed);
            CHECK(w->faults[i].block >= 0 && w->faults[i].block < NBLOCKS);
        }
        buf += w->consumed;
        len -= w->consumed;
        if (stop == MIG_RAM_STOP_MORE) {
            return len;
        }
        if (stop != MIG_RAM_STOP_EOS) {
            buf++;
            len--;
            w->parser->current = UNKNOWN;
        }
    }
    return 0;
}

static void check_counts(const struct mig_walk *w)
{
    for (int i = 0; i < UNKNOWN; i++) {
        const struct mig_tally *t = &w->blocks[i];
        uint64_t npages = blocks[i].npages, records = t->normal + t->fill + t->xbzrle + t->compressed;

        CHECK(t->npages == mig_bitmap_count(w->kernels, t->sent, 0, npages));
        CHECK(t->nzero == mig_bitmap_count(w->kernels, t->zero, 0, npages));
        CHECK(t->nzero <= t->npages);
        CHECK(records == t->npages + t->repeated);
        CHECK(t->filled <= t->fill);
    }
}

static void counts_equal(const struct mig_walk *a, const struct mig_walk *b)
{
    for (int i = 0; i < NBLOCKS; i++) {
        struct mig_tally x = a->blocks[i], y = b->blocks[i];

        x.sent = x.zero = y.sent = y.zero = NULL;
        CHECK(memcmp(&x, &y, sizeof(x)) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct mig_walk one, two;
    size_t page_size, capacity, cut, left, faults[2] = {0, 0};

    if (size < 2) {
        return 0;
    }
    page_size = data[0] & 1 ? 64 : 1024;
    capacity = data[0] & 2 ? 1 : MAX_CAPACITY;
    cut = (size - 1) * (data[0] >> 2) / 64;
    walk_open(&one, page_size, capacity);
    walk_open(&two, page_size, capacity);
    walk_all(&one, data + 1, size - 1, &faults[0]);
    left = walk_all(&two, data + 1, cut, &faults[1]);
    walk_all(&two, data + 1 + cut - left, size - 1 - cut + left, &faults[1]);
    check_counts(&one);
    check_counts(&two);
    counts_equal(&one, &two);
    CHECK(faults[0] == faults[1]);
    walk_close(&one);
    walk_close(&two);
    return 0;
}
