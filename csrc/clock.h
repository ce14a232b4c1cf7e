/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef MIG_CLOCK_H
#define MIG_CLOCK_H

#include <time.h>

/* Seconds on a clock that is never set. */
static inline double mig_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

#endif
