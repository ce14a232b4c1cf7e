/* SPDX-License-Identifier: LGPL-2.1-or-later
 * A mapped-ram file while it is written: every page has its place in the file, so pages go there
 * from any number of threads, each with a writer of its own. With O_DIRECT they are written behind
 * our back (kernel AIO), from the very bytes that the network left them in. */
#ifndef MIG_MAPPEDLOG_H
#define MIG_MAPPEDLOG_H

#include "mig.h"

enum {
    MIG_MAPPEDLOG_BUFFER = 512 << 10, /* bytes of pages, a whole packet of multifd */
    MIG_MAPPEDLOG_NBUFFERS = 4,
};

struct mig_mappedlog_block {
    int64_t offset;    /* of its first page in the file */
    uint64_t *present; /* pages that have contents; all others read as zeros */
    uint64_t *written; /* pages that the file has had contents of */
};

struct mig_mappedlog {
    int fd;
    int direct_fd; /* the same file with O_DIRECT, -1: write through the page cache */
    size_t page_size;
    const struct mig_mappedlog_block *blocks;
    const struct mig_kernels *kernels;
};

/* Pages of one block that are gathered or being written. */
struct mig_mappedlog_buffer {
    uint8_t *bytes;
    uint64_t *page;
    const struct mig_mappedlog_block *block;
    size_t npages;
    size_t pending; /* writes that have not come back */
};

struct mig_mappedlog_writer {
    const struct mig_mappedlog *file;
    uint64_t aio; /* 0: none */
    uint8_t *bytes;
    uint64_t *pages;
    size_t capacity; /* of a buffer, in pages */
    struct mig_mappedlog_buffer buffers[MIG_MAPPEDLOG_NBUFFERS];
    size_t current; /* the buffer that is being filled; it has no write pending */
    int error;      /* of a write that came back */
};

/* 0 or MIG_E_NOMEM. The file must have its full length already. */
int mig_mappedlog_open(struct mig_mappedlog_writer *w, const struct mig_mappedlog *file);
void mig_mappedlog_close(struct mig_mappedlog_writer *w);

/* Has room for a buffer of pages, at *bytes; 0 or -errno. */
int mig_mappedlog_room(struct mig_mappedlog_writer *w, uint8_t **bytes);
/* Writes the n pages that were put there. Of one that comes again the last stands in the file. */
int mig_mappedlog_write(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block,
                       const uint64_t *page, size_t n);
/* Puts the parser's last burst, inflated, into the file, in order. 0, -errno, or at record `wrong`
 * MIG_E_RAM_BAD_FILL or MIG_E_XBZRLE_*. */
int mig_mappedlog_put(struct mig_mappedlog_writer *w, struct mig_ram_parser *p, const uint8_t *buf);
/* For pages that come one by one: makes room for pages of a block; where the k-th next goes, NULL:
 * the buffer is full; whether this page can be next; it is there. */
int mig_mappedlog_expect(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block);
uint8_t *mig_mappedlog_slot(const struct mig_mappedlog_writer *w, size_t k);
bool mig_mappedlog_takes(const struct mig_mappedlog_writer *w,
                        const struct mig_mappedlog_block *block, uint64_t page);
int mig_mappedlog_landed(struct mig_mappedlog_writer *w, const struct mig_mappedlog_block *block,
                        uint64_t page);
/* All that was put stands in the file when this returns. */
int mig_mappedlog_flush(struct mig_mappedlog_writer *w);

#endif
