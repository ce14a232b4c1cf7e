/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The header of a multifd packet: see multifd.h. */
#include <string.h>

#include "endian.h"
#include "multifd.h"

enum { NAME_AT = MIG_MFD_HEADER - MIG_MFD_NAME };

void mig_mfd_put(const struct mig_mfd_packet *p, size_t page_size, uint8_t *out)
{
    size_t n = p->normal + p->zero;

    memset(out, 0, mig_mfd_packet_nbytes(page_size));
    mig_store_be32(out, MIG_MFD_MAGIC);
    mig_store_be32(out + 4, MIG_MFD_VERSION);
    mig_store_be32(out + 8, p->flags);
    mig_store_be32(out + 12, (uint32_t)mig_mfd_max_pages(page_size));
    mig_store_be32(out + 16, p->normal);
    mig_store_be32(out + 20, p->next_size);
    mig_store_be64(out + 24, p->number);
    mig_store_be32(out + 32, p->zero);
    memcpy(out + NAME_AT, p->name, MIG_MFD_NAME);
    for (size_t i = 0; i < n; i++) {
        mig_store_be64(out + MIG_MFD_HEADER + i * 8, p->page[i] * page_size);
    }
}

int mig_mfd_get(struct mig_mfd_packet *p, size_t page_size, const uint8_t *in)
{
    size_t max = mig_mfd_max_pages(page_size), n;

    if (mig_load_be32(in) != MIG_MFD_MAGIC) {
        return MIG_E_MFD_MAGIC;
    }
    if (mig_load_be32(in + 4) != MIG_MFD_VERSION) {
        return MIG_E_MFD_VERSION;
    }
    p->flags = mig_load_be32(in + 8);
    p->normal = mig_load_be32(in + 16);
    p->next_size = mig_load_be32(in + 20);
    p->number = mig_load_be64(in + 24);
    p->zero = mig_load_be32(in + 32);
    memcpy(p->name, in + NAME_AT, MIG_MFD_NAME);
    p->name[MIG_MFD_NAME - 1] = 0;
    /* what QEMU 10 calls DEVICE_STATE is followed by something else than offsets */
    if (p->flags & ~(uint32_t)(MIG_MFD_SYNC | MIG_MFD_CODECS)) {
        return MIG_E_MFD_FLAGS;
    }
    /* more room for offsets than is known of: the data would not start where they are looked for */
    if (mig_load_be32(in + 12) > max) {
        return MIG_E_MFD_PAGES;
    }
    if (p->normal > max || p->zero > max - p->normal) {
        return MIG_E_MFD_PAGES;
    }
    n = p->normal + p->zero;
    for (size_t i = 0; i < n; i++) {
        uint64_t offset = mig_load_be64(in + MIG_MFD_HEADER + i * 8);

        if (offset % page_size) {
            return MIG_E_MFD_OFFSET;
        }
        p->page[i] = offset / page_size;
    }
    return 0;
}
