/* SPDX-License-Identifier: LGPL-2.1-or-later
 * multifd: pages travel in packets over several connections beside the main one.
 *
 *   0        4       8     12          16     20        24              28           32
 *   +--------+-------+-----+-----------+------+---------+---------------+------------+
 *   | magic  |version|flags|pages_alloc|normal|next_size| packet number (be64)       |
 *   +--------+-------+-----+-----------+------+---------+----------------------------+
 *   32       36                64                320
 *   +--------+-----------------+-----------------+------------------------------------+
 *   | zero   |    reserved     |   block name    | offsets (be64): normal, then zero  |
 *   +--------+-----------------+-----------------+------------------------------------+
 *
 * then next_size bytes: the normal pages, compressed or not. A packet has room for the offsets of
 * all the pages it could have, whatever it has.
 */
#ifndef MIG_MULTIFD_H
#define MIG_MULTIFD_H

#include <pthread.h>

#include "adaptive.h"
#include "codec.h"
#include "mig.h"
#include "mappedlog.h"

enum {
    MIG_MFD_MAGIC = 0x11223344,
    MIG_MFD_VERSION = 1,
    MIG_MFD_INIT = 64,            /* bytes of the packet that introduces a channel */
    MIG_MFD_HEADER = 320,         /* bytes of a packet before its offsets */
    MIG_MFD_NAME = 256,           /* of them the name of the block, and its NUL */
    MIG_MFD_DATA = 512 << 10,     /* bytes of the pages of a packet, at most */
    MIG_MFD_MAX_CHANNELS = 255,
};

enum mig_mfd_flag {
    MIG_MFD_SYNC = 1,
    MIG_MFD_CODECS = 0x1f << 1,
    MIG_MFD_ZLIB = 1 << 1,
    MIG_MFD_ZSTD = 2 << 1,
    MIG_MFD_ADAPTIVE = 0x1f << 1, /* mig's own: no QEMU knows it */
};

/* What is wrong with a packet; continues the list in mig.h. */
enum mig_mfd_error {
    MIG_E_MFD_MAGIC = -5050,
    MIG_E_MFD_VERSION = -5051,
    MIG_E_MFD_PAGES = -5052,  /* more pages than a packet can have */
    MIG_E_MFD_NAME = -5053,   /* no such block */
    MIG_E_MFD_OFFSET = -5054, /* a page that is not inside its block */
    MIG_E_MFD_SIZE = -5055,   /* a length of the data that cannot be */
    MIG_E_MFD_CODEC = -5056,  /* compressed otherwise than was agreed */
    MIG_E_MFD_CUT = -5057,    /* the connection ends inside a packet */
    MIG_E_MFD_GONE = -5058,   /* a channel ended before the others came to the same SYNC */
    MIG_E_MFD_STOPPED = -5059,
    MIG_E_MFD_FLAGS = -5060, /* flags that are no SYNC and no compression */
};

struct mig_mfd_packet {
    uint32_t flags, normal, zero, next_size;
    uint64_t number;
    char name[MIG_MFD_NAME];
    uint64_t *page; /* indexes: normal pages, then zero pages */
};

static inline size_t mig_mfd_max_pages(size_t page_size)
{
    return page_size < MIG_MFD_DATA ? MIG_MFD_DATA / page_size : 1;
}

static inline size_t mig_mfd_packet_nbytes(size_t page_size)
{
    return MIG_MFD_HEADER + mig_mfd_max_pages(page_size) * 8;
}

/* Writes mig_mfd_packet_nbytes() bytes. */
void mig_mfd_put(const struct mig_mfd_packet *p, size_t page_size, uint8_t *out);
/* Reads as many; p->page has room for mig_mfd_max_pages(). Checks everything but the block. */
int mig_mfd_get(struct mig_mfd_packet *p, size_t page_size, const uint8_t *in);

/* ---- sending -------------------------------------------------------------------------------- */

struct mig_mfd_job {
    const struct mig_pages *pages; /* stays until the job is done */
    uint64_t address; /* of the block, in the space that the cache of deltas is addressed by */
    bool scan;                     /* look for zero pages */
    char name[MIG_MFD_NAME];
    size_t npages;
    uint64_t *page;
};

struct mig_mfd_sender {
    size_t page_size;
    unsigned nchannels;
    enum mig_codec codec;
    int level;
    bool zero_copy; /* MSG_ZEROCOPY, or an error */
    bool splice;    /* pages may be read when the other end reads, where that is possible */
    uint8_t uuid[16];
    struct mig_adaptive adaptive;

    pthread_mutex_t lock;
    pthread_cond_t work, done; /* there is something to do; something was done */
    struct mig_mfd_job *jobs;
    size_t njobs;
    size_t *ready, first_ready, nready; /* ring of jobs to do */
    size_t *unused, nunused;            /* stack of the others that nobody is at */
    uint64_t syncs;                     /* SYNCs that every channel has to have sent */
    uint64_t *synced;                   /* that each has */
    bool finished, stopped;

    uint64_t packet_number;
    uint64_t nbytes, nnormal, nzero; /* sent */
    uint64_t copied; /* syncs before which the kernel copied what it was not to copy */
};

/* 0 or MIG_E_NOMEM. */
int mig_mfd_sender_open(struct mig_mfd_sender *s, unsigned nchannels, size_t page_size);
void mig_mfd_sender_close(struct mig_mfd_sender *s);
/* Has pages index[0..n) of a block sent, on any channel; waits while enough is queued. 0, or
 * MIG_E_MFD_STOPPED when it was stopped or a channel had an error. */
int mig_mfd_send(struct mig_mfd_sender *s, const struct mig_pages *pages, uint64_t address,
                 const char *name, size_t name_len, const uint64_t *index, size_t n, bool scan);
/* Returns when all that was queued is sent. */
int mig_mfd_drain(struct mig_mfd_sender *s);
/* Returns when all that was queued is sent, and a SYNC on every channel behind it. */
int mig_mfd_sync(struct mig_mfd_sender *s);
/* The channels end when all is sent (at once). */
void mig_mfd_finish(struct mig_mfd_sender *s);
void mig_mfd_stop(struct mig_mfd_sender *s);
/* One channel, from its first packet to finish: 0 or an error. */
int mig_mfd_send_channel(struct mig_mfd_sender *s, const struct mig_kernels *k, unsigned id,
                         const struct mig_fd *fd);

/* ---- receiving ------------------------------------------------------------------------------ */

struct mig_mfd_block {
    const struct mig_pages *pages; /* memory; NULL: a file */
    uint64_t *received;
    bool fresh; /* memory whose bit in `received` is clear reads as zeros */
    int64_t *where; /* of the page log */
};

struct mig_mfd_receiver {
    size_t page_size;
    unsigned nchannels;
    enum mig_codec codec;
    const struct mig_ram_block *ram_blocks;
    const struct mig_mfd_block *blocks; /* of the same numbers */
    size_t nblocks;
    struct mig_pagelog *log; /* a stream file, or */
    pthread_mutex_t *log_lock;
    const struct mig_mappedlog *file; /* a mapped-ram file; both NULL: memory */

    pthread_mutex_t lock;
    pthread_cond_t arrived, released;
    uint64_t syncs;    /* that have been released */
    uint64_t *reached; /* by each channel */
    int64_t *ended;    /* offset at which each channel ended, -1 while it has not */
    bool stopped;

    uint64_t nbytes, nnormal, nzero;
};

/* Where a channel is, for errors. */
struct mig_mfd_place {
    uint64_t offset; /* bytes before the packet */
    uint64_t npackets;
    char name[MIG_MFD_NAME]; /* of its block, "" when it has none */
};

int mig_mfd_receiver_open(struct mig_mfd_receiver *r, unsigned nchannels, size_t page_size);
void mig_mfd_receiver_close(struct mig_mfd_receiver *r);
/* One channel, behind the packet that introduces it, until it ends between two packets: 0 or an
 * error. */
int mig_mfd_receive_channel(struct mig_mfd_receiver *r, const struct mig_kernels *k, unsigned id,
                            const struct mig_fd *fd, struct mig_mfd_place *place);
/* Waits until every channel has come to its next SYNC, and lets them go on: 0, MIG_E_MFD_GONE,
 * MIG_E_TIMEOUT, or MIG_E_MFD_STOPPED when it was stopped or a channel had an error. */
int mig_mfd_receive_sync(struct mig_mfd_receiver *r, int timeout_ms);
void mig_mfd_receive_stop(struct mig_mfd_receiver *r);

#endif
