/* SPDX-License-Identifier: LGPL-2.1-or-later
 * What becomes of a burst of records: into memory, or into a table of places. See mig.h. */
#include "endian.h"
#include "mig.h"

/* Whether the page holds the fill byte already. */
static bool is_filled(const struct mig_kernels *k, const uint8_t *page, size_t page_size, int fill)
{
    return fill == 0 && k->is_zero(page, page_size);
}

int mig_ram_place(const struct mig_kernels *k, struct mig_ram_parser *p,
                  const struct mig_pages *pages, uint64_t *received, bool fresh,
                  const uint8_t *buf)
{
    size_t page_size = pages->page_size, packed = 0;

    for (size_t i = 0; i < p->npages; i++) {
        uint64_t index = p->page[i];
        uint8_t *page = pages->base + index * page_size;
        int fill = (int)(-1 - p->src[i]);
        int64_t rc = 0;

        if (p->kind[i] == MIG_RAM_PAGE) {
            memcpy(page, buf + p->src[i], page_size);
        } else if (p->kind[i] == MIG_RAM_XBZRLE) {
            rc = k->xbzrle_decode(buf + p->src[i], p->length[i], page, page_size);
        } else if (p->kind[i] == MIG_RAM_COMPRESS) {
            memcpy(page, p->unpacked + packed++ * page_size, page_size);
        } else if (fill != 0 || !fresh || mig_bitmap_test_atomic(received, index)) {
            if (!is_filled(k, page, page_size, fill)) {
                memset(page, fill, page_size);
            }
        }
        /* channels of multifd set bits of the same words */
        mig_bitmap_set_atomic(received, index, 1);
        if (rc < 0) {
            p->wrong = i;
            return (int)rc;
        }
    }
    return 0;
}

int mig_ram_index(struct mig_ram_parser *p, int64_t *where, int64_t start)
{
    for (size_t i = 0; i < p->npages; i++) {
        if (p->kind[i] == MIG_RAM_PAGE) {
            where[p->page[i]] = start + p->src[i];
        } else if (p->kind[i] == MIG_RAM_ZERO && p->src[i] == -1) {
            where[p->page[i]] = MIG_PAGE_ZERO;
        } else {
            p->wrong = i;
            return p->kind[i] == MIG_RAM_ZERO ? MIG_E_RAM_BAD_FILL : MIG_E_RAM_CODED;
        }
    }
    return 0;
}

size_t mig_ram_record_offset(const struct mig_ram_parser *p, const uint8_t *buf, size_t i)
{
    size_t at = 0;

    for (size_t j = 0; j < i; j++) {
        if (p->src[j] >= 0) {
            at = (size_t)p->src[j] + p->length[j];
            continue;
        }
        /* a fill byte, behind the word and perhaps a name */
        if (!(mig_load_be64(buf + at) & MIG_RAM_CONTINUE)) {
            at += 1 + (size_t)buf[at + MIG_RAM_WORD];
        }
        at += MIG_RAM_WORD + 1;
    }
    return at;
}
