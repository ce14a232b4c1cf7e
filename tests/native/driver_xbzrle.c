/* SPDX-License-Identifier: LGPL-2.1-or-later
 * XBZRLE in the driver: every family against the simple coder, in buffers without slack. */
#include <pthread.h>

#include "driver.h"

/* How two pages differ. */
enum difference {
    SAME,
    ALL,
    FIRST,
    LAST,
    ONE,
    ALTERNATING,
    TENTH,
    HALF,
    RARE,
    WORDS, /* a few of eight bytes */
    SHORT_RUNS,
    LONG_RUNS, /* lengths around those that take a second byte */
    FRONT,     /* changed bytes, then none up to the end */
    BACK,
    NDIFFERENCES,
};

static void change(uint8_t *page, size_t at) { page[at] ^= (uint8_t)(1 + below(255)); }

static void change_runs(uint8_t *page, size_t nbytes, size_t shortest, size_t longest)
{
    size_t at = rnd() % 2 ? 0 : shortest + below(longest - shortest);

    while (at < nbytes) {
        size_t end = at + shortest + below(longest - shortest);

        for (; at < end && at < nbytes; at++) {
            change(page, at);
        }
        at += shortest + below(longest - shortest);
    }
}

static void differ(uint8_t *page, size_t nbytes, enum difference difference)
{
    uint64_t share = difference == HALF ? 2 : difference == TENTH ? 10 : 500;
    size_t cut = below(nbytes + 1);

    switch (difference) {
    case ALTERNATING:
        for (size_t at = rnd() % 2; at < nbytes; at += 2) {
            change(page, at);
        }
        break;
    case TENTH:
    case HALF:
    case RARE:
        for (size_t at = 0; at < nbytes; at++) {
            if (below(share) == 0) {
                change(page, at);
            }
        }
        break;
    case WORDS:
        for (int i = 0; i < 5; i++) {
            size_t start = below(nbytes) / 8 * 8;

            for (size_t at = start; at < start + 8 && at < nbytes; at++) {
                change(page, at);
            }
        }
        break;
    case SHORT_RUNS:
        change_runs(page, nbytes, 1, 12);
        break;
    case LONG_RUNS:
        change_runs(page, nbytes, 120, 135);
        break;
    case ALL:
        cut = nbytes; /* fall through */
    case FRONT:
        for (size_t at = 0; at < cut; at++) {
            change(page, at);
        }
        break;
    case BACK:
        for (size_t at = cut; at < nbytes; at++) {
            change(page, at);
        }
        break;
    case FIRST:
    case LAST:
    case ONE:
        if (nbytes) {
            change(page, difference == FIRST ? 0 : difference == LAST ? nbytes - 1 : below(nbytes));
        }
        break;
    case SAME:
    case NDIFFERENCES:
        break;
    }
}

/* ---- encoder --------------------------------------------------------------------------------- */

static void check_decoded(const struct mig_kernels *k, const uint8_t *src, size_t nsrc,
                          const uint8_t *before, size_t nbytes);

static void check_encode(const struct mig_kernels *k, const struct piece *old,
                         const struct piece *new, size_t max)
{
    size_t nbytes = old->nbytes;
    uint8_t *want = malloc(max + 1);
    int64_t length = simple_encode(old->bytes, new->bytes, nbytes, want, max);
    struct piece out = piece_open(max, below(9));
    struct piece kept = piece_copy(old->bytes, nbytes, below(70));

    memset(out.bytes, 0, max);
    CHECK(k->xbzrle_encode(old->bytes, new->bytes, nbytes, out.bytes, max) == length);
    CHECK(length <= 0 || memcmp(out.bytes, want, (size_t)length) == 0);
    memset(out.bytes, 0, max);
    CHECK(k->xbzrle_update(kept.bytes, new->bytes, nbytes, out.bytes, max) == length);
    CHECK(length <= 0 || memcmp(out.bytes, want, (size_t)length) == 0);
    CHECK(memcmp(kept.bytes, new->bytes, nbytes) == 0);
    piece_close(&out);
    piece_close(&kept);
    free(want);
}

static void check_pair(const struct mig_kernels *k, size_t nbytes, enum difference difference,
                       bool all_limits)
{
    struct piece old = piece_open(nbytes, below(70)), new;
    uint8_t *whole = malloc(simple_longest(nbytes));
    int64_t length;
    size_t around;

    for (size_t i = 0; i < nbytes; i++) {
        old.bytes[i] = (uint8_t)rnd();
    }
    new = piece_copy(old.bytes, nbytes, below(70));
    differ(new.bytes, nbytes, difference);
    length = simple_encode(old.bytes, new.bytes, nbytes, whole, simple_longest(nbytes));
    around = length > 0 ? (size_t)length : nbytes;
    if (all_limits) {
        for (size_t max = 0; max < around + 4; max++) {
            check_encode(k, &old, &new, max);
        }
    } else {
        for (size_t max = 0; max < 4; max++) {
            check_encode(k, &old, &new, max);
        }
        for (size_t max = around < 3 ? 0 : around - 3; max < around + 4; max++) {
            check_encode(k, &old, &new, max);
        }
        check_encode(k, &old, &new, below(around));
        check_encode(k, &old, &new, around + 64 + below(64));
        check_encode(k, &old, &new, nbytes);
    }
    if (length >= 0) {
        check_decoded(k, whole, (size_t)length, old.bytes, nbytes);
    }
    piece_close(&old);
    piece_close(&new);
    free(whole);
}

void check_encoder(const struct mig_kernels *k)
{
    static const size_t sizes[] = {255,  256,  257,  319,  320,  511,  512,   1000,  1024,
                                   4095, 4096, 4097, 4160, 8192, 12345, 16384, 32768, 65536};

    for (int i = 0; i < NDIFFERENCES; i++) {
        enum difference difference = (enum difference)i;

        for (size_t nbytes = 0; nbytes < 210; nbytes++) {
            check_pair(k, nbytes, difference, nbytes < 80 || nbytes % 16 == 0);
        }
        for (size_t j = 0; j < sizeof(sizes) / sizeof(sizes[0]); j++) {
            for (size_t again = 0; again < (sizes[j] > 5000 ? 1 : 4); again++) {
                check_pair(k, sizes[j], difference, sizes[j] == 320 && again == 0);
            }
        }
    }
    /* runs of the longest length that can be said, and a byte more; changed and unchanged */
    for (size_t length = 0x3ffe; length <= 0x4001; length++) {
        for (int tail = 0; tail < 4; tail++) {
            struct piece old = piece_open(40000, 0), new;

            memset(old.bytes, 0, old.nbytes);
            new = piece_copy(old.bytes, old.nbytes, 0);
            memset(new.bytes + (tail & 1 ? 9 : length), 1, tail & 1 ? length : 1);
            new.bytes[old.nbytes - 1] = tail & 2 ? 1 : 0;
            check_encode(k, &old, &new, 40000);
            piece_close(&old);
            piece_close(&new);
        }
    }
}

/* ---- decoder --------------------------------------------------------------------------------- */

static void check_decoded(const struct mig_kernels *k, const uint8_t *src, size_t nsrc,
                          const uint8_t *before, size_t nbytes)
{
    struct piece in = piece_copy(src, nsrc, below(9)), page = piece_copy(before, nbytes, below(70));
    struct piece want = piece_copy(before, nbytes, 0);
    int64_t rc = simple_decode(src, nsrc, want.bytes, nbytes);

    CHECK(k->xbzrle_decode(in.bytes, nsrc, page.bytes, nbytes) == rc);
    CHECK(memcmp(page.bytes, want.bytes, nbytes) == 0); /* also what an error leaves behind */
    piece_close(&in);
    piece_close(&page);
    piece_close(&want);
}

static size_t mutate(uint8_t *src, size_t nsrc)
{
    static const uint8_t odd[] = {0, 1, 0x3f, 0x40, 0x41, 0x7f, 0x80, 0x81, 0xff};

    for (uint64_t i = below(4); nsrc && i <= 3; i++) {
        size_t at = below(rnd() % 2 ? nsrc : nsrc < 16 ? nsrc : 16);

        switch (below(4)) {
        case 0:
            src[at] = (uint8_t)rnd();
            break;
        case 1:
            src[at] = odd[below(sizeof(odd))];
            break;
        case 2:
            src[at] ^= (uint8_t)(1 << below(8));
            break;
        default:
            nsrc -= below(nsrc < 8 ? nsrc : 8);
            break;
        }
    }
    return nsrc;
}

/* Runs whose lengths are mostly right, minimal or not, up to and past the end of the page. */
static size_t make_up(uint8_t *src, size_t max, uint64_t longest)
{
    size_t nsrc = 0;

    while (nsrc + 4 < max && below(200)) {
        uint64_t changed = 0;

        for (int i = 0; i < 2; i++) {
            changed = (i || nsrc) && below(300) ? 1 + below(longest) : below(longest);
            if (changed < 128 && below(50)) {
                src[nsrc++] = (uint8_t)changed;
            } else {
                src[nsrc++] = (uint8_t)(changed % 128 + 128);
                src[nsrc++] = (uint8_t)(changed / 128 + (below(300) ? 0 : 128));
            }
        }
        for (; changed && nsrc < max; changed--) {
            src[nsrc++] = (uint8_t)rnd();
        }
    }
    return nsrc;
}

/* Every encoding of up to three bytes, laid over pages of a few bytes. */
static void check_short(const struct mig_kernels *k)
{
    static const uint8_t before[3] = {7, 8, 9};

    for (uint32_t i = 0; i < 1 << 16; i++) {
        uint8_t src[3] = {(uint8_t)i, (uint8_t)(i >> 8), 0x55};

        check_decoded(k, src, 2, before, 3);
        check_decoded(k, src, 3, before, i % 4 > 1 ? 3 : 1);
        if (i < 256) {
            check_decoded(k, src, i % 2, before, 3);
        }
    }
}

void check_decoder(const struct mig_kernels *k)
{
    enum { LONGEST = 5000 };
    static const size_t sizes[] = {1, 2, 63, 64, 65, 200, 1024, 4096, 4999};
    uint8_t *old = malloc(LONGEST), *new = malloc(LONGEST);
    uint8_t *src = malloc(simple_longest(LONGEST));

    check_short(k);
    check_decoded(k, src, 0, old, 0);
    for (size_t i = 0; i < LONGEST; i++) {
        old[i] = (uint8_t)rnd();
    }
    for (int i = 0; i < 400; i++) {
        for (size_t j = 0; j < sizeof(sizes) / sizeof(sizes[0]); j++) {
            size_t nbytes = sizes[j], nsrc;

            memcpy(new, old, nbytes);
            differ(new, nbytes, (enum difference)below(NDIFFERENCES));
            nsrc = (size_t)simple_encode(old, new, nbytes, src, simple_longest(nbytes));
            check_decoded(k, src, mutate(src, nsrc), old, nbytes);
            nsrc = make_up(src, simple_longest(nbytes), rnd() % 2 ? 12 : 150);
            check_decoded(k, src, nsrc, old, nbytes);
            for (nsrc = 0; nsrc < below(300); nsrc++) {
                src[nsrc] = (uint8_t)(rnd() % 4 ? below(6) : rnd());
            }
            check_decoded(k, src, nsrc, old, nbytes);
        }
    }
    free(old);
    free(new);
    free(src);
}

/* ---- a guest that writes while its page is encoded ------------------------------------------- */

struct guest {
    volatile uint8_t *page;
    size_t nbytes;
    bool stop;
};

static void *guest_main(void *opaque)
{
    struct guest *g = opaque;

    for (uint64_t x = 1; !__atomic_load_n(&g->stop, __ATOMIC_RELAXED);) {
        x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        g->page[(x >> 33) % g->nbytes] = (uint8_t)(x >> 56);
    }
    return NULL;
}

/* Whatever is written when: the encoding makes the copy as it was into the copy as it is. */
void check_race(const struct mig_kernels *k)
{
    enum { PAGE = 4096 };
    struct piece page = piece_open(PAGE, 0), copy = piece_open(PAGE, 0), out = piece_open(PAGE, 0);
    struct guest g = {.page = page.bytes, .nbytes = PAGE};
    uint8_t *before = malloc(PAGE);
    pthread_t thread;

    memset(page.bytes, 0, PAGE);
    memset(copy.bytes, 0, PAGE);
    CHECK(pthread_create(&thread, NULL, guest_main, &g) == 0);
    for (int i = 0; i < 4000; i++) {
        int64_t length;

        memcpy(before, copy.bytes, PAGE);
        length = k->xbzrle_update(copy.bytes, page.bytes, PAGE, out.bytes, PAGE);
        if (length != MIG_XBZRLE_OVERFLOW) {
            CHECK(simple_decode(out.bytes, (size_t)length, before, PAGE) >= 0);
            CHECK(memcmp(before, copy.bytes, PAGE) == 0);
        }
    }
    __atomic_store_n(&g.stop, true, __ATOMIC_RELAXED);
    CHECK(pthread_join(thread, NULL) == 0);
    k->xbzrle_update(copy.bytes, page.bytes, PAGE, out.bytes, PAGE);
    CHECK(memcmp(copy.bytes, page.bytes, PAGE) == 0);
    free(before);
    piece_close(&page);
    piece_close(&copy);
    piece_close(&out);
}
