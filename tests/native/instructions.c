/* SPDX-License-Identifier: LGPL-2.1-or-later
 * A few workloads of each kernel family, one after the other, for Callgrind to count the
 * instructions of: each ends with a dump under the name "family workload units", where units are
 * pages, bits or whatever else is done so many times (test_instructions.py builds and runs it). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/callgrind.h>

#include "mig.h"

enum { PAGE = 4096, NPAGES = 64, NBITS = 1 << 17 };

static uint64_t seed;

static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

#define COUNT(family, workload, units, ...)                                                   \
    do {                                                                                      \
        char name[80];                                                                        \
                                                                                              \
        snprintf(name, sizeof(name), "%s %s %llu", family, workload,                          \
                 (unsigned long long)(units));                                                \
        CALLGRIND_ZERO_STATS;                                                                 \
        __VA_ARGS__;                                                                          \
        CALLGRIND_DUMP_STATS_AT(name);                                                        \
    } while (0)

static uint8_t *old, *new, *out;

/* Pages of which one byte in `share` differs. */
static void make_pages(uint64_t share)
{
    for (size_t i = 0; i < NPAGES * PAGE; i++) {
        old[i] = new[i] = (uint8_t)rnd();
        if (share && rnd() % share == 0) {
            new[i] ^= (uint8_t)(1 + rnd() % 255);
        }
    }
}

static void zero_pages(const struct mig_kernels *k)
{
    uint64_t zero[1];
    struct mig_pages pages = {.base = old, .npages = NPAGES, .page_size = PAGE};

    memset(old, 0, NPAGES * PAGE);
    COUNT(k->name, "zero-page", NPAGES, mig_zero_pages(k, &pages, NULL, NPAGES, zero));
    make_pages(0);
    COUNT(k->name, "random-page", NPAGES, mig_zero_pages(k, &pages, NULL, NPAGES, zero));
}

static void bitmaps(const struct mig_kernels *k)
{
    static const struct {
        const char *bits, *runs;
        uint64_t percent;
    } densities[] = {{"bits-1%", "runs-1%", 1}, {"bits-50%", "runs-50%", 50}};
    uint64_t *words = calloc(NBITS / 64, 8), *copy = malloc(NBITS / 8), *list = malloc(NBITS * 8);

    COUNT(k->name, "bits-none", NBITS / 64, k->bits(words, NBITS, 0, list, NBITS));
    for (size_t i = 0; i < sizeof(densities) / sizeof(densities[0]); i++) {
        uint64_t nbits, nruns;

        memset(words, 0, NBITS / 8);
        for (uint64_t bit = 0; bit < NBITS; bit++) {
            if (rnd() % 100 < densities[i].percent) {
                mig_bitmap_put(words, bit);
            }
        }
        nbits = k->popcount(words, NBITS / 64);
        nruns = k->edges(words, NBITS, 0, list, NBITS) / 2;
        COUNT(k->name, densities[i].bits, nbits, k->bits(words, NBITS, 0, list, NBITS));
        COUNT(k->name, densities[i].runs, nruns, k->edges(words, NBITS, 0, list, NBITS));
    }
    COUNT(k->name, "popcount", NBITS / 64, k->popcount(words, NBITS / 64));
    memset(copy, 0, NBITS / 8);
    COUNT(k->name, "merge", NBITS / 64, k->merge(copy, words, NBITS / 64));
    COUNT(k->name, "combine", NBITS / 64, k->combine(MIG_BITOP_AND, copy, words, NBITS / 64));
    free(words);
    free(copy);
    free(list);
}

/* Encodes all pages, then decodes them. */
static void encode(const struct mig_kernels *k, const char *workload, const char *back)
{
    static int64_t length[NPAGES];

    COUNT(k->name, workload, NPAGES, for (size_t i = 0; i < NPAGES; i++) {
        length[i] = k->xbzrle_encode(old + i * PAGE, new + i * PAGE, PAGE, out + i * PAGE, PAGE);
    });
    if (back) {
        COUNT(k->name, back, NPAGES, for (size_t i = 0; i < NPAGES; i++) {
            k->xbzrle_decode(out + i * PAGE, (size_t)length[i], old + i * PAGE, PAGE);
        });
    }
}

static void xbzrle(const struct mig_kernels *k)
{
    make_pages(0);
    encode(k, "encode-same", NULL);
    for (size_t i = 0; i < NPAGES; i++) {
        for (size_t j = 0; j < 8; j++) { /* eight words of eight bytes */
            new[i * PAGE + rnd() % (PAGE / 8) * 8] ^= 0x10;
        }
    }
    encode(k, "encode-sparse", "decode-sparse");
    make_pages(10);
    encode(k, "encode-10%", "decode-10%");
    make_pages(1);
    encode(k, "encode-replaced", NULL);
}

static void cache(const struct mig_kernels *k)
{
    struct mig_pages pages = {.base = new, .npages = NPAGES, .page_size = PAGE};
    int32_t result[NPAGES];
    uint64_t index[NPAGES];
    struct mig_cache c;
    size_t used;

    if (mig_cache_open(&c, NPAGES, PAGE) < 0) {
        exit(1);
    }
    for (size_t i = 0; i < NPAGES; i++) {
        index[i] = i;
    }
    /* not counted: most of it is memcpy(), which every machine has another one of */
    mig_cache_encode(k, &c, &pages, 0, index, NPAGES, 1, false, out, NPAGES * PAGE, result, &used);
    COUNT(k->name, "cache-hit", NPAGES,
          mig_cache_encode(k, &c, &pages, 0, index, NPAGES, 2, false, out, NPAGES * PAGE, result,
                           &used));
    COUNT(k->name, "lookup", NPAGES, for (size_t i = 0; i < NPAGES; i++) {
        mig_cache_lookup(&c, i * PAGE, 3);
    });
    mig_cache_close(&c);
}

int main(int argc, char **argv)
{
    old = malloc(NPAGES * PAGE);
    new = malloc(NPAGES * PAGE);
    out = malloc(NPAGES * PAGE);
    for (int i = 1; i < argc; i++) {
        const struct mig_kernels *k;

        if (mig_kernels_select(argv[i], &k) < 0) {
            fprintf(stderr, "%s does not run here\n", argv[i]);
            return 1;
        }
        seed = 88172645463325252u; /* the same for every family */
        zero_pages(k);
        bitmaps(k);
        xbzrle(k);
        cache(k);
    }
    free(old);
    free(new);
    free(out);
    return 0;
}
