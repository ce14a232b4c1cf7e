/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The process guest under a thread sanitizer: every control while its workers write, and memory that
 * is looked at, and changed, while they stand still. */
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "workload.h"

enum { PAGE = 4096, NPAGES = 512, NWORKERS = 3 };

struct guest {
    uint8_t ram[NPAGES * PAGE];
    uint8_t ledger[NPAGES * 8];
    uint64_t ram_marks[NPAGES / 64], ledger_marks[1];
    struct mig_workload *w;
};

static void nap(long ms)
{
    struct timespec time = {0, ms * 1000000};

    nanosleep(&time, NULL);
}

static uint64_t writes(struct guest *g)
{
    uint64_t sum = 0;

    for (uint64_t i = 0; i < NWORKERS; i++) {
        struct mig_worker_state state;

        mig_workload_get(g->w, i, &state);
        CHECK(state.refused == 0);
        sum += state.writes;
    }
    return sum;
}

static void await_writes(struct guest *g, uint64_t more)
{
    uint64_t enough = writes(g) + more;

    while (writes(g) < enough) {
        nap(1);
    }
}

static void check_whole(struct guest *g)
{
    struct mig_verdict verdict;

    mig_workload_verify(g->w, &verdict);
    CHECK(verdict.npages == NPAGES && verdict.ncorrupt == 0 && verdict.nledger == 0);
}

static void open_guest(struct guest *g, enum mig_pattern pattern, uint64_t rate)
{
    struct mig_workload_config config = {
        .seed = 7, .set_pages = NPAGES / 2, .rate = rate, .nworkers = NWORKERS,
        .pattern = pattern, .fill = MIG_FILL_HALF,
    };
    struct mig_pages ram = {.base = g->ram, .npages = NPAGES, .page_size = PAGE};

    memset(g, 0, sizeof(*g));
    CHECK(mig_workload_open(&g->w, &config, &ram, g->ledger, g->ram_marks, g->ledger_marks) == 0);
    mig_workload_fill(g->w);
}

/* Nothing of what it does while it stands still may be missed by its marks. */
static void check_still(struct guest *g, uint8_t *copy)
{
    uint64_t before = writes(g), dirty[NPAGES / 64] = {0}, ledger_dirty[1] = {0};

    mig_bitmap_drain(dirty, g->ram_marks, NPAGES);
    mig_bitmap_drain(ledger_dirty, g->ledger_marks, 1);
    for (uint64_t page = 0; page < NPAGES; page++) {
        bool same = memcmp(copy + page * PAGE, g->ram + page * PAGE, PAGE) == 0;

        CHECK(same || mig_bitmap_test(dirty, page));
    }
    CHECK(ledger_dirty[0] == 1);
    memcpy(copy, g->ram, sizeof(g->ram));
    nap(3);
    CHECK(memcmp(copy, g->ram, sizeof(g->ram)) == 0 && writes(g) == before);
}

static void *meddle(void *arg)
{
    struct guest *g = arg;

    for (unsigned i = 0; i < 20; i++) {
        mig_workload_throttle(g->w, i * 5 % 100);
        mig_workload_set_rate(g->w, i % 3 ? 0 : UINT64_C(50) << 20);
        check_whole(g);
        mig_workload_pause(g->w);
        mig_workload_resume(g->w);
    }
    mig_workload_throttle(g->w, 0);
    return NULL;
}

static void check_pattern(enum mig_pattern pattern, uint64_t rate)
{
    static struct guest g, other;
    static uint8_t copy[NPAGES * PAGE];
    pthread_t threads[2];

    open_guest(&g, pattern, rate);
    check_whole(&g);
    memcpy(copy, g.ram, sizeof(copy));
    for (int i = 0; i < 3; i++) {
        mig_workload_resume(g.w);
        await_writes(&g, 50);
        mig_workload_pause(g.w);
        check_still(&g, copy);
    }
    mig_workload_resume(g.w);
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, meddle, &g) == 0);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    await_writes(&g, 50);
    mig_workload_throttle(g.w, 99);
    mig_workload_pause(g.w);
    check_whole(&g);

    /* it moves: memory, ledger and the workers' state */
    open_guest(&other, pattern, rate);
    memcpy(other.ram, g.ram, sizeof(g.ram));
    memcpy(other.ledger, g.ledger, sizeof(g.ledger));
    for (uint64_t i = 0; i < NWORKERS; i++) {
        struct mig_worker_state state;

        mig_workload_get(g.w, i, &state);
        CHECK(mig_workload_put(other.w, i, &state) == 0);
        state.position = NPAGES;
        CHECK(mig_workload_put(other.w, i, &state) < 0);
    }
    mig_workload_close(g.w);
    check_whole(&other);
    mig_workload_resume(other.w);
    await_writes(&other, 50);
    check_whole(&other);
    mig_workload_close(other.w);
}

int main(void)
{
    for (int pattern = MIG_PATTERN_FULL; pattern <= MIG_PATTERN_HOT; pattern++) {
        check_pattern((enum mig_pattern)pattern, pattern % 2 ? 0 : UINT64_C(20) << 20);
    }
    puts("fine");
    return 0;
}
