/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Pages that are read from the descriptor straight to where they belong.
 *
 * A source that sends memory for the first time sends PAGE records one behind the other. So the
 * words and the pages of the next records are read, by one call, each to its place; a word that
 * turns out to be another one has what follows it put into a buffer, to be parsed as usual. */
#ifndef MIG_LANDING_H
#define MIG_LANDING_H

#include "mig.h"
#include "mappedlog.h"

/* Where the next pages go. */
struct mig_landing {
    /* Where the page of the k-th record from here on goes if it can be known, NULL if not. */
    uint8_t *(*slot)(const struct mig_landing *l, size_t k);
    /* Whether the next record may be this page, in slot 0. */
    bool (*takes)(const struct mig_landing *l, uint64_t page);
    /* It is there. 0 or an error. */
    int (*landed)(struct mig_landing *l, uint64_t page);
    /* Bytes that did not belong into a slot are to be gone. */
    void (*undo)(uint8_t *slot, size_t nbytes);
    size_t page_size;
    uint64_t npages; /* of the block */
    uint64_t next;   /* memory: the page that is expected */
    const struct mig_pages *pages;
    uint64_t *received;
    struct mig_mappedlog_writer *writer; /* a file */
    const struct mig_mappedlog_block *block;
};

/* Into memory whose bit in `received` is clear where it reads as zeros; from page `next` on. */
void mig_land_in_memory(struct mig_landing *l, const struct mig_pages *pages, uint64_t *received,
                        uint64_t npages, uint64_t next);
/* Into a file, any page of the block. */
void mig_land_in_file(struct mig_landing *l, struct mig_mappedlog_writer *w,
                      const struct mig_mappedlog_block *block, uint64_t npages);

struct mig_landed {
    uint64_t npages;   /* that are where they belong */
    size_t held;       /* bytes in the buffer */
    bool more;         /* it ended for no other reason than the limit */
};

enum { MIG_LAND_LIMIT = 8 << 20 };

/* The buffer has `held` bytes of the next record, and is `capacity` bytes long: a few records at
 * least. Returns when the next record is of another kind, or is not all there and the stream has
 * ended, or when MIG_LAND_LIMIT bytes have come. 0 or an error. */
int mig_land(const struct mig_fd *fd, struct mig_landing *l, uint8_t *buf, size_t held,
             size_t capacity, struct mig_landed *result);
/* Whether the last burst makes it likely that more such pages follow: all of it PAGE records, and,
 * when they are `ordered`, one behind the other. */
bool mig_land_likely(const struct mig_ram_parser *p, bool ordered);

#endif
