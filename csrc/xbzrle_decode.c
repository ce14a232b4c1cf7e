/* SPDX-License-Identifier: LGPL-2.1-or-later
 * XBZRLE decoder: lays the changed runs of an encoding over the old page. Whatever the input,
 * it reads and writes nothing outside of its two buffers. */
#include <string.h>

#include "kernels.h"
#include "xbzrle.h"

enum { SLACK = 64 };

/* What a family brings: copies 1 to SLACK bytes and changes no others; may read SLACK of them
 * from `src`. */
typedef void (*copy_fn)(uint8_t *dst, const uint8_t *src, size_t nbytes);

/* Reads a length at src[*at]; at least two bytes are there. -1 when a third would follow. */
MIG_INLINE int64_t get_length(const uint8_t *src, size_t *at)
{
    size_t low = src[(*at)++], high;

    if (low < MIG_XBZRLE_LONG) {
        return (int64_t)low;
    }
    high = src[(*at)++];
    return high < MIG_XBZRLE_LONG ? (int64_t)((low & 0x7f) | high << 7) : -1;
}

MIG_INLINE int64_t decode(const uint8_t *src, size_t nsrc, uint8_t *page, size_t nbytes,
                          copy_fn copy)
{
    size_t safe_from = nsrc < 2 * SLACK + 2 ? 0 : nsrc - 2 * SLACK - 2;
    size_t safe_to = nbytes < SLACK ? 0 : nbytes - SLACK;
    size_t from = 0, to = 0;

    while (from < nsrc) {
        bool first = from == 0;
        int64_t length;

        /* runs that are short and away from both ends, as those of a dense page are */
        while (from < safe_from) {
            size_t unchanged = src[from], changed = src[from + 1];

            if (((unchanged - 1) | (changed - 1)) >= SLACK || to + unchanged + changed > safe_to) {
                break;
            }
            copy(page + to + unchanged, src + from + 2, changed);
            to += unchanged + changed;
            from += 2 + changed;
            first = false;
        }
        /* any run, with all that can be wrong with it */
        if (nsrc - from < 2) {
            return MIG_E_XBZRLE_TRUNCATED;
        }
        length = get_length(src, &from);
        if (length < 0 || (length == 0 && !first)) {
            return MIG_E_XBZRLE_LENGTH;
        }
        if ((size_t)length > nbytes - to) {
            return MIG_E_XBZRLE_PAST_PAGE;
        }
        to += (size_t)length;
        if (nsrc - from < 2) {
            return MIG_E_XBZRLE_TRUNCATED;
        }
        length = get_length(src, &from);
        if (length <= 0) {
            return MIG_E_XBZRLE_LENGTH;
        }
        if ((size_t)length > nbytes - to) {
            return MIG_E_XBZRLE_PAST_PAGE;
        }
        if ((size_t)length > nsrc - from) {
            return MIG_E_XBZRLE_TRUNCATED;
        }
        if (length <= SLACK && nsrc - from >= SLACK) {
            copy(page + to, src + from, (size_t)length);
        } else {
            memcpy(page + to, src + from, (size_t)length);
        }
        to += (size_t)length;
        from += (size_t)length;
    }
    return (int64_t)to;
}

/* Overlapping moves of a fixed size; runs of a few bytes are the most frequent. */
MIG_INLINE void copy_scalar(uint8_t *dst, const uint8_t *src, size_t nbytes)
{
    if (nbytes < 4) {
        dst[0] = src[0];
        dst[nbytes / 2] = src[nbytes / 2];
        dst[nbytes - 1] = src[nbytes - 1];
    } else if (nbytes < 8) {
        memcpy(dst, src, 4);
        memcpy(dst + nbytes - 4, src + nbytes - 4, 4);
    } else if (nbytes < 16) {
        memcpy(dst, src, 8);
        memcpy(dst + nbytes - 8, src + nbytes - 8, 8);
    } else {
        for (size_t i = 0; i + 16 < nbytes; i += 16) {
            memcpy(dst + i, src + i, 16);
        }
        memcpy(dst + nbytes - 16, src + nbytes - 16, 16);
    }
}

int64_t mig_xbzrle_decode_scalar(const uint8_t *src, size_t nsrc, uint8_t *page, size_t nbytes)
{
    return decode(src, nsrc, page, nbytes, copy_scalar);
}

#ifdef MIG_X86
/* Masked stores need no look at the length, but cost more than the one or two bytes that most runs
 * of a dense page have. */
MIG_TARGET_AVX512 MIG_INLINE void copy_avx512(uint8_t *dst, const uint8_t *src, size_t nbytes)
{
    if (nbytes <= 2) {
        dst[0] = src[0];
        dst[nbytes - 1] = src[nbytes - 1];
    } else if (nbytes <= 16) {
        _mm_mask_storeu_epi8(dst, (__mmask16)_bzhi_u32(0xffff, (unsigned)nbytes),
                             _mm_loadu_si128((const void *)src));
    } else {
        _mm512_mask_storeu_epi8(dst, _bzhi_u64(~UINT64_C(0), (unsigned)nbytes),
                                _mm512_loadu_si512(src));
    }
}

MIG_TARGET_AVX512
int64_t mig_xbzrle_decode_avx512(const uint8_t *src, size_t nsrc, uint8_t *page, size_t nbytes)
{
    return decode(src, nsrc, page, nbytes, copy_avx512);
}
#endif
