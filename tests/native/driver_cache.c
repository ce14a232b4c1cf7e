/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The page cache in the driver, against a table of pages that is searched from one end. */
#include "driver.h"

struct entry {
    bool used;
    uint64_t address, age;
    uint8_t *page;
};

/* A cache, what should be in it, and a block of guest memory that goes through it. */
struct model {
    struct mig_cache cache;
    struct entry *entries;
    size_t nslots, page_size, npages, used;
    uint64_t base; /* the block's address */
    struct piece memory;
};

static void model_open(struct model *m, size_t nslots, size_t page_size, size_t npages)
{
    m->entries = calloc(nslots, sizeof(*m->entries));
    m->nslots = nslots;
    m->page_size = page_size;
    m->npages = npages;
    m->used = 0;
    m->base = 5 * page_size;
    m->memory = piece_open(npages * page_size, 0);
    memset(m->memory.bytes, 0, m->memory.nbytes);
    for (size_t i = 0; i < nslots; i++) {
        m->entries[i].page = calloc(1, page_size);
    }
    CHECK(mig_cache_open(&m->cache, nslots, page_size) == 0);
}

static struct entry *entry_of(struct model *m, uint64_t address)
{
    return &m->entries[address / m->page_size % m->nslots];
}

static uint8_t *memory_page(struct model *m, uint64_t index)
{
    return m->memory.bytes + index * m->page_size;
}

static bool model_insert(struct model *m, uint64_t address, const uint8_t *page,
                         uint64_t generation)
{
    struct entry *e = entry_of(m, address);

    if (e->used && e->address != address && e->age + 2 > generation) {
        return false;
    }
    m->used += !e->used;
    e->used = true;
    e->address = address;
    e->age = generation;
    memcpy(e->page, page, m->page_size);
    return true;
}

static void model_check(struct model *m)
{
    CHECK(m->cache.used == m->used);
    for (size_t i = 0; i < m->nslots; i++) {
        const struct mig_cache_slot *slot = &m->cache.slots[i];
        const uint8_t *copy = m->cache.pages + i * m->cache.stride;

        CHECK(m->entries[i].used == (slot->address != UINT64_MAX));
        if (m->entries[i].used) {
            CHECK(slot->address == m->entries[i].address && slot->age == m->entries[i].age);
        }
        CHECK(memcmp(copy, m->entries[i].page, m->page_size) == 0);
        for (size_t j = m->page_size; j < m->cache.stride; j++) {
            CHECK(copy[j] == 0); /* between two pages */
        }
    }
}

static void model_close(struct model *m)
{
    model_check(m);
    for (size_t i = 0; i < m->nslots; i++) {
        free(m->entries[i].page);
    }
    free(m->entries);
    piece_close(&m->memory);
    mig_cache_close(&m->cache);
    CHECK(!m->cache.pages && !m->cache.slots);
    mig_cache_close(&m->cache); /* again: nothing happens */
}

static void guest_writes(struct model *m)
{
    for (size_t index = 0; index < m->npages; index++) {
        uint64_t most = below(4) ? 0 : below(4) ? 6 : m->page_size;

        for (uint64_t i = below(most + 1); i > 0; i--) {
            memory_page(m, index)[below(m->page_size)] = (uint8_t)rnd();
        }
    }
}

/* A batch of pages: what each does to the cache, and what there is to send. */
static void check_batch(const struct mig_kernels *k, struct model *m, uint64_t generation)
{
    struct mig_pages pages = {.base = m->memory.bytes, .npages = m->npages,
                              .page_size = m->page_size};
    bool last_stage = below(4) == 0;
    size_t n = below(2 * m->npages), max = below(n * m->page_size + 2), used, done, i, at = 0;
    struct piece index = piece_open(n * 8, 0), result = piece_open(n * 4, 0);
    struct piece out = piece_open(max, below(9));
    uint8_t *want = malloc(m->page_size + 1);
    uint64_t *indexes = (void *)index.bytes;
    int32_t *results = (void *)result.bytes;

    for (i = 0; i < n; i++) {
        indexes[i] = below(m->npages);
    }
    done = mig_cache_encode(k, &m->cache, &pages, m->base, indexes, n, generation, last_stage,
                            out.bytes, max, results, &used);
    for (i = 0; i < n && max - at >= m->page_size; i++) {
        uint64_t address = m->base + indexes[i] * m->page_size;
        const uint8_t *page = memory_page(m, indexes[i]);
        struct entry *e = entry_of(m, address);
        int64_t length;

        CHECK(i < done);
        if (!e->used || e->address != address) {
            bool kept = !last_stage && model_insert(m, address, page, generation);

            CHECK(results[i] == (kept ? MIG_CACHE_MISS : MIG_CACHE_REFUSED));
            continue;
        }
        e->age = generation;
        length = simple_encode(e->page, page, m->page_size, want, m->page_size);
        if (length == MIG_XBZRLE_OVERFLOW) {
            CHECK(results[i] == MIG_CACHE_OVERFLOW);
        } else {
            CHECK(results[i] == length);
            CHECK(memcmp(out.bytes + at, want, (size_t)length) == 0);
            at += (size_t)length;
        }
        if (!last_stage) {
            memcpy(e->page, page, m->page_size);
        }
    }
    CHECK(done == i && used == at);
    piece_close(&index);
    piece_close(&result);
    piece_close(&out);
    free(want);
}

static void check_lookup(struct model *m, uint64_t address, uint64_t generation)
{
    struct entry *e = entry_of(m, address);
    const uint8_t *copy = mig_cache_lookup(&m->cache, address, generation);

    CHECK((copy != NULL) == (e->used && e->address == address));
    if (copy) {
        CHECK(memcmp(copy, e->page, m->page_size) == 0);
        e->age = generation;
    }
}

static void check_insert(struct model *m, uint64_t index, uint64_t address, uint64_t generation)
{
    const uint8_t *page = memory_page(m, index), *copy;
    uint8_t *zeros = calloc(1, m->page_size);
    bool zero = below(4) == 0, kept;

    kept = model_insert(m, address, zero ? zeros : page, generation);
    copy = mig_cache_insert(&m->cache, address, zero ? NULL : page, generation);
    CHECK((copy != NULL) == kept);
    CHECK(!copy || memcmp(copy, zero ? zeros : page, m->page_size) == 0);
    free(zeros);
}

static void check_one_cache(const struct mig_kernels *k, size_t nslots, size_t page_size,
                            int rounds)
{
    struct model m;
    uint64_t generation = 0;

    model_open(&m, nslots, page_size, nslots < 64 ? 3 * nslots : nslots + nslots / 8);
    for (int i = 0; i < rounds; i++) {
        generation += below(3) == 0;
        guest_writes(&m);
        check_batch(k, &m, generation);
        for (int j = 0; j < 20; j++) {
            uint64_t index = below(m.npages), address = m.base + index * page_size;

            check_lookup(&m, address, generation);
            check_insert(&m, index, address, generation);
            /* the same slot of an address high up */
            address ^= UINT64_C(1) << 62;
            check_lookup(&m, address, generation);
            if (below(8) == 0) {
                check_insert(&m, index, address, generation);
            }
        }
        if (nslots < 64 || i % 8 == 0) {
            model_check(&m);
        }
    }
    model_close(&m);
}

void check_cache(const struct mig_kernels *k)
{
    struct mig_cache c;

    for (size_t nslots = 1; nslots <= 16; nslots *= 4) {
        for (size_t page_size = 64; page_size <= 4096; page_size *= 4) {
            check_one_cache(k, nslots, page_size, 60);
        }
    }
    check_one_cache(k, 2, 16, 60);
    check_one_cache(k, 2, 1 << 16, 6);
    /* larger than the processor's cache, which inserting passes by */
    check_one_cache(k, 512, 4096, 8);
    CHECK(mig_cache_open(&c, (size_t)1 << 60, 4096) == MIG_E_NOMEM);
    CHECK(mig_cache_open(&c, (size_t)1 << 46, 4096) == MIG_E_NOMEM);
    CHECK(!c.pages && !c.slots);
}
