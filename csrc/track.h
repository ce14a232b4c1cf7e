/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Which pages of this process's own memory were written, by whatever thread or by the kernel on
 * its behalf (read(2) into them). Two ways to know:
 *
 * MIG_TRACK_SCAN (pagescan.c)   the page tables say; the kernel lifts the write protection of a
 *                               page that is written by itself, and a scan sets it again
 * MIG_TRACK_FAULTS (wpfaults.c) every first write to a page stops until a thread has noted it
 *
 * A write that races with mig_track_sync() is in this one or in the next. Nothing is said of
 * memory that is given back (MADV_DONTNEED), nor of what a device or io_uring writes to memory
 * that it has pinned before. */
#ifndef MIG_TRACK_H
#define MIG_TRACK_H

#include <pthread.h>

#include "mig.h"

enum mig_track_method { MIG_TRACK_SCAN, MIG_TRACK_FAULTS };

struct mig_track_block {
    uint8_t *base;    /* at a host page */
    uint64_t npages;  /* target pages */
    size_t page_size; /* of the target: the host's, or more */
    bool anonymous;   /* private, of no file: its untouched pages are in no page table */
    /* SCAN: host pages that were ever seen with memory; FAULTS: target pages that were written */
    uint64_t *bits;
};

struct mig_track {
    enum mig_track_method method;
    struct mig_track_block *blocks;
    size_t nblocks, nregistered;
    size_t host_page;
    int uffd;
    int pagemap;
    /* FAULTS: the rest; the lock is over all bits and the protection that belongs to them */
    int stop_fd;
    bool has_thread;
    pthread_t thread;
    pthread_mutex_t lock;
    int error; /* of the thread, after which nothing is logged any more */
};

/* 0 when the method works in this process. -EOPNOTSUPP: the kernel cannot; -ENOSYS: it has no
 * userfaultfd; -EPERM: it does not let this process.
 * user_mode_only: FAULTS without privileges, where the kernel's own writes fail with EFAULT */
int mig_track_probe(enum mig_track_method method, bool user_mode_only);
/* Begins to log writes to the blocks, which the caller keeps until mig_track_close(); nothing is
 * left behind when it fails. */
int mig_track_open(struct mig_track *t, enum mig_track_method method, bool user_mode_only,
                   struct mig_track_block *blocks, size_t nblocks);
/* Sets the bits of the pages that were written since the last time; returns how many were clear. */
int64_t mig_track_sync(struct mig_track *t, const struct mig_kernels *k,
                       const struct mig_track_block *block, uint64_t *dirty);
/* Memory is as it was before; also after a failed mig_track_open(), or twice. */
void mig_track_close(struct mig_track *t);

/* A userfaultfd with these features: a descriptor, or what mig_track_probe() returns. */
int mig_track_userfaultfd(uint64_t features, bool user_mode_only);

/* ---- between the files of this ---------------------------------------------------------------*/

uint64_t mig_track_nbytes(const struct mig_track_block *block);
/* (Un)protects nbytes at `at`; where nothing is protected any more, that is no error. */
int mig_track_protect(const struct mig_track *t, const uint8_t *at, uint64_t nbytes, bool on);
void mig_track_unregister(struct mig_track *t);

int mig_pagescan_probe(int pagemap);
int mig_pagescan_start(struct mig_track *t);
int64_t mig_pagescan_sync(const struct mig_track *t, const struct mig_track_block *block,
                          uint64_t *dirty);

/* Before and after the blocks are registered. */
int mig_wpfaults_prepare(struct mig_track *t);
int mig_wpfaults_start(struct mig_track *t);
int64_t mig_wpfaults_sync(struct mig_track *t, const struct mig_kernels *k,
                          const struct mig_track_block *block, uint64_t *dirty);
void mig_wpfaults_stop(struct mig_track *t);

#endif
