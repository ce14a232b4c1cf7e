/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Zero-page detection. A page that another thread writes meanwhile is harmless: the answer is
 * then about bytes that were there at some moment, and the dirty log will send the page again. */
#include <string.h>

#include "kernels.h"

enum {
    /* Bytes that are looked at together. */
    STEP = 256,
    /* Pages of a batch whose first line is fetched ahead of their turn. Most pages are not zero,
     * and of those it is all that is read. */
    AHEAD = 16,
};

/* What a family brings: whether some bytes are zero, at an aligned place (STEP bytes) or at any
 * place (as many as the family's vectors have). */
typedef bool (*bytes_fn)(const uint8_t *bytes);

/* Most pages that are not zero differ from zero in one of these three places. Each is a cache
 * line of its own, so the next is only looked at when the one before was zero; pages that are
 * zero up to one late byte would otherwise be read whole. */
MIG_INLINE bool sample_is_zero(const uint8_t *bytes, size_t nbytes)
{
    return !bytes[0] && !bytes[nbytes - 1] && !bytes[nbytes / 2];
}

MIG_INLINE bool is_zero(const uint8_t *bytes, size_t nbytes, bytes_fn step, bytes_fn vector,
                        size_t width)
{
    const uint8_t *end = bytes + nbytes, *p = bytes + (-(uintptr_t)bytes & (width - 1));

    if (nbytes < STEP) {
        return mig_is_zero_scalar(bytes, nbytes);
    }
    if (!sample_is_zero(bytes, nbytes) || (p != bytes && !vector(bytes))) {
        return false;
    }
    for (; end - p >= STEP; p += STEP) {
        if (!step(p)) {
            return false;
        }
    }
    for (; (size_t)(end - p) >= width; p += width) {
        if (!vector(p)) {
            return false;
        }
    }
    return p == end || vector(end - width);
}

MIG_INLINE uint64_t load64(const uint8_t *p)
{
    uint64_t word;

    memcpy(&word, p, sizeof(word));
    return word;
}

bool mig_is_zero_scalar(const uint8_t *bytes, size_t nbytes)
{
    uint64_t any;

    if (nbytes == 0) {
        return true;
    }
    if (!sample_is_zero(bytes, nbytes)) {
        return false;
    }
    for (; nbytes >= 64; bytes += 64, nbytes -= 64) {
        any = 0;
        for (size_t i = 0; i < 64; i += 8) {
            any |= load64(bytes + i);
        }
        if (any) {
            return false;
        }
    }
    any = 0;
    for (size_t i = 0; i < nbytes; i++) {
        any |= bytes[i];
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

bool mig_is_zero_sse2(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_sse2, vector_sse2, 16);
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

MIG_TARGET_AVX2
bool mig_is_zero_avx2(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_avx2, vector_avx2, 32);
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

MIG_TARGET_AVX512
bool mig_is_zero_avx512(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_avx512, vector_avx512, 64);
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

bool mig_is_zero_neon(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_neon, vector_neon, 16);
}
#endif

size_t mig_zero_pages(const struct mig_kernels *k, const struct mig_pages *pages,
                      const uint64_t *index, size_t n, uint64_t *zero)
{
    size_t nzero = 0;

    memset(zero, 0, mig_bitmap_nwords(n) * sizeof(*zero));
    for (size_t i = 0; i < n; i++) {
        const uint8_t *page = mig_page(pages, index ? index[i] : i);

        if (i + AHEAD < n) {
            __builtin_prefetch(mig_page(pages, index ? index[i + AHEAD] : i + AHEAD));
        }
        if (!page || (page[0] == 0 && k->is_zero(page, pages->page_size))) {
            mig_bitmap_put(zero, i);
            nzero++;
        }
    }
    return nzero;
}
