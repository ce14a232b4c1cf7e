/* SPDX-License-Identifier: LGPL-2.1-or-later
 * XBZRLE by its rules, a byte at a time: what the kernels are compared with. */
#include "driver.h"

enum { LONGEST_RUN = (1 << 14) - 1 };

static size_t put_number(uint8_t *dst, size_t number)
{
    if (number < 128) {
        dst[0] = (uint8_t)number;
        return 1;
    }
    dst[0] = (uint8_t)(number % 128 + 128);
    dst[1] = (uint8_t)(number / 128);
    return 2;
}

int64_t simple_encode(const uint8_t *old, const uint8_t *new, size_t nbytes, uint8_t *dst,
                      size_t max)
{
    uint8_t *whole = malloc(simple_longest(nbytes));
    size_t length = 0, at = 0;
    bool fits = true;

    while (at < nbytes) {
        size_t start = at, end;

        while (start < nbytes && old[start] == new[start]) {
            start++;
        }
        if (start == nbytes) {
            break; /* unchanged bytes at the end are not sent */
        }
        for (end = start; end < nbytes && old[end] != new[end];) {
            end++;
        }
        if (start - at > LONGEST_RUN || end - start > LONGEST_RUN) {
            fits = false;
            break;
        }
        length += put_number(whole + length, start - at);
        length += put_number(whole + length, end - start);
        memcpy(whole + length, new + start, end - start);
        length += end - start;
        at = end;
    }
    /* behind the last run QEMU wants room for one more, unless the page ends there */
    fits = fits && length <= max;
    fits = fits && (nbytes == 0 || old[nbytes - 1] != new[nbytes - 1] || length + 2 <= max);
    if (fits && length) {
        memcpy(dst, whole, length);
    }
    free(whole);
    return fits ? (int64_t)length : MIG_XBZRLE_OVERFLOW;
}

/* A length of one or two bytes; the two that it may take must be there. */
static int64_t get_number(const uint8_t *src, size_t nsrc, size_t *at)
{
    int64_t number;

    if (nsrc - *at < 2) {
        return MIG_E_XBZRLE_TRUNCATED;
    }
    number = src[(*at)++];
    if (number >= 128) {
        uint8_t high = src[(*at)++];

        if (high >= 128) {
            return MIG_E_XBZRLE_LENGTH;
        }
        number += 128 * high - 128;
    }
    return number;
}

int64_t simple_decode(const uint8_t *src, size_t nsrc, uint8_t *page, size_t nbytes)
{
    size_t at = 0, to = 0;

    while (at < nsrc) {
        bool first = at == 0;

        for (int changed = 0; changed < 2; changed++) {
            int64_t number = get_number(src, nsrc, &at);

            if (number < 0) {
                return number;
            }
            /* only the page's first byte may follow no unchanged one */
            if (number == 0 && (changed || !first)) {
                return MIG_E_XBZRLE_LENGTH;
            }
            if ((size_t)number > nbytes - to) {
                return MIG_E_XBZRLE_PAST_PAGE;
            }
            if (changed && (size_t)number > nsrc - at) {
                return MIG_E_XBZRLE_TRUNCATED;
            }
            for (int64_t i = 0; changed && i < number; i++) {
                page[to + (size_t)i] = src[at++];
            }
            to += (size_t)number;
        }
    }
    return (int64_t)to;
}
