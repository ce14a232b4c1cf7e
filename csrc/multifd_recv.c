/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The receiving side of multifd: channels that put packets where their pages belong, and wait for
 * each other at every SYNC. See multifd.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "endian.h"
#include "multifd.h"

/* What one channel works with. */
struct lane {
    struct mig_mfd_receiver *r;
    const struct mig_kernels *k;
    const struct mig_fd *fd;
    unsigned id;
    struct mig_mfd_packet packet;
    uint8_t *head; /* the packet on the wire */
    struct mig_coder coder;
    uint8_t *coded, *plain; /* data of a packet, before and after the codec */
    size_t max_coded;
    struct mig_ram_parser burst; /* the packet, as if it were records in `plain` */
    uint64_t *raw;               /* pages of an adaptive packet that are read into memory */
    struct iovec *iov;
    struct mig_mappedlog_writer writer; /* to r->file */
};

int mig_mfd_receiver_open(struct mig_mfd_receiver *r, unsigned nchannels, size_t page_size)
{
    pthread_condattr_t clock;

    memset(r, 0, sizeof(*r));
    r->page_size = page_size;
    r->nchannels = nchannels;
    r->reached = calloc(nchannels, sizeof(*r->reached));
    r->ended = calloc(nchannels, sizeof(*r->ended));
    for (unsigned i = 0; r->ended && i < nchannels; i++) {
        r->ended[i] = -1;
    }
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->arrived, &clock);
    pthread_cond_init(&r->released, NULL);
    pthread_condattr_destroy(&clock);
    return r->reached && r->ended ? 0 : MIG_E_NOMEM;
}

void mig_mfd_receiver_close(struct mig_mfd_receiver *r)
{
    if (r->nchannels) {
        pthread_mutex_destroy(&r->lock);
        pthread_cond_destroy(&r->arrived);
        pthread_cond_destroy(&r->released);
    }
    free(r->reached);
    free(r->ended);
    memset(r, 0, sizeof(*r));
}

/* ---- channels wait for each other ----------------------------------------------------------- */

/* An error belongs to the channel that had it: for all others it is the end. */
static int state(const struct mig_mfd_receiver *r)
{
    return r->stopped ? MIG_E_MFD_STOPPED : 0;
}

static int arrive(struct lane *l)
{
    struct mig_mfd_receiver *r = l->r;
    int rc = r->file ? mig_mappedlog_flush(&l->writer) : 0;

    if (rc < 0) {
        return rc;
    }
    pthread_mutex_lock(&r->lock);
    r->reached[l->id]++;
    pthread_cond_signal(&r->arrived);
    while (r->syncs < r->reached[l->id] && !state(r)) {
        pthread_cond_wait(&r->released, &r->lock);
    }
    rc = state(r);
    pthread_mutex_unlock(&r->lock);
    return rc;
}

/* 1 when all channels have come to the next SYNC, 0 when not yet. With the lock held. */
static int all_arrived(const struct mig_mfd_receiver *r)
{
    int all = 1;

    if (state(r)) {
        return state(r);
    }
    for (unsigned i = 0; i < r->nchannels; i++) {
        if (r->reached[i] <= r->syncs) {
            if (r->ended[i] >= 0) {
                return MIG_E_MFD_GONE;
            }
            all = 0;
        }
    }
    return all;
}

int mig_mfd_receive_sync(struct mig_mfd_receiver *r, int timeout_ms)
{
    struct timespec end;
    uint64_t before = UINT64_MAX;
    int rc;

    pthread_mutex_lock(&r->lock);
    while ((rc = all_arrived(r)) == 0) {
        /* the limit is on the time without a byte */
        if (before != r->nbytes) {
            before = r->nbytes;
            clock_gettime(CLOCK_MONOTONIC, &end);
            end.tv_sec += timeout_ms / 1000;
            end.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
            end.tv_sec += end.tv_nsec / 1000000000;
            end.tv_nsec %= 1000000000;
        }
        if (timeout_ms < 0) {
            pthread_cond_wait(&r->arrived, &r->lock);
        } else if (pthread_cond_timedwait(&r->arrived, &r->lock, &end) == ETIMEDOUT &&
                   before == r->nbytes) {
            rc = MIG_E_TIMEOUT;
            break;
        }
    }
    if (rc > 0) {
        r->syncs++;
        pthread_cond_broadcast(&r->released);
        rc = 0;
    }
    pthread_mutex_unlock(&r->lock);
    return rc;
}

void mig_mfd_receive_stop(struct mig_mfd_receiver *r)
{
    pthread_mutex_lock(&r->lock);
    r->stopped = true;
    pthread_cond_broadcast(&r->arrived);
    pthread_cond_broadcast(&r->released);
    pthread_mutex_unlock(&r->lock);
}

/* ---- packets -------------------------------------------------------------------------------- */

/* Exactly `nbytes` bytes. */
static int read_all(const struct lane *l, uint8_t *bytes, size_t nbytes)
{
    int64_t n = mig_fd_read(l->fd, bytes, nbytes, nbytes);

    return n < 0 ? (int)n : (size_t)n < nbytes ? MIG_E_MFD_CUT : 0;
}

/* Exactly these pages, straight to where they belong. */
static int read_pages(struct lane *l, const struct mig_mfd_block *block, const uint64_t *index,
                      size_t n)
{
    size_t page_size = l->r->page_size, niov = 0;
    int64_t got;

    for (size_t i = 0; i < n; i++) {
        uint8_t *page = block->pages->base + index[i] * page_size;
        struct iovec *last = niov ? &l->iov[niov - 1] : NULL;

        if (last && (uint8_t *)last->iov_base + last->iov_len == page) {
            last->iov_len += page_size;
        } else {
            l->iov[niov++] = (struct iovec){.iov_base = page, .iov_len = page_size};
        }
    }
    got = mig_fd_readv(l->fd, l->iov, niov);
    if (got < 0) {
        return (int)got;
    }
    if ((size_t)got < n * page_size) {
        return MIG_E_MFD_CUT;
    }
    for (size_t i = 0; i < n; i++) {
        mig_bitmap_set_atomic(block->received, index[i], 1);
    }
    return 0;
}

static const struct mig_mfd_block *find_block(const struct lane *l)
{
    size_t length = strlen(l->packet.name);

    for (size_t i = 0; i < l->r->nblocks; i++) {
        const struct mig_ram_block *ram = &l->r->ram_blocks[i];

        if (ram->name_len == length && memcmp(ram->name, l->packet.name, length) == 0) {
            return &l->r->blocks[i];
        }
    }
    return NULL;
}

/* Whether the packet can be what it says; its data are not read yet. */
static int check(const struct lane *l, const struct mig_mfd_block *block)
{
    const struct mig_mfd_packet *p = &l->packet;
    static const uint32_t flag_of[] = {[MIG_CODEC_ZLIB] = MIG_MFD_ZLIB,
                                       [MIG_CODEC_ZSTD] = MIG_MFD_ZSTD,
                                       [MIG_CODEC_ADAPTIVE] = MIG_MFD_ADAPTIVE};
    enum mig_codec codec = l->r->codec;
    uint64_t npages = l->r->ram_blocks[block - l->r->blocks].npages;

    /* without pages the length may be anything: QEMU 7.2 leaves that of another packet there */
    if (p->normal) {
        if ((p->flags & MIG_MFD_CODECS) != flag_of[codec]) {
            return MIG_E_MFD_CODEC;
        }
        if (codec == MIG_CODEC_NONE ? p->next_size != p->normal * l->r->page_size
                                    : !p->next_size || p->next_size > l->max_coded) {
            return MIG_E_MFD_SIZE;
        }
    }
    for (size_t i = 0; i < p->normal + p->zero; i++) {
        if (p->page[i] >= npages) {
            return MIG_E_MFD_OFFSET;
        }
    }
    return 0;
}

/* The pages of a packet into the file, from where they arrive. */
static int read_to_file(struct lane *l, const struct mig_mfd_block *block)
{
    const struct mig_mfd_packet *p = &l->packet;
    uint8_t *bytes;
    int rc = mig_mappedlog_room(&l->writer, &bytes);

    if (rc == 0) {
        rc = read_all(l, bytes, p->normal * l->r->page_size);
    }
    if (rc == 0) {
        rc = mig_mappedlog_write(&l->writer, &l->r->file->blocks[block - l->r->blocks], p->page,
                                p->normal);
    }
    return rc;
}

/* Adds a record to the burst, of `nbytes` bytes at `src`. */
static void add(struct lane *l, uint16_t kind, uint64_t page, int64_t src, size_t nbytes)
{
    struct mig_ram_parser *b = &l->burst;

    b->kind[b->npages] = kind;
    b->page[b->npages] = page;
    b->src[b->npages] = src;
    b->length[b->npages++] = (uint32_t)nbytes;
}

/* The packet's data into `plain`, or straight into memory. */
static int read_data(struct lane *l, const struct mig_mfd_block *block)
{
    const struct mig_mfd_packet *p = &l->packet;
    size_t page_size = l->r->page_size, nbytes = p->normal * page_size;
    int rc;

    if (l->r->codec == MIG_CODEC_NONE && block->pages) {
        return read_pages(l, block, p->page, p->normal);
    }
    if (l->r->codec == MIG_CODEC_NONE && l->r->file) {
        return read_to_file(l, block);
    }
    if (l->r->codec == MIG_CODEC_NONE) {
        rc = read_all(l, l->plain, nbytes);
    } else {
        rc = read_all(l, l->coded, p->next_size);
        if (rc == 0) {
            rc = mig_decode(&l->coder, l->coded, p->next_size, l->plain, nbytes);
        }
    }
    for (size_t i = 0; i < p->normal; i++) {
        add(l, MIG_RAM_PAGE, p->page[i], (int64_t)(i * page_size), page_size);
    }
    return rc;
}

/* Adds the records of an adaptive packet, whose raw pages follow each other from `raw` on, or are
 * put into index[...]. They come first: a peer may name a page twice, and what comes of it is not
 * to depend on where it goes. */
static void add_methods(struct lane *l, const struct mig_adaptive_data *d, size_t unpacked,
                        size_t raw, uint64_t *index)
{
    const struct mig_mfd_packet *p = &l->packet;
    const uint8_t *methods = l->plain, *length = l->plain + p->normal;
    size_t page_size = l->r->page_size, delta = d->deltas, nraw = 0;

    for (size_t i = 0; i < p->normal; i++) {
        if (methods[i] == MIG_METHOD_RAW && index) {
            index[nraw++] = p->page[i];
        } else if (methods[i] == MIG_METHOD_RAW) {
            add(l, MIG_RAM_PAGE, p->page[i], (int64_t)(raw + nraw++ * page_size), page_size);
        }
    }
    for (size_t i = 0; i < p->normal; i++) {
        if (methods[i] == MIG_METHOD_DELTA) {
            add(l, MIG_RAM_XBZRLE, p->page[i], (int64_t)delta, mig_load_be16(length));
            delta += mig_load_be16(length);
            length += 2;
        } else if (methods[i] == MIG_METHOD_ZSTD) {
            add(l, MIG_RAM_PAGE, p->page[i], (int64_t)unpacked, page_size);
            unpacked += page_size;
        }
    }
}

/* The same for an adaptive packet. */
static int read_adaptive(struct lane *l, const struct mig_mfd_block *block)
{
    const struct mig_mfd_packet *p = &l->packet;
    size_t page_size = l->r->page_size, n = p->normal, head, raw;
    struct mig_adaptive_data d;
    int rc = p->next_size < n ? MIG_E_MFD_SIZE : read_all(l, l->plain, n);

    if (rc == 0) {
        rc = mig_adaptive_methods(&d, l->plain, n, p->next_size, page_size);
    }
    if (rc < 0) {
        return rc;
    }
    head = p->next_size - d.nraw * page_size;
    raw = head + d.nzstd * page_size;
    rc = read_all(l, l->plain + n, head - n);
    if (rc == 0) {
        rc = mig_adaptive_layout(&d, l->plain, n, head);
    }
    if (rc == 0 && d.nzstd) {
        rc = mig_decode(&l->coder, l->plain + d.zstd, d.zstd_nbytes, l->plain + head, raw - head);
    }
    if (rc < 0) {
        return rc;
    }
    add_methods(l, &d, head, raw, block->pages ? l->raw : NULL);
    return block->pages ? read_pages(l, block, l->raw, d.nraw)
                        : read_all(l, l->plain + raw, d.nraw * page_size);
}

static int take_pages(struct lane *l)
{
    const struct mig_mfd_packet *p = &l->packet;
    const struct mig_mfd_receiver *r = l->r;
    const struct mig_mfd_block *block = find_block(l);
    int rc = block ? check(l, block) : MIG_E_MFD_NAME;

    l->burst.npages = 0;
    if (rc == 0 && p->normal) {
        rc = r->codec == MIG_CODEC_ADAPTIVE ? read_adaptive(l, block) : read_data(l, block);
    }
    if (rc < 0) {
        return rc;
    }
    for (size_t i = p->normal; i < p->normal + p->zero; i++) {
        add(l, MIG_RAM_ZERO, p->page[i], -1, 0);
    }
    l->burst.current = block - r->blocks;
    if (block->pages) {
        return mig_ram_place(l->k, &l->burst, block->pages, block->received, block->fresh,
                             l->plain);
    }
    if (r->file) {
        return mig_mappedlog_put(&l->writer, &l->burst, l->plain);
    }
    pthread_mutex_lock(r->log_lock);
    rc = mig_pagelog_put(r->log, &l->burst, block->where, l->plain);
    pthread_mutex_unlock(r->log_lock);
    return rc;
}

/* Accounts for the packet. A peer that never lets us wait must not keep us from seeing the end. */
static int count(struct lane *l)
{
    struct mig_mfd_receiver *r = l->r;
    const struct mig_mfd_packet *p = &l->packet;
    int rc;

    pthread_mutex_lock(&r->lock);
    r->nbytes += mig_mfd_packet_nbytes(r->page_size) + (p->normal ? p->next_size : 0);
    r->nnormal += p->normal;
    r->nzero += p->zero;
    rc = state(r);
    pthread_mutex_unlock(&r->lock);
    return rc;
}

/* The head of the next packet: its length, less where the connection ends before. The idle limit
 * begins with its first byte: a channel may have nothing to do for long while others have. */
static int64_t read_head(const struct lane *l, size_t nbytes)
{
    struct mig_fd patient = *l->fd;
    int64_t first, more = 0;

    patient.timeout_ms = -1;
    first = mig_fd_read(&patient, l->head, 1, nbytes);
    if (first > 0 && (size_t)first < nbytes) {
        size_t rest = nbytes - (size_t)first;

        more = mig_fd_read(l->fd, l->head + first, rest, rest);
    }
    return more < 0 ? more : first + more;
}

/* Packet after packet; 0 when the connection ends between two of them. */
static int work(struct lane *l, struct mig_mfd_place *place)
{
    size_t nbytes = mig_mfd_packet_nbytes(l->r->page_size);

    for (;;) {
        int64_t n = read_head(l, nbytes);
        int rc = 0;

        if (n <= 0) {
            return (int)n;
        }
        place->name[0] = 0;
        if ((size_t)n < nbytes) {
            return MIG_E_MFD_CUT;
        }
        rc = mig_mfd_get(&l->packet, l->r->page_size, l->head);
        if (rc == 0 && l->packet.normal + l->packet.zero) {
            memcpy(place->name, l->packet.name, MIG_MFD_NAME);
            rc = take_pages(l);
        }
        if (rc == 0) {
            rc = count(l);
            place->offset += nbytes + (l->packet.normal ? l->packet.next_size : 0);
            place->npackets++;
        }
        if (rc == 0 && (l->packet.flags & MIG_MFD_SYNC)) {
            rc = arrive(l);
        }
        if (rc < 0) {
            return rc;
        }
    }
}

/* ---- a channel ------------------------------------------------------------------------------ */

static int open_lane(struct lane *l)
{
    size_t page_size = l->r->page_size, max_pages = mig_mfd_max_pages(page_size);
    bool adapts = l->r->codec == MIG_CODEC_ADAPTIVE;
    bool codes = l->r->codec != MIG_CODEC_NONE && !adapts;

    l->packet.page = calloc(max_pages, sizeof(*l->packet.page));
    l->burst.blocks = l->r->ram_blocks;
    l->burst.nblocks = l->r->nblocks;
    l->burst.page_size = page_size;
    l->burst.page = calloc(max_pages, sizeof(*l->burst.page));
    l->burst.src = calloc(max_pages, sizeof(*l->burst.src));
    l->burst.length = calloc(max_pages, sizeof(*l->burst.length));
    l->burst.kind = calloc(max_pages, sizeof(*l->burst.kind));
    l->iov = calloc(max_pages, sizeof(*l->iov));
    l->head = malloc(mig_mfd_packet_nbytes(page_size));
    l->raw = calloc(max_pages, sizeof(*l->raw));
    l->max_coded = adapts ? mig_adaptive_bound(max_pages, page_size) + max_pages * page_size
                          : mig_codec_bound(l->r->codec, max_pages * page_size);
    l->plain = malloc(max_pages * page_size + (adapts ? l->max_coded : 0));
    l->coded = codes ? malloc(l->max_coded) : NULL;
    if (!l->packet.page || !l->burst.page || !l->burst.src || !l->burst.length || !l->burst.kind ||
        !l->raw || !l->iov || !l->head || !l->plain || (codes && !l->coded)) {
        return MIG_E_NOMEM;
    }
    return mig_decoder_open(&l->coder, adapts ? MIG_CODEC_ZSTD : l->r->codec);
}

static void close_lane(struct lane *l)
{
    mig_decoder_close(&l->coder);
    free(l->packet.page);
    free(l->burst.page);
    free(l->burst.src);
    free(l->burst.length);
    free(l->burst.kind);
    free(l->raw);
    free(l->iov);
    free(l->head);
    free(l->plain);
    free(l->coded);
}

int mig_mfd_receive_channel(struct mig_mfd_receiver *r, const struct mig_kernels *k, unsigned id,
                            const struct mig_fd *fd, struct mig_mfd_place *place)
{
    struct lane l = {.r = r, .k = k, .fd = fd, .id = id};
    int rc = open_lane(&l);

    if (rc == 0 && r->file) {
        rc = mig_mappedlog_open(&l.writer, r->file);
    }
    if (rc == 0) {
        rc = work(&l, place);
    }
    if (rc == 0 && r->file) {
        rc = mig_mappedlog_flush(&l.writer);
    }
    if (r->file) {
        mig_mappedlog_close(&l.writer);
    }
    close_lane(&l);
    pthread_mutex_lock(&r->lock);
    r->ended[id] = (int64_t)place->offset;
    r->stopped = r->stopped || rc < 0;
    pthread_cond_broadcast(&r->arrived);
    pthread_cond_broadcast(&r->released);
    pthread_mutex_unlock(&r->lock);
    return rc;
}
