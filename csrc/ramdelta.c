/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Page records against the XBZRLE cache: see mig.h. */
#include "endian.h"
#include "mig.h"

/* Longest encoding that its be16 can say. */
enum { MAX_ENCODING = 0xffff };

/* The word, and the block's name if it is given, at the end of the arena; returns their length. */
static size_t put_head(struct mig_out *out, uint64_t word, const char *name, size_t name_len)
{
    uint8_t *at = out->arena + out->used;

    mig_store_be64(at, name ? word : word | MIG_RAM_CONTINUE);
    if (!name) {
        return MIG_RAM_WORD;
    }
    at[MIG_RAM_WORD] = (uint8_t)name_len;
    memcpy(at + MIG_RAM_WORD + 1, name, name_len);
    return MIG_RAM_WORD + 1 + name_len;
}

static void put_zero(struct mig_out *out, struct mig_delta *d, uint64_t offset, const char *name,
                     size_t name_len)
{
    size_t head = put_head(out, offset | MIG_RAM_ZERO, name, name_len);

    out->arena[out->used + head] = 0;
    mig_out_arena(out, head + 1);
    mig_cache_insert(d->cache, d->address + offset, NULL, d->generation);
    d->zero++;
}

static void count(struct mig_delta *d, int32_t result, size_t head, size_t page_size)
{
    switch (result) {
    case MIG_CACHE_MISS:
        d->missed++;
        break;
    case MIG_CACHE_REFUSED:
        d->refused++;
        break;
    case MIG_CACHE_SAME:
        d->unchanged++;
        break;
    case MIG_CACHE_OVERFLOW:
        d->overflows++;
        d->record_bytes += page_size;
        break;
    default:
        d->encoded++;
        d->encoded_bytes += (uint64_t)result;
        d->record_bytes += head - MIG_RAM_WORD + MIG_RAM_XBZRLE_FIELDS + (uint64_t)result;
    }
}

/* Whether it made a record. */
static bool put_page(struct mig_out *out, struct mig_delta *d, const uint8_t *page,
                     uint64_t offset, const char *name, size_t name_len)
{
    struct mig_cache *cache = d->cache;
    size_t page_size = cache->page_size;
    size_t head = MIG_RAM_WORD + (name ? 1 + name_len : 0);
    uint8_t *fields = out->arena + out->used + head;
    const uint8_t *copy;
    int32_t result = mig_cache_encode_page(
        d->kernels, cache, page, d->address + offset, d->generation, d->last_stage,
        fields + MIG_RAM_XBZRLE_FIELDS, page_size < MAX_ENCODING ? page_size : MAX_ENCODING, &copy);

    count(d, result, head, page_size);
    if (result == MIG_CACHE_SAME) {
        return false;
    }
    if (result > 0) {
        put_head(out, offset | MIG_RAM_XBZRLE, name, name_len);
        fields[0] = MIG_RAM_XBZRLE_CODING;
        mig_store_be16(fields + 1, (unsigned)result);
        mig_out_arena(out, head + MIG_RAM_XBZRLE_FIELDS + (size_t)result);
        return true;
    }
    put_head(out, offset | MIG_RAM_PAGE, name, name_len);
    mig_out_arena(out, head);
    mig_out_bytes(out, copy ? copy : page, page_size);
    if (copy) {
        mig_cache_queue(cache, d->address + offset);
    }
    return true;
}

size_t mig_delta_encode(struct mig_out *out, struct mig_delta *d, const struct mig_pages *pages,
                        const char *name, size_t name_len, const uint64_t *index, size_t first,
                        size_t n, const uint64_t *zero)
{
    size_t room = mig_delta_room(pages->page_size), i;

    for (i = first; i < n; i++) {
        uint64_t offset = index[i] * pages->page_size;
        bool sent = true;

        if (out->arena_size - out->used < room || out->max_iov - out->niov < 2 ||
            mig_cache_is_queued(d->cache, d->address + offset)) {
            break;
        }
        if (i + 1 < n) {
            mig_cache_fetch(d->cache, mig_page(pages, index[i + 1]),
                            d->address + index[i + 1] * pages->page_size);
        }
        if (zero && mig_bitmap_test(zero, i)) {
            put_zero(out, d, offset, name, name_len);
        } else {
            sent = put_page(out, d, mig_page(pages, index[i]), offset, name, name_len);
        }
        if (sent) {
            name = NULL;
        }
    }
    return i;
}
