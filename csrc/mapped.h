/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Pages at their fixed places of a file: page i of a block at offset + i * page_size. Who wants
 * them knows by a bitmap which of them the file has; the others are zero. */
#ifndef MIG_MAPPED_H
#define MIG_MAPPED_H

#include "mig.h"
#include "pool.h"

struct mig_mapped {
    const struct mig_kernels *kernels;
    int fd;
    int direct_fd; /* the same file, open with O_DIRECT; -1: there is none */
    bool no_direct; /* the file system has refused it */
    struct mig_pool *pool; /* NULL: the caller's thread does it all */
};

/* Writes pages index[0..n), ascending, but for those that are zero: bit i of zero[] (NULL: none)
 * is set, or the page has no storage. Sets and clears their bits in `stored`. Returns the bytes
 * that were written, or -errno. */
int64_t mig_mapped_write(struct mig_mapped *m, const struct mig_pages *pages,
                         const uint64_t *index, size_t n, const uint64_t *zero, uint64_t *stored,
                         int64_t offset);
/* Reads those of pages first..end - 1 whose bits are set in `stored`, and makes the others zero,
 * unless all of them are (`fresh`). Returns the bytes that were read, -errno, or
 * MIG_E_MAPPED_SHORT. */
int64_t mig_mapped_read(struct mig_mapped *m, const struct mig_pages *pages,
                        const uint64_t *stored, uint64_t first, uint64_t end, int64_t offset,
                        bool fresh);
/* Reads a bitmap of little-endian words at `offset` into words that are 0, which take no memory
 * where the file has none. Bits past the size are left out. 0, -errno, or MIG_E_MAPPED_SHORT. */
int mig_mapped_bitmap(const struct mig_mapped *m, uint64_t *words, uint64_t nbits,
                      int64_t offset);
/* Writes bytes. 0 or -errno. */
int mig_mapped_put(const struct mig_mapped *m, const uint8_t *bytes, size_t nbytes,
                   int64_t offset);

#endif
