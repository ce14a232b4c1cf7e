/* SPDX-License-Identifier: LGPL-2.1-or-later
 * libFuzzer target: XBZRLE of every family against a simple coder.
 *
 *   clang -g -O1 -std=gnu11 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
 *       -D_GNU_SOURCE -Icsrc -Itests/native -o fuzz_xbzrle tests/native/fuzz_xbzrle.c \
 *       tests/native/simple_xbzrle.c $(ls csrc/[a-z]*.c)
 *   ./fuzz_xbzrle -max_len=4096 -max_total_time=60 CORPUS_FOLDER
 *
 * The first byte of the input chooses what the rest is: an encoding from a hostile peer, two pages,
 * or a list of edits that make a new page of an old one. Checked: all families decode the same, to
 * the same page, also when they refuse; they encode the same, within any limit, and what they
 * encoded gives the new page back. */
#include "driver.h"

enum { MAX_FAMILIES = 8 };

static const struct mig_kernels *families[MAX_FAMILIES];
static size_t nfamilies;

static void find_families(void)
{
    const char *name;

    for (size_t i = 0; nfamilies == 0 && (name = mig_kernels_name(i)); i++) {
        if (mig_kernels_select(name, &families[nfamilies]) == 0) {
            CHECK(++nfamilies < MAX_FAMILIES);
        }
    }
}

/* Bytes at the end of their own memory, so that one too far is seen. */
static uint8_t *copy_of(const uint8_t *bytes, size_t nbytes)
{
    uint8_t *copy = malloc(nbytes);

    if (nbytes) {
        memcpy(copy, bytes, nbytes);
    }
    return copy;
}

static uint8_t *old_page(size_t nbytes)
{
    uint8_t *page = malloc(nbytes);

    for (size_t i = 0; i < nbytes; i++) {
        page[i] = (uint8_t)(i * 7 + i / 256);
    }
    return page;
}

static void decode(const uint8_t *data, size_t size, size_t nbytes)
{
    uint8_t *src = copy_of(data, size), *want = old_page(nbytes);
    int64_t rc = simple_decode(src, size, want, nbytes);

    for (size_t i = 0; i < nfamilies; i++) {
        uint8_t *page = old_page(nbytes);

        CHECK(families[i]->xbzrle_decode(src, size, page, nbytes) == rc);
        CHECK(nbytes == 0 || memcmp(page, want, nbytes) == 0);
        free(page);
    }
    free(src);
    free(want);
}

static void encode(const uint8_t *old, const uint8_t *new, size_t nbytes, size_t max)
{
    uint8_t *want = malloc(max + 1);
    int64_t length = simple_encode(old, new, nbytes, want, max);

    for (size_t i = 0; i < nfamilies; i++) {
        const struct mig_kernels *k = families[i];
        uint8_t *out = malloc(max), *page = copy_of(old, nbytes);

        CHECK(k->xbzrle_encode(old, new, nbytes, out, max) == length);
        if (length >= 0) {
            CHECK(memcmp(out, want, (size_t)length) == 0);
            CHECK(k->xbzrle_decode(out, (size_t)length, page, nbytes) >= 0);
            CHECK(nbytes == 0 || memcmp(page, new, nbytes) == 0);
        }
        if (nbytes) {
            memcpy(page, old, nbytes);
        }
        memset(out, 0, max);
        CHECK(k->xbzrle_update(page, new, nbytes, out, max) == length);
        CHECK(length < 0 || memcmp(out, want, (size_t)length) == 0);
        CHECK(nbytes == 0 || memcmp(page, new, nbytes) == 0);
        free(out);
        free(page);
    }
    free(want);
}

/* Triples: bytes to go over, bytes to change, what to change them by. The limit is any, or close to
 * what the encoding needs. */
static void encode_edits(const uint8_t *data, size_t size, size_t nbytes, size_t max)
{
    uint8_t *old = old_page(nbytes), *new = old_page(nbytes);
    uint8_t *whole = malloc(simple_longest(nbytes));
    int64_t need;
    size_t at = 0;

    for (; size >= 3; data += 3, size -= 3) {
        size_t length = data[1];

        at += data[0] == 255 ? 4095 : data[0];
        length = length == 255 ? 16383 : length;
        for (; length && at < nbytes; length--) {
            new[at++] ^= data[2];
        }
    }
    need = simple_encode(old, new, nbytes, whole, simple_longest(nbytes));
    if (need >= 4 && max % 4) {
        max = (size_t)need + max / 4 % 8 - 4;
    }
    encode(old, new, nbytes, max);
    free(old);
    free(new);
    free(whole);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const size_t page_sizes[] = {64, 100, 257, 1024, 4096, 4099, 20000, 65536};
    size_t nbytes, max;

    find_families();
    if (size < 3) {
        return -1;
    }
    nbytes = page_sizes[data[0] >> 2 & 7];
    max = (size_t)(data[1] | data[2] << 8);
    switch (data[0] & 3) {
    case 0:
        decode(data + 3, size - 3, nbytes);
        break;
    case 1:
        decode(data + 3, size - 3, max);
        break;
    case 2:
        nbytes = (size - 3) / 2;
        /* mostly limits that matter: around the size of the page */
        max = data[0] & 4 ? max : nbytes + 8 < data[1] ? 0 : nbytes + 8 - data[1];
        for (int swapped = 0; swapped < 2; swapped++) {
            uint8_t *old = copy_of(data + 3, nbytes), *new = copy_of(data + 3 + nbytes, nbytes);

            encode(swapped ? new : old, swapped ? old : new, nbytes, max);
            free(old);
            free(new);
        }
        break;
    default:
        encode_edits(data + 3, size - 3, nbytes, max);
        break;
    }
    return 0;
}
