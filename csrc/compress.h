/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Pages as zlib streams, made and read by threads: the records of capability `compress`.
 *
 *   |  word  |len|name|  be32 length  |  zlib stream of one page  |     see ramio.c */
#ifndef MIG_COMPRESS_H
#define MIG_COMPRESS_H

#include "mig.h"

/* ---- out ----------------------------------------------------------------------------------- */

struct mig_compressor;

/* As many threads as `nthreads` (255 at most), for up to `max_jobs` pages at once. `level`: zlib's,
 * 0 to 9. 0, MIG_E_NOMEM or -errno. */
int mig_compressor_open(struct mig_compressor **z, unsigned nthreads, int level, size_t page_size,
                        size_t max_jobs);
void mig_compressor_close(struct mig_compressor *z);

/* Has threads begin to compress the first `max` pages of index[0..n) that are not zero (bit i of
 * zero[] is clear, they have storage), of at most max_jobs; returns how many. Each page is copied
 * before, as deflate() cannot bear that it changes. The jobs before must have been put. */
size_t mig_compress_start(struct mig_compressor *z, const struct mig_pages *pages,
                          const uint64_t *index, size_t n, const uint64_t *zero, size_t max);
/* Whether all that was started is done; mig_compress_wait() comes back when it is: 0, or
 * MIG_E_NOMEM when zlib had not enough. */
bool mig_compress_is_done(struct mig_compressor *z);
int mig_compress_wait(struct mig_compressor *z);

/* What became of pages; record_bytes: as QEMU counts them, of records without their words. */
struct mig_compress_counts {
    uint64_t compressed, record_bytes;
};

/* As mig_ram_encode(), with the records of finished jobs where their pages are among index[first..n).
 * `skip`: leave those pages out instead. */
size_t mig_compress_encode(struct mig_out *out, struct mig_compressor *z,
                           const struct mig_pages *pages, const char *name, size_t name_len,
                           const uint64_t *index, size_t first, size_t n, const uint64_t *zero,
                           bool skip, struct mig_compress_counts *counts);
/* The page numbers of the jobs, so that they can be put by themselves. */
const uint64_t *mig_compress_jobs(const struct mig_compressor *z, size_t *n);
/* Bytes of arena that a record may take. */
size_t mig_compress_room(size_t page_size);

/* ---- in ------------------------------------------------------------------------------------ */

struct mig_decompressor;

int mig_decompressor_open(struct mig_decompressor **z, unsigned nthreads);
void mig_decompressor_close(struct mig_decompressor *z);
/* Inflates the compressed pages of the parser's last burst into p->unpacked. 0, MIG_E_NOMEM, or
 * MIG_E_RAM_BAD_ZLIB at the first record that is wrong (`wrong`): it is corrupt, or not of a page. */
int mig_decompress(struct mig_decompressor *z, struct mig_ram_parser *p, const uint8_t *buf);

#endif
