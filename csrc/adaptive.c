/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The sending side of adaptive packets, and their layout: see adaptive.h. */
#include "adaptive.h"

#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "endian.h"
#include "multifd.h"

enum {
    SAMPLES = 128, /* bytes of a page that are looked at */
    /* distinct values among them: random bytes have 100 or so, text 40 */
    RANDOM = 80,
    DOUBT = 32, /* packets after which the other choice is tried */
    TELLING = 64 << 10, /* bytes that fit into no socket's buffer unnoticed */
};

/* ---- what the channels share ---------------------------------------------------------------- */

int mig_adaptive_open(struct mig_adaptive *a, size_t nslots, size_t page_size)
{
    int rc = 0;

    memset(a, 0, sizeof(*a));
    if (nslots) {
        rc = mig_cache_open(&a->cache, nslots, page_size);
    }
    for (size_t i = 0; i < MIG_ADAPTIVE_LOCKS; i++) {
        pthread_mutex_init(&a->locks[i], NULL);
    }
    a->open = true;
    return rc;
}

void mig_adaptive_close(struct mig_adaptive *a)
{
    if (!a->open) {
        return;
    }
    mig_cache_close(&a->cache);
    for (size_t i = 0; i < MIG_ADAPTIVE_LOCKS; i++) {
        pthread_mutex_destroy(&a->locks[i]);
    }
}

/* Pages that may share a slot share a lock: slots are a power of two, and so are locks. */
static pthread_mutex_t *lock_of(struct mig_adaptive *a, uint64_t address)
{
    return &a->locks[(address >> a->cache.page_shift) % MIG_ADAPTIVE_LOCKS];
}

/* With fewer slots than locks two locks would guard one slot. */
static bool caches(const struct mig_adaptive *a)
{
    return a->caching && a->cache.nslots >= MIG_ADAPTIVE_LOCKS;
}

void mig_adaptive_zero(struct mig_adaptive *a, uint64_t address)
{
    if (caches(a) && !a->last_stage) {
        pthread_mutex_t *lock = lock_of(a, address);

        pthread_mutex_lock(lock);
        mig_cache_insert(&a->cache, address, NULL, a->generation);
        pthread_mutex_unlock(lock);
    }
}

/* ---- a channel's own ------------------------------------------------------------------------ */

int mig_adaptive_lane_open(struct mig_adaptive_lane *l, size_t max_pages, size_t page_size,
                           int level)
{
    size_t nbytes = max_pages * page_size;

    memset(l, 0, sizeof(*l));
    l->speed = 400e6;
    l->ratio = 0.5;
    l->max_coded = mig_codec_bound(MIG_CODEC_ZSTD, nbytes);
    l->methods = malloc(max_pages);
    l->lengths = malloc(2 * max_pages);
    l->deltas = malloc(nbytes);
    l->plain = malloc(nbytes);
    l->coded = malloc(l->max_coded);
    if (!l->methods || !l->lengths || !l->deltas || !l->plain || !l->coded) {
        return MIG_E_NOMEM;
    }
    return mig_encoder_open(&l->zstd, MIG_CODEC_ZSTD, level);
}

void mig_adaptive_lane_close(struct mig_adaptive_lane *l)
{
    mig_encoder_close(&l->zstd);
    free(l->methods);
    free(l->lengths);
    free(l->deltas);
    free(l->plain);
    free(l->coded);
}

/* A mean that forgets. */
static void learn(double *mean, double value)
{
    *mean = *mean > 0 ? *mean * 0.875 + value * 0.125 : value;
}

void mig_adaptive_sent(struct mig_adaptive_lane *l, size_t nbytes, double seconds)
{
    if (seconds > 0 && nbytes >= TELLING) {
        learn(&l->link, (double)nbytes / seconds);
    }
}

/* Whether zstd brings a page over sooner than the connection alone. Once in a while it is the other
 * way round, to see whether that has changed. */
static bool pays(const struct mig_adaptive *a, struct mig_adaptive_lane *l)
{
    double link = l->link;
    bool pays;

    if (a->link > 0 && (link <= 0 || a->link < link)) {
        link = a->link;
    }
    pays = link > 0 && (1 - l->ratio) * l->speed > link;
    if (++l->packets >= DOUBT) {
        l->packets = 0;
        /* under a limit the connection is not what there is to be measured */
        return pays ? a->link > 0 : true;
    }
    return pays;
}

/* A cheap look: few values among many samples say that the page is not random. */
static bool looks_compressible(const uint8_t *page, size_t page_size)
{
    uint64_t seen[4] = {0};
    size_t stride = page_size / SAMPLES;
    unsigned distinct = 0;

    for (size_t i = 0; i < SAMPLES; i++) {
        /* not at the same place of each word */
        uint8_t value = page[i * stride + i % (stride ? stride : 1)];

        seen[value / 64] |= UINT64_C(1) << value % 64;
    }
    for (size_t i = 0; i < 4; i++) {
        distinct += (unsigned)__builtin_popcountll(seen[i]);
    }
    return distinct < RANDOM;
}

/* ---- a packet ------------------------------------------------------------------------------- */

struct packet {
    size_t n, ndelta, deltas, nzstd, nraw; /* pages in all; of DELTA pages also the bytes */
    bool zstd;                             /* whether zstd is worth it now */
};

/* Sets *source to what the page must be sent from; the length of its difference when that is what
 * goes, 0 when the page has not changed, -1 when it goes otherwise. */
static int32_t compare(struct mig_adaptive *a, const struct mig_kernels *k, const uint8_t *page,
                       uint64_t address, uint8_t *out, const uint8_t **source)
{
    const uint8_t *copy = NULL;
    pthread_mutex_t *lock;
    int32_t result;

    *source = page;
    if (!caches(a)) {
        return -1;
    }
    lock = lock_of(a, address);
    pthread_mutex_lock(lock);
    /* a difference of nearly a page saves nothing, and takes more time at the other end */
    result = mig_cache_encode_page(k, &a->cache, page, address, a->generation, a->last_stage, out,
                                   a->cache.page_size / 4 * 3, &copy);
    pthread_mutex_unlock(lock);
    if (copy) {
        *source = copy;
    }
    return result >= 0 ? result : -1;
}

static void add_page(struct mig_adaptive_lane *l, struct packet *p, const uint8_t *source,
                     size_t page_size, struct iovec *raw)
{
    if (p->zstd && looks_compressible(source, page_size)) {
        l->methods[p->n++] = MIG_METHOD_ZSTD;
        memcpy(l->plain + p->nzstd++ * page_size, source, page_size);
        return;
    }
    l->methods[p->n++] = MIG_METHOD_RAW;
    raw[p->nraw++] = (struct iovec){.iov_base = (void *)(uintptr_t)source, .iov_len = page_size};
}

static int64_t compress(struct mig_adaptive_lane *l, size_t nbytes)
{
    double began = mig_now(), seconds;
    int64_t coded = mig_encode(&l->zstd, l->plain, nbytes, l->coded, l->max_coded);

    seconds = mig_now() - began;
    if (coded >= 0) {
        learn(&l->ratio, (double)coded / (double)nbytes);
        if (seconds > 0) {
            learn(&l->speed, (double)nbytes / seconds);
        }
        mig_store_be32(l->nzstd, (uint32_t)coded);
    }
    return coded;
}

static void count(struct mig_adaptive *a, const struct packet *p, size_t nsame)
{
    __atomic_fetch_add(&a->npages[MIG_METHOD_RAW], p->nraw, __ATOMIC_RELAXED);
    __atomic_fetch_add(&a->npages[MIG_METHOD_DELTA], p->ndelta, __ATOMIC_RELAXED);
    __atomic_fetch_add(&a->npages[MIG_METHOD_ZSTD], p->nzstd, __ATOMIC_RELAXED);
    __atomic_fetch_add(&a->nsame, nsame, __ATOMIC_RELAXED);
}

int mig_adaptive_encode(struct mig_adaptive *a, struct mig_adaptive_lane *l,
                        const struct mig_kernels *k, const struct mig_pages *pages,
                        uint64_t address, uint64_t *index, uint32_t *n, struct iovec *iov)
{
    size_t page_size = pages->page_size, niov = 0, before = *n;
    /* raw pages come last: their iovecs stand there until it is known what comes before */
    struct iovec *raw = iov + 5;
    struct packet p = {.zstd = pays(a, l)};
    int64_t coded = 0;

    for (size_t i = 0; i < before; i++) {
        const uint8_t *source;
        int32_t delta = compare(a, k, mig_page(pages, index[i]), address + index[i] * page_size,
                                l->deltas + p.deltas, &source);

        if (delta == 0) {
            continue;
        }
        index[p.n] = index[i];
        if (delta > 0) {
            l->methods[p.n++] = MIG_METHOD_DELTA;
            mig_store_be16(l->lengths + 2 * p.ndelta++, (unsigned)delta);
            p.deltas += (size_t)delta;
        } else {
            add_page(l, &p, source, page_size, raw);
        }
    }
    if (p.nzstd) {
        coded = compress(l, p.nzstd * page_size);
        if (coded < 0) {
            return (int)coded;
        }
    }
    count(a, &p, before - p.n);
    *n = (uint32_t)p.n;
    iov[niov++] = (struct iovec){.iov_base = l->methods, .iov_len = p.n};
    if (p.ndelta) {
        iov[niov++] = (struct iovec){.iov_base = l->lengths, .iov_len = 2 * p.ndelta};
        iov[niov++] = (struct iovec){.iov_base = l->deltas, .iov_len = p.deltas};
    }
    if (p.nzstd) {
        iov[niov++] = (struct iovec){.iov_base = l->nzstd, .iov_len = sizeof(l->nzstd)};
        iov[niov++] = (struct iovec){.iov_base = l->coded, .iov_len = (size_t)coded};
    }
    memmove(iov + niov, raw, p.nraw * sizeof(*raw));
    return (int)(niov + p.nraw);
}

/* ---- receiving ------------------------------------------------------------------------------ */

size_t mig_adaptive_bound(size_t n, size_t page_size)
{
    return n + 2 * n + n * page_size + 4 + mig_codec_bound(MIG_CODEC_ZSTD, n * page_size);
}

int mig_adaptive_methods(struct mig_adaptive_data *d, const uint8_t *methods, size_t n,
                         size_t nbytes, size_t page_size)
{
    size_t count[MIG_NMETHODS] = {0};

    for (size_t i = 0; i < n; i++) {
        if (methods[i] >= MIG_NMETHODS) {
            return MIG_E_MFD_CODEC;
        }
        count[methods[i]]++;
    }
    *d = (struct mig_adaptive_data){.nraw = count[MIG_METHOD_RAW],
                                    .ndelta = count[MIG_METHOD_DELTA],
                                    .nzstd = count[MIG_METHOD_ZSTD]};
    if (nbytes < n + d->nraw * page_size + 2 * d->ndelta + (d->nzstd ? 4 : 0) ||
        nbytes - d->nraw * page_size > mig_adaptive_bound(n, page_size)) {
        return MIG_E_MFD_SIZE;
    }
    return 0;
}

int mig_adaptive_layout(struct mig_adaptive_data *d, const uint8_t *data, size_t n, size_t nbytes)
{
    size_t at = n + 2 * d->ndelta;

    d->deltas = at;
    for (size_t i = 0; i < d->ndelta; i++) {
        at += mig_load_be16(data + n + 2 * i);
    }
    if (at + (d->nzstd ? 4 : 0) > nbytes) {
        return MIG_E_MFD_SIZE;
    }
    if (d->nzstd) {
        d->zstd_nbytes = mig_load_be32(data + at);
        d->zstd = at += 4;
    }
    return at + d->zstd_nbytes == nbytes ? 0 : MIG_E_MFD_SIZE;
}
