/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The XBZRLE cache: pages as they were last sent, and what a sender does with it. */
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

enum {
    LINE = 64,
    HUGE = 2 << 20, /* pages of the machine that make first use and address translation cheap */
    FETCHED = 1024, /* bytes of the next page, and of its copy, that are fetched ahead */
    CACHED = 1 << 20, /* a cache that is larger than this is not in the processor's */
};

static const uint64_t EMPTY = UINT64_MAX;

/* Memory of zeros that costs nothing until it is touched; NULL when it cannot be had. */
static void *map(size_t nbytes)
{
    void *p = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return p == MAP_FAILED ? NULL : p;
}

int mig_cache_open(struct mig_cache *c, size_t nslots, size_t page_size)
{
    /* one line more than a page: otherwise all pages would compete for the same cache sets */
    size_t stride = page_size + LINE, table;

    memset(c, 0, sizeof(*c));
    if (__builtin_mul_overflow(nslots, stride, &c->mapped) ||
        __builtin_mul_overflow(nslots, sizeof(*c->slots), &table)) {
        return MIG_E_NOMEM;
    }
    c->pages = map(c->mapped);
    c->slots = map(table);
    c->nslots = nslots;
    c->page_size = page_size;
    c->page_shift = (unsigned)__builtin_ctzll(page_size);
    c->stride = stride;
    c->epoch = 1;
    if (!c->pages || !c->slots) {
        mig_cache_close(c);
        return MIG_E_NOMEM;
    }
    if (c->mapped >= HUGE) {
        madvise(c->pages, c->mapped, MADV_HUGEPAGE);
    }
    for (size_t i = 0; i < nslots; i++) {
        c->slots[i].address = EMPTY;
    }
    return 0;
}

void mig_cache_close(struct mig_cache *c)
{
    if (c->pages) {
        munmap(c->pages, c->mapped);
    }
    if (c->slots) {
        munmap(c->slots, c->nslots * sizeof(*c->slots));
    }
    memset(c, 0, sizeof(*c));
}

static inline size_t slot_of(const struct mig_cache *c, uint64_t address)
{
    return (size_t)(address >> c->page_shift) & (c->nslots - 1);
}

uint8_t *mig_cache_lookup(struct mig_cache *c, uint64_t address, uint64_t generation)
{
    size_t i = slot_of(c, address);

    if (c->slots[i].address != address) {
        return NULL;
    }
    c->slots[i].age = generation;
    return c->pages + i * c->stride;
}

/* An inserted page is read again only when it is sent; writing it past the processor's caches saves
 * reading what it replaces. */
static void copy_page(const struct mig_cache *c, uint8_t *copy, const uint8_t *page)
{
#ifdef MIG_X86
    if (c->mapped > CACHED && c->page_size % LINE == 0) {
        for (size_t at = 0; at < c->page_size; at += LINE) {
            for (size_t i = 0; i < LINE; i += 16) {
                _mm_stream_si128((void *)(copy + at + i),
                                 _mm_loadu_si128((const void *)(page + at + i)));
            }
        }
        _mm_sfence();
        return;
    }
#endif
    memcpy(copy, page, c->page_size);
}

uint8_t *mig_cache_insert(struct mig_cache *c, uint64_t address, const uint8_t *page,
                          uint64_t generation)
{
    size_t i = slot_of(c, address);
    struct mig_cache_slot *slot = &c->slots[i];
    uint8_t *copy = c->pages + i * c->stride;

    if (slot->address == EMPTY) {
        /* several threads may, each under a lock of its own share of the slots */
        __atomic_fetch_add(&c->used, 1, __ATOMIC_RELAXED);
    } else if (slot->address != address && slot->age + MIG_CACHE_LIFETIME > generation) {
        return NULL;
    }
    slot->address = address;
    slot->age = generation;
    if (page) {
        copy_page(c, copy, page);
    } else {
        memset(copy, 0, c->page_size);
    }
    return copy;
}

bool mig_cache_is_queued(const struct mig_cache *c, uint64_t address)
{
    return c->slots[slot_of(c, address)].queued == c->epoch;
}

void mig_cache_queue(struct mig_cache *c, uint64_t address)
{
    c->slots[slot_of(c, address)].queued = c->epoch;
}

int32_t mig_cache_encode_page(const struct mig_kernels *k, struct mig_cache *c,
                              const uint8_t *page, uint64_t address, uint64_t generation,
                              bool last_stage, uint8_t *out, size_t max, const uint8_t **copy)
{
    uint8_t *cached = mig_cache_lookup(c, address, generation);
    int64_t length;

    *copy = NULL;
    if (!cached) {
        *copy = last_stage ? NULL : mig_cache_insert(c, address, page, generation);
        return *copy ? MIG_CACHE_MISS : MIG_CACHE_REFUSED;
    }
    if (last_stage) {
        length = k->xbzrle_encode(cached, page, c->page_size, out, max);
    } else {
        length = k->xbzrle_update(cached, page, c->page_size, out, max);
        *copy = cached;
    }
    return length == MIG_XBZRLE_OVERFLOW ? MIG_CACHE_OVERFLOW : (int32_t)length;
}

void mig_cache_fetch(const struct mig_cache *c, const uint8_t *page, uint64_t address)
{
    size_t i = slot_of(c, address);

    __builtin_prefetch(c->slots + i);
    for (size_t at = 0; at < FETCHED && at < c->page_size; at += LINE) {
        __builtin_prefetch(page + at);
        __builtin_prefetch(c->pages + i * c->stride + at);
    }
}

size_t mig_cache_encode(const struct mig_kernels *k, struct mig_cache *c,
                        const struct mig_pages *pages, uint64_t address, const uint64_t *index,
                        size_t n, uint64_t generation, bool last_stage, uint8_t *out, size_t max,
                        int32_t *result, size_t *used)
{
    size_t i;

    *used = 0;
    for (i = 0; i < n && max - *used >= c->page_size; i++) {
        const uint8_t *copy;

        if (i + 1 < n) {
            mig_cache_fetch(c, mig_page(pages, index[i + 1]),
                            address + (index[i + 1] << c->page_shift));
        }
        result[i] = mig_cache_encode_page(k, c, mig_page(pages, index[i]),
                                          address + (index[i] << c->page_shift), generation,
                                          last_stage, out + *used, c->page_size, &copy);
        *used += result[i] > 0 ? (size_t)result[i] : 0;
    }
    return i;
}
