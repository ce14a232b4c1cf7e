/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Records of the `ram` section: a batch of pages out, a burst of records in.
 *
 *   0        8                          a word: offset in the block | flags, big-endian
 *   +--------+--------+-----  - - -
 *   |  word  |len|name|  contents       len and name only without CONTINUE;
 *   +--------+--------+-----  - - -     PAGE: page_size bytes, ZERO: one byte
 */
#include "endian.h"
#include "mig.h"

/* ---- out ----------------------------------------------------------------------------------- */

static void out_bytes(struct mig_out *out, const uint8_t *bytes, size_t nbytes)
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

/* The bytes just written at the end of the arena become part of the queue. */
static void out_arena(struct mig_out *out, size_t nbytes)
{
    const uint8_t *start = out->arena + out->used;

    out->used += nbytes;
    out_bytes(out, start, nbytes);
}

bool mig_out_copy(struct mig_out *out, const void *bytes, size_t nbytes)
{
    if (out->arena_size - out->used < nbytes || out->niov == out->max_iov) {
        return false;
    }
    if (nbytes) {
        memcpy(out->arena + out->used, bytes, nbytes);
        out_arena(out, nbytes);
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
            out_bytes(out, page - MIG_RAM_WORD, MIG_RAM_WORD + pages->page_size);
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
        out_arena(out, nbytes);
        if (!is_zero) {
            out_bytes(out, page, pages->page_size);
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
    p->npages = p->nfill = 0;
    return error;
}

static int stop_more(struct mig_ram_parser *p, size_t need)
{
    p->need = need;
    return MIG_RAM_STOP_MORE;
}

int mig_ram_parse(struct mig_ram_parser *p, const uint8_t *buf, size_t len)
{
    const uint64_t mask = p->page_size - 1;

    p->npages = p->nfill = p->consumed = p->need = 0;
    for (;;) {
        const uint8_t *rec = buf + p->consumed;
        size_t left = len - p->consumed, head = MIG_RAM_WORD, body;
        int64_t block = p->current;
        uint64_t word, flags, page;

        if (p->npages == p->capacity) {
            return MIG_RAM_STOP_FULL;
        }
        if (left < head) {
            return stop_more(p, head);
        }
        word = p->word = mig_load_be64(rec);
        flags = word & mask & ~(uint64_t)MIG_RAM_CONTINUE;
        if (flags == MIG_RAM_EOS) {
            p->consumed += head;
            return MIG_RAM_STOP_EOS;
        }
        if (flags != MIG_RAM_PAGE && flags != MIG_RAM_ZERO) {
            return MIG_RAM_STOP_OTHER;
        }
        body = flags == MIG_RAM_PAGE ? p->page_size : 1;
        if (!(word & MIG_RAM_CONTINUE)) {
            if (left < head + 1) {
                return stop_more(p, head + 1);
            }
            head += 1 + (size_t)rec[MIG_RAM_WORD];
            if (left < head) {
                return stop_more(p, head);
            }
            block = find_block(p, rec + MIG_RAM_WORD + 1, rec[MIG_RAM_WORD]);
            if (block < 0) {
                return stop_error(p, -1, (int)block);
            }
            if (p->npages && block != p->current) {
                return MIG_RAM_STOP_SWITCH;
            }
        } else if (block < 0) {
            return stop_error(p, -1, MIG_E_RAM_NO_BLOCK);
        }
        page = (word & ~mask) / p->page_size;
        if (page >= p->blocks[block].npages) {
            return stop_error(p, block, MIG_E_RAM_BAD_OFFSET);
        }
        if (left < head + body) {
            return stop_more(p, head + body);
        }
        p->current = block;
        p->page[p->npages] = page;
        p->src[p->npages] = flags == MIG_RAM_PAGE ? (int64_t)(p->consumed + head)
                                                  : -1 - (int64_t)rec[head];
        p->npages++;
        p->nfill += flags == MIG_RAM_ZERO;
        p->consumed += head + body;
    }
}

/* Whether the page holds the fill byte already. */
static bool is_filled(const struct mig_kernels *k, const uint8_t *page, size_t page_size, int fill)
{
    return fill == 0 && k->is_zero(page, page_size);
}

void mig_ram_place(const struct mig_kernels *k, const struct mig_pages *pages, uint64_t *received,
                   bool fresh, const uint8_t *buf, const uint64_t *index, const int64_t *src,
                   size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint8_t *page = pages->base + index[i] * pages->page_size;
        int fill = (int)(-1 - src[i]);

        if (src[i] >= 0) {
            memcpy(page, buf + src[i], pages->page_size);
        } else if (fill != 0 || !fresh || mig_bitmap_test_atomic(received, index[i])) {
            if (!is_filled(k, page, pages->page_size, fill)) {
                memset(page, fill, pages->page_size);
            }
        }
        /* channels of multifd set bits of the same words */
        mig_bitmap_set_atomic(received, index[i], 1);
    }
}

size_t mig_ram_index(int64_t *where, int64_t start, const uint64_t *index, const int64_t *src,
                     size_t n)
{
    size_t odd = 0;

    for (size_t i = 0; i < n; i++) {
        where[index[i]] = src[i] < 0 ? MIG_PAGE_ZERO : start + src[i];
        odd += src[i] < -1;
    }
    return odd;
}
