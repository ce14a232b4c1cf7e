/* SPDX-License-Identifier: LGPL-2.1-or-later
 * A pool of threads: see pool.h. */
#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

#include "mig.h"
#include "thread.h"

struct worker {
    struct mig_pool *pool;
    pthread_t thread;
    unsigned number;
};

struct mig_pool {
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    mig_pool_fn fn;
    void *context;
    size_t next, n, left; /* next item to begin, items in all, items that are not done */
    bool quit;
    unsigned nthreads;
    struct worker workers[];
};

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct mig_pool *pool = worker->pool;

    pthread_mutex_lock(&pool->lock);
    while (!pool->quit) {
        if (pool->next == pool->n) {
            pthread_cond_wait(&pool->work, &pool->lock);
            continue;
        }
        size_t item = pool->next++;

        pthread_mutex_unlock(&pool->lock);
        pool->fn(pool->context, worker->number, item);
        pthread_mutex_lock(&pool->lock);
        if (--pool->left == 0) {
            pthread_cond_signal(&pool->idle);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static int open_threads(struct mig_pool *pool, unsigned nthreads)
{
    int rc = 0;

    for (; pool->nthreads < nthreads && rc == 0; pool->nthreads += rc == 0) {
        struct worker *worker = &pool->workers[pool->nthreads];

        worker->pool = pool;
        worker->number = pool->nthreads;
        rc = mig_thread_start(&worker->thread, work, worker, "mig-pool");
    }
    return rc;
}

int mig_pool_open(struct mig_pool **opened, unsigned nthreads)
{
    struct mig_pool *pool = calloc(1, sizeof(*pool) + nthreads * sizeof(pool->workers[0]));
    int rc;

    *opened = NULL;
    if (!pool) {
        return MIG_E_NOMEM;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->idle, NULL);
    rc = open_threads(pool, nthreads);
    if (rc < 0) {
        mig_pool_close(pool);
        return rc;
    }
    *opened = pool;
    return 0;
}

void mig_pool_close(struct mig_pool *pool)
{
    if (!pool) {
        return;
    }
    mig_pool_wait(pool);
    pthread_mutex_lock(&pool->lock);
    pool->quit = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < pool->nthreads; i++) {
        pthread_join(pool->workers[i].thread, NULL);
    }
    pthread_cond_destroy(&pool->idle);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

void mig_pool_start(struct mig_pool *pool, mig_pool_fn fn, void *context, size_t n)
{
    pthread_mutex_lock(&pool->lock);
    pool->fn = fn;
    pool->context = context;
    pool->next = 0;
    pool->n = pool->left = n;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

bool mig_pool_is_idle(struct mig_pool *pool)
{
    bool idle;

    pthread_mutex_lock(&pool->lock);
    idle = pool->left == 0;
    pthread_mutex_unlock(&pool->lock);
    return idle;
}

void mig_pool_wait(struct mig_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->left) {
        pthread_cond_wait(&pool->idle, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
}
