/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The process guest (workload.c): threads that write memory of this process and check it first.
 *
 * What a page holds follows from the seed, the number of the page, and how often it was written,
 * which the ledger says: 64 bits for each page, little-endian, guest memory like the pages. Every
 * worker owns a range of pages and their entries; nobody else writes them.
 */
#ifndef MIG_WORKLOAD_H
#define MIG_WORKLOAD_H

#include "mig.h"

/* Numbers of these two enums are part of the device state. */
enum mig_pattern {
    MIG_PATTERN_FULL,       /* whole pages, in random order */
    MIG_PATTERN_WORDS,      /* the same, but only one word in every 512 bytes */
    MIG_PATTERN_SEQUENTIAL, /* whole pages, one after the other */
    MIG_PATTERN_HOT,        /* whole pages, nine of ten in the first tenth of the working set */
};

/* What pages hold that were never written; _COMPRESSIBLE: also those that were. */
enum mig_fill {
    MIG_FILL_RANDOM,
    MIG_FILL_ZERO,
    MIG_FILL_HALF,         /* every second page is zero */
    MIG_FILL_COMPRESSIBLE, /* the second half of each page is one word again and again */
};

enum { MIG_MAX_WORKERS = 256, MIG_NFIRST = 8 };

struct mig_workload_config {
    uint64_t seed;
    uint64_t set_pages; /* pages that are written: nworkers at least, all at most */
    uint64_t rate;      /* bytes of dirtied memory per second of running, 0: no limit */
    uint64_t nworkers;
    enum mig_pattern pattern;
    enum mig_fill fill;
};

/* A page that is not what the ledger says. */
struct mig_corrupt {
    uint64_t page, count; /* its number, how often it was written by the ledger */
    uint64_t offset;      /* of the first 8 bytes in the page that are wrong */
    uint64_t expected, found;
};

/* All of a worker that moves with the guest: 64-bit words only. */
struct mig_worker_state {
    uint64_t rng, position; /* where it writes next */
    uint64_t writes;
    uint64_t ticks;     /* how often it came around its loop: every millisecond at least */
    uint64_t last_tick; /* CLOCK_MONOTONIC, ns; 0: it has not run, or not since this boot */
    uint64_t longest_gap;    /* ns between two ticks */
    uint64_t switchover_gap; /* ns between the last tick before it was loaded and the next */
    uint64_t checksum;       /* sum over its entries of the ledger */
    uint64_t refused;        /* writes that were left out because the page is corrupt */
    struct mig_corrupt first;   /* the page of the first of them */
};

enum { MIG_WORKER_NWORDS = sizeof(struct mig_worker_state) / sizeof(uint64_t) };

struct mig_verdict {
    uint64_t npages, ncorrupt;
    uint64_t nledger; /* workers whose checksum is not that of their part of the ledger */
    struct mig_corrupt first[MIG_NFIRST];
};

struct mig_workload;

/* Makes a guest that stands still, its threads included. The memory stays the caller's: `ram`
 * (without places), 8 bytes of `ledger` for each of its pages. After each write the page's bit is
 * set in ram_marks and that of the ledger's page in ledger_marks; both NULL: nothing is marked.
 * 0, MIG_E_NOMEM or -errno. */
int mig_workload_open(struct mig_workload **made, const struct mig_workload_config *config,
                      const struct mig_pages *ram, uint8_t *ledger, uint64_t *ram_marks,
                      uint64_t *ledger_marks);
/* Ends the threads. */
void mig_workload_close(struct mig_workload *w);

/* Everything below may be called by any thread. */

/* Puts the contents of pages that were never written, and an empty ledger. Only before the first
 * resume. */
void mig_workload_fill(struct mig_workload *w);
/* Returns when no worker writes, marks included; takes no longer than one write. */
void mig_workload_pause(struct mig_workload *w);
void mig_workload_resume(struct mig_workload *w);
/* Workers stand still for `percent` (0..99) of the time: they run for slices of 10 ms. */
void mig_workload_throttle(struct mig_workload *w, unsigned percent);
/* The same for one worker, for `share` (0..9900) ten-thousandths of the time; of the two the larger
 * share counts. */
void mig_workload_limit(struct mig_workload *w, uint64_t worker, unsigned share);
void mig_workload_set_rate(struct mig_workload *w, uint64_t rate);
void mig_workload_get(struct mig_workload *w, uint64_t worker, struct mig_worker_state *state);
/* 0, or -EINVAL for a position outside of what the worker owns. Only while it stands still. */
int mig_workload_put(struct mig_workload *w, uint64_t worker,
                     const struct mig_worker_state *state);
/* Checks all pages and the ledger. Each worker stands still meanwhile, which is no gap. */
void mig_workload_verify(struct mig_workload *w, struct mig_verdict *verdict);

#endif
