/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Which pages a postcopy has received so far: see received.h. */
#include "received.h"

void mig_received_mark(const struct mig_ram_parser *p, uint64_t *received)
{
    for (size_t i = 0; i < p->npages; i++) {
        mig_bitmap_set_atomic(received, p->page[i], 1);
    }
}

int mig_received_blank(struct mig_pagelog *log, const int64_t *where, uint64_t npages,
                       const uint64_t *received)
{
    for (uint64_t page = mig_bitmap_next_clear(received, npages, 0); page < npages;
         page = mig_bitmap_next_clear(received, npages, page + 1)) {
        if (where[page] > 0) {
            int rc = mig_overwrite(&log->file, where[page], log->zeros, log->page_size);

            if (rc < 0) {
                return rc;
            }
        }
    }
    return 0;
}
