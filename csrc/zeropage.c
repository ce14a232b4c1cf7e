/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Zero-page detection. A page that another thread writes meanwhile is harmless: the answer is
 * then about bytes that were there at some moment, and the dirty log will send the page again. */
#include <string.h>

#include "kernels.h"

#ifdef MIG_X86
#include <immintrin.h>
#endif

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t word;

    memcpy(&word, p, sizeof(word));
    return word;
}

/* Most non-zero pages differ from zero in one of these three places; looking there first costs
 * three loads and saves the scan (pages with one late byte would otherwise be read whole). */
static inline bool sample_is_zero(const uint8_t *bytes, size_t nbytes)
{
    return (bytes[0] | bytes[nbytes / 2] | bytes[nbytes - 1]) == 0;
}

bool mig_is_zero_scalar(const uint8_t *bytes, size_t nbytes)
{
    size_t i = 0;

    if (nbytes == 0) {
        return true;
    }
    if (!sample_is_zero(bytes, nbytes)) {
        return false;
    }
    for (; i + 64 <= nbytes; i += 64) {
        uint64_t any = 0;

        for (size_t j = 0; j < 64; j += 8) {
            any |= load64(bytes + i + j);
        }
        if (any) {
            return false;
        }
    }
    for (; i < nbytes; i++) {
        if (bytes[i]) {
            return false;
        }
    }
    return true;
}

#ifdef MIG_X86
MIG_TARGET_AVX2
bool mig_is_zero_avx2(const uint8_t *bytes, size_t nbytes)
{
    const __m256i *p = (const __m256i *)(const void *)bytes;
    size_t steps = nbytes / 256;

    if (nbytes < 256) {
        return mig_is_zero_scalar(bytes, nbytes);
    }
    if (!sample_is_zero(bytes, nbytes)) {
        return false;
    }
    for (size_t i = 0; i < steps; i++, p += 8) {
        __m256i a = _mm256_or_si256(_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1));
        __m256i b = _mm256_or_si256(_mm256_loadu_si256(p + 2), _mm256_loadu_si256(p + 3));
        __m256i c = _mm256_or_si256(_mm256_loadu_si256(p + 4), _mm256_loadu_si256(p + 5));
        __m256i d = _mm256_or_si256(_mm256_loadu_si256(p + 6), _mm256_loadu_si256(p + 7));
        __m256i any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));

        if (!_mm256_testz_si256(any, any)) {
            return false;
        }
    }
    return mig_is_zero_scalar(bytes + steps * 256, nbytes - steps * 256);
}

MIG_TARGET_AVX512
bool mig_is_zero_avx512(const uint8_t *bytes, size_t nbytes)
{
    const uint8_t *p = bytes;
    size_t steps = nbytes / 512;

    if (nbytes < 512) {
        return mig_is_zero_scalar(bytes, nbytes);
    }
    if (!sample_is_zero(bytes, nbytes)) {
        return false;
    }
    for (size_t i = 0; i < steps; i++, p += 512) {
        __m512i a = _mm512_or_si512(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64));
        __m512i b = _mm512_or_si512(_mm512_loadu_si512(p + 128), _mm512_loadu_si512(p + 192));
        __m512i c = _mm512_or_si512(_mm512_loadu_si512(p + 256), _mm512_loadu_si512(p + 320));
        __m512i d = _mm512_or_si512(_mm512_loadu_si512(p + 384), _mm512_loadu_si512(p + 448));
        __m512i any = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));

        if (_mm512_test_epi64_mask(any, any)) {
            return false;
        }
    }
    return mig_is_zero_scalar(p, nbytes - steps * 512);
}
#endif

size_t mig_zero_pages(const struct mig_kernels *k, const struct mig_pages *pages,
                      const uint64_t *index, size_t n, uint64_t *zero)
{
    size_t nzero = 0;

    memset(zero, 0, mig_bitmap_nwords(n) * sizeof(*zero));
    for (size_t i = 0; i < n; i++) {
        const uint8_t *page = mig_page(pages, index[i]);

        if (!page || k->is_zero(page, pages->page_size)) {
            mig_bitmap_put(zero, i);
            nzero++;
        }
    }
    return nzero;
}
