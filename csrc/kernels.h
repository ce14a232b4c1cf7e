/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private: the kernels that the families' tables are made of. Every variant gives the same bits as
 * the scalar one; the variants are compiled by target attribute, so no file needs its own flags. */
#ifndef MIG_KERNELS_H
#define MIG_KERNELS_H

#include "mig.h"

#if defined(__x86_64__)
#define MIG_X86 1
#define MIG_TARGET_AVX2 __attribute__((target("avx2,popcnt")))
#define MIG_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vpopcntdq,avx2,popcnt")))
#define MIG_KERNELS_AVX2 (&mig_kernels_avx2)
#define MIG_KERNELS_AVX512 (&mig_kernels_avx512)
extern const struct mig_kernels mig_kernels_avx2;
extern const struct mig_kernels mig_kernels_avx512;
bool mig_is_zero_avx2(const uint8_t *bytes, size_t nbytes);
bool mig_is_zero_avx512(const uint8_t *bytes, size_t nbytes);
uint64_t mig_popcount_avx2(const uint64_t *words, size_t nwords);
uint64_t mig_popcount_avx512(const uint64_t *words, size_t nwords);
uint64_t mig_merge_avx2(uint64_t *dst, const uint64_t *src, size_t nwords);
uint64_t mig_merge_avx512(uint64_t *dst, const uint64_t *src, size_t nwords);
#else
#define MIG_KERNELS_AVX2 NULL
#define MIG_KERNELS_AVX512 NULL
#endif

bool mig_is_zero_scalar(const uint8_t *bytes, size_t nbytes);
uint64_t mig_popcount_scalar(const uint64_t *words, size_t nwords);
uint64_t mig_merge_scalar(uint64_t *dst, const uint64_t *src, size_t nwords);

#endif
