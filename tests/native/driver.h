/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private to driver*.c and the fuzz target of XBZRLE. */
#ifndef DRIVER_H
#define DRIVER_H

#include <string.h>

#include "check.h"
#include "mig.h"

uint64_t rnd(void);
/* 0 <= below(n) < n, and 0 when n is 0 */
uint64_t below(uint64_t n);

/* A buffer that ends where memory ends: a byte more is reported by AddressSanitizer, or faults in
 * a build without it. It begins at an odd place, `lead` bytes into memory that must not change. */
struct piece {
    uint8_t *bytes;
    size_t nbytes, lead;
};

struct piece piece_open(size_t nbytes, size_t lead);
struct piece piece_copy(const void *bytes, size_t nbytes, size_t lead);
void piece_close(struct piece *p);

void check_zero(const struct mig_kernels *k);
void check_words(const struct mig_kernels *k);
void check_scans(const struct mig_kernels *k);
void check_bitmap(const struct mig_kernels *k);
void check_encoder(const struct mig_kernels *k);
void check_decoder(const struct mig_kernels *k);
void check_race(const struct mig_kernels *k);
void check_cache(const struct mig_kernels *k);
void check_records(const struct mig_kernels *k);

/* XBZRLE by its rules, a byte at a time (simple_xbzrle.c); the arguments and results of the
 * kernels. */
int64_t simple_encode(const uint8_t *old, const uint8_t *new, size_t nbytes, uint8_t *dst,
                      size_t max);
int64_t simple_decode(const uint8_t *src, size_t nsrc, uint8_t *page, size_t nbytes);
/* The longest encoding of a page: every second byte has changed. */
static inline size_t simple_longest(size_t nbytes) { return 2 * nbytes + 4; }

#endif
