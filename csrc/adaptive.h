/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Packets of multifd whose pages go each in its own way, an extension between two ends of mig. The
 * data of such a packet:
 *
 *   +---------+---------+--------+------------+-------------+-----------+
 *   | methods | lengths | deltas | be32 nzstd | zstd stream | raw pages |
 *   +---------+---------+--------+------------+-------------+-----------+
 *
 * methods: a byte for each normal page; lengths: be16 for each DELTA page; deltas: their XBZRLE
 * encodings, against what the channels have sent of the page before; nzstd and zstd stream: one
 * flush of the channel's stream, of all ZSTD pages, there only if there is one; raw pages: all RAW
 * pages. Everything in the order of the pages.
 */
#ifndef MIG_ADAPTIVE_H
#define MIG_ADAPTIVE_H

#include <pthread.h>

#include "codec.h"
#include "mig.h"

enum mig_method { MIG_METHOD_RAW, MIG_METHOD_DELTA, MIG_METHOD_ZSTD, MIG_NMETHODS };

enum { MIG_ADAPTIVE_LOCKS = 64 };

/* ---- sending: what the channels share ------------------------------------------------------- */

struct mig_adaptive {
    struct mig_cache cache; /* pages as they were sent last; no slots: no deltas */
    pthread_mutex_t locks[MIG_ADAPTIVE_LOCKS]; /* each for its share of the slots */
    bool open;
    bool caching;    /* pages are put into the cache: the first pass is over */
    bool last_stage; /* the guest stands still: the cache stays as it is */
    uint64_t generation;
    double link; /* bytes per second that a channel may send, 0: as many as it can */
    uint64_t npages[MIG_NMETHODS], nsame;
};

/* nslots: a power of two, 0 for no cache. 0 or MIG_E_NOMEM. */
int mig_adaptive_open(struct mig_adaptive *a, size_t nslots, size_t page_size);
void mig_adaptive_close(struct mig_adaptive *a);

/* ---- sending: a channel's own --------------------------------------------------------------- */

struct mig_adaptive_lane {
    struct mig_coder zstd;
    uint8_t *methods, *lengths, *deltas, *plain, *coded;
    size_t max_coded;
    uint8_t nzstd[4];
    /* measured lately: bytes per second that the connection took, that zstd took, and the share
     * that zstd left of what it took */
    double link, speed, ratio;
    unsigned packets; /* since the choice was last questioned */
};

int mig_adaptive_lane_open(struct mig_adaptive_lane *l, size_t max_pages, size_t page_size,
                           int level);
void mig_adaptive_lane_close(struct mig_adaptive_lane *l);
/* Notes that the connection took so many bytes in so many seconds. */
void mig_adaptive_sent(struct mig_adaptive_lane *l, size_t nbytes, double seconds);

/* Chooses a method for each of the n pages index[...] of a block at `address` (in the space that
 * the cache is addressed by) and fills iov[...] with the packet's data; there is room for 5 + n.
 * Pages that are as they were sent last are taken out of index; *n: those that are left. Returns
 * the number of iovecs, or MIG_E_CODEC_*. */
int mig_adaptive_encode(struct mig_adaptive *a, struct mig_adaptive_lane *l,
                        const struct mig_kernels *k, const struct mig_pages *pages,
                        uint64_t address, uint64_t *index, uint32_t *n, struct iovec *iov);
/* A zero page is sent: so it was sent last. */
void mig_adaptive_zero(struct mig_adaptive *a, uint64_t address);

/* ---- receiving ------------------------------------------------------------------------------ */

/* What the data of a packet of n pages say before its raw pages; offsets into them. */
struct mig_adaptive_data {
    size_t nraw, ndelta, nzstd;        /* pages */
    size_t deltas, zstd, zstd_nbytes; /* where they begin, and how many bytes of zstd stream */
};

/* Reads the methods, of which `nbytes` bytes of data follow; MIG_E_MFD_SIZE or MIG_E_MFD_CODEC. */
int mig_adaptive_methods(struct mig_adaptive_data *d, const uint8_t *methods, size_t n,
                         size_t nbytes, size_t page_size);
/* Reads the rest up to the raw pages: `data` begins with the methods, and has `nbytes` bytes
 * without the raw pages. */
int mig_adaptive_layout(struct mig_adaptive_data *d, const uint8_t *data, size_t n, size_t nbytes);
/* The most bytes of data without raw pages that n pages can have. */
size_t mig_adaptive_bound(size_t n, size_t page_size);

#endif
