/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Set bits of a bitmap as a list of indexes, or as a list of runs.
 *
 * A run begins and ends at an edge, a bit that differs from the one before it. Listing the set bits
 * of word ^ (word << 1) gives start, end, start, end, ... so one scan does both. One body serves
 * all families; they differ in how a stretch without set bits is passed over and how the set bits
 * of a word are listed. */
#include <string.h>

#include "kernels.h"

enum {
    GROUP = 32, /* words that are looked at together */
    MANY = 24,  /* when so many of them are not 0, all are listed, */
    SOME = 8,   /* so many at once */
};

/* What a family brings: */
/* Which words of an aligned group are not 0. With `edges` it is about their edges, for which
 * words[-1] is looked at. Unless none is, they are in `out` then. */
typedef uint32_t (*group_fn)(const uint64_t *words, bool edges, uint64_t *out);
/* Lists the set bits of a word, each plus `base`, and returns their number; may write 64 entries
 * whatever it is. */
typedef size_t (*list_fn)(uint64_t bits, uint64_t base, uint64_t *out);

struct listing {
    uint64_t *out;
    size_t n, max;
};

/* Lists a word; returns the bits for which there was no room. */
MIG_INLINE uint64_t put_word(struct listing *l, uint64_t word, uint64_t base, list_fn list)
{
    uint64_t some[64];
    size_t n, room = l->max - l->n;

    if (room >= 64) {
        l->n += list(word, base, l->out + l->n);
        return 0;
    }
    n = list(word, base, some);
    if (n <= room) {
        memcpy(l->out + l->n, some, n * sizeof(*some));
        l->n += n;
        return 0;
    }
    memcpy(l->out + l->n, some, room * sizeof(*some));
    l->n = l->max;
    return word & (~UINT64_C(0) << (some[room] - base));
}

/* One word of the bitmap, of which the bits of `mask` count; false when `out` is full. */
MIG_INLINE bool scan_word(struct listing *l, uint64_t *words, uint64_t w, uint64_t mask,
                          uint64_t before, bool edges, bool clear, list_fn list)
{
    uint64_t word = words[w] & mask, rest;

    rest = put_word(l, edges ? word ^ (word << 1 | before) : word, w * 64, list);
    if (clear) {
        words[w] = (words[w] & ~word) | rest;
    }
    return l->n < l->max;
}

/* A group of the bitmap; false when `out` is full. */
MIG_INLINE bool scan_group(struct listing *l, uint64_t *words, uint64_t w, bool edges, bool clear,
                           group_fn group, list_fn list)
{
    uint64_t some[GROUP];
    uint32_t busy = group(words + w, edges, some);
    size_t done = 0;

    if (__builtin_popcount(busy) >= MANY) {
        /* while there is room for whatever they hold */
        for (; done < GROUP && l->max - l->n >= SOME * 64; done += SOME) {
            for (size_t i = done; i < done + SOME; i++) {
                l->n += list(some[i], (w + i) * 64, l->out + l->n);
            }
            if (clear) {
                memset(words + w + done, 0, SOME * sizeof(*words));
            }
        }
        busy = done < GROUP ? busy & ~UINT32_C(0) << done : 0;
    }
    for (; busy; busy &= busy - 1) {
        size_t i = (size_t)__builtin_ctz(busy);
        uint64_t rest = put_word(l, some[i], (w + i) * 64, list);

        if (clear) {
            words[w + i] = rest;
        }
        if (l->n == l->max) {
            return false;
        }
    }
    return true;
}

/* Lists the bits from..nbits of a bitmap, removing them from it when `clear`. */
MIG_INLINE size_t scan(uint64_t *words, uint64_t nbits, uint64_t from, uint64_t *out, size_t max,
                       bool edges, bool clear, group_fn group, list_fn list)
{
    struct listing l = {.out = out, .max = max};
    uint64_t w = from / 64, last = (nbits - 1) / 64;
    uint64_t first_mask = ~UINT64_C(0) << (from % 64), last_mask = ~UINT64_C(0) >> (-nbits % 64);

    if (from >= nbits || max == 0) {
        return 0;
    }
    first_mask &= w == last ? last_mask : ~UINT64_C(0);
    if (!scan_word(&l, words, w++, first_mask, 0, edges, clear, list)) {
        return max;
    }
    for (; w < last && (uintptr_t)(words + w) % 64; w++) {
        if (!scan_word(&l, words, w, ~UINT64_C(0), words[w - 1] >> 63, edges, clear, list)) {
            return max;
        }
    }
    for (; w + GROUP <= last; w += GROUP) {
        if (!scan_group(&l, words, w, edges, clear, group, list)) {
            return max;
        }
    }
    for (; w <= last; w++) {
        if (!scan_word(&l, words, w, w == last ? last_mask : ~UINT64_C(0), words[w - 1] >> 63,
                       edges, clear, list)) {
            return max;
        }
    }
    if (edges && l.n % 2) {
        out[l.n++] = nbits; /* the last run reaches the end of the last word */
    }
    return l.n;
}

#define SCANNERS(family, target)                                                                \
    target size_t mig_bits_##family(const uint64_t *words, uint64_t nbits, uint64_t from,       \
                                    uint64_t *out, size_t max)                                  \
    {                                                                                           \
        return scan((uint64_t *)words, nbits, from, out, max, false, false, group_##family,     \
                    list_##family);                                                             \
    }                                                                                           \
    target size_t mig_take_##family(uint64_t *words, uint64_t nbits, uint64_t from,             \
                                    uint64_t *out, size_t max)                                  \
    {                                                                                           \
        return scan(words, nbits, from, out, max, false, true, group_##family, list_##family);  \
    }                                                                                           \
    target size_t mig_edges_##family(const uint64_t *words, uint64_t nbits, uint64_t from,      \
                                     uint64_t *out, size_t max)                                 \
    {                                                                                           \
        return scan((uint64_t *)words, nbits, from, out, max, true, false, group_##family,      \
                    list_##family);                                                             \
    }

/* Nothing to list: the words are as if they were all the bit before them, or 0. */
MIG_INLINE uint64_t nothing(const uint64_t *words, bool edges)
{
    return edges ? -(words[-1] >> 63) : 0;
}

MIG_INLINE uint32_t group_scalar(const uint64_t *words, bool edges, uint64_t *out)
{
    uint64_t idle = nothing(words, edges), any = 0;
    uint32_t busy = 0;

    for (size_t i = 0; i < GROUP; i++) {
        any |= words[i] ^ idle;
    }
    if (!any) {
        return 0;
    }
    for (size_t i = 0; i < GROUP; i++) {
        out[i] = edges ? words[i] ^ (words[i] << 1 | words[(ptrdiff_t)i - 1] >> 63) : words[i];
        busy |= (uint32_t)(out[i] != 0) << i;
    }
    return busy;
}

MIG_INLINE size_t list_scalar(uint64_t bits, uint64_t base, uint64_t *out)
{
    size_t n = 0;

    for (; bits; bits &= bits - 1) {
        out[n++] = base + (uint64_t)__builtin_ctzll(bits);
    }
    return n;
}

SCANNERS(scalar, )

#ifdef MIG_X86
MIG_TARGET_AVX2 MIG_INLINE __m256i edges_avx2(__m256i v, const uint64_t *words)
{
    __m256i before = _mm256_srli_epi64(_mm256_loadu_si256((const void *)(words - 1)), 63);

    return _mm256_xor_si256(v, _mm256_or_si256(_mm256_add_epi64(v, v), before));
}

MIG_TARGET_AVX2 MIG_INLINE uint32_t group_avx2(const uint64_t *words, bool edges, uint64_t *out)
{
    __m256i idle = _mm256_set1_epi64x((long long)nothing(words, edges));
    __m256i v[GROUP / 4], any = _mm256_setzero_si256();
    uint32_t busy = 0;

    for (size_t i = 0; i < GROUP / 4; i++) {
        v[i] = _mm256_loadu_si256((const void *)(words + 4 * i));
        any = _mm256_or_si256(any, _mm256_xor_si256(v[i], idle));
    }
    if (_mm256_testz_si256(any, any)) {
        return 0;
    }
    for (size_t i = 0; i < GROUP / 4; i++) {
        __m256i zero;

        v[i] = edges ? edges_avx2(v[i], words + 4 * i) : v[i];
        _mm256_storeu_si256((void *)(out + 4 * i), v[i]);
        zero = _mm256_cmpeq_epi64(v[i], _mm256_setzero_si256());
        busy |= (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(zero)) << 4 * i;
    }
    return ~busy;
}

MIG_TARGET_AVX2 MIG_INLINE size_t list_avx2(uint64_t bits, uint64_t base, uint64_t *out)
{
    size_t n = (size_t)__builtin_popcountll(bits);

    /* eight at a time: how often is easier to predict than how many */
    for (size_t i = 0; i < n; i += 8) {
        for (size_t j = 0; j < 8; j++) {
            out[i + j] = base + _tzcnt_u64(bits);
            bits = _blsr_u64(bits);
        }
    }
    return n;
}

SCANNERS(avx2, MIG_TARGET_AVX2)

MIG_TARGET_AVX512 MIG_INLINE uint32_t group_avx512(const uint64_t *words, bool edges,
                                                   uint64_t *out)
{
    __m512i idle = _mm512_set1_epi64((long long)nothing(words, edges));
    __m512i v[GROUP / 8], any = _mm512_setzero_si512();
    uint32_t busy = 0;

    for (size_t i = 0; i < GROUP / 8; i++) {
        v[i] = _mm512_loadu_si512(words + 8 * i);
        /* any | (v ^ idle) */
        any = _mm512_ternarylogic_epi64(any, v[i], idle, 0xf6);
    }
    if (!_mm512_test_epi64_mask(any, any)) {
        return 0;
    }
    for (size_t i = 0; i < GROUP / 8; i++) {
        if (edges) {
            __m512i before = _mm512_loadu_si512(words + 8 * i - 1);

            v[i] = _mm512_xor_si512(v[i], _mm512_shldi_epi64(v[i], before, 1));
        }
        _mm512_storeu_si512(out + 8 * i, v[i]);
        busy |= (uint32_t)_mm512_test_epi64_mask(v[i], v[i]) << 8 * i;
    }
    return busy;
}

/* Entries 8 i .. 8 i + 7 of a list: numbers of bits are bytes in `at`. */
MIG_TARGET_AVX512 MIG_INLINE void put_eight(__m512i at, __m512i base, uint64_t *out, size_t i)
{
    const __m512i first = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    __m512i pick = _mm512_add_epi64(first, _mm512_set1_epi64((long long)(8 * i)));
    __m512i index = _mm512_maskz_permutexvar_epi8(UINT64_C(0x0101010101010101), pick, at);

    _mm512_storeu_si512(out + 8 * i, _mm512_add_epi64(index, base));
}

MIG_TARGET_AVX512 MIG_INLINE size_t list_avx512(uint64_t bits, uint64_t base, uint64_t *out)
{
    size_t n = (size_t)__builtin_popcountll(bits);
    __m512i at, add = _mm512_set1_epi64((long long)base);

    /* In few steps, each large enough for nearly all words of bitmaps of one density. Compressing
     * is what takes the time: not for two bits. */
    out[0] = base + _tzcnt_u64(bits);
    out[1] = base + _tzcnt_u64(_blsr_u64(bits));
    if (n <= 2) {
        return n;
    }
    at = _mm512_maskz_compress_epi8(bits, mig_byte_numbers());
    put_eight(at, add, out, 0);
    put_eight(at, add, out, 1);
    if (n > 16) {
        put_eight(at, add, out, 2);
        put_eight(at, add, out, 3);
        put_eight(at, add, out, 4);
    }
    if (n > 40) {
        put_eight(at, add, out, 5);
        put_eight(at, add, out, 6);
        put_eight(at, add, out, 7);
    }
    return n;
}

SCANNERS(avx512, MIG_TARGET_AVX512)
#endif
