/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Bitmaps over 64-bit words. Bits past the size in the last word are ignored by every reader here
 * that takes a size in bits. */
#include "kernels.h"

#ifdef MIG_X86
#include <immintrin.h>
#endif

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

size_t mig_bitmap_take(uint64_t *words, uint64_t nbits, uint64_t from, uint64_t *out, size_t max)
{
    uint64_t bit = mig_bitmap_next_set(words, nbits, from), nwords = mig_bitmap_nwords(nbits);
    size_t n = 0;

    if (bit == nbits || max == 0) {
        return 0;
    }
    for (uint64_t w = bit / 64; w < nwords; w++) {
        uint64_t word = words[w];

        if (w == bit / 64) {
            word &= mask_from(bit);
        }
        if (w == nwords - 1) {
            word &= mask_until(nbits);
        }
        for (; word; word &= word - 1) {
            if (n == max) {
                return n;
            }
            out[n++] = w * 64 + (uint64_t)__builtin_ctzll(word);
            words[w] &= ~(word & -word);
        }
    }
    return n;
}

bool mig_bitmap_set_atomic(uint64_t *words, uint64_t bit)
{
    uint64_t mask = UINT64_C(1) << (bit % 64);

    return !(__atomic_fetch_or(words + bit / 64, mask, __ATOMIC_ACQ_REL) & mask);
}

uint64_t mig_bitmap_drain(uint64_t *dst, uint64_t *src, size_t nwords)
{
    uint64_t fresh = 0;

    for (size_t w = 0; w < nwords; w++) {
        uint64_t word;

        if (!__atomic_load_n(src + w, __ATOMIC_RELAXED)) {
            continue;
        }
        word = __atomic_exchange_n(src + w, 0, __ATOMIC_ACQ_REL);
        fresh += (uint64_t)__builtin_popcountll(word & ~dst[w]);
        dst[w] |= word;
    }
    return fresh;
}

uint64_t mig_popcount_scalar(const uint64_t *words, size_t nwords)
{
    uint64_t n = 0;

    for (size_t w = 0; w < nwords; w++) {
        n += (uint64_t)__builtin_popcountll(words[w]);
    }
    return n;
}

uint64_t mig_merge_scalar(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    uint64_t fresh = 0;

    for (size_t w = 0; w < nwords; w++) {
        fresh += (uint64_t)__builtin_popcountll(src[w] & ~dst[w]);
        dst[w] |= src[w];
    }
    return fresh;
}

#ifdef MIG_X86
/* The same loops: with the popcnt instruction allowed the compiler does the rest. */
MIG_TARGET_AVX2
uint64_t mig_popcount_avx2(const uint64_t *words, size_t nwords)
{
    uint64_t a = 0, b = 0;
    size_t w = 0;

    for (; w + 2 <= nwords; w += 2) {
        a += (uint64_t)__builtin_popcountll(words[w]);
        b += (uint64_t)__builtin_popcountll(words[w + 1]);
    }
    if (w < nwords) {
        a += (uint64_t)__builtin_popcountll(words[w]);
    }
    return a + b;
}

MIG_TARGET_AVX2
uint64_t mig_merge_avx2(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    uint64_t fresh = 0;

    for (size_t w = 0; w < nwords; w++) {
        fresh += (uint64_t)__builtin_popcountll(src[w] & ~dst[w]);
        dst[w] |= src[w];
    }
    return fresh;
}

MIG_TARGET_AVX512
uint64_t mig_popcount_avx512(const uint64_t *words, size_t nwords)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    size_t w = 0;

    for (; w + 16 <= nwords; w += 16) {
        a = _mm512_add_epi64(a, _mm512_popcnt_epi64(_mm512_loadu_si512(words + w)));
        b = _mm512_add_epi64(b, _mm512_popcnt_epi64(_mm512_loadu_si512(words + w + 8)));
    }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(a, b)) +
           mig_popcount_avx2(words + w, nwords - w);
}

MIG_TARGET_AVX512
uint64_t mig_merge_avx512(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    __m512i fresh = _mm512_setzero_si512();
    size_t w = 0;

    for (; w + 8 <= nwords; w += 8) {
        __m512i d = _mm512_loadu_si512(dst + w), s = _mm512_loadu_si512(src + w);

        fresh = _mm512_add_epi64(fresh, _mm512_popcnt_epi64(_mm512_andnot_si512(d, s)));
        _mm512_storeu_si512(dst + w, _mm512_or_si512(d, s));
    }
    return (uint64_t)_mm512_reduce_add_epi64(fresh) + mig_merge_avx2(dst + w, src + w, nwords - w);
}
#endif
