/* SPDX-License-Identifier: LGPL-2.1-or-later
 * A thread that touches pages, as a vCPU does: how long it waits for each. See test_postcopy.py. */
#include <stddef.h>
#include <stdint.h>
#include <time.h>

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void sleep_until(uint64_t when)
{
    struct timespec time = {(time_t)(when / 1000000000), (long)(when % 1000000000)};

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

/* Touches the pages in turn for so long, with a pause before each; returns how many. Their times go
 * into `took`. Everything is in nanoseconds. */
size_t touch_pages(const volatile uint8_t *memory, const uint64_t *offsets, size_t n, uint64_t pause,
                   uint64_t duration, uint64_t *took)
{
    uint64_t end = now() + duration;
    size_t i;

    for (i = 0; i < n; i++) {
        uint64_t start;

        sleep_until(now() + pause);
        start = now();
        if (start >= end) {
            break;
        }
        (void)memory[offsets[i]];
        took[i] = now() - start;
    }
    return i;
}
