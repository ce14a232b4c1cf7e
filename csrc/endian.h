/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private: the only place that swaps bytes. */
#ifndef MIG_ENDIAN_H
#define MIG_ENDIAN_H

#include <stdint.h>
#include <string.h>

static inline uint64_t mig_swap64(uint64_t x)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return __builtin_bswap64(x);
#else
    return x;
#endif
}

/* To or from little-endian: its own inverse. */
static inline uint64_t mig_little64(uint64_t x)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return x;
#else
    return __builtin_bswap64(x);
#endif
}

static inline uint64_t mig_load_le64(const uint8_t *p)
{
    uint64_t x;

    memcpy(&x, p, sizeof(x));
    return mig_little64(x);
}

static inline void mig_store_le64(uint8_t *p, uint64_t x)
{
    x = mig_little64(x);
    memcpy(p, &x, sizeof(x));
}

static inline uint64_t mig_load_be64(const uint8_t *p)
{
    uint64_t x;

    memcpy(&x, p, sizeof(x));
    return mig_swap64(x);
}

static inline void mig_store_be64(uint8_t *p, uint64_t x)
{
    x = mig_swap64(x);
    memcpy(p, &x, sizeof(x));
}

static inline uint32_t mig_load_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline void mig_store_be32(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)(x >> 24);
    p[1] = (uint8_t)(x >> 16);
    p[2] = (uint8_t)(x >> 8);
    p[3] = (uint8_t)x;
}

static inline unsigned mig_load_be16(const uint8_t *p)
{
    return (unsigned)p[0] << 8 | p[1];
}

static inline void mig_store_be16(uint8_t *p, unsigned x)
{
    p[0] = (uint8_t)(x >> 8);
    p[1] = (uint8_t)x;
}

#endif
