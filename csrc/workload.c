/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The process guest. A worker holds its lock while it writes and lets go of it to sleep; whoever
 * takes the lock finds the worker's pages, entries and state as they are between two writes. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "contents.h"
#include "endian.h"
#include "thread.h"
#include "workload.h"

#define NS_PER_S UINT64_C(1000000000)
/* a worker that has nothing to do looks again so soon: the grain of gaps */
#define TICK_NS UINT64_C(1000000)
/* QEMU's timeslice of the CPU throttle */
#define TIMESLICE_NS UINT64_C(10000000)
/* Slice and nap of a limited worker together, where that makes the slice shorter: so that a second has
 * many of them, and its rate can be measured. */
#define CYCLE_NS UINT64_C(100000000)
#define WHOLE UINT64_C(10000)
/* a rate that the machine did not allow is made up for as long as this */
#define CATCH_UP_NS NS_PER_S

struct worker {
    struct mig_workload *guest;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    unsigned wanted; /* threads that wait for the lock; atomic */
    /* the rest under the lock */
    bool stopped, quit;
    bool loaded; /* no tick since put() */
    unsigned percent, limit;
    uint64_t stopped_at;
    uint64_t due, due_rest; /* when the next write is; the rest in 1 / rate ns */
    uint64_t slice_end;
    uint64_t first, end, set_pages; /* pages it owns; of which the first set_pages are written */
    uint8_t *scratch;               /* one page */
    struct mig_worker_state state;
} __attribute__((aligned(64)));

struct mig_workload {
    struct mig_workload_config config; /* all but the rate stays as it was opened */
    struct mig_contents contents;
    struct mig_pages ram;
    uint8_t *ledger;
    uint64_t *ram_marks, *ledger_marks;
    uint8_t *scratch;
    struct worker *workers;
    uint64_t interval, interval_rest; /* ns between two writes of one worker */
    uint64_t nthreads;
};

static uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

/* ---- one page --------------------------------------------------------------------------------- */

static inline uint8_t *page_bytes(const struct mig_workload *w, uint64_t page)
{
    return w->ram.base + page * w->ram.page_size;
}

static inline uint64_t ledger_count(const struct mig_workload *w, uint64_t page)
{
    return mig_load_le64(w->ledger + 8 * page);
}

/* False, and *bad filled, when the page is not what it is after `count` writes. */
static bool check_page(const struct worker *k, uint64_t page, uint64_t count,
                       struct mig_corrupt *bad)
{
    const struct mig_workload *w = k->guest;
    const uint8_t *bytes = page_bytes(w, page);
    size_t offset = 0;

    mig_contents_put(&w->contents, page, count, k->scratch);
    if (memcmp(bytes, k->scratch, w->ram.page_size) == 0) {
        return true;
    }
    /* who corrupts it may be at it still: the last word is the limit */
    while (offset + 8 < w->ram.page_size && memcmp(bytes + offset, k->scratch + offset, 8) == 0) {
        offset += 8;
    }
    *bad = (struct mig_corrupt){
        .page = page,
        .count = count,
        .offset = offset,
        .expected = mig_load_le64(k->scratch + offset),
        .found = mig_load_le64(bytes + offset),
    };
    return false;
}

/* A random number below n. */
static uint64_t draw(struct mig_worker_state *s, uint64_t n)
{
    s->rng += MIG_MIX_STEP;
    return (uint64_t)((unsigned __int128)mig_mix(s->rng) * n >> 64);
}

static uint64_t next_page(struct worker *k)
{
    struct mig_worker_state *s = &k->state;
    uint64_t n = k->set_pages, position;

    switch (k->guest->config.pattern) {
    case MIG_PATTERN_SEQUENTIAL:
        position = s->position;
        s->position = position + 1 == n ? 0 : position + 1;
        return k->first + position;
    case MIG_PATTERN_HOT:
        if (draw(s, 10)) {
            n = (n + 9) / 10;
        }
        return k->first + draw(s, n);
    case MIG_PATTERN_FULL:
    case MIG_PATTERN_WORDS:
        break;
    }
    return k->first + draw(s, n);
}

/* Writes a page once more, unless it is corrupt: then it stays as it is, for verify(). */
static void write_page(struct worker *k)
{
    struct mig_workload *w = k->guest;
    struct mig_worker_state *s = &k->state;
    const struct mig_contents *c = &w->contents;
    uint64_t page = next_page(k), count = ledger_count(w, page);
    struct mig_corrupt bad;

    if (!check_page(k, page, count, &bad)) {
        if (s->refused++ == 0) {
            s->first = bad;
        }
        return;
    }
    if (w->config.pattern == MIG_PATTERN_WORDS) {
        mig_contents_put_words(c, page, count + 1, page_bytes(w, page));
    } else {
        mig_contents_put(c, page, count + 1, page_bytes(w, page));
    }
    mig_store_le64(w->ledger + 8 * page, count + 1);
    s->checksum += mig_contents_term(c, page, count + 1) - mig_contents_term(c, page, count);
    s->writes++;
    if (w->ram_marks) {
        /* After the write, always: a look first whether somebody logs, or whether the bit is set
         * already, could be done by the CPU before its writes can be seen. */
        mig_bitmap_set_atomic(w->ram_marks, page, 1);
        mig_bitmap_set_atomic(w->ledger_marks, 8 * page / w->ram.page_size, 1);
    }
}

/* ---- when ----------------------------------------------------------------------------------- */

static void tick(struct worker *k, uint64_t now)
{
    struct mig_worker_state *s = &k->state;

    if (s->last_tick && now > s->last_tick) {
        uint64_t gap = now - s->last_tick;

        s->longest_gap = gap > s->longest_gap ? gap : s->longest_gap;
        s->switchover_gap = k->loaded ? gap : s->switchover_gap;
    }
    k->loaded = false;
    s->last_tick = now;
    s->ticks++;
}

static bool wanted(const struct worker *k)
{
    return __atomic_load_n(&k->wanted, __ATOMIC_RELAXED) != 0;
}

static void sleep_until(struct worker *k, uint64_t when)
{
    struct timespec at = {
        .tv_sec = (time_t)(when / NS_PER_S),
        .tv_nsec = (long)(when % NS_PER_S),
    };

    pthread_cond_timedwait(&k->wake, &k->lock, &at);
}

/* How much of the time it stands still, in ten-thousandths. */
static uint64_t share_of(const struct worker *k)
{
    uint64_t all = k->percent * (WHOLE / 100);

    return k->limit > all ? k->limit : all;
}

static uint64_t slice_of(const struct worker *k)
{
    uint64_t running = CYCLE_NS / WHOLE * (WHOLE - share_of(k));

    return k->limit && running < TIMESLICE_NS ? running : TIMESLICE_NS;
}

/* Returns when a write is due; false when the worker has to end. */
static bool await_turn(struct worker *k)
{
    while (!k->quit) {
        uint64_t now;

        if (k->stopped || wanted(k)) {
            pthread_cond_wait(&k->wake, &k->lock);
            continue;
        }
        now = clock_ns();
        if (share_of(k) && now >= k->slice_end) {
            uint64_t until = k->slice_end + slice_of(k) * share_of(k) / (WHOLE - share_of(k));

            if (now < until) {
                sleep_until(k, until);
                continue;
            }
            /* what was not written meanwhile is not made up for */
            k->due += now - k->slice_end;
            k->slice_end = now + slice_of(k);
        }
        tick(k, now);
        if (now >= k->due) {
            return true;
        }
        sleep_until(k, now + TICK_NS);
    }
    return false;
}

static void pace(struct worker *k, uint64_t now)
{
    const struct mig_workload *w = k->guest;

    k->due += w->interval;
    k->due_rest += w->interval_rest;
    if (w->config.rate && k->due_rest >= w->config.rate) {
        k->due_rest -= w->config.rate;
        k->due++;
    }
    if (now > k->due + CATCH_UP_NS) {
        k->due = now - CATCH_UP_NS;
    }
}

static void run_turn(struct worker *k)
{
    uint64_t now;

    do {
        write_page(k);
        now = clock_ns();
        tick(k, now);
        pace(k, now);
    } while (now >= k->due && !wanted(k) && !(share_of(k) && now >= k->slice_end));
}

static void *worker_main(void *arg)
{
    struct worker *k = arg;

    pthread_mutex_lock(&k->lock);
    while (await_turn(k)) {
        run_turn(k);
    }
    pthread_mutex_unlock(&k->lock);
    return NULL;
}

/* ---- control -------------------------------------------------------------------------------- */

/* A worker that never sleeps would win its lock back every time if it were not told. */
static void ask(struct worker *k)
{
    __atomic_fetch_add(&k->wanted, 1, __ATOMIC_RELAXED);
}

static void take_asked(struct worker *k)
{
    pthread_mutex_lock(&k->lock);
    __atomic_fetch_sub(&k->wanted, 1, __ATOMIC_RELAXED);
}

static void take(struct worker *k)
{
    ask(k);
    take_asked(k);
}

static void give(struct worker *k)
{
    pthread_cond_broadcast(&k->wake);
    pthread_mutex_unlock(&k->lock);
}

void mig_workload_pause(struct mig_workload *w)
{
    /* all are asked before one is waited for */
    for (uint64_t i = 0; i < w->nthreads; i++) {
        ask(&w->workers[i]);
    }
    for (uint64_t i = 0; i < w->nthreads; i++) {
        struct worker *k = &w->workers[i];

        take_asked(k);
        if (!k->stopped) {
            k->stopped = true;
            k->stopped_at = clock_ns();
        }
        give(k);
    }
}

void mig_workload_resume(struct mig_workload *w)
{
    for (uint64_t i = 0; i < w->nthreads; i++) {
        struct worker *k = &w->workers[i];
        uint64_t now = clock_ns();

        take(k);
        if (k->stopped) {
            k->stopped = false;
            k->due = k->due ? k->due + (now - k->stopped_at) : now;
            k->slice_end = now + slice_of(k);
        }
        give(k);
    }
}

static void slow_down(struct worker *k, unsigned percent, unsigned limit)
{
    uint64_t now = clock_ns();

    if (share_of(k) && !k->stopped && now > k->slice_end) {
        k->due += now - k->slice_end;
    }
    k->percent = percent;
    k->limit = limit;
    k->slice_end = now + slice_of(k);
}

void mig_workload_throttle(struct mig_workload *w, unsigned percent)
{
    for (uint64_t i = 0; i < w->nthreads; i++) {
        struct worker *k = &w->workers[i];

        take(k);
        slow_down(k, percent, k->limit);
        give(k);
    }
}

void mig_workload_limit(struct mig_workload *w, uint64_t worker, unsigned share)
{
    struct worker *k = &w->workers[worker];

    take(k);
    slow_down(k, k->percent, share);
    give(k);
}

static void set_interval(struct mig_workload *w, uint64_t rate)
{
    uint64_t span = w->ram.page_size * NS_PER_S * w->config.nworkers;

    w->config.rate = rate;
    w->interval = rate ? span / rate : 0;
    w->interval_rest = rate ? span % rate : 0;
}

void mig_workload_set_rate(struct mig_workload *w, uint64_t rate)
{
    for (uint64_t i = 0; i < w->nthreads; i++) {
        take(&w->workers[i]);
    }
    set_interval(w, rate);
    for (uint64_t i = 0; i < w->nthreads; i++) {
        struct worker *k = &w->workers[i];

        if (k->due) {
            k->due = k->stopped ? k->stopped_at : clock_ns();
        }
        k->due_rest = 0;
        give(k);
    }
}

void mig_workload_get(struct mig_workload *w, uint64_t worker, struct mig_worker_state *state)
{
    struct worker *k = &w->workers[worker];

    take(k);
    *state = k->state;
    give(k);
}

int mig_workload_put(struct mig_workload *w, uint64_t worker, const struct mig_worker_state *state)
{
    struct worker *k = &w->workers[worker];

    if (state->position >= k->set_pages) {
        return -EINVAL;
    }
    take(k);
    k->state = *state;
    k->loaded = true;
    give(k);
    return 0;
}

/* ---- all pages ------------------------------------------------------------------------------ */

void mig_workload_fill(struct mig_workload *w)
{
    memset(w->ledger, 0, 8 * w->ram.npages);
    for (uint64_t page = 0; page < w->ram.npages; page++) {
        uint8_t *bytes = page_bytes(w, page);

        if (w->config.fill == MIG_FILL_RANDOM || w->config.fill == MIG_FILL_COMPRESSIBLE) {
            mig_contents_put(&w->contents, page, 0, bytes);
            continue;
        }
        /* zeros are not written over zeros: that would only allocate them */
        mig_contents_put(&w->contents, page, 0, w->scratch);
        if (memcmp(bytes, w->scratch, w->ram.page_size) != 0) {
            memcpy(bytes, w->scratch, w->ram.page_size);
        }
    }
}

static void verify_worker(const struct worker *k, struct mig_verdict *verdict)
{
    uint64_t sum = 0;

    for (uint64_t page = k->first; page < k->end; page++) {
        uint64_t count = ledger_count(k->guest, page);
        struct mig_corrupt bad;

        sum += mig_contents_term(&k->guest->contents, page, count);
        if (!check_page(k, page, count, &bad)) {
            if (verdict->ncorrupt < MIG_NFIRST) {
                verdict->first[verdict->ncorrupt] = bad;
            }
            verdict->ncorrupt++;
        }
    }
    verdict->npages += k->end - k->first;
    verdict->nledger += sum != k->state.checksum;
}

void mig_workload_verify(struct mig_workload *w, struct mig_verdict *verdict)
{
    memset(verdict, 0, sizeof(*verdict));
    for (uint64_t i = 0; i < w->nthreads; i++) {
        struct worker *k = &w->workers[i];
        uint64_t from, took;

        take(k);
        from = clock_ns();
        verify_worker(k, verdict);
        took = clock_ns() - from;
        if (!k->stopped) {
            k->state.last_tick += k->state.last_tick ? took : 0;
            k->due += took;
            k->slice_end += took;
        }
        give(k);
    }
}

/* ---- open and close ------------------------------------------------------------------------- */

/* 0 or -errno. */
static int start_worker(struct worker *k)
{
    pthread_condattr_t attributes;
    int rc;

    k->stopped = true;
    pthread_mutex_init(&k->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&k->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    rc = mig_thread_start(&k->thread, worker_main, k, "mig-guest");
    if (rc < 0) {
        pthread_cond_destroy(&k->wake);
        pthread_mutex_destroy(&k->lock);
    }
    return rc;
}

static void end_worker(struct worker *k)
{
    take(k);
    k->quit = true;
    give(k);
    pthread_join(k->thread, NULL);
    pthread_cond_destroy(&k->wake);
    pthread_mutex_destroy(&k->lock);
}

static void share_out(struct mig_workload *w, uint64_t i)
{
    uint64_t npages = w->ram.npages, n = w->config.nworkers;
    struct worker *k = &w->workers[i];

    k->guest = w;
    k->scratch = w->scratch + i * w->ram.page_size;
    k->first = (uint64_t)((unsigned __int128)npages * i / n);
    k->end = (uint64_t)((unsigned __int128)npages * (i + 1) / n);
    /* rounded up: every worker has something to write */
    k->set_pages = (uint64_t)(
        ((unsigned __int128)(k->end - k->first) * w->config.set_pages + npages - 1) / npages);
    k->state.rng = mig_mix(w->config.seed ^ mig_mix(i + 1));
}

int mig_workload_open(struct mig_workload **made, const struct mig_workload_config *config,
                      const struct mig_pages *ram, uint8_t *ledger, uint64_t *ram_marks,
                      uint64_t *ledger_marks)
{
    struct mig_workload *w;

    if (config->nworkers == 0 || config->nworkers > MIG_MAX_WORKERS || ram->where ||
        config->set_pages < config->nworkers || config->set_pages > ram->npages ||
        config->rate >> 63 || config->pattern > MIG_PATTERN_HOT ||
        config->fill > MIG_FILL_COMPRESSIBLE) {
        return -EINVAL;
    }
    w = calloc(1, sizeof(*w));
    if (!w) {
        return MIG_E_NOMEM;
    }
    *w = (struct mig_workload){
        .config = *config,
        .contents = {config->seed, ram->page_size, config->pattern == MIG_PATTERN_WORDS,
                     config->fill},
        .ram = *ram,
        .ledger = ledger,
        .ram_marks = ram_marks,
        .ledger_marks = ledger_marks,
        .scratch = calloc((size_t)config->nworkers, ram->page_size),
        .workers = aligned_alloc(64, (size_t)config->nworkers * sizeof(struct worker)),
    };
    if (!w->scratch || !w->workers) {
        mig_workload_close(w);
        return MIG_E_NOMEM;
    }
    memset(w->workers, 0, (size_t)config->nworkers * sizeof(struct worker));
    set_interval(w, config->rate);
    while (w->nthreads < config->nworkers) {
        int rc;

        share_out(w, w->nthreads);
        rc = start_worker(&w->workers[w->nthreads]);
        if (rc < 0) {
            mig_workload_close(w);
            return rc;
        }
        w->nthreads++;
    }
    *made = w;
    return 0;
}

void mig_workload_close(struct mig_workload *w)
{
    for (uint64_t i = 0; i < w->nthreads; i++) {
        end_worker(&w->workers[i]);
    }
    free(w->workers);
    free(w->scratch);
    free(w);
}
