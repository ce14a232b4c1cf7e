/* SPDX-License-Identifier: LGPL-2.1-or-later
 * See pagediff.h. */
#include "pagediff.h"

#include <string.h>

static bool is_there(const struct mig_pages *pages, uint64_t index)
{
    return !pages->where || pages->where[index] != MIG_PAGE_NONE;
}

static bool is_same(const struct mig_kernels *k, const uint8_t *a, const uint8_t *b, size_t nbytes)
{
    if (a && b) {
        return memcmp(a, b, nbytes) == 0;
    }
    return a ? k->is_zero(a, nbytes) : !b || k->is_zero(b, nbytes);
}

void mig_pages_diff(const struct mig_kernels *k, const struct mig_pages *a,
                    const struct mig_pages *b, uint64_t first, uint64_t end, uint64_t *differ,
                    struct mig_pagediff *counts)
{
    for (uint64_t i = first; i < end; i++) {
        bool in_a = is_there(a, i), in_b = is_there(b, i);

        if (in_a && in_b) {
            if (is_same(k, mig_page(a, i), mig_page(b, i), a->page_size)) {
                counts->same++;
                continue;
            }
            counts->differ++;
        } else if (in_a == in_b) {
            counts->same++;
            continue;
        } else {
            counts->only_a += in_a;
            counts->only_b += in_b;
        }
        mig_bitmap_put(differ, i);
    }
}
