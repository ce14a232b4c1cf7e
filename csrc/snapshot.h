/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Memory as it was at one moment, while its owner writes on: all of it is write-protected by a
 * userfaultfd, and a page is copied before its protection is lifted. Two threads copy: the one that
 * walks over memory (mig_snapshot_save), and one here that serves who writes to a page before the
 * walk has come there. Copies stay in the store until they are sent.
 *
 *   snapshot.c    registering, protecting, letting go
 *   snapsave.c    copying, and the fault thread
 *
 * No copy waits for the channel or for Python's lock, which the one who stopped at a page may hold.
 * Works from Linux 5.7 on, shared memory from 5.19. Not seen are memory that is given back
 * (MADV_DONTNEED) and writes of devices to memory that was pinned before. */
#ifndef MIG_SNAPSHOT_H
#define MIG_SNAPSHOT_H

#include <pthread.h>

#include "mig.h"

struct mig_snapshot_block {
    uint8_t *base;     /* at a host page */
    uint64_t npages;   /* of the target */
    size_t unit;       /* bytes that are protected at once: the larger of host and target page */
    bool anonymous;    /* private, of no file: its untouched pages are in no page table */
    uint64_t *pending; /* pages of which there is no copy yet, at first those that are wanted */
    uint64_t *bare;    /* pages that are not protected yet */
    uint64_t *ready;   /* pages that wait to be taken, the caller's */
    uint64_t lowest;   /* no page before this is ready; npages: none is */
    int64_t *where;    /* of each copy: its place in the store, or MIG_PAGE_ZERO; the caller's */
};

/* Slots are further apart than a page is long: nobody takes the bytes before a copy for its record. */
enum { MIG_SNAPSHOT_GAP = 64 };

struct mig_snapshot {
    const struct mig_kernels *k;
    struct mig_snapshot_block *blocks;
    size_t nblocks, nregistered;
    size_t page_size, host_page;
    int uffd, stop_fd;
    int ready_fd; /* readable when much waits to be taken */
    bool populates;   /* pages have to be there to be protected */
    bool detect_zero; /* zero pages are noted, not copied */
    bool has_thread, has_lock, stopping;
    pthread_t thread;
    /* over everything below, and over pending, bare, ready and where */
    pthread_mutex_t lock;
    pthread_cond_t room;
    bool frozen; /* the moment has come */
    uint8_t *store;
    uint64_t nslots, nused; /* slots, and those that were ever used */
    uint64_t *free_slots, nfree;
    uint64_t nstored; /* slots in use */
    uint64_t limit;   /* of them, before who writes has to wait */
    bool unlimited;   /* nobody has taken copies for long: it may be the writer who is waited for */
    bool signalled;
    int error; /* of the fault thread, after which nothing is protected any more */
    uint64_t nfaults, nwaits; /* pages copied because of a write; waits for room */
};

/* Bytes of a store with room for so many pages. */
static inline uint64_t mig_snapshot_store(uint64_t npages, size_t page_size)
{
    return (npages + 1) * (page_size + MIG_SNAPSHOT_GAP);
}

/* Registers the blocks and starts the fault thread; nothing is protected yet. The store has room for
 * every page that is pending, and takes memory as it is used.
 * populate: as on a kernel that cannot protect what is not there (before Linux 6.4)
 * -EOPNOTSUPP, -ENOSYS, -EPERM as mig_track_probe(); nothing is left behind when it fails. */
int mig_snapshot_open(struct mig_snapshot *s, const struct mig_kernels *k,
                      struct mig_snapshot_block *blocks, size_t nblocks, size_t page_size,
                      uint8_t *store, uint64_t nslots, uint64_t limit, bool detect_zero,
                      bool populate);
/* Protects all pending pages while they are written to, so that at the moment itself no others are
 * left than those that were written to after this. */
int mig_snapshot_arm(struct mig_snapshot *s);
/* This is the moment: protects all pending pages. Nobody is to write meanwhile. */
int mig_snapshot_protect(struct mig_snapshot *s);
/* Nothing is protected any more and nobody waits; twice is once. */
void mig_snapshot_close(struct mig_snapshot *s);

/* Copies those of the pages that are pending, and lifts their protection; how many they were. */
int64_t mig_snapshot_save(struct mig_snapshot *s, size_t block, const uint64_t *index, size_t n);
/* Takes the next copies of a block, by ascending page; returns their number. */
int64_t mig_snapshot_take(struct mig_snapshot *s, size_t block, uint64_t *index, size_t max);
/* Copies that were taken are not needed any more: gives back their room. */
void mig_snapshot_free(struct mig_snapshot *s, size_t block, const uint64_t *index, size_t n);

/* ---- between the files of this ---------------------------------------------------------------*/

/* MADV_POPULATE_READ of Linux 5.14; the headers of a distribution are older than the kernel it may
 * run on */
enum { MIG_POPULATE_READ = 22 };

/* (Un)protects memory; who waits there is woken. */
int mig_snapshot_change(const struct mig_snapshot *s, const uint8_t *at, uint64_t nbytes, bool on);
void mig_snapshot_unregister(struct mig_snapshot *s);
int mig_snapshot_start(struct mig_snapshot *s);
void mig_snapshot_stop(struct mig_snapshot *s);

#endif
