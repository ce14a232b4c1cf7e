/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The source's end of a postcopy: who asks for a page gets it at once. See pageserver.c. */
#ifndef MIG_PAGESERVER_H
#define MIG_PAGESERVER_H

#include <pthread.h>

#include "mig.h"

enum {
    MIG_SERVER_BATCH = 512,  /* pages that are sent by one call */
    MIG_SERVER_BUFFER = 4096,
    MIG_SERVER_NOTES = 1 << 16,
    MIG_SERVER_FRAME = 32,   /* bytes around the records of a batch, on either side */
};

struct mig_served_block {
    const char *name;
    size_t name_len;
    const struct mig_pages *pages;
    uint64_t *dirty;      /* a bit for each page that nobody has taken */
    uint64_t host_npages; /* pages of a host page: they are taken together */
    bool detect_zero;
    bool ignored;         /* no page of it is sent */
};

/* Something about pages of a block that others want to know. */
struct mig_served {
    uint32_t block;
    bool sent; /* the kernel has them; else they were asked for */
    uint64_t first, npages;
};

struct mig_server {
    const struct mig_kernels *k;
    const struct mig_served_block *blocks;
    size_t nblocks, page_size;
    bool tells_sent;
    int kick_fd; /* eventfd: run() is to look at what has changed */
    int wake_fd; /* eventfd of who takes notes and the other pages */

    /* Pages: held by who takes some. */
    pthread_mutex_t pages;
    uint64_t left;          /* pages that nobody has taken */
    int64_t begun;          /* block with a host page that the other has begun, -1: none */
    uint64_t begun_first, begun_end;
    bool hurries;           /* somebody waits for that one */
    struct mig_served *notes;
    size_t nnotes;

    /* The stream: had by who writes to it, who asks first gets it first. */
    pthread_mutex_t turn;
    pthread_cond_t turned;
    bool writing;
    unsigned waiting;       /* answers that wait for it */
    int broken;             /* why nothing can follow what was written last, 0: it can */

    /* What answers go over. Whoever has the stream. */
    bool open;
    bool detects;           /* zero pages, of blocks that say so */
    bool beside;            /* a connection of their own: who closes that is gone */
    struct mig_fd out;
    int64_t named;          /* block that its last record was of, -1: the next one names it */
    uint8_t head[MIG_SERVER_FRAME], tail[MIG_SERVER_FRAME];
    size_t nhead, ntail;
    struct mig_out queue;
    uint64_t *index, *zero;
    size_t max_index;

    /* The return path: one thread. */
    struct mig_fd in;
    uint8_t buf[MIG_SERVER_BUFFER];
    size_t start, end;
    int64_t last;           /* block of the last request, -1: there was none */

    /* Sums, which any thread may read: pages that were asked for, pages and bytes sent. */
    uint64_t nasked, nnormal, nzero, nbytes;
};

/* 0, MIG_E_NOMEM or -errno; blocks and descriptors stay the caller's. */
int mig_server_open(struct mig_server *s, const struct mig_kernels *k,
                    const struct mig_served_block *blocks, size_t nblocks, size_t page_size);
/* Lets go of its descriptor; what it has counted can still be read. More than once is the same. */
void mig_server_stop(struct mig_server *s);
void mig_server_close(struct mig_server *s);

/* From now on answers go over `out`, between head and tail, zero pages as such if detected. */
void mig_server_attach(struct mig_server *s, const struct mig_fd *out, bool beside, bool detects,
                       const uint8_t *head, size_t nhead, const uint8_t *tail, size_t ntail);
/* From now on nobody is answered. What waits to write has to be cancelled before. */
void mig_server_detach(struct mig_server *s);

/* Has the stream, from when nobody writes and no answer waits, until give(): 0. Or what broke it: then
 * nobody has it, until another is attached. */
int mig_server_take_turn(struct mig_server *s);
/* `broken`: what was begun will not be finished, so that nothing can follow. */
void mig_server_give_turn(struct mig_server *s, bool broken);

/* Reads the return path and answers requests, until something comes that is not one, or none that
 * can be answered: then 0, and it is the next that mig_server_read() gives out. -errno or MIG_E_*,
 * MIG_E_GONE when a connection beside was closed before the last page was taken. */
int mig_server_run(struct mig_server *s);
/* Exactly n bytes of the return path; fewer at its end. */
int64_t mig_server_read(struct mig_server *s, uint8_t *to, size_t n);

/* Sends what is left of these pages, host pages as a whole, but for one that the other has begun.
 * Any thread. 0, -errno or MIG_E_*. */
int mig_server_answer(struct mig_server *s, size_t block, uint64_t first, uint64_t npages);

#endif
