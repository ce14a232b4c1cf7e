/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Encodes a page by each named family's updating encoder, once, for Lackey to trace the loads of,
 * and prints "family address length" of the new page: nothing else loads from there
 * (test_instructions.py builds and runs it). */
#include <string.h>

#include "check.h"
#include "mig.h"

static void update(const char *family, size_t nbytes)
{
    const struct mig_kernels *k;
    uint8_t *old = calloc(1, nbytes), *new = calloc(1, nbytes), *out = malloc(nbytes);

    CHECK(mig_kernels_select(family, &k) == 0);
    for (size_t i = 0; i < nbytes; i += i % 200 ? 5 : 40) {
        new[i] = 1;
    }
    CHECK(k->xbzrle_update(old, new, nbytes, out, nbytes) > 0);
    printf("%s %p %zu\n", family, (void *)new, nbytes);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        update(argv[i], 255);
        update(argv[i], 4096);
    }
    return 0;
}
