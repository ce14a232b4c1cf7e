/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Every kernel of every family on odd lengths and alignments, ending where the memory ends, under
 * AddressSanitizer and UndefinedBehaviorSanitizer, and for arm64 without them (test_driver.py
 * builds and runs it). What a kernel says is compared with a loop over bits or bytes. */
#include <sys/mman.h>

#include "driver.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

static uint64_t seed;

uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

uint64_t below(uint64_t n) { return n ? rnd() % n : 0; }

/* ---- memory ---------------------------------------------------------------------------------- */

enum { LEAD = 0xa5 };

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

static uint8_t *memory_get(size_t nbytes) { return malloc(nbytes); }
static void memory_put(uint8_t *memory, size_t nbytes) { (void)nbytes, free(memory); }
#else
/* A few areas with an inaccessible page behind them. */
enum { AREA = 1 << 22, GUARD = 1 << 16 };

static struct {
    uint8_t *end;
    bool busy;
} areas[16];

static uint8_t *memory_get(size_t nbytes)
{
    size_t i = 0;

    while (areas[i].busy) {
        CHECK(++i < sizeof(areas) / sizeof(areas[0]));
    }
    if (!areas[i].end) {
        uint8_t *area = mmap(NULL, AREA + GUARD, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(area != MAP_FAILED && mprotect(area + AREA, GUARD, PROT_NONE) == 0);
        areas[i].end = area + AREA;
    }
    CHECK(nbytes <= AREA);
    areas[i].busy = true;
    return areas[i].end - nbytes;
}

static void memory_put(uint8_t *memory, size_t nbytes)
{
    for (size_t i = 0; i < sizeof(areas) / sizeof(areas[0]); i++) {
        areas[i].busy &= areas[i].end != memory + nbytes;
    }
}
#define ASAN_POISON_MEMORY_REGION(at, n) ((void)(at), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(at, n) ((void)(at), (void)(n))
#endif

struct piece piece_open(size_t nbytes, size_t lead)
{
    uint8_t *memory = memory_get(lead + nbytes);

    CHECK(memory);
    memset(memory, LEAD, lead);
    /* AddressSanitizer knows memory by eight bytes; those that are half ours stay readable */
    ASAN_POISON_MEMORY_REGION(memory, lead / 8 * 8);
    return (struct piece){.bytes = memory + lead, .nbytes = nbytes, .lead = lead};
}

struct piece piece_copy(const void *bytes, size_t nbytes, size_t lead)
{
    struct piece p = piece_open(nbytes, lead);

    if (nbytes) {
        memcpy(p.bytes, bytes, nbytes);
    }
    return p;
}

void piece_close(struct piece *p)
{
    uint8_t *memory = p->bytes - p->lead;

    ASAN_UNPOISON_MEMORY_REGION(memory, p->lead);
    for (size_t i = 0; i < p->lead; i++) {
        CHECK(memory[i] == LEAD);
    }
    memory_put(memory, p->lead + p->nbytes);
}

/* ---- zero pages ------------------------------------------------------------------------------ */

static void check_zero_bytes(const struct mig_kernels *k)
{
    for (size_t n = 0; n < 2200; n += n < 600 ? 1 : 37) {
        for (size_t lead = 0; lead < 65; lead += n % 3 ? 13 : 1) {
            struct piece p = piece_open(n, lead); /* what stands before does not count */

            memset(p.bytes, 0, n);
            CHECK(k->is_zero(p.bytes, n));
            for (int i = 0; n && i < 4; i++) {
                size_t at = i == 0 ? 0 : i == 1 ? n - 1 : below(n);

                p.bytes[at] = (uint8_t)(1 << below(8));
                CHECK(!k->is_zero(p.bytes, n));
                p.bytes[at] = 0;
            }
            piece_close(&p);
        }
    }
}

/* One byte that is not zero, at every place of pages. */
static void check_zero_places(const struct mig_kernels *k)
{
    static const size_t sizes[] = {1024, 4096, 5000};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct piece p = piece_open(sizes[i], 7 * i);

        memset(p.bytes, 0, sizes[i]);
        for (size_t at = 0; at < sizes[i]; at++) {
            p.bytes[at] = 0x80;
            CHECK(!k->is_zero(p.bytes, sizes[i]));
            p.bytes[at] = 0;
        }
        piece_close(&p);
    }
}

/* Batches over pages in a row and over pages that are anywhere or nowhere, all of them or some. */
static void check_zero_pages(const struct mig_kernels *k, size_t page_size, bool scattered)
{
    enum { NPAGES = 150 };
    struct piece memory = piece_open((scattered ? NPAGES + 1 : NPAGES) * page_size, 0);
    struct mig_pages pages = {.base = memory.bytes, .npages = NPAGES, .page_size = page_size};
    int64_t where[NPAGES];
    bool is_zero[NPAGES];

    memset(memory.bytes, 0, memory.nbytes);
    pages.where = scattered ? where : NULL;
    for (size_t i = 0; i < NPAGES; i++) {
        size_t at = scattered ? (NPAGES - i) * page_size : i * page_size;

        where[i] = i % 5 == 1 ? MIG_PAGE_NONE : i % 5 == 3 ? MIG_PAGE_ZERO : (int64_t)at;
        is_zero[i] = (scattered && where[i] <= 0) || rnd() % 2;
        if (!is_zero[i]) {
            memory.bytes[at + below(page_size)] = (uint8_t)(1 + below(255));
        }
    }
    for (size_t n = 0; n <= NPAGES; n++) {
        struct piece zero = piece_open(mig_bitmap_nwords(n) * 8, 0);
        struct piece index = piece_open(n * 8, 8 * (n % 3));
        uint64_t *chosen = (void *)index.bytes, *bits = (void *)zero.bytes;

        for (int all = 0; all < 2; all++) {
            size_t want = 0;

            memset(zero.bytes, 0xff, zero.nbytes);
            for (size_t i = 0; i < n; i++) {
                chosen[i] = all ? i : below(NPAGES);
                want += is_zero[chosen[i]];
            }
            CHECK(mig_zero_pages(k, &pages, all ? NULL : chosen, n, bits) == want);
            for (size_t i = 0; i < n; i++) {
                CHECK(mig_bitmap_test(bits, i) == is_zero[chosen[i]]);
            }
        }
        piece_close(&zero);
        piece_close(&index);
    }
    piece_close(&memory);
}

void check_zero(const struct mig_kernels *k)
{
    check_zero_bytes(k);
    check_zero_places(k);
    for (size_t page_size = 64; page_size <= 1024; page_size *= 4) {
        check_zero_pages(k, page_size, false);
        check_zero_pages(k, page_size, true);
    }
}

int main(void)
{
    const struct mig_kernels *k;
    const char *name;

    for (size_t i = 0; (name = mig_kernels_name(i)); i++) {
        int rc = mig_kernels_select(name, &k);

        if (rc == MIG_E_KERNEL_NO_CPU || rc == MIG_E_KERNEL_NOT_BUILT) {
            printf("%s: cannot run here\n", name);
            continue;
        }
        CHECK(rc == 0 && strcmp(k->name, name) == 0);
        seed = 88172645463325252u; /* the same cases for all families */
        check_zero(k);
        check_words(k);
        check_scans(k);
        check_bitmap(k);
        check_encoder(k);
        check_decoder(k);
        check_race(k);
        check_cache(k);
        check_records(k);
        printf("%s: fine\n", name);
        fflush(stdout);
    }
    CHECK(mig_kernels_select("nonsense", &k) == MIG_E_KERNEL_UNKNOWN);
    CHECK(mig_kernels_select(NULL, &k) == 0);
    return 0;
}
