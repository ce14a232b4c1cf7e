/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Bitmaps over 64-bit words. Bits past the size in the last word are ignored by every reader here
 * that takes a size in bits. */
#include <string.h>

#include "endian.h"
#include "kernels.h"

static inline uint64_t mask_from(uint64_t bit) { return ~UINT64_C(0) << (bit % 64); }
/* bits below `end` in the word that holds bit end - 1 */
static inline uint64_t mask_until(uint64_t end) { return ~UINT64_C(0) >> (-end % 64); }

void mig_bitmap_set(uint64_t *words, uint64_t first, uint64_t nbits)
{
    uint64_t end = first + nbits, w = first / 64, last;

    if (nbits == 0) {
        return;
    }
    last = (end - 1) / 64;
    if (w == last) {
        words[w] |= mask_from(first) & mask_until(end);
        return;
    }
    words[w] |= mask_from(first);
    while (++w < last) {
        words[w] = ~UINT64_C(0);
    }
    words[last] |= mask_until(end);
}

void mig_bitmap_clear(uint64_t *words, uint64_t first, uint64_t nbits)
{
    uint64_t end = first + nbits, w = first / 64, last;

    if (nbits == 0) {
        return;
    }
    last = (end - 1) / 64;
    if (w == last) {
        words[w] &= ~(mask_from(first) & mask_until(end));
        return;
    }
    words[w] &= ~mask_from(first);
    while (++w < last) {
        words[w] = 0;
    }
    words[last] &= ~mask_until(end);
}

uint64_t mig_bitmap_count(const struct mig_kernels *k, const uint64_t *words, uint64_t first,
                          uint64_t nbits)
{
    uint64_t end = first + nbits, w = first / 64, last;

    if (nbits == 0) {
        return 0;
    }
    last = (end - 1) / 64;
    if (w == last) {
        return (uint64_t)__builtin_popcountll(words[w] & mask_from(first) & mask_until(end));
    }
    return (uint64_t)__builtin_popcountll(words[w] & mask_from(first)) +
           k->popcount(words + w + 1, (size_t)(last - w - 1)) +
           (uint64_t)__builtin_popcountll(words[last] & mask_until(end));
}

uint64_t mig_bitmap_merge(const struct mig_kernels *k, uint64_t *dst, const uint64_t *src,
                          uint64_t nbits)
{
    uint64_t fresh = k->merge(dst, src, (size_t)(nbits / 64));

    if (nbits % 64) {
        uint64_t last = src[nbits / 64] & mask_until(nbits);

        fresh += k->merge(dst + nbits / 64, &last, 1);
    }
    return fresh;
}

void mig_bitmap_combine(const struct mig_kernels *k, enum mig_bitop op, uint64_t *dst,
                        const uint64_t *src, uint64_t nbits)
{
    size_t nwords = mig_bitmap_nwords(nbits);

    k->combine(op, dst, src, nwords);
    if (nbits % 64) {
        dst[nwords - 1] &= mask_until(nbits);
    }
}

/* First bit at or after `from` that is set in word ^ flip; flip of all ones searches for clear. */
static uint64_t next_bit(const uint64_t *words, uint64_t nbits, uint64_t from, uint64_t flip)
{
    uint64_t w = from / 64, nwords = mig_bitmap_nwords(nbits), word, bit;

    if (from >= nbits) {
        return nbits;
    }
    word = (words[w] ^ flip) & mask_from(from);
    while (!word) {
        if (++w == nwords) {
            return nbits;
        }
        word = words[w] ^ flip;
    }
    bit = w * 64 + (uint64_t)__builtin_ctzll(word);
    return bit < nbits ? bit : nbits;
}

uint64_t mig_bitmap_next_set(const uint64_t *words, uint64_t nbits, uint64_t from)
{
    return next_bit(words, nbits, from, 0);
}

uint64_t mig_bitmap_next_clear(const uint64_t *words, uint64_t nbits, uint64_t from)
{
    return next_bit(words, nbits, from, ~UINT64_C(0));
}

/* Changes the bits first..first + nbits, word by word; returns how many have changed. */
static uint64_t change_atomic(uint64_t *words, uint64_t first, uint64_t nbits, bool set)
{
    uint64_t end = first + nbits, changed = 0;

    if (nbits == 0) {
        return 0;
    }
    for (uint64_t w = first / 64; w <= (end - 1) / 64; w++) {
        uint64_t mask = ~UINT64_C(0), before;

        mask &= w == first / 64 ? mask_from(first) : ~UINT64_C(0);
        mask &= w == (end - 1) / 64 ? mask_until(end) : ~UINT64_C(0);
        if (set) {
            before = ~__atomic_fetch_or(words + w, mask, __ATOMIC_ACQ_REL);
        } else {
            before = __atomic_fetch_and(words + w, ~mask, __ATOMIC_ACQ_REL);
        }
        changed += (uint64_t)__builtin_popcountll(before & mask);
    }
    return changed;
}

uint64_t mig_bitmap_set_atomic(uint64_t *words, uint64_t first, uint64_t nbits)
{
    return change_atomic(words, first, nbits, true);
}

uint64_t mig_bitmap_clear_atomic(uint64_t *words, uint64_t first, uint64_t nbits)
{
    return change_atomic(words, first, nbits, false);
}

uint64_t mig_bitmap_drain(uint64_t *dst, uint64_t *src, uint64_t nbits)
{
    uint64_t fresh = 0;

    for (uint64_t w = 0; w < mig_bitmap_nwords(nbits); w++) {
        uint64_t word;

        if (!__atomic_load_n(src + w, __ATOMIC_RELAXED)) {
            continue;
        }
        word = __atomic_exchange_n(src + w, 0, __ATOMIC_ACQ_REL);
        word &= w == (nbits - 1) / 64 ? mask_until(nbits) : ~UINT64_C(0);
        fresh += (uint64_t)__builtin_popcountll(word & ~dst[w]);
        dst[w] |= word;
    }
    return fresh;
}

size_t mig_bitmap_runs(const struct mig_kernels *k, const uint64_t *words, uint64_t nbits,
                       uint64_t from, uint64_t *runs, size_t max, uint64_t budget)
{
    size_t nruns;

    max = max < budget ? max : (size_t)budget;
    nruns = k->edges(words, nbits, from, runs, 2 * max) / 2;
    if (nruns == 0 || budget >= runs[2 * nruns - 1] - runs[0]) {
        return nruns; /* without a sum: they cannot have more bits than they span */
    }
    for (size_t i = 0; i < nruns; i++) {
        uint64_t length = runs[2 * i + 1] - runs[2 * i];

        if (length >= budget) {
            runs[2 * i + 1] = runs[2 * i] + budget;
            return i + 1;
        }
        budget -= length;
    }
    return nruns;
}

void mig_bitmap_round(uint64_t *words, uint64_t nbits, uint64_t group)
{
    uint64_t nwords = mig_bitmap_nwords(nbits), step = group / 64;

    for (uint64_t w = 0; step && w < nwords; w += step) {
        uint64_t any = 0, n = nwords - w < step ? nwords - w : step;

        for (uint64_t i = 0; i < n; i++) {
            any |= words[w + i] & (w + i == nwords - 1 ? mask_until(nbits) : ~UINT64_C(0));
        }
        if (any) {
            memset(words + w, 0xff, (size_t)n * sizeof(*words));
        }
    }
    for (uint64_t w = 0; !step && w < nwords; w++) {
        uint64_t word = words[w] & (w == nwords - 1 ? mask_until(nbits) : ~UINT64_C(0));

        /* onto the lowest bit of each group, and from there over all of it */
        for (uint64_t shift = 1; shift < group; shift *= 2) {
            word |= word >> shift;
        }
        word &= ~UINT64_C(0) / ((UINT64_C(1) << group) - 1);
        words[w] = word * ((UINT64_C(1) << group) - 1);
    }
    if (nbits) {
        words[nwords - 1] &= mask_until(nbits);
    }
}

void mig_bitmap_to_wire(const uint64_t *words, uint64_t nbits, uint8_t *bytes)
{
    for (uint64_t w = 0; w < mig_bitmap_nwords(nbits); w++) {
        uint64_t word = words[w];

        word &= w == (nbits - 1) / 64 ? mask_until(nbits) : ~UINT64_C(0);
        mig_store_le64(bytes + 8 * w, word);
    }
}

void mig_bitmap_from_wire(uint64_t *words, uint64_t nbits, const uint8_t *bytes)
{
    for (uint64_t w = 0; w < mig_bitmap_nwords(nbits); w++) {
        words[w] = mig_load_le64(bytes + 8 * w);
    }
    if (nbits) {
        words[(nbits - 1) / 64] &= mask_until(nbits);
    }
}
