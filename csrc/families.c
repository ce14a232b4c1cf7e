/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The tables: one per instruction set. A family without a better kernel of its own has the one of
 * the family below it. */
#include "kernels.h"

const struct mig_kernels mig_kernels_scalar = {
    .name = "scalar",
    .is_zero = mig_is_zero_scalar,
    .popcount = mig_popcount_scalar,
    .merge = mig_merge_scalar,
    .combine = mig_combine_scalar,
    .bits = mig_bits_scalar,
    .take = mig_take_scalar,
    .edges = mig_edges_scalar,
    .xbzrle_encode = mig_xbzrle_encode_scalar,
    .xbzrle_update = mig_xbzrle_update_scalar,
    .xbzrle_decode = mig_xbzrle_decode_scalar,
};

#ifdef MIG_X86
const struct mig_kernels mig_kernels_sse2 = {
    .name = "sse2",
    .is_zero = mig_is_zero_sse2,
    .popcount = mig_popcount_sse2,
    .merge = mig_merge_sse2,
    .combine = mig_combine_scalar, /* which the compiler makes of SSE2 on x86-64 */
    .bits = mig_bits_scalar,
    .take = mig_take_scalar,
    .edges = mig_edges_scalar,
    .xbzrle_encode = mig_xbzrle_encode_sse2,
    .xbzrle_update = mig_xbzrle_update_sse2,
    .xbzrle_decode = mig_xbzrle_decode_scalar,
};

const struct mig_kernels mig_kernels_avx2 = {
    .name = "avx2",
    .is_zero = mig_is_zero_avx2,
    .popcount = mig_popcount_avx2,
    .merge = mig_merge_avx2,
    .combine = mig_combine_avx2,
    .bits = mig_bits_avx2,
    .take = mig_take_avx2,
    .edges = mig_edges_avx2,
    .xbzrle_encode = mig_xbzrle_encode_avx2,
    .xbzrle_update = mig_xbzrle_update_avx2,
    .xbzrle_decode = mig_xbzrle_decode_scalar,
};

const struct mig_kernels mig_kernels_avx512 = {
    .name = "avx512",
    .is_zero = mig_is_zero_avx512,
    .popcount = mig_popcount_avx512,
    .merge = mig_merge_avx512,
    .combine = mig_combine_avx512,
    .bits = mig_bits_avx512,
    .take = mig_take_avx512,
    .edges = mig_edges_avx512,
    .xbzrle_encode = mig_xbzrle_encode_avx512,
    .xbzrle_update = mig_xbzrle_update_avx512,
    .xbzrle_decode = mig_xbzrle_decode_avx512,
};

const struct mig_kernels mig_kernels_avx512_256 = {
    .name = "avx512-256",
    .is_zero = mig_is_zero_avx2,
    .popcount = mig_popcount_avx512,
    .merge = mig_merge_avx512,
    .combine = mig_combine_avx512,
    .bits = mig_bits_avx512,
    .take = mig_take_avx512,
    .edges = mig_edges_avx512,
    .xbzrle_encode = mig_xbzrle_encode_avx512,
    .xbzrle_update = mig_xbzrle_update_avx512,
    .xbzrle_decode = mig_xbzrle_decode_avx512,
};
#endif

#ifdef MIG_NEON
const struct mig_kernels mig_kernels_neon = {
    .name = "neon",
    .is_zero = mig_is_zero_neon,
    .popcount = mig_popcount_neon,
    .merge = mig_merge_neon,
    .combine = mig_combine_scalar, /* which the compiler makes of NEON on arm64 */
    .bits = mig_bits_scalar,
    .take = mig_take_scalar,
    .edges = mig_edges_scalar,
    .xbzrle_encode = mig_xbzrle_encode_neon,
    .xbzrle_update = mig_xbzrle_update_neon,
    .xbzrle_decode = mig_xbzrle_decode_scalar,
};
#endif
