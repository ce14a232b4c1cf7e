/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Which kernels exist, which of them this CPU runs, and which one is the default. */
#include <string.h>

#include "kernels.h"

/* Best first: the default is the first that the CPU runs. Measured on an AMD EPYC of family 25
 * (benchmarks/RESULTS.md): avx512 counts and merges bitmaps 2.6 to 3.2 times as fast as avx2, which
 * wins by a tenth on zero pages in cache and is level with it from memory. */
static const struct {
    const char *name;
    const struct mig_kernels *kernels; /* NULL: not in this build */
} families[] = {
    {"avx512", MIG_KERNELS_AVX512},
    {"avx2", MIG_KERNELS_AVX2},
    {"scalar", &mig_kernels_scalar},
};

enum { NFAMILIES = sizeof(families) / sizeof(families[0]) };

static bool cpu_runs(const char *name)
{
#ifdef MIG_X86
    __builtin_cpu_init();
    if (strcmp(name, "avx512") == 0) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("popcnt");
    }
    if (strcmp(name, "avx2") == 0) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
    }
#endif
    return strcmp(name, "scalar") == 0;
}

const char *mig_kernels_name(size_t i)
{
    return i < NFAMILIES ? families[i].name : NULL;
}

int mig_kernels_select(const char *name, const struct mig_kernels **found)
{
    for (size_t i = 0; i < NFAMILIES; i++) {
        bool usable = families[i].kernels && cpu_runs(families[i].name);

        if (!name && usable) {
            *found = families[i].kernels;
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
