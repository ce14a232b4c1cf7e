/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Bitmaps in the driver: kernels over words, lists of bits and runs, and what is made of them. */
#include "driver.h"

/* A bitmap at the end of memory; bits past the size are junk. */
struct bitmap {
    struct piece piece;
    uint64_t *words, nbits;
    size_t nwords;
};

static struct bitmap bitmap_open(uint64_t nbits)
{
    struct bitmap b = {.nbits = nbits, .nwords = mig_bitmap_nwords(nbits)};

    b.piece = piece_open(b.nwords * 8, 8 * below(9));
    b.words = (void *)b.piece.bytes;
    for (size_t w = 0; w < b.nwords; w++) {
        b.words[w] = rnd();
    }
    return b;
}

static struct bitmap bitmap_copy(const struct bitmap *from)
{
    struct bitmap b = bitmap_open(from->nbits);

    memcpy(b.words, from->words, b.nwords * 8);
    return b;
}

static void bitmap_close(struct bitmap *b) { piece_close(&b->piece); }

static void put(struct bitmap *b, uint64_t bit, bool value)
{
    uint64_t one = (uint64_t)1 << bit % 64;

    b->words[bit / 64] = value ? b->words[bit / 64] | one : b->words[bit / 64] & ~one;
}

static bool get(const struct bitmap *b, uint64_t bit)
{
    return b->words[bit / 64] >> bit % 64 & 1;
}

/* Bits past the size, up to the end of the last word, keep what they were. */
static void check_junk_kept(const struct bitmap *b, const struct bitmap *before)
{
    for (uint64_t bit = b->nbits; bit < b->nwords * 64; bit++) {
        CHECK(get(b, bit) == get(before, bit));
    }
}

static void check_junk_gone(const struct bitmap *b)
{
    for (uint64_t bit = b->nbits; bit < b->nwords * 64; bit++) {
        CHECK(!get(b, bit));
    }
}

/* Set bits in 10000, bit by bit, or (RUNS) runs of up to 200 bits, set and clear. */
enum { RUNS = -1 };
static const int densities[] = {0, 1, 20, 100, 1000, 5000, 9000, 9990, 10000, RUNS};
enum { NDENSITIES = sizeof(densities) / sizeof(densities[0]) };

static struct bitmap bitmap_random(uint64_t nbits, int density)
{
    struct bitmap b = bitmap_open(nbits);
    bool value = rnd() % 2;
    uint64_t left = 0;

    for (uint64_t bit = 0; bit < nbits; bit++) {
        if (density != RUNS) {
            value = (int)below(10000) < density;
        } else if (left-- == 0) {
            value = !value;
            left = below(rnd() % 4 ? 20 : 200);
        }
        put(&b, bit, value);
    }
    return b;
}

/* ---- words ----------------------------------------------------------------------------------- */

static void check_combine(const struct mig_kernels *k, const struct bitmap *a,
                          const struct bitmap *b)
{
    for (int op = MIG_BITOP_AND; op <= MIG_BITOP_NOT; op++) {
        struct bitmap words = bitmap_copy(a), bits = bitmap_copy(a);

        k->combine((enum mig_bitop)op, words.words, b->words, a->nwords);
        mig_bitmap_combine(k, (enum mig_bitop)op, bits.words, b->words, a->nbits);
        for (uint64_t bit = 0; bit < a->nwords * 64; bit++) {
            bool x = get(a, bit), y = get(b, bit);
            bool want = op == MIG_BITOP_AND      ? x && y
                        : op == MIG_BITOP_OR     ? x || y
                        : op == MIG_BITOP_ANDNOT ? x && !y
                                                 : !y;

            CHECK(get(&words, bit) == want);
            CHECK(get(&bits, bit) == (want && bit < a->nbits));
        }
        bitmap_close(&words);
        bitmap_close(&bits);
    }
}

static void check_merge(const struct mig_kernels *k, const struct bitmap *a,
                        const struct bitmap *b)
{
    struct bitmap words = bitmap_copy(a), bits = bitmap_copy(a);
    uint64_t fresh_words = 0, fresh_bits = 0, count = 0;

    for (uint64_t bit = 0; bit < a->nwords * 64; bit++) {
        bool fresh = !get(a, bit) && get(b, bit);

        count += get(a, bit);
        fresh_words += fresh;
        fresh_bits += fresh && bit < a->nbits;
    }
    CHECK(k->popcount(a->words, a->nwords) == count);
    CHECK(k->merge(words.words, b->words, a->nwords) == fresh_words);
    CHECK(mig_bitmap_merge(k, bits.words, b->words, a->nbits) == fresh_bits);
    for (uint64_t bit = 0; bit < a->nwords * 64; bit++) {
        CHECK(get(&words, bit) == (get(a, bit) || get(b, bit)));
        CHECK(bit >= a->nbits || get(&bits, bit) == (get(a, bit) || get(b, bit)));
    }
    check_junk_kept(&bits, a);
    bitmap_close(&words);
    bitmap_close(&bits);
}

static void check_count(const struct mig_kernels *k, const struct bitmap *a)
{
    for (uint64_t first = 0; first <= a->nbits; first += 1 + below(97)) {
        uint64_t nbits = rnd() % 4 ? below(a->nbits - first + 1) : a->nbits - first, want = 0;

        for (uint64_t bit = first; bit < first + nbits; bit++) {
            want += get(a, bit);
        }
        CHECK(mig_bitmap_count(k, a->words, first, nbits) == want);
    }
}

void check_words(const struct mig_kernels *k)
{
    for (uint64_t nbits = 0; nbits < 64 * 70; nbits += nbits < 200 ? 1 : 1 + below(120)) {
        struct bitmap a = bitmap_random(nbits, densities[rnd() % NDENSITIES]);
        struct bitmap b = bitmap_random(nbits, densities[rnd() % NDENSITIES]);

        check_combine(k, &a, &b);
        check_merge(k, &a, &b);
        check_count(k, &a);
        bitmap_close(&a);
        bitmap_close(&b);
    }
}

/* ---- lists of bits and of runs --------------------------------------------------------------- */

struct list {
    uint64_t *entries;
    size_t n;
};

static struct list list_bits(const struct bitmap *b, uint64_t from)
{
    struct list l = {.entries = malloc((b->nbits + 1) * 8)};

    for (uint64_t bit = from; bit < b->nbits; bit++) {
        if (get(b, bit)) {
            l.entries[l.n++] = bit;
        }
    }
    return l;
}

static struct list list_runs(const struct bitmap *b, uint64_t from)
{
    struct list l = {.entries = malloc((b->nbits + 2) * 8)};

    for (uint64_t bit = from; bit < b->nbits; bit++) {
        if (get(b, bit) && (bit == from || !get(b, bit - 1))) {
            l.entries[l.n++] = bit;
        }
        if (get(b, bit) && (bit + 1 == b->nbits || !get(b, bit + 1))) {
            l.entries[l.n++] = bit + 1;
        }
    }
    return l;
}

static void check_list(const struct list *want, size_t n, const uint64_t *out, size_t max)
{
    CHECK(n == (want->n < max ? want->n : max));
    CHECK(n == 0 || memcmp(out, want->entries, n * 8) == 0);
}

static void check_bits(const struct mig_kernels *k, const struct bitmap *b, uint64_t from,
                       const struct list *want, size_t max)
{
    struct piece out = piece_open(max * 8, 8 * below(3));
    struct bitmap taken = bitmap_copy(b), left = bitmap_copy(b);
    uint64_t *entries = (void *)out.bytes;

    check_list(want, k->bits(b->words, b->nbits, from, entries, max), entries, max);
    check_list(want, k->take(taken.words, b->nbits, from, entries, max), entries, max);
    for (size_t i = 0; i < want->n && i < max; i++) {
        put(&left, want->entries[i], false);
    }
    CHECK(memcmp(taken.words, left.words, b->nwords * 8) == 0);
    piece_close(&out);
    bitmap_close(&taken);
    bitmap_close(&left);
}

/* mig_bitmap_runs() cuts the list of runs where the budget of bits ends. */
static void check_runs(const struct mig_kernels *k, const struct bitmap *b, uint64_t from,
                       const struct list *want, size_t max)
{
    struct piece out = piece_open(max * 16, 8 * below(3));
    uint64_t *entries = (void *)out.bytes;
    const uint64_t budgets[] = {0, 1, below(b->nbits), b->nbits, UINT64_MAX};

    check_list(want, k->edges(b->words, b->nbits, from, entries, 2 * max), entries, 2 * max);
    for (size_t i = 0; i < sizeof(budgets) / sizeof(budgets[0]); i++) {
        uint64_t budget = budgets[i];
        size_t n = mig_bitmap_runs(k, b->words, b->nbits, from, entries, max, budget), j = 0;

        for (; j < max && 2 * j < want->n && budget; j++) {
            uint64_t first = want->entries[2 * j], end = want->entries[2 * j + 1];

            end = end - first < budget ? end : first + budget;
            CHECK(j < n && entries[2 * j] == first && entries[2 * j + 1] == end);
            budget -= end - first;
        }
        CHECK(n == j);
    }
    piece_close(&out);
}

static void check_scan(const struct mig_kernels *k, const struct bitmap *b)
{
    const uint64_t starts[] = {0, below(b->nbits), below(b->nbits / 64 + 1) * 64,
                               b->nbits - (b->nbits != 0), b->nbits, b->nbits + 1 + below(200)};

    for (size_t i = 0; i < sizeof(starts) / sizeof(starts[0]); i++) {
        struct list bits = list_bits(b, starts[i]), runs = list_runs(b, starts[i]);
        const size_t limits[] = {0, 1, below(bits.n), bits.n - (bits.n != 0), bits.n, bits.n + 1,
                                 bits.n + 600};

        for (size_t j = 0; j < sizeof(limits) / sizeof(limits[0]); j++) {
            check_bits(k, b, starts[i], &bits, limits[j]);
        }
        check_runs(k, b, starts[i], &runs, 1);
        check_runs(k, b, starts[i], &runs, below(runs.n / 2));
        check_runs(k, b, starts[i], &runs, runs.n / 2);
        check_runs(k, b, starts[i], &runs, runs.n / 2 + 1 + below(600));
        free(bits.entries);
        free(runs.entries);
    }
}

void check_scans(const struct mig_kernels *k)
{
    static const uint64_t sizes[] = {511, 512, 513, 575, 576, 640, 1000, 2047, 2048, 2049, 2111,
                                     2112, 3000, 4096, 4160, 5555, 8191, 8192, 9000, 20001};

    for (int i = 0; i < NDENSITIES; i++) {
        for (uint64_t nbits = 0; nbits < 330; nbits += nbits < 130 ? 1 : 7) {
            struct bitmap b = bitmap_random(nbits, densities[i]);

            check_scan(k, &b);
            bitmap_close(&b);
        }
        for (size_t j = 0; j < sizeof(sizes) / sizeof(sizes[0]); j++) {
            struct bitmap b = bitmap_random(sizes[j], densities[i]);

            check_scan(k, &b);
            /* stretches without bits, over which steps are taken */
            mig_bitmap_clear(b.words, sizes[j] / 8, sizes[j] / 3);
            check_scan(k, &b);
            bitmap_close(&b);
        }
    }
}

/* ---- what needs no kernel, or little of it --------------------------------------------------- */

static void check_set_and_clear(const struct bitmap *b, uint64_t first, uint64_t nbits)
{
    struct bitmap set = bitmap_copy(b), clear = bitmap_copy(b);
    struct bitmap set_atomic = bitmap_copy(b), clear_atomic = bitmap_copy(b);
    uint64_t count = 0;

    for (uint64_t bit = first; bit < first + nbits; bit++) {
        count += get(b, bit);
    }
    mig_bitmap_set(set.words, first, nbits);
    mig_bitmap_clear(clear.words, first, nbits);
    CHECK(mig_bitmap_set_atomic(set_atomic.words, first, nbits) == nbits - count);
    CHECK(mig_bitmap_set_atomic(set_atomic.words, first, nbits) == 0);
    CHECK(mig_bitmap_clear_atomic(clear_atomic.words, first, nbits) == count);
    CHECK(mig_bitmap_clear_atomic(clear_atomic.words, first, nbits) == 0);
    for (uint64_t bit = 0; bit < b->nwords * 64; bit++) {
        bool inside = bit >= first && bit < first + nbits;

        CHECK(get(&set, bit) == (inside || get(b, bit)));
        CHECK(get(&clear, bit) == (!inside && get(b, bit)));
    }
    CHECK(memcmp(set.words, set_atomic.words, b->nwords * 8) == 0);
    CHECK(memcmp(clear.words, clear_atomic.words, b->nwords * 8) == 0);
    bitmap_close(&set);
    bitmap_close(&clear);
    bitmap_close(&set_atomic);
    bitmap_close(&clear_atomic);
}

static void check_next(const struct bitmap *b)
{
    uint64_t set = b->nbits, clear = b->nbits;

    CHECK(mig_bitmap_next_set(b->words, b->nbits, b->nbits + below(200)) == b->nbits);
    CHECK(mig_bitmap_next_clear(b->words, b->nbits, b->nbits + below(200)) == b->nbits);
    for (uint64_t bit = b->nbits; bit-- > 0;) {
        *(get(b, bit) ? &set : &clear) = bit;
        CHECK(mig_bitmap_next_set(b->words, b->nbits, bit) == set);
        CHECK(mig_bitmap_next_clear(b->words, b->nbits, bit) == clear);
    }
}

static void check_round(const struct bitmap *b)
{
    for (uint64_t group = 1; group <= 4096; group *= 2) {
        struct bitmap rounded = bitmap_copy(b);

        mig_bitmap_round(rounded.words, b->nbits, group);
        for (uint64_t start = 0; start < b->nbits; start += group) {
            uint64_t end = b->nbits - start < group ? b->nbits : start + group;
            bool any = false;

            for (uint64_t bit = start; bit < end; bit++) {
                any |= get(b, bit);
            }
            for (uint64_t bit = start; bit < end; bit++) {
                CHECK(get(&rounded, bit) == any);
            }
        }
        check_junk_gone(&rounded);
        bitmap_close(&rounded);
    }
}

static void check_wire(const struct bitmap *b)
{
    struct piece wire = piece_open(b->nwords * 8, below(8));
    struct bitmap back = bitmap_open(b->nbits);

    mig_bitmap_to_wire(b->words, b->nbits, wire.bytes);
    for (uint64_t bit = 0; bit < b->nwords * 64; bit++) {
        bool want = bit < b->nbits && get(b, bit);

        CHECK((wire.bytes[bit / 8] >> bit % 8 & 1) == want);
        if (bit >= b->nbits && rnd() % 2) {
            wire.bytes[bit / 8] |= (uint8_t)(1 << bit % 8); /* a peer's junk */
        }
    }
    mig_bitmap_from_wire(back.words, b->nbits, wire.bytes);
    for (uint64_t bit = 0; bit < b->nbits; bit++) {
        CHECK(get(&back, bit) == get(b, bit));
    }
    check_junk_gone(&back);
    piece_close(&wire);
    bitmap_close(&back);
}

static void check_drain(const struct bitmap *a, const struct bitmap *b)
{
    struct bitmap dst = bitmap_copy(a), src = bitmap_copy(b);
    uint64_t fresh = 0;

    for (uint64_t bit = 0; bit < a->nbits; bit++) {
        fresh += !get(a, bit) && get(b, bit);
    }
    CHECK(mig_bitmap_drain(dst.words, src.words, a->nbits) == fresh);
    for (uint64_t bit = 0; bit < a->nbits; bit++) {
        CHECK(get(&dst, bit) == (get(a, bit) || get(b, bit)));
        CHECK(!get(&src, bit));
    }
    check_junk_kept(&dst, a);
    bitmap_close(&dst);
    bitmap_close(&src);
}

void check_bitmap(const struct mig_kernels *k)
{
    (void)k;
    for (uint64_t nbits = 0; nbits < 9000; nbits += nbits < 200 ? 1 : 1 + below(900)) {
        for (int i = 0; i < 4; i++) {
            struct bitmap a = bitmap_random(nbits, densities[rnd() % NDENSITIES]);
            struct bitmap b = bitmap_random(nbits, densities[rnd() % NDENSITIES]);
            uint64_t first = below(nbits + 1);

            check_set_and_clear(&a, first, nbits - first);
            check_set_and_clear(&a, first, below(nbits - first + 1));
            check_next(&a);
            check_round(&a);
            check_wire(&a);
            check_drain(&a, &b);
            bitmap_close(&a);
            bitmap_close(&b);
        }
    }
}
