/* SPDX-License-Identifier: LGPL-2.1-or-later
 * RAM records walked over and counted, not loaded: what a stream has of each block. */
#ifndef MIG_TALLY_H
#define MIG_TALLY_H

#include "compress.h"
#include "mig.h"

/* Of one block; of a block that is not known, sent and zero are NULL. sent, zero: a bit for each page that has had a record, and whether its last record
 * made it zero; npages, nzero: how many of these are set. The rest counts records: repeated: of
 * pages that had one before; filled: with a fill byte that is not 0; coded_bytes: of encodings. */
struct mig_tally {
    uint64_t *sent, *zero;
    uint64_t npages, nzero;
    uint64_t normal, fill, xbzrle, compressed, repeated, filled;
    uint64_t record_bytes, xbzrle_bytes, compressed_bytes;
};

/* A record that can be passed over, but whose contents are wrong. */
struct mig_tally_fault {
    uint64_t offset; /* of the record from the start of the walk */
    int64_t block;
    int error; /* MIG_E_XBZRLE_* or MIG_E_RAM_BAD_ZLIB */
};

enum {
    MIG_TALLY_FAULTS = 32,
    /* what is walked over in a mapped file is let go in such pieces */
    MIG_TALLY_WINDOW = 16 << 20,
};

struct mig_walk {
    struct mig_ram_parser *parser;
    struct mig_decompressor *inflating; /* NULL until there are compressed pages */
    unsigned threads;                   /* for these */
    const struct mig_kernels *kernels;
    struct mig_tally *blocks; /* as many as the parser has; the last is for the unknown */
    uint8_t *page;            /* room for one, where XBZRLE is tried */
    bool mapped;              /* the bytes are those of a mapped file */
    /* results of the last call: bytes gone over; where an error is a record's, its block or -1 */
    size_t consumed;
    int64_t wrong_block;
    struct mig_tally_fault faults[MIG_TALLY_FAULTS];
    size_t nfaults; /* all of them; no more than there is room for are noted */
};

/* Walks over records of any blocks, up to the end of the section's payload or of buf. Returns
 * MIG_RAM_STOP_MORE, _EOS or _OTHER, or MIG_E_* at a record that is wrong, which `consumed` is in
 * front of; the records before it are counted. */
int mig_walk(struct mig_walk *w, const uint8_t *buf, size_t len);

#endif
