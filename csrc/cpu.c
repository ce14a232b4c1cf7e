/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Which kernels exist, which of them this CPU runs, and which one is the default. */
#include <string.h>
#include <time.h>

#include "kernels.h"

#ifdef MIG_X86
#define X86(family) (&mig_kernels_##family)
#else
#define X86(family) NULL
#endif
#ifdef MIG_NEON
#define ARM(family) (&mig_kernels_##family)
#else
#define ARM(family) NULL
#endif

/* Best first, by the measurements in benchmarks/RESULTS.md; choose() decides between the first
 * two. */
static const struct {
    const char *name;
    const struct mig_kernels *kernels; /* NULL: not in this build */
} families[] = {
    {"avx512", X86(avx512)},
    {"avx512-256", X86(avx512_256)},
    {"avx2", X86(avx2)},
    {"sse2", X86(sse2)},
    {"neon", ARM(neon)},
    {"scalar", &mig_kernels_scalar},
};

enum { NFAMILIES = sizeof(families) / sizeof(families[0]) };

static bool cpu_runs(const char *name)
{
    (void)name;
#ifdef MIG_X86
    __builtin_cpu_init();
    /* AVX-512 as it is since Ice Lake and Zen 4: with compression and counting of bits */
    if (strncmp(name, "avx512", 6) == 0) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("bmi2");
    }
    if (strcmp(name, "avx2") == 0) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    }
#endif
    /* every CPU of the architecture has the others */
    return true;
}

const char *mig_kernels_name(size_t i)
{
    return i < NFAMILIES ? families[i].name : NULL;
}

#ifdef MIG_X86
enum { PROBE_BYTES = 4096, PROBE_RUNS = 16 };

/* Shortest time of many, so that what interrupts some of them does not count. */
static long fastest(const struct mig_kernels *k, const uint8_t *page)
{
    long best = 0;

    for (int i = 0; i < PROBE_RUNS; i++) {
        struct timespec start, end;
        bool zero = true;
        long took;

        clock_gettime(CLOCK_MONOTONIC, &start);
        for (int j = 0; j < PROBE_RUNS; j++) {
            zero &= k->is_zero(page, PROBE_BYTES);
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        took = (end.tv_sec - start.tv_sec) * 1000000000 + end.tv_nsec - start.tv_nsec;
        best = zero && (i == 0 || took < best) ? took : best;
    }
    return best;
}

/* CPUs that load 512 bits in two halves read zero pages faster by vectors of 256 bits, and no
 * feature bit tells: ten microseconds of trying do. */
static const struct mig_kernels *choose(const struct mig_kernels *found)
{
    static const uint8_t page[PROBE_BYTES] __attribute__((aligned(64)));

    if (found != &mig_kernels_avx512 ||
        fastest(found, page) * 20 < fastest(&mig_kernels_avx512_256, page) * 19) {
        return found;
    }
    return &mig_kernels_avx512_256;
}
#else
static const struct mig_kernels *choose(const struct mig_kernels *found) { return found; }
#endif

int mig_kernels_select(const char *name, const struct mig_kernels **found)
{
    for (size_t i = 0; i < NFAMILIES; i++) {
        bool usable = families[i].kernels && cpu_runs(families[i].name);

        if (!name && usable) {
            *found = choose(families[i].kernels);
            return 0;
        }
        if (name && strcmp(name, families[i].name) == 0) {
            if (!families[i].kernels) {
                return MIG_E_KERNEL_NOT_BUILT;
            }
            if (!usable) {
                return MIG_E_KERNEL_NO_CPU;
            }
            *found = families[i].kernels;
            return 0;
        }
    }
    return MIG_E_KERNEL_UNKNOWN;
}
