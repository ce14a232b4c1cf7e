/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private: the kernels that the families' tables are made of. Every variant gives the same bits as
 * the scalar one; the variants are compiled by target attribute, so no file needs its own flags. */
#ifndef MIG_KERNELS_H
#define MIG_KERNELS_H

#include "mig.h"

/* Bodies that all families share take a family's own pieces as arguments, and everything is
 * inlined into the function that carries the target attribute. */
#define MIG_INLINE static inline __attribute__((always_inline))

/* Not every family has all of them (families.c). */
#define MIG_DECLARE_KERNELS(family)                                                             \
    extern const struct mig_kernels mig_kernels_##family;                                       \
    bool mig_is_zero_##family(const uint8_t *bytes, size_t nbytes);                             \
    uint64_t mig_popcount_##family(const uint64_t *words, size_t nwords);                       \
    uint64_t mig_merge_##family(uint64_t *dst, const uint64_t *src, size_t nwords);             \
    void mig_combine_##family(enum mig_bitop op, uint64_t *dst, const uint64_t *src,            \
                              size_t nwords);                                                   \
    size_t mig_bits_##family(const uint64_t *words, uint64_t nbits, uint64_t from,              \
                             uint64_t *out, size_t max);                                        \
    size_t mig_take_##family(uint64_t *words, uint64_t nbits, uint64_t from, uint64_t *out,     \
                             size_t max);                                                       \
    size_t mig_edges_##family(const uint64_t *words, uint64_t nbits, uint64_t from,             \
                              uint64_t *out, size_t max);                                       \
    int64_t mig_xbzrle_encode_##family(const uint8_t *old, const uint8_t *new, size_t nbytes,   \
                                       uint8_t *dst, size_t max);                               \
    int64_t mig_xbzrle_update_##family(uint8_t *old, const uint8_t *new, size_t nbytes,         \
                                       uint8_t *dst, size_t max);                               \
    int64_t mig_xbzrle_decode_##family(const uint8_t *src, size_t nsrc, uint8_t *page,          \
                                       size_t nbytes);

MIG_DECLARE_KERNELS(scalar)

#if defined(__x86_64__)
#include <immintrin.h>

#define MIG_X86 1
#define MIG_TARGET_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define MIG_TARGET_AVX512                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vpopcntdq,"   \
                          "avx2,bmi,bmi2,popcnt")))

MIG_DECLARE_KERNELS(sse2)
MIG_DECLARE_KERNELS(avx2)
MIG_DECLARE_KERNELS(avx512)
/* AVX-512, but zero pages by vectors of 256 bits */
extern const struct mig_kernels mig_kernels_avx512_256;

/* The bytes 0, 1, ... 63: compressed by a word, they are the numbers of its set bits. */
MIG_TARGET_AVX512 MIG_INLINE __m512i mig_byte_numbers(void)
{
    const __m512i first = _mm512_set1_epi64(0x0706050403020100);
    const __m512i eights = _mm512_set_epi64(0x3838383838383838, 0x3030303030303030,
                                            0x2828282828282828, 0x2020202020202020,
                                            0x1818181818181818, 0x1010101010101010,
                                            0x0808080808080808, 0);

    return _mm512_add_epi8(first, eights);
}
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

#define MIG_NEON 1
MIG_DECLARE_KERNELS(neon)
#endif

#endif
