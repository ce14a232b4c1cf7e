/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Tracking writes by PAGEMAP_SCAN: one system call lists the pages that are not write-protected
 * and protects them, each page table entry at once and the TLB before it returns.
 *
 * An untouched page of anonymous memory is in no page table. It is left so: protecting it would
 * take page tables for all of a sparse guest, and huge pages from memory that gets its first
 * write. Once it is in a page table, unprotected, something has happened to it:
 *
 *   a write         it has memory: dirty. The kernel may have given it a whole huge page, whose
 *                   other pages then are dirty, too. Written later, a huge page is split.
 *   a read          the kernel's page of zeros is there: not dirty, if there never was memory
 *   zeros replaced  KSM, or the split of a huge page, gave a page of zeros for memory that had
 *                   become zero: dirty, as far as anybody knows
 *
 * so that pages with memory are remembered in block->bits. Pages of files (shmem, memfd) look
 * the same read or written, and an entry vanishes when its page is reclaimed; there the range is
 * protected as a whole, entry or not, and what has lost that protection is dirty. */
#include <errno.h>
#include <sys/ioctl.h>

#include "track.h"

/* PAGEMAP_SCAN is of Linux 6.7, newer than the headers of some distributions: its numbers and
 * structures here */
struct scan_region {
    uint64_t start, end, categories;
};

struct scan_arg {
    uint64_t size, flags, start, end, walk_end;
    uint64_t vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

enum {
    SCAN_WP_MATCHING = 1 << 0,
    IS_WRITTEN = 1 << 1,
    IS_PRESENT = 1 << 3,
    IS_SWAPPED = 1 << 4,
    IS_ZERO_PAGE = 1 << 5,
    /* as many as the kernel collects in one go: the pages of a page table, 12 KiB of stack */
    MAX_REGIONS = 512,
};

int mig_pagescan_probe(int pagemap)
{
    struct scan_region region;
    struct scan_arg arg = {
        .size = sizeof(arg), .vec = (uintptr_t)&region, .vec_len = 1,
        .category_mask = IS_WRITTEN, .return_mask = IS_WRITTEN,
    };

    if (ioctl(pagemap, SCAN_IOCTL, &arg) >= 0) {
        return 0;
    }
    return errno == ENOTTY || errno == EINVAL ? -EOPNOTSUPP : -errno;
}

/* Sets the bits of the target pages that the host pages first..end - 1 lie in. */
static uint64_t mark(const struct mig_track *t, const struct mig_track_block *block,
                     uint64_t first, uint64_t end, uint64_t *dirty)
{
    uint64_t ratio = block->page_size / t->host_page;
    uint64_t page = first / ratio, last = (end - 1) / ratio;

    return dirty ? mig_bitmap_set_atomic(dirty, page, last - page + 1) : 0;
}

static uint64_t take(const struct mig_track *t, const struct mig_track_block *block,
                     const struct scan_region *region, uint64_t *dirty)
{
    uint64_t first = (region->start - (uintptr_t)block->base) / t->host_page;
    uint64_t end = (region->end - (uintptr_t)block->base) / t->host_page, fresh = 0;

    if (!(region->categories & IS_ZERO_PAGE)) {
        mig_bitmap_set(block->bits, first, end - first);
        return mark(t, block, first, end, dirty);
    }
    while ((first = mig_bitmap_next_set(block->bits, end, first)) < end) {
        uint64_t stop = mig_bitmap_next_clear(block->bits, end, first);

        fresh += mark(t, block, first, stop, dirty);
        first = stop;
    }
    return fresh;
}

int64_t mig_pagescan_sync(const struct mig_track *t, const struct mig_track_block *block,
                          uint64_t *dirty)
{
    struct scan_region regions[MAX_REGIONS];
    uint64_t fresh = 0;
    /* of files, exactly these masks: with them an entry that is empty counts as written */
    struct scan_arg arg = {
        .size = sizeof(arg),
        .flags = SCAN_WP_MATCHING,
        .start = (uintptr_t)block->base,
        .end = (uintptr_t)block->base + mig_track_nbytes(block),
        .vec = (uintptr_t)regions,
        .vec_len = MAX_REGIONS,
        .category_mask = IS_WRITTEN,
        .category_anyof_mask = block->anonymous ? IS_PRESENT | IS_SWAPPED : 0,
        .return_mask = block->anonymous ? IS_WRITTEN | IS_ZERO_PAGE : IS_WRITTEN,
    };

    while (arg.start < arg.end) {
        int n = ioctl(t->pagemap, SCAN_IOCTL, &arg);

        if (n < 0 && errno != EINTR) {
            return -errno;
        }
        for (int i = 0; i < n; i++) {
            fresh += take(t, block, regions + i, dirty);
        }
        arg.start = n < 0 ? arg.start : arg.walk_end;
    }
    return (int64_t)fresh;
}

int mig_pagescan_start(struct mig_track *t)
{
    for (size_t i = 0; i < t->nblocks; i++) {
        const struct mig_track_block *block = t->blocks + i;
        int64_t rc = block->anonymous
                         ? mig_pagescan_sync(t, block, NULL)
                         : mig_track_protect(t, block->base, mig_track_nbytes(block), true);

        if (rc < 0) {
            return (int)rc;
        }
    }
    return 0;
}
