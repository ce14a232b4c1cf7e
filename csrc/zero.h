/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private: whether bytes are zero, by each family's vectors: STEP bytes at an aligned place, and
 * one vector at any place. */
#ifndef MIG_ZERO_H
#define MIG_ZERO_H

#include <string.h>

#include "kernels.h"

enum { STEP = 256 };

MIG_INLINE bool step_scalar(const uint8_t *p)
{
    uint64_t any = 0;

    for (size_t i = 0; i < STEP; i += 8) {
        uint64_t word;

        memcpy(&word, p + i, 8);
        any |= word;
    }
    return !any;
}

#ifdef MIG_X86
MIG_INLINE bool vector_sse2(const uint8_t *p)
{
    __m128i equal = _mm_cmpeq_epi8(_mm_loadu_si128((const void *)p), _mm_setzero_si128());

    return _mm_movemask_epi8(equal) == 0xffff;
}

MIG_INLINE bool step_sse2(const uint8_t *p)
{
    const __m128i *v = (const void *)p;
    __m128i any = v[0], other = v[1];

    for (size_t i = 2; i < STEP / 16; i += 2) {
        any = _mm_or_si128(any, v[i]);
        other = _mm_or_si128(other, v[i + 1]);
    }
    any = _mm_cmpeq_epi8(_mm_or_si128(any, other), _mm_setzero_si128());
    return _mm_movemask_epi8(any) == 0xffff;
}

MIG_TARGET_AVX2 MIG_INLINE bool vector_avx2(const uint8_t *p)
{
    __m256i v = _mm256_loadu_si256((const void *)p);

    return _mm256_testz_si256(v, v);
}

MIG_TARGET_AVX2 MIG_INLINE bool step_avx2(const uint8_t *p)
{
    const __m256i *v = (const void *)p;
    __m256i a = _mm256_or_si256(v[0], v[1]), b = _mm256_or_si256(v[2], v[3]);
    __m256i c = _mm256_or_si256(v[4], v[5]), d = _mm256_or_si256(v[6], v[7]);

    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    return _mm256_testz_si256(a, a);
}

MIG_TARGET_AVX512 MIG_INLINE bool vector_avx512(const uint8_t *p)
{
    __m512i v = _mm512_loadu_si512(p);

    return !_mm512_test_epi64_mask(v, v);
}

MIG_TARGET_AVX512 MIG_INLINE bool step_avx512(const uint8_t *p)
{
    const __m512i *v = (const void *)p;
    __m512i any = _mm512_ternarylogic_epi64(_mm512_or_si512(v[0], v[1]), v[2], v[3], 0xfe);

    return !_mm512_test_epi64_mask(any, any);
}
#endif

#ifdef MIG_NEON
MIG_INLINE bool vector_neon(const uint8_t *p) { return vmaxvq_u8(vld1q_u8(p)) == 0; }

MIG_INLINE bool step_neon(const uint8_t *p)
{
    uint8x16_t any = vdupq_n_u8(0), other = any;

    for (size_t i = 0; i < STEP; i += 32) {
        any = vorrq_u8(any, vld1q_u8(p + i));
        other = vorrq_u8(other, vld1q_u8(p + i + 16));
    }
    return vmaxvq_u8(vorrq_u8(any, other)) == 0;
}
#endif

#endif
