/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The tables: one per instruction set. */
#include "kernels.h"

const struct mig_kernels mig_kernels_scalar = {
    .name = "scalar",
    .is_zero = mig_is_zero_scalar,
    .popcount = mig_popcount_scalar,
    .merge = mig_merge_scalar,
};

#ifdef MIG_X86
const struct mig_kernels mig_kernels_avx2 = {
    .name = "avx2",
    .is_zero = mig_is_zero_avx2,
    .popcount = mig_popcount_avx2,
    .merge = mig_merge_avx2,
};

const struct mig_kernels mig_kernels_avx512 = {
    .name = "avx512",
    .is_zero = mig_is_zero_avx512,
    .popcount = mig_popcount_avx512,
    .merge = mig_merge_avx512,
};
#endif
