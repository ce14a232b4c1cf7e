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
    int64_t *src; /* where in `plain` each page is */
    struct iovec *iov;
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
    int rc;

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

/* Exactly the pages of the packet, straight to where they belong. */
static int read_pages(struct lane *l, const struct mig_mfd_block *block)
{
    const struct mig_mfd_packet *p = &l->packet;
    size_t page_size = l->r->page_size, n = 0;
    int64_t got;

    for (size_t i = 0; i < p->normal; i++) {
        uint8_t *page = block->pages->base + p->page[i] * page_size;

        if (n && (uint8_t *)l->iov[n - 1].iov_base + l->iov[n - 1].iov_len == page) {
            l->iov[n - 1].iov_len += page_size;
        } else {
            l->iov[n++] = (struct iovec){.iov_base = page, .iov_len = page_size};
        }
    }
    got = mig_fd_readv(l->fd, l->iov, n);
    if (got < 0) {
        return (int)got;
    }
    if ((size_t)got < p->normal * page_size) {
        return MIG_E_MFD_CUT;
    }
    for (size_t i = 0; i < p->normal; i++) {
        mig_bitmap_set_atomic(block->received, p->page[i], 1);
    }
    return 0;
}

static const struct mig_mfd_block *find_block(const struct lane *l)
{
    size_t length = strlen(l->packet.name);

    for (size_t i = 0; i < l->r->nblocks; i++) {
        const struct mig_mfd_block *block = &l->r->blocks[i];

        if (block->ram.name_len == length && memcmp(block->ram.name, l->packet.name, length) == 0) {
            return block;
        }
    }
    return NULL;
}

/* Whether the packet can be what it says; its data are not read yet. */
static int check(const struct lane *l, const struct mig_mfd_block *block)
{
    const struct mig_mfd_packet *p = &l->packet;
    static const uint32_t flag_of[] = {[MIG_CODEC_ZLIB] = MIG_MFD_ZLIB,
                                       [MIG_CODEC_ZSTD] = MIG_MFD_ZSTD};
    enum mig_codec codec = l->r->codec;

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
        if (p->page[i] >= block->ram.npages) {
            return MIG_E_MFD_OFFSET;
        }
    }
    return 0;
}

/* The packet's data into `plain`. */
static int read_data(struct lane *l)
{
    const struct mig_mfd_packet *p = &l->packet;
    int rc;

    if (l->r->codec == MIG_CODEC_NONE || !p->normal) {
        return read_all(l, l->plain, p->normal * l->r->page_size);
    }
    rc = read_all(l, l->coded, p->next_size);
    if (rc == 0) {
        rc = mig_decode(&l->coder, l->coded, p->next_size, l->plain,
                        p->normal * l->r->page_size);
    }
    return rc;
}

static int take_pages(struct lane *l)
{
    const struct mig_mfd_packet *p = &l->packet;
    const struct mig_mfd_receiver *r = l->r;
    const struct mig_mfd_block *block = find_block(l);
    size_t first = 0;
    int rc = block ? check(l, block) : MIG_E_MFD_NAME;

    if (rc == 0 && block->pages && r->codec == MIG_CODEC_NONE) {
        rc = read_pages(l, block);
        first = p->normal;
    } else if (rc == 0) {
        rc = read_data(l);
    }
    if (rc < 0) {
        return rc;
    }
    for (size_t i = 0; i < p->normal + p->zero; i++) {
        l->src[i] = i < p->normal ? (int64_t)(i * r->page_size) : -1;
    }
    if (block->pages) {
        mig_ram_place(l->k, block->pages, block->received, block->fresh, l->plain,
                      p->page + first, l->src + first, p->normal + p->zero - first);
        return 0;
    }
    pthread_mutex_lock(r->log_lock);
    rc = mig_pagelog_put(r->log, block - r->blocks, &block->ram, block->where, l->plain, p->page,
                         l->src, p->normal + p->zero);
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
    bool codes = l->r->codec != MIG_CODEC_NONE;

    l->packet.page = calloc(max_pages, sizeof(*l->packet.page));
    l->src = calloc(max_pages, sizeof(*l->src));
    l->iov = calloc(max_pages, sizeof(*l->iov));
    l->head = malloc(mig_mfd_packet_nbytes(page_size));
    l->max_coded = mig_codec_bound(l->r->codec, max_pages * page_size);
    l->plain = malloc(max_pages * page_size);
    l->coded = codes ? malloc(l->max_coded) : NULL;
    if (!l->packet.page || !l->src || !l->iov || !l->head || !l->plain || (codes && !l->coded)) {
        return MIG_E_NOMEM;
    }
    return mig_decoder_open(&l->coder, l->r->codec);
}

static void close_lane(struct lane *l)
{
    mig_decoder_close(&l->coder);
    free(l->packet.page);
    free(l->src);
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

    if (rc == 0) {
        rc = work(&l, place);
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
