/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Kernels over the words of bitmaps: counting, merging, and the bitwise operations. */
#include "kernels.h"

/* ---- counting: each family says how the bits of a few words are counted ---------------------- */

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
/* Bits of each half: sums of 2, 4 and 8 neighbours, then of bytes. */
MIG_INLINE __m128i count_sse2(__m128i v)
{
    const __m128i ones = _mm_set1_epi8(0x55), twos = _mm_set1_epi8(0x33),
                  fours = _mm_set1_epi8(0x0f);

    v = _mm_sub_epi8(v, _mm_and_si128(_mm_srli_epi64(v, 1), ones));
    v = _mm_add_epi8(_mm_and_si128(v, twos), _mm_and_si128(_mm_srli_epi64(v, 2), twos));
    v = _mm_and_si128(_mm_add_epi8(v, _mm_srli_epi64(v, 4)), fours);
    return _mm_sad_epu8(v, _mm_setzero_si128());
}

static uint64_t sum_sse2(__m128i v)
{
    uint64_t half[2];

    _mm_storeu_si128((void *)half, v);
    return half[0] + half[1];
}

uint64_t mig_popcount_sse2(const uint64_t *words, size_t nwords)
{
    __m128i n = _mm_setzero_si128();
    size_t w = 0;

    for (; w + 2 <= nwords; w += 2) {
        n = _mm_add_epi64(n, count_sse2(_mm_loadu_si128((const void *)(words + w))));
    }
    return sum_sse2(n) + mig_popcount_scalar(words + w, nwords - w);
}

uint64_t mig_merge_sse2(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    __m128i fresh = _mm_setzero_si128();
    size_t w = 0;

    for (; w + 2 <= nwords; w += 2) {
        __m128i d = _mm_loadu_si128((const void *)(dst + w));
        __m128i s = _mm_loadu_si128((const void *)(src + w));

        fresh = _mm_add_epi64(fresh, count_sse2(_mm_andnot_si128(d, s)));
        _mm_storeu_si128((void *)(dst + w), _mm_or_si128(d, s));
    }
    return sum_sse2(fresh) + mig_merge_scalar(dst + w, src + w, nwords - w);
}

/* Bits of each quarter, half a byte at a time out of a table. */
MIG_TARGET_AVX2 MIG_INLINE __m256i count_avx2(__m256i v)
{
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1,
                                           2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(0x0f);
    __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
    __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));

    return _mm256_sad_epu8(_mm256_add_epi8(a, b), _mm256_setzero_si256());
}

MIG_TARGET_AVX2 MIG_INLINE uint64_t sum_avx2(__m256i v)
{
    uint64_t part[4];

    _mm256_storeu_si256((void *)part, v);
    return part[0] + part[1] + part[2] + part[3];
}

MIG_TARGET_AVX2
uint64_t mig_popcount_avx2(const uint64_t *words, size_t nwords)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    size_t w = 0;

    for (; w + 8 <= nwords; w += 8) {
        a = _mm256_add_epi64(a, count_avx2(_mm256_loadu_si256((const void *)(words + w))));
        b = _mm256_add_epi64(b, count_avx2(_mm256_loadu_si256((const void *)(words + w + 4))));
    }
    return sum_avx2(_mm256_add_epi64(a, b)) + mig_popcount_scalar(words + w, nwords - w);
}

MIG_TARGET_AVX2
uint64_t mig_merge_avx2(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    __m256i fresh = _mm256_setzero_si256();
    size_t w = 0;

    for (; w + 4 <= nwords; w += 4) {
        __m256i d = _mm256_loadu_si256((const void *)(dst + w));
        __m256i s = _mm256_loadu_si256((const void *)(src + w));

        fresh = _mm256_add_epi64(fresh, count_avx2(_mm256_andnot_si256(d, s)));
        _mm256_storeu_si256((void *)(dst + w), _mm256_or_si256(d, s));
    }
    return sum_avx2(fresh) + mig_merge_scalar(dst + w, src + w, nwords - w);
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

#ifdef MIG_NEON
MIG_INLINE uint64x2_t count_neon(uint64x2_t v)
{
    return vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(vcntq_u8(vreinterpretq_u8_u64(v)))));
}

uint64_t mig_popcount_neon(const uint64_t *words, size_t nwords)
{
    uint64x2_t n = vdupq_n_u64(0);
    size_t w = 0;

    for (; w + 2 <= nwords; w += 2) {
        n = vaddq_u64(n, count_neon(vld1q_u64(words + w)));
    }
    return vaddvq_u64(n) + mig_popcount_scalar(words + w, nwords - w);
}

uint64_t mig_merge_neon(uint64_t *dst, const uint64_t *src, size_t nwords)
{
    uint64x2_t fresh = vdupq_n_u64(0);
    size_t w = 0;

    for (; w + 2 <= nwords; w += 2) {
        uint64x2_t d = vld1q_u64(dst + w), s = vld1q_u64(src + w);

        fresh = vaddq_u64(fresh, count_neon(vbicq_u64(s, d)));
        vst1q_u64(dst + w, vorrq_u64(d, s));
    }
    return vaddvq_u64(fresh) + mig_merge_scalar(dst + w, src + w, nwords - w);
}
#endif

/* ---- bitwise operations: the compiler makes the vectors, of each family's width -------------- */

MIG_INLINE void combine(enum mig_bitop op, uint64_t *dst, const uint64_t *src, size_t nwords)
{
    switch (op) {
    case MIG_BITOP_AND:
        for (size_t w = 0; w < nwords; w++) {
            dst[w] &= src[w];
        }
        break;
    case MIG_BITOP_OR:
        for (size_t w = 0; w < nwords; w++) {
            dst[w] |= src[w];
        }
        break;
    case MIG_BITOP_ANDNOT:
        for (size_t w = 0; w < nwords; w++) {
            dst[w] &= ~src[w];
        }
        break;
    case MIG_BITOP_NOT:
        for (size_t w = 0; w < nwords; w++) {
            dst[w] = ~src[w];
        }
        break;
    }
}

#define COMBINE(family, target)                                                                 \
    target void mig_combine_##family(enum mig_bitop op, uint64_t *dst, const uint64_t *src,     \
                                     size_t nwords)                                             \
    {                                                                                           \
        combine(op, dst, src, nwords);                                                          \
    }

COMBINE(scalar, )
#ifdef MIG_X86
COMBINE(avx2, MIG_TARGET_AVX2)
COMBINE(avx512, MIG_TARGET_AVX512)
#endif
