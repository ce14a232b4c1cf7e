/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private: what the pages of the process guest hold. */
#ifndef MIG_CONTENTS_H
#define MIG_CONTENTS_H

#include "workload.h"

#define MIG_MIX_STEP UINT64_C(0x9e3779b97f4a7c15)

/* A bijection of words in which every bit depends on all bits (the finalizer of SplitMix64). */
static inline uint64_t mig_mix(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

struct mig_contents {
    uint64_t seed;
    size_t page_size;
    bool words; /* a write changes a few words only */
    enum mig_fill fill;
};

/* Puts what the page holds after `count` writes. */
void mig_contents_put(const struct mig_contents *c, uint64_t page, uint64_t count, uint8_t *bytes);
/* Puts what the write number `count` changes in a page, with `words`. */
void mig_contents_put_words(const struct mig_contents *c, uint64_t page, uint64_t count,
                            uint8_t *bytes);
/* What the page's entry adds to the checksum of the ledger: nothing before the first write. */
uint64_t mig_contents_term(const struct mig_contents *c, uint64_t page, uint64_t count);

#endif
