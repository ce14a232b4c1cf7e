/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Threads that wait for work: a number of items, each worked on by one of them. */
#ifndef MIG_POOL_H
#define MIG_POOL_H

#include <stdbool.h>
#include <stddef.h>

enum { MIG_POOL_MAX_THREADS = 255 };

struct mig_pool;

/* One item; `thread` tells the threads of a pool apart, from 0. */
typedef void (*mig_pool_fn)(void *context, unsigned thread, size_t item);

/* 0, MIG_E_NOMEM or -errno. */
int mig_pool_open(struct mig_pool **pool, unsigned nthreads);
/* Waits for what has been started. NULL is fine. */
void mig_pool_close(struct mig_pool *pool);
/* Has items 0..n done; what was started before must have been waited for. */
void mig_pool_start(struct mig_pool *pool, mig_pool_fn fn, void *context, size_t n);
/* Whether all that was started is done. */
bool mig_pool_is_idle(struct mig_pool *pool);
void mig_pool_wait(struct mig_pool *pool);

#endif
