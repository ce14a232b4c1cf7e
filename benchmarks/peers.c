/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the kernels are measured against: plain expressions of the algorithms that peers have
 * (plain_*), and loops that call any function with a peer's signature page by page (each_*), so
 * that neither side is charged for a Python call. Compiled when the benchmarks run; see peers.py.
 */
#include <stdlib.h>
#include <string.h>

#include "mig.h"

#if defined(__x86_64__)
#define VECTORS __attribute__((target("avx2")))
#else
#define VECTORS
#endif

/* the signatures of a peer's functions */
typedef bool zero_fn(const void *bytes, size_t nbytes);
typedef int encode_fn(uint8_t *old, uint8_t *new, int nbytes, uint8_t *dst, int max);
typedef int decode_fn(uint8_t *src, int nsrc, uint8_t *page, int nbytes);
typedef unsigned long next_fn(const unsigned long *words, unsigned long nbits, unsigned long from);
typedef void *open_fn(uint64_t nbytes, size_t page_size, void **error);
typedef bool cached_fn(const void *cache, uint64_t address, uint64_t generation);
typedef uint8_t *data_fn(const void *cache, uint64_t address);
typedef int insert_fn(void *cache, uint64_t address, const uint8_t *page, uint64_t generation);

struct cache_api {
    void *cache;
    cached_fn *cached;
    data_fn *data;
    insert_fn *insert;
};

static uint64_t load(const uint8_t *p)
{
    uint64_t word;

    memcpy(&word, p, sizeof(word));
    return word;
}

/* ---- bytes ---------------------------------------------------------------------------------- */

typedef uint64_t vec __attribute__((vector_size(32), may_alias));

VECTORS
static bool any_set(const uint8_t *bytes, size_t nbytes)
{
    const vec *p = (const void *)bytes, *end = p + nbytes / sizeof(vec);
    vec a = {0}, b = a, c = a, d = a;

    for (; p < end; p += 8) {
        a |= p[0] | p[1];
        b |= p[2] | p[3];
        c |= p[4] | p[5];
        d |= p[6] | p[7];
    }
    a |= b | c | d;
    return a[0] | a[1] | a[2] | a[3];
}

/* Reads every byte of the pages. */
size_t each_read(const uint8_t *base, const uint64_t *index, size_t n, size_t page_size)
{
    size_t found = 0;

    for (size_t i = 0; i < n; i++) {
        found += any_set(base + index[i] * page_size, page_size);
    }
    return found;
}

void each_copy(uint8_t *to, const uint8_t *base, const uint64_t *index, size_t n,
               size_t page_size)
{
    for (size_t i = 0; i < n; i++) {
        memcpy(to + index[i] * page_size, base + index[i] * page_size, page_size);
    }
}

/* Three sampled bytes, then 256 bytes at a time. */
bool plain_is_zero(const void *data, size_t nbytes)
{
    const uint8_t *bytes = data;

    if (bytes[0] | bytes[nbytes - 1] | bytes[nbytes / 2]) {
        return false;
    }
    for (size_t at = 0; at < nbytes; at += 256) {
        if (any_set(bytes + at, 256)) {
            return false;
        }
    }
    return true;
}

size_t each_zero(zero_fn *is_zero, const uint8_t *base, const uint64_t *index, size_t n,
                 size_t page_size)
{
    size_t nzero = 0;

    for (size_t i = 0; i < n; i++) {
        nzero += is_zero(base + index[i] * page_size, page_size);
    }
    return nzero;
}

/* ---- bitmaps -------------------------------------------------------------------------------- */

static unsigned long next(const unsigned long *words, unsigned long nbits, unsigned long from,
                          unsigned long invert)
{
    unsigned long word, i = from / 64;

    if (from >= nbits) {
        return nbits;
    }
    word = (words[i] ^ invert) & ~0UL << from % 64;
    while (!word) {
        if (++i * 64 >= nbits) {
            return nbits;
        }
        word = words[i] ^ invert;
    }
    from = i * 64 + (unsigned long)__builtin_ctzl(word);
    return from < nbits ? from : nbits;
}

unsigned long plain_next_set(const unsigned long *words, unsigned long nbits, unsigned long from)
{
    return next(words, nbits, from, 0);
}

unsigned long plain_next_clear(const unsigned long *words, unsigned long nbits, unsigned long from)
{
    return next(words, nbits, from, ~0UL);
}

/* Indexes of all set bits; `out` (a power of two long) is filled again and again. */
size_t each_bit(next_fn *next_set, const unsigned long *words, unsigned long nbits, uint64_t *out,
                size_t max)
{
    unsigned long bit = next_set(words, nbits, 0);
    size_t n = 0;

    while (bit < nbits) {
        out[n++ & (max - 1)] = bit;
        bit = next_set(words, nbits, bit + 1);
    }
    return n;
}

/* All runs of set bits, first and end, in the same manner. */
size_t each_run(next_fn *next_set, next_fn *next_clear, const unsigned long *words,
                unsigned long nbits, uint64_t *out, size_t max)
{
    unsigned long first = next_set(words, nbits, 0);
    size_t n = 0;

    while (first < nbits) {
        unsigned long end = next_clear(words, nbits, first);

        out[n++ & (max - 1)] = first;
        out[n++ & (max - 1)] = end;
        first = next_set(words, nbits, end);
    }
    return n / 2;
}

size_t plain_count(const uint64_t *words, size_t nwords)
{
    size_t n = 0;

    for (size_t i = 0; i < nwords; i++) {
        n += (size_t)__builtin_popcountll(words[i]);
    }
    return n;
}

size_t plain_merge(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    size_t n = 0;

    for (size_t i = 0; i < nwords; i++) {
        if (src[i]) {
            n += (size_t)__builtin_popcountll(src[i] & ~dst[i]);
            dst[i] |= src[i];
        }
    }
    return n;
}

/* ---- XBZRLE: a word at a time ---------------------------------------------------------------- */

static int first_change(const uint8_t *old, const uint8_t *new, int at, int nbytes)
{
    for (; at + 8 <= nbytes; at += 8) {
        uint64_t changed = load(old + at) ^ load(new + at);

        if (changed) {
            break;
        }
    }
    while (at < nbytes && old[at] == new[at]) {
        at++;
    }
    return at;
}

static int first_equal(const uint8_t *old, const uint8_t *new, int at, int nbytes)
{
    const uint64_t low = UINT64_MAX / 255;

    for (; at + 8 <= nbytes; at += 8) {
        uint64_t changed = load(old + at) ^ load(new + at);

        /* a byte of it is 0 */
        if ((changed - low) & ~changed & low << 7) {
            break;
        }
    }
    while (at < nbytes && old[at] != new[at]) {
        at++;
    }
    return at;
}

static int put_length(uint8_t *dst, int length)
{
    dst[0] = (uint8_t)(length & 0x7f);
    if (length < 0x80) {
        return 1;
    }
    dst[0] |= 0x80;
    dst[1] = (uint8_t)(length >> 7);
    return 2;
}

int plain_encode(uint8_t *old, uint8_t *new, int nbytes, uint8_t *dst, int max)
{
    int used = 0, at = 0;

    for (;;) {
        int start = first_change(old, new, at, nbytes), end;

        if (start == nbytes) {
            return used;
        }
        end = first_equal(old, new, start, nbytes);
        if (used + 4 + end - start > max) {
            return -1;
        }
        used += put_length(dst + used, start - at);
        used += put_length(dst + used, end - start);
        memcpy(dst + used, new + start, (size_t)(end - start));
        used += end - start;
        at = end;
    }
}

/* 0 when there is no such length */
static int get_length(const uint8_t *src, int nsrc, int *length)
{
    if (nsrc < 2) {
        return 0;
    }
    *length = src[0] & 0x7f;
    if (src[0] < 0x80) {
        return 1;
    }
    *length |= src[1] << 7;
    return src[1] < 0x80 ? 2 : 0;
}

int plain_decode(uint8_t *src, int nsrc, uint8_t *page, int nbytes)
{
    int from = 0, at = 0;

    while (from < nsrc) {
        int skip, run, n = get_length(src + from, nsrc - from, &skip);

        if (!n || (from && !skip)) {
            return -1;
        }
        from += n;
        n = get_length(src + from, nsrc - from, &run);
        if (!n || !run || skip + run > nbytes - at || run > nsrc - from - n) {
            return -1;
        }
        from += n;
        memcpy(page + at + skip, src + from, (size_t)run);
        from += run;
        at += skip + run;
    }
    return at;
}

/* Encodes page after page, one encoding behind the other, `times` times. */
size_t each_encode(encode_fn *encode, uint8_t *old, uint8_t *new, size_t n, size_t page_size,
                   uint8_t *out, size_t times)
{
    size_t used = 0;

    while (times--) {
        used = 0;
        for (size_t i = 0; i < n; i++) {
            int length = encode(old + i * page_size, new + i * page_size, (int)page_size,
                                out + used, (int)page_size);

            used += length > 0 ? (size_t)length : 0;
        }
    }
    return used;
}

size_t each_decode(decode_fn *decode, uint8_t *encodings, const int32_t *lengths, uint8_t *pages,
                   size_t n, size_t page_size, size_t times)
{
    size_t used = 0;

    while (times--) {
        used = 0;
        for (size_t i = 0; i < n; i++) {
            if (decode(encodings + used, lengths[i], pages + i * page_size, (int)page_size) < 0) {
                return 0;
            }
            used += (size_t)lengths[i];
        }
    }
    return used;
}

/* ---- page cache: a memory block for each page, a division for each look-up ------------------- */

struct plain_item {
    uint64_t address, generation;
    uint8_t *page;
};

struct plain_cache {
    size_t page_size, nitems;
    struct plain_item items[];
};

void *plain_cache_open(uint64_t nbytes, size_t page_size, void **error)
{
    size_t nitems = nbytes / page_size;
    struct plain_cache *c = calloc(1, sizeof(*c) + nitems * sizeof(c->items[0]));

    (void)error;
    if (c) {
        c->page_size = page_size;
        c->nitems = nitems;
    }
    return c;
}

void plain_cache_close(void *cache)
{
    struct plain_cache *c = cache;

    for (size_t i = 0; i < c->nitems; i++) {
        free(c->items[i].page);
    }
    free(c);
}

static struct plain_item *item_of(const struct plain_cache *c, uint64_t address)
{
    return (struct plain_item *)&c->items[address / c->page_size & (c->nitems - 1)];
}

bool plain_cache_cached(const void *cache, uint64_t address, uint64_t generation)
{
    struct plain_item *item = item_of(cache, address);

    if (!item->page || item->address != address) {
        return false;
    }
    item->generation = generation;
    return true;
}

uint8_t *plain_cache_data(const void *cache, uint64_t address)
{
    return item_of(cache, address)->page;
}

int plain_cache_insert(void *cache, uint64_t address, const uint8_t *page, uint64_t generation)
{
    struct plain_cache *c = cache;
    struct plain_item *item = item_of(c, address);

    if (!item->page) {
        item->page = malloc(c->page_size);
        if (!item->page) {
            return -1;
        }
    } else if (item->address != address && item->generation + 2 > generation) {
        return -1;
    }
    memcpy(item->page, page, c->page_size);
    item->address = address;
    item->generation = generation;
    return 0;
}

size_t each_lookup(const struct cache_api *api, const uint64_t *index, size_t n, size_t page_size,
                   uint64_t generation)
{
    size_t found = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t address = index[i] * page_size;

        if (api->cached(api->cache, address, generation)) {
            found += api->data(api->cache, address) != NULL;
        }
    }
    return found;
}

size_t each_insert(const struct cache_api *api, const uint8_t *base, uint64_t address,
                   const uint64_t *index, size_t n, size_t page_size, uint64_t generation)
{
    size_t done = 0;

    for (size_t i = 0; i < n; i++) {
        done += api->insert(api->cache, address + index[i] * page_size,
                            base + index[i] * page_size, generation) == 0;
    }
    return done;
}

/* What a sender does with pages that are in the cache. The guest may write its pages meanwhile, so
 * a page is copied first; the cache gets the copy if anything has changed. Out is as long as
 * `batch` pages, of which it holds the encodings. */
size_t each_send(const struct cache_api *api, encode_fn *encode, const uint8_t *base,
                 const uint64_t *index, size_t n, size_t batch, size_t page_size,
                 uint64_t generation, uint8_t *out)
{
    uint8_t *copy = aligned_alloc(4096, page_size);
    size_t used = 0, total = 0;

    for (size_t i = 0; copy && i < n; i++) {
        uint64_t address = index[i] * page_size;
        uint8_t *cached;
        int length;

        used = i % batch ? used : 0;
        if (!api->cached(api->cache, address, generation)) {
            api->insert(api->cache, address, base + address, generation);
            continue;
        }
        cached = api->data(api->cache, address);
        memcpy(copy, base + address, page_size);
        length = encode(cached, copy, (int)page_size, out + used, (int)page_size);
        if (length) {
            memcpy(cached, copy, page_size);
        }
        if (length > 0) {
            used += (size_t)length;
            total += (size_t)length;
        }
    }
    free(copy);
    return total;
}

/* ---- mig's own functions, from its sources, in the same loops -------------------------------- */

size_t mig_each_zero(const struct mig_kernels *k, uint8_t *base, const uint64_t *index, size_t n,
                     size_t page_size, uint64_t *zero)
{
    const struct mig_pages pages = {.base = base, .npages = n, .page_size = page_size};

    return mig_zero_pages(k, &pages, index, n, zero);
}

size_t mig_each_run(const struct mig_kernels *k, const uint64_t *words, uint64_t nbits,
                    uint64_t *out, size_t max)
{
    size_t found = 0, n;
    uint64_t from = 0;

    do {
        n = mig_bitmap_runs(k, words, nbits, from, out, max / 2, nbits);
        found += n;
        from = n ? out[2 * n - 1] : nbits;
    } while (n == max / 2);
    return found;
}

size_t mig_each_encode(const struct mig_kernels *k, const uint8_t *old, const uint8_t *new,
                       size_t n, size_t page_size, uint8_t *out, size_t times)
{
    size_t used = 0;

    while (times--) {
        used = 0;
        for (size_t i = 0; i < n; i++) {
            int64_t length = k->xbzrle_encode(old + i * page_size, new + i * page_size, page_size,
                                              out + used, page_size);

            used += length > 0 ? (size_t)length : 0;
        }
    }
    return used;
}

size_t mig_each_decode(const struct mig_kernels *k, const uint8_t *encodings,
                       const int32_t *lengths, uint8_t *pages, size_t n, size_t page_size,
                       size_t times)
{
    size_t used = 0;

    while (times--) {
        used = 0;
        for (size_t i = 0; i < n; i++) {
            k->xbzrle_decode(encodings + used, (size_t)lengths[i], pages + i * page_size,
                             page_size);
            used += (size_t)lengths[i];
        }
    }
    return used;
}

void *mig_open(uint64_t nbytes, size_t page_size, void **error)
{
    struct mig_cache *c = malloc(sizeof(*c));

    (void)error;
    if (c && mig_cache_open(c, nbytes / page_size, page_size) < 0) {
        free(c);
        return NULL;
    }
    return c;
}

void mig_close(void *cache)
{
    mig_cache_close(cache);
    free(cache);
}

size_t mig_each_insert(struct mig_cache *c, const uint8_t *base, const uint64_t *index, size_t n,
                       size_t page_size, uint64_t generation)
{
    size_t done = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t address = index[i] * page_size;

        done += mig_cache_insert(c, address, base + address, generation) != NULL;
    }
    return done;
}

size_t mig_each_lookup(struct mig_cache *c, const uint64_t *index, size_t n, size_t page_size,
                       uint64_t generation)
{
    size_t found = 0;

    for (size_t i = 0; i < n; i++) {
        found += mig_cache_lookup(c, index[i] * page_size, generation) != NULL;
    }
    return found;
}

size_t mig_each_send(const struct mig_kernels *k, struct mig_cache *c, uint8_t *base,
                     const uint64_t *index, size_t n, size_t page_size, uint64_t generation,
                     uint8_t *out, size_t max, int32_t *results)
{
    const struct mig_pages pages = {.base = base, .npages = n, .page_size = page_size};
    size_t used;

    mig_cache_encode(k, c, &pages, 0, index, n, generation, false, out, max, results, &used);
    return used;
}
