/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Every kernel of every family on odd lengths and alignments, ending where the memory ends, under
 * AddressSanitizer and UndefinedBehaviorSanitizer (test_sanitizers.py builds and runs it). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "mig.h"

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

static uint64_t seed = 88172645463325252u;

static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static void check_zero(const struct mig_kernels *k)
{
    for (size_t n = 0; n < 2200; n += n < 600 ? 1 : 37) {
        for (size_t lead = 0; lead < 65; lead += n % 3 ? 13 : 1) {
            uint8_t *bytes = calloc(1, lead + n);

            CHECK(k->is_zero(bytes + lead, n));
            memset(bytes, 0xff, lead); /* what stands before does not count */
            CHECK(k->is_zero(bytes + lead, n));
            for (int i = 0; n && i < 4; i++) {
                size_t at = i == 0 ? 0 : i == 1 ? n - 1 : rnd() % n;

                bytes[lead + at] = (uint8_t)(1 << (rnd() % 8));
                CHECK(!k->is_zero(bytes + lead, n));
                bytes[lead + at] = 0;
            }
            free(bytes);
        }
    }
}

static void check_words(const struct mig_kernels *k)
{
    for (size_t n = 0; n < 140; n++) {
        uint64_t *a = malloc(n * 8), *b = malloc(n * 8), *c = malloc(n * 8);
        uint64_t bits = 0, fresh = 0;

        for (size_t i = 0; i < n; i++) {
            a[i] = rnd() & rnd();
            b[i] = c[i] = rnd() & rnd();
            bits += (uint64_t)__builtin_popcountll(a[i]);
            fresh += (uint64_t)__builtin_popcountll(a[i] & ~b[i]);
        }
        CHECK(k->popcount(a, n) == bits);
        CHECK(k->merge(b, a, n) == fresh);
        for (size_t i = 0; i < n; i++) {
            CHECK(b[i] == (c[i] | a[i]));
        }
        for (uint64_t first = 0; first <= n * 64; first += 1 + rnd() % 97) {
            uint64_t left = n * 64 - first, count = left ? rnd() % (left + 1) : 0, want = 0;

            for (uint64_t bit = first; bit < first + count; bit++) {
                want += mig_bitmap_test(a, bit);
            }
            CHECK(mig_bitmap_count(k, a, first, count) == want);
        }
        free(a);
        free(b);
        free(c);
    }
}

static void check_bitmap(void)
{
    for (uint64_t nbits = 0; nbits < 300; nbits++) {
        size_t nwords = mig_bitmap_nwords(nbits);
        uint64_t *a = calloc(nwords, 8), *b = calloc(nwords, 8), *out = malloc(nbits * 8);
        uint64_t first = nbits ? rnd() % nbits : 0, n = nbits - first;

        mig_bitmap_set(a, first, n);
        CHECK(mig_bitmap_next_set(a, nbits, 0) == (n ? first : nbits));
        CHECK(mig_bitmap_next_clear(a, nbits, 0) == (first ? 0 : nbits));
        CHECK(mig_bitmap_next_set(a, nbits, nbits) == nbits);
        CHECK(mig_bitmap_drain(b, a, nwords) == n);
        CHECK(mig_bitmap_take(b, nbits, 0, out, nbits) == n);
        for (uint64_t i = 0; i < n; i++) {
            CHECK(out[i] == first + i);
            CHECK(mig_bitmap_set_atomic(b, out[i]));
            CHECK(!mig_bitmap_set_atomic(b, out[i]));
        }
        mig_bitmap_clear(b, first, n);
        CHECK(mig_bitmap_next_set(b, nbits, 0) == nbits);
        free(a);
        free(b);
        free(out);
    }
}

/* Records of odd page sizes out, in, into memory and into a page log, in buffers without slack. */
static void check_records(const struct mig_kernels *k, size_t page_size)
{
    enum { NPAGES = 67 };
    const struct mig_ram_block block = {.name = "ram", .name_len = 3, .npages = NPAGES};
    uint8_t *memory = malloc(NPAGES * page_size), *copy = calloc(NPAGES, page_size);
    uint8_t *zeros = calloc(1, page_size), *flat;
    uint64_t index[NPAGES], zero[2], received[2] = {0}, page[NPAGES];
    int64_t src[NPAGES], *where = calloc(NPAGES, sizeof(*where));
    struct mig_pages from = {.base = memory, .npages = NPAGES, .page_size = page_size}, to = from;
    struct mig_out out = {.max_iov = 2 * NPAGES + 2, .arena_size = 4096};
    struct mig_pagelog log = {.current = -1, .page_size = page_size, .zeros = zeros};
    struct mig_ram_parser p = {.blocks = &block, .nblocks = 1, .page_size = page_size,
                               .current = -1, .page = page, .src = src, .capacity = NPAGES};
    size_t at = 0;

    for (size_t i = 0; i < NPAGES; i++) {
        memset(memory + i * page_size, i % 3 ? (int)i : 0, page_size);
        index[i] = i;
    }
    CHECK(mig_zero_pages(k, &from, index, NPAGES, zero) == 23);
    out.iov = malloc(out.max_iov * sizeof(*out.iov));
    out.arena = malloc(out.arena_size);
    CHECK(mig_ram_encode(&out, &from, "ram", 3, index, 0, NPAGES, zero) == NPAGES);
    flat = malloc(out.nbytes);
    for (size_t i = 0; i < out.niov; i++) {
        memcpy(flat + at, out.iov[i].iov_base, out.iov[i].iov_len);
        at += out.iov[i].iov_len;
    }
    for (size_t cut = 0; cut < at; cut += cut < 600 ? 1 : page_size / 2 + 1) {
        uint8_t *piece = malloc(cut);

        memcpy(piece, flat, cut);
        p.current = -1;
        CHECK(mig_ram_parse(&p, piece, cut) == MIG_RAM_STOP_MORE);
        CHECK(p.consumed <= cut && p.need > cut - p.consumed);
        free(piece);
    }
    p.current = -1;
    mig_ram_parse(&p, flat, at);
    CHECK(p.consumed == at && p.npages == NPAGES);
    to.base = copy;
    mig_ram_place(k, &to, received, true, flat, page, src, NPAGES);
    CHECK(memcmp(copy, memory, NPAGES * page_size) == 0);
    CHECK(mig_appender_open(&log.file, memfd_create("log", 0), -1) == 0);
    CHECK(mig_pagelog_put(&log, 0, &block, where, flat, page, src, NPAGES) == 0);
    CHECK(mig_pagelog_put(&log, 0, &block, where, flat, page, src, NPAGES) == 0);
    CHECK(mig_pagelog_zeros(&log, 0, &block, where) == 0);
    CHECK((size_t)mig_appender_tail(&log.file) == at);
    CHECK(mig_appender_finish(&log.file) == 0);
    close(log.file.fd);
    mig_appender_close(&log.file);
    free(memory);
    free(copy);
    free(zeros);
    free(flat);
    free(where);
    free(out.iov);
    free(out.arena);
}

int main(void)
{
    const struct mig_kernels *k;
    const char *name;

    check_bitmap();
    for (size_t i = 0; (name = mig_kernels_name(i)); i++) {
        int rc = mig_kernels_select(name, &k);

        if (rc == MIG_E_KERNEL_NO_CPU || rc == MIG_E_KERNEL_NOT_BUILT) {
            printf("%s: cannot run here\n", name);
            continue;
        }
        CHECK(rc == 0 && strcmp(k->name, name) == 0);
        check_zero(k);
        check_words(k);
        for (size_t page_size = 64; page_size <= 8192; page_size *= 2) {
            check_records(k, page_size);
        }
        printf("%s: fine\n", name);
    }
    CHECK(mig_kernels_select("nonsense", &k) == MIG_E_KERNEL_UNKNOWN);
    return 0;
}
