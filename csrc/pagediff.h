/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Which pages of two blocks differ. */
#ifndef MIG_PAGEDIFF_H
#define MIG_PAGEDIFF_H

#include "mig.h"

/* How two blocks differ, in pages. One that only one of them has is in the latter two. */
struct mig_pagediff {
    uint64_t same, differ, only_a, only_b;
};

/* Compares pages first..end of two blocks whose pages are of one size, and sets bit i of `differ`
 * where page i does, or is only in one of them. A page without storage that was sent is zero. */
void mig_pages_diff(const struct mig_kernels *k, const struct mig_pages *a,
                    const struct mig_pages *b, uint64_t first, uint64_t end, uint64_t *differ,
                    struct mig_pagediff *counts);

#endif
