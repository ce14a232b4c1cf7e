/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Zero-page detection. A page that another thread writes meanwhile is harmless: the answer is
 * then about bytes that were there at some moment, and the dirty log will send the page again. */
#include <string.h>

#include "kernels.h"
#include "zero.h"

enum {
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
bool mig_is_zero_sse2(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_sse2, vector_sse2, 16);
}

MIG_TARGET_AVX2
bool mig_is_zero_avx2(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_avx2, vector_avx2, 32);
}

MIG_TARGET_AVX512
bool mig_is_zero_avx512(const uint8_t *bytes, size_t nbytes)
{
    return is_zero(bytes, nbytes, step_avx512, vector_avx512, 64);
}
#endif

#ifdef MIG_NEON
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
