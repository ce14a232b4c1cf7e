/* SPDX-License-Identifier: LGPL-2.1-or-later
 * What is checked by programs without Python. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* abort() rather than exit(): a fuzzer keeps the input that led here */
#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
            abort();                                                                 \
        }                                                                            \
    } while (0)

#endif
