/* SPDX-License-Identifier: LGPL-2.1-or-later
 * What the pages of the process guest hold: little-endian words that follow from seed, page and
 * count, so that pages which are old, torn or in the wrong place are all told from the right ones.
 */
#include <string.h>

#include "contents.h"
#include "endian.h"

/* one word of so many bytes is changed by a write of words */
enum { WORD_BLOCK = 512 };

static uint64_t page_key(const struct mig_contents *c, uint64_t page, uint64_t count)
{
    return mig_mix(mig_mix(c->seed + (page + 1) * MIG_MIX_STEP) + (count + 1) * MIG_MIX_STEP);
}

static void put_random(uint8_t *bytes, size_t nbytes, uint64_t key)
{
    for (size_t i = 0; i < nbytes / 8; i++) {
        mig_store_le64(bytes + 8 * i, mig_mix(key + i * MIG_MIX_STEP));
    }
}

/* A random first half, and a second half that is one word again and again. */
static void put_compressible(uint8_t *bytes, size_t nbytes, uint64_t key)
{
    put_random(bytes, nbytes / 2, key);
    for (size_t i = nbytes / 2; i < nbytes; i += 8) {
        mig_store_le64(bytes + i, key);
    }
}

/* Always the same words of a page, so that its contents follow from the last write alone. */
void mig_contents_put_words(const struct mig_contents *c, uint64_t page, uint64_t count,
                            uint8_t *bytes)
{
    size_t block = c->page_size < WORD_BLOCK ? c->page_size : WORD_BLOCK;
    /* a key that no count has */
    uint64_t key = page_key(c, page, count), places = page_key(c, page, UINT64_MAX - 1);

    for (size_t i = 0; i < c->page_size / block; i++) {
        size_t word = (size_t)(mig_mix(places + i * MIG_MIX_STEP) % (block / 8));

        mig_store_le64(bytes + i * block + 8 * word, mig_mix(key + i * MIG_MIX_STEP));
    }
}

void mig_contents_put(const struct mig_contents *c, uint64_t page, uint64_t count, uint8_t *bytes)
{
    uint64_t below = c->words ? 0 : count;
    bool zero = c->fill == MIG_FILL_ZERO || (c->fill == MIG_FILL_HALF && page % 2);

    if (below == 0 && zero) {
        memset(bytes, 0, c->page_size);
    } else if (c->fill == MIG_FILL_COMPRESSIBLE) {
        put_compressible(bytes, c->page_size, page_key(c, page, below));
    } else {
        put_random(bytes, c->page_size, page_key(c, page, below));
    }
    if (c->words && count) {
        mig_contents_put_words(c, page, count, bytes);
    }
}

uint64_t mig_contents_term(const struct mig_contents *c, uint64_t page, uint64_t count)
{
    return count ? mig_mix(page_key(c, page, count) ^ MIG_MIX_STEP) : 0;
}
