/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Records of the `ram` section: a batch of pages out, a burst of records in.
 *
 *   0        8                          a word: offset in the block | flags, big-endian
 *   +--------+--------+-----  - - -
 *   |  word  |len|name|  contents       len and name only without CONTINUE;
 *   +--------+--------+-----  - - -     PAGE: page_size bytes, ZERO: one byte,
 *   +--------+--------+-----  - - -     XBZRLE: a byte 1, be16 length, so many bytes,
 *                                       COMPRESS: be32 length, so many bytes
 */
#include "endian.h"
#include "mig.h"

/* ---- out ----------------------------------------------------------------------------------- */

void mig_out_bytes(struct mig_out *out, const uint8_t *bytes, size_t nbytes)
{
    struct iovec *last = out->niov ? &out->iov[out->niov - 1] : NULL;

    if (last && (const uint8_t *)last->iov_base + last->iov_len == bytes) {
        last->iov_len += nbytes;
    } else {
        out->iov[out->niov].iov_base = (void *)(uintptr_t)bytes;
        out->iov[out->niov].iov_len = nbytes;
        out->niov++;
    }
    out->nbytes += nbytes;
}

void mig_out_arena(struct mig_out *out, size_t nbytes)
{
    const uint8_t *start = out->arena + out->used;

    out->used += nbytes;
    mig_out_bytes(out, start, nbytes);
}

bool mig_out_copy(struct mig_out *out, const void *bytes, size_t nbytes)
{
    if (out->arena_size - out->used < nbytes || out->niov == out->max_iov) {
        return false;
    }
    if (nbytes) {
        memcpy(out->arena + out->used, bytes, nbytes);
        mig_out_arena(out, nbytes);
    }
    return true;
}

size_t mig_ram_encode(struct mig_out *out, const struct mig_pages *pages, const char *name,
                      size_t name_len, const uint64_t *index, size_t first, size_t n,
                      const uint64_t *zero)
{
    size_t room = MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME + 1, i;

    for (i = first; i < n; i++) {
        const uint8_t *page = mig_page(pages, index[i]);
        bool is_zero = !page || (zero && mig_bitmap_test(zero, i));
        uint64_t word = index[i] * pages->page_size | (is_zero ? MIG_RAM_ZERO : MIG_RAM_PAGE);
        uint8_t *at = out->arena + out->used, header[MIG_RAM_WORD];
        size_t nbytes = MIG_RAM_WORD;

        /* a record takes at most two iovecs: its header and its page */
        if (out->arena_size - out->used < room || out->max_iov - out->niov < 2) {
            break;
        }
        if (!name) {
            word |= MIG_RAM_CONTINUE;
        }
        mig_store_be64(header, word);
        /* In the file of a captured VM the record stands complete before our eyes: send it from
         * there, so that a run of such records is one piece. */
        if (!is_zero && !name && pages->where && pages->where[index[i]] >= MIG_RAM_WORD &&
            memcmp(page - MIG_RAM_WORD, header, MIG_RAM_WORD) == 0) {
            mig_out_bytes(out, page - MIG_RAM_WORD, MIG_RAM_WORD + pages->page_size);
            continue;
        }
        memcpy(at, header, MIG_RAM_WORD);
        if (name) {
            at[nbytes] = (uint8_t)name_len;
            memcpy(at + nbytes + 1, name, name_len);
            nbytes += 1 + name_len;
            name = NULL;
        }
        if (is_zero) {
            at[nbytes++] = 0;
        }
        mig_out_arena(out, nbytes);
        if (!is_zero) {
            mig_out_bytes(out, page, pages->page_size);
        }
    }
    return i;
}

/* ---- in ------------------------------------------------------------------------------------ */

static bool is_named(const struct mig_ram_block *block, const uint8_t *name, size_t len)
{
    return block->name_len == len && memcmp(block->name, name, len) == 0;
}

static int64_t find_block(const struct mig_ram_parser *p, const uint8_t *name, size_t len)
{
    if (p->current >= 0 && is_named(&p->blocks[p->current], name, len)) {
        return p->current;
    }
    for (size_t i = 0; i < p->nblocks; i++) {
        if (is_named(&p->blocks[i], name, len)) {
            return (int64_t)i;
        }
    }
    return MIG_E_RAM_UNKNOWN_BLOCK;
}

/* `current` tells where the error is; the pages before it are of no use any more. */
static int stop_error(struct mig_ram_parser *p, int64_t block, int error)
{
    p->current = block;
    p->npages = p->nfill = p->nxbzrle = p->npacked = 0;
    return error;
}

static int stop_more(struct mig_ram_parser *p, size_t need)
{
    p->need = need;
    return MIG_RAM_STOP_MORE;
}

/* The fields between a record's name and its bytes: *nfields bytes, and *nbytes that follow. 0,
 * MIG_RAM_STOP_OTHER when `left` is less than these fields, or MIG_E_*. */
static int read_fields(const struct mig_ram_parser *p, uint64_t flags, const uint8_t *at,
                       size_t left, size_t *nfields, size_t *nbytes)
{
    *nfields = 0;
    *nbytes = flags == MIG_RAM_PAGE ? p->page_size : 1;
    if (flags == MIG_RAM_XBZRLE) {
        *nfields = MIG_RAM_XBZRLE_FIELDS;
        if (left < *nfields) {
            return MIG_RAM_STOP_OTHER;
        }
        if (at[0] != MIG_RAM_XBZRLE_CODING) {
            return MIG_E_RAM_BAD_CODING;
        }
        *nbytes = mig_load_be16(at + 1);
        if (*nbytes > p->page_size) {
            return MIG_E_RAM_BAD_LENGTH;
        }
    } else if (flags == MIG_RAM_COMPRESS) {
        *nfields = MIG_RAM_COMPRESS_FIELDS;
        if (left < *nfields) {
            return MIG_RAM_STOP_OTHER;
        }
        *nbytes = mig_load_be32(at);
        if (*nbytes > mig_ram_compress_bound(p->page_size)) {
            return MIG_E_RAM_BAD_LENGTH;
        }
    }
    return 0;
}

/* The block of the record, -1 for none, and the length of its word and name. `need` is set when they
 * are not all there. */
static int64_t read_block(struct mig_ram_parser *p, const uint8_t *rec, size_t left, size_t *head)
{
    *head = MIG_RAM_WORD;
    if (p->word & MIG_RAM_CONTINUE) {
        return p->current;
    }
    p->need = *head + 1;
    if (left >= p->need) {
        p->need += (size_t)rec[MIG_RAM_WORD];
    }
    if (left < p->need) {
        return -1;
    }
    *head = p->need;
    p->need = 0;
    return find_block(p, rec + MIG_RAM_WORD + 1, rec[MIG_RAM_WORD]);
}

enum { RECORDS_AHEAD = 8 };

static bool is_page(uint64_t flags)
{
    return flags == MIG_RAM_PAGE || flags == MIG_RAM_ZERO || flags == MIG_RAM_XBZRLE ||
           flags == MIG_RAM_COMPRESS;
}

static void take(struct mig_ram_parser *p, uint64_t page, uint64_t flags, const uint8_t *rec,
                 size_t head, size_t nbytes)
{
    size_t i = p->npages++;
    bool fill = flags == MIG_RAM_ZERO;

    p->page[i] = page;
    p->kind[i] = (uint16_t)flags;
    p->src[i] = fill ? -1 - (int64_t)rec[head] : (int64_t)(p->consumed + head);
    p->length[i] = fill ? 0 : (uint32_t)nbytes;
    p->nfill += fill;
    p->nxbzrle += flags == MIG_RAM_XBZRLE;
    if (flags == MIG_RAM_COMPRESS) {
        p->packed[p->npacked++] = (uint32_t)i;
    }
    p->consumed += head + nbytes;
    if (flags == MIG_RAM_PAGE) {
        /* the records behind are most likely as long: their words would be waited for one by one */
        __builtin_prefetch(rec + RECORDS_AHEAD * (head + nbytes));
    }
}

int mig_ram_parse(struct mig_ram_parser *p, const uint8_t *buf, size_t len)
{
    const uint64_t mask = p->page_size - 1;

    p->npages = p->nfill = p->nxbzrle = p->npacked = p->consumed = p->need = 0;
    for (;;) {
        const uint8_t *rec = buf + p->consumed;
        size_t left = len - p->consumed, head, nfields, nbytes;
        uint64_t flags, page;
        int64_t block;
        int rc;

        if (p->npages == p->capacity || (p->npacked && p->npacked == p->max_packed)) {
            return MIG_RAM_STOP_FULL;
        }
        if (left < MIG_RAM_WORD) {
            return stop_more(p, MIG_RAM_WORD);
        }
        p->word = mig_load_be64(rec);
        flags = p->word & mask & ~(uint64_t)MIG_RAM_CONTINUE;
        if (flags == MIG_RAM_EOS) {
            p->consumed += MIG_RAM_WORD;
            return MIG_RAM_STOP_EOS;
        }
        if (!is_page(flags)) {
            return MIG_RAM_STOP_OTHER;
        }
        block = read_block(p, rec, left, &head);
        if (p->need) {
            return MIG_RAM_STOP_MORE;
        }
        if (block < 0) {
            return stop_error(p, -1, block == -1 ? MIG_E_RAM_NO_BLOCK : (int)block);
        }
        if (p->npages && block != p->current) {
            return MIG_RAM_STOP_SWITCH;
        }
        page = (p->word & ~mask) / p->page_size;
        if (page >= p->blocks[block].npages) {
            return stop_error(p, block, MIG_E_RAM_BAD_OFFSET);
        }
        rc = read_fields(p, flags, rec + head, left - head, &nfields, &nbytes);
        if (rc < 0) {
            return stop_error(p, block, rc);
        }
        if (rc || left - head - nfields < nbytes) {
            return stop_more(p, head + nfields + (rc ? 0 : nbytes));
        }
        p->current = block;
        take(p, page, flags, rec, head + nfields, nbytes);
    }
}
