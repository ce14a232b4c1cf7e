/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Which pages a postcopy has received so far: one bitmap for each block. */
#ifndef MIG_RECEIVED_H
#define MIG_RECEIVED_H

#include "mig.h"

/* Sets the bits of the last burst's pages. Any number of threads at a time. */
void mig_received_mark(const struct mig_ram_parser *p, uint64_t *received);
/* Pages that have a record in the file, but were discarded and did not come again, become zeros
 * there: what they held is not the guest's any more. 0 or -errno. */
int mig_received_blank(struct mig_pagelog *log, const int64_t *where, uint64_t npages,
                       const uint64_t *received);

#endif
