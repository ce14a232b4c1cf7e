/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The sending side of multifd: one queue of jobs, a packet each, and channels that take them from
 * there. See multifd.h. */
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "endian.h"
#include "multifd.h"
#include "splice.h"
#include "zerocopy.h"

enum {
    JOBS_PER_CHANNEL = 2,
    WORTH_SPLICING = 16 << 10, /* bytes: fewer are copied sooner */
};

/* What one channel works with. */
struct lane {
    struct mig_mfd_sender *s;
    const struct mig_kernels *k;
    const struct mig_fd *fd;
    unsigned id;
    struct mig_mfd_packet packet;
    uint8_t *head;      /* the packet on the wire */
    uint64_t *is_zero;  /* bit per page of the job */
    struct iovec *iov;  /* head and pages */
    struct mig_coder coder;
    uint8_t *plain, *coded; /* the pages of a packet, before and after the codec */
    size_t max_coded;
    bool splices;
    struct mig_splice splice;
    struct mig_zero_copy zero_copy;
    struct mig_adaptive_lane adaptive;
};

/* ---- queue ---------------------------------------------------------------------------------- */

int mig_mfd_sender_open(struct mig_mfd_sender *s, unsigned nchannels, size_t page_size)
{
    size_t max_pages = mig_mfd_max_pages(page_size);
    uint64_t *pages;

    memset(s, 0, sizeof(*s));
    s->page_size = page_size;
    s->nchannels = nchannels;
    s->njobs = (size_t)nchannels * JOBS_PER_CHANNEL;
    s->jobs = calloc(s->njobs, sizeof(*s->jobs));
    s->ready = calloc(s->njobs, sizeof(*s->ready));
    s->unused = calloc(s->njobs, sizeof(*s->unused));
    s->synced = calloc(nchannels, sizeof(*s->synced));
    pages = calloc(s->njobs * max_pages, sizeof(*pages));
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    pthread_cond_init(&s->done, NULL);
    if (!s->jobs || !s->ready || !s->unused || !s->synced || !pages) {
        free(pages);
        mig_mfd_sender_close(s);
        return MIG_E_NOMEM;
    }
    for (size_t i = 0; i < s->njobs; i++) {
        s->jobs[i].page = pages + i * max_pages;
        s->unused[s->nunused++] = i;
    }
    return 0;
}

void mig_mfd_sender_close(struct mig_mfd_sender *s)
{
    if (s->njobs) {
        pthread_mutex_destroy(&s->lock);
        pthread_cond_destroy(&s->work);
        pthread_cond_destroy(&s->done);
    }
    free(s->jobs ? s->jobs[0].page : NULL);
    free(s->jobs);
    free(s->ready);
    free(s->unused);
    free(s->synced);
    mig_adaptive_close(&s->adaptive);
    memset(s, 0, sizeof(*s));
}

/* An error belongs to the channel that had it: for all others it is the end. */
static int state(const struct mig_mfd_sender *s)
{
    return s->stopped ? MIG_E_MFD_STOPPED : 0;
}

/* A job that nobody is at, with the lock held; NULL when it is over. */
static struct mig_mfd_job *unused_job(struct mig_mfd_sender *s, size_t *number)
{
    while (!s->nunused && !state(s)) {
        pthread_cond_wait(&s->done, &s->lock);
    }
    if (state(s)) {
        return NULL;
    }
    *number = s->unused[--s->nunused];
    return &s->jobs[*number];
}

static void make_ready(struct mig_mfd_sender *s, size_t number)
{
    s->ready[(s->first_ready + s->nready++) % s->njobs] = number;
    pthread_cond_signal(&s->work);
}

int mig_mfd_send(struct mig_mfd_sender *s, const struct mig_pages *pages, uint64_t address,
                 const char *name, size_t name_len, const uint64_t *index, size_t n, bool scan)
{
    size_t max_pages = mig_mfd_max_pages(s->page_size);
    int rc = 0;

    pthread_mutex_lock(&s->lock);
    for (size_t first = 0; first < n && rc == 0;) {
        size_t some = n - first < max_pages ? n - first : max_pages, number;
        struct mig_mfd_job *job = unused_job(s, &number);

        if (!job) {
            rc = state(s);
            break;
        }
        job->pages = pages;
        job->address = address;
        job->scan = scan;
        job->npages = some;
        memset(job->name, 0, sizeof(job->name));
        memcpy(job->name, name, name_len);
        memcpy(job->page, index + first, some * sizeof(*index));
        make_ready(s, number);
        first += some;
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static bool all_synced(const struct mig_mfd_sender *s)
{
    for (unsigned i = 0; i < s->nchannels; i++) {
        if (s->synced[i] < s->syncs) {
            return false;
        }
    }
    return true;
}

/* With the lock held. */
static void wait_until_sent(struct mig_mfd_sender *s)
{
    while (s->nunused < s->njobs && !state(s)) {
        pthread_cond_wait(&s->done, &s->lock);
    }
}

int mig_mfd_drain(struct mig_mfd_sender *s)
{
    int rc;

    pthread_mutex_lock(&s->lock);
    wait_until_sent(s);
    rc = state(s);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int mig_mfd_sync(struct mig_mfd_sender *s)
{
    int rc;

    pthread_mutex_lock(&s->lock);
    wait_until_sent(s);
    s->syncs++;
    pthread_cond_broadcast(&s->work);
    while (!all_synced(s) && !state(s)) {
        pthread_cond_wait(&s->done, &s->lock);
    }
    rc = state(s);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

static void set(struct mig_mfd_sender *s, bool *flag)
{
    pthread_mutex_lock(&s->lock);
    *flag = true;
    pthread_cond_broadcast(&s->work);
    pthread_cond_broadcast(&s->done);
    pthread_mutex_unlock(&s->lock);
}

void mig_mfd_finish(struct mig_mfd_sender *s) { set(s, &s->finished); }

void mig_mfd_stop(struct mig_mfd_sender *s) { set(s, &s->stopped); }

/* ---- one channel ---------------------------------------------------------------------------- */

static void close_lane(struct lane *l)
{
    if (l->splices) {
        mig_splice_close(&l->splice);
    }
    mig_encoder_close(&l->coder);
    mig_adaptive_lane_close(&l->adaptive);
    free(l->packet.page);
    free(l->head);
    free(l->is_zero);
    free(l->iov);
    free(l->plain);
    free(l->coded);
}

static int open_lane(struct lane *l)
{
    const struct mig_mfd_sender *s = l->s;
    size_t max_pages = mig_mfd_max_pages(s->page_size), nbytes = max_pages * s->page_size;
    bool codes = s->codec == MIG_CODEC_ZLIB || s->codec == MIG_CODEC_ZSTD;

    l->packet.page = calloc(max_pages, sizeof(*l->packet.page));
    l->head = malloc(mig_mfd_packet_nbytes(s->page_size));
    l->is_zero = calloc(mig_bitmap_nwords(max_pages), sizeof(*l->is_zero));
    l->iov = calloc(1 + 5 + max_pages, sizeof(*l->iov));
    l->max_coded = mig_codec_bound(s->codec, nbytes);
    l->plain = codes ? malloc(nbytes) : NULL;
    l->coded = codes ? malloc(l->max_coded) : NULL;
    if (!l->packet.page || !l->head || !l->is_zero || !l->iov ||
        (codes && (!l->plain || !l->coded))) {
        return MIG_E_NOMEM;
    }
    if (s->zero_copy) {
        int rc = mig_zero_copy_open(&l->zero_copy, l->fd);

        if (rc < 0) {
            return rc;
        }
    } else if (s->splice && s->codec == MIG_CODEC_NONE) {
        l->splices = mig_splice_open(&l->splice, l->fd);
    }
    if (s->codec == MIG_CODEC_ADAPTIVE) {
        return mig_adaptive_lane_open(&l->adaptive, max_pages, s->page_size, s->level);
    }
    return mig_encoder_open(&l->coder, s->codec, s->level);
}

static int64_t introduce(const struct lane *l)
{
    uint8_t first[MIG_MFD_INIT] = {0};
    struct iovec iov = {.iov_base = first, .iov_len = sizeof(first)};

    mig_store_be32(first, MIG_MFD_MAGIC);
    mig_store_be32(first + 4, MIG_MFD_VERSION);
    memcpy(first + 8, l->s->uuid, sizeof(l->s->uuid));
    first[24] = (uint8_t)l->id;
    return mig_fd_writev(l->fd, &iov, 1);
}

/* Sorts the job's pages: those with contents into the packet, the zero ones to the front of the
 * job. */
static void sort_pages(struct lane *l, const struct mig_mfd_job *job)
{
    struct mig_mfd_packet *p = &l->packet;

    p->normal = p->zero = 0;
    if (job->scan) {
        mig_zero_pages(l->k, job->pages, job->page, job->npages, l->is_zero);
    }
    for (size_t i = 0; i < job->npages; i++) {
        bool zero = job->scan ? mig_bitmap_test(l->is_zero, i) : !mig_page(job->pages, job->page[i]);

        if (!zero) {
            p->page[p->normal++] = job->page[i];
        }
        job->page[p->zero] = job->page[i];
        p->zero += zero;
    }
}

/* The pages as pieces of memory behind iov[0]; returns how many iovecs there are. */
static size_t gather(struct lane *l, const struct mig_mfd_job *job)
{
    size_t n = 0;

    for (size_t i = 0; i < l->packet.normal; i++) {
        uint8_t *page = (uint8_t *)(uintptr_t)mig_page(job->pages, l->packet.page[i]);
        struct iovec *last = &l->iov[n];

        if (n && (uint8_t *)last->iov_base + last->iov_len == page) {
            last->iov_len += l->s->page_size;
        } else {
            l->iov[++n] = (struct iovec){.iov_base = page, .iov_len = l->s->page_size};
        }
    }
    return 1 + n;
}

/* A page may change while it is read, which a codec does not expect: it gets a copy. */
static int64_t compress(struct lane *l, const struct mig_mfd_job *job)
{
    size_t page_size = l->s->page_size;

    for (size_t i = 0; i < l->packet.normal; i++) {
        memcpy(l->plain + i * page_size, mig_page(job->pages, l->packet.page[i]), page_size);
    }
    return mig_encode(&l->coder, l->plain, l->packet.normal * page_size, l->coded, l->max_coded);
}

/* The pages each in its own way; returns how many iovecs there are. */
static int64_t adapt(struct lane *l, const struct mig_mfd_job *job)
{
    struct mig_mfd_packet *p = &l->packet;
    struct mig_adaptive *a = &l->s->adaptive;
    int n = 0;

    for (size_t i = 0; i < p->zero; i++) {
        mig_adaptive_zero(a, job->address + job->page[i] * l->s->page_size);
    }
    p->next_size = 0;
    if (p->normal) {
        n = mig_adaptive_encode(a, &l->adaptive, l->k, job->pages, job->address, p->page,
                                &p->normal, l->iov + 1);
    }
    for (int i = 0; i < n; i++) {
        p->next_size += (uint32_t)l->iov[1 + i].iov_len;
    }
    return n < 0 ? n : 1 + n;
}

/* The header is written anew for the next packet: only pages may be read later. */
static int64_t send_in_place(struct lane *l, size_t npieces)
{
    int64_t pages = 0, head = l->splices ? mig_fd_writev(l->fd, l->iov, 1)
                                         : mig_zero_copy_put(&l->zero_copy, l->iov, 1);

    if (head >= 0 && npieces) {
        pages = l->splices ? mig_splice_writev(&l->splice, l->iov + 1, npieces)
                           : mig_zero_copy_writev(&l->zero_copy, l->iov + 1, npieces);
    }
    return head < 0 ? head : pages < 0 ? pages : head + pages;
}

static int64_t send_packet(struct lane *l, size_t niov)
{
    struct mig_mfd_packet *p = &l->packet;
    bool in_place = l->s->zero_copy || (l->splices && p->next_size >= WORTH_SPLICING);

    p->number = __atomic_fetch_add(&l->s->packet_number, 1, __ATOMIC_RELAXED);
    mig_mfd_put(p, l->s->page_size, l->head);
    l->iov[0] = (struct iovec){.iov_base = l->head,
                               .iov_len = mig_mfd_packet_nbytes(l->s->page_size)};
    if (l->s->codec == MIG_CODEC_ADAPTIVE) {
        double began = mig_now();
        int64_t sent = mig_fd_writev(l->fd, l->iov, niov);

        if (sent > 0) {
            mig_adaptive_sent(&l->adaptive, (size_t)sent, mig_now() - began);
        }
        return sent;
    }
    return in_place ? send_in_place(l, niov - 1) : mig_fd_writev(l->fd, l->iov, niov);
}

static int64_t send_pages(struct lane *l, const struct mig_mfd_job *job)
{
    static const uint32_t flag_of[] = {[MIG_CODEC_ZLIB] = MIG_MFD_ZLIB,
                                       [MIG_CODEC_ZSTD] = MIG_MFD_ZSTD,
                                       [MIG_CODEC_ADAPTIVE] = MIG_MFD_ADAPTIVE};
    struct mig_mfd_packet *p = &l->packet;
    int64_t niov = 1;

    sort_pages(l, job);
    memcpy(p->name, job->name, sizeof(p->name));
    /* QEMU 10 wants it also where there is nothing to decode */
    p->flags = flag_of[l->s->codec];
    p->next_size = (uint32_t)(p->normal * l->s->page_size);
    if (l->s->codec == MIG_CODEC_ADAPTIVE) {
        niov = adapt(l, job);
    } else if (p->normal && l->s->codec == MIG_CODEC_NONE) {
        niov = (int64_t)gather(l, job);
    } else if (p->normal) {
        int64_t nbytes = compress(l, job);

        if (nbytes < 0) {
            return nbytes;
        }
        p->next_size = (uint32_t)nbytes;
        l->iov[1] = (struct iovec){.iov_base = l->coded, .iov_len = (size_t)nbytes};
        niov = 2;
    }
    memcpy(p->page + p->normal, job->page, p->zero * sizeof(*p->page));
    if (niov < 0 || p->normal + p->zero == 0) {
        return niov < 0 ? niov : 0;
    }
    return send_packet(l, (size_t)niov);
}

static int64_t send_sync(struct lane *l)
{
    struct mig_mfd_packet *p = &l->packet;
    int64_t rc = 0;

    if (l->s->zero_copy) {
        rc = mig_zero_copy_settle(&l->zero_copy);
    }
    memset(p->name, 0, sizeof(p->name));
    p->flags = MIG_MFD_SYNC;
    p->normal = p->zero = p->next_size = 0;
    return rc < 0 ? rc : send_packet(l, 1);
}

enum task { STOP, SYNC, JOB };

/* What the channel is to do next. With the lock held. */
static enum task next(const struct lane *l, size_t *number)
{
    struct mig_mfd_sender *s = l->s;

    for (;;) {
        if (state(s)) {
            return STOP;
        }
        if (s->nready) {
            *number = s->ready[s->first_ready];
            s->first_ready = (s->first_ready + 1) % s->njobs;
            s->nready--;
            return JOB;
        }
        if (s->synced[l->id] < s->syncs) {
            return SYNC;
        }
        if (s->finished) {
            return STOP;
        }
        pthread_cond_wait(&s->work, &s->lock);
    }
}

/* Accounts for bytes that were sent; an error ends all channels. With the lock held. */
static void note(struct mig_mfd_sender *s, int64_t rc)
{
    if (rc >= 0) {
        s->nbytes += (uint64_t)rc;
    } else {
        s->stopped = true;
        pthread_cond_broadcast(&s->work);
    }
    pthread_cond_broadcast(&s->done);
}

static void job_is_done(struct lane *l, size_t number)
{
    struct mig_mfd_sender *s = l->s;

    s->nnormal += l->packet.normal;
    s->nzero += l->packet.zero;
    s->unused[s->nunused++] = number;
}

static void sync_is_done(struct lane *l)
{
    struct mig_mfd_sender *s = l->s;

    s->synced[l->id]++;
    if (s->zero_copy) {
        s->copied += mig_zero_copy_missed(&l->zero_copy);
    }
}

/* Jobs and SYNCs until all is over: 0, this channel's error, or MIG_E_MFD_STOPPED. */
static int64_t work(struct lane *l)
{
    struct mig_mfd_sender *s = l->s;
    int64_t rc = 0;
    size_t number = 0;

    pthread_mutex_lock(&s->lock);
    for (;;) {
        enum task what = next(l, &number);

        if (what == STOP) {
            rc = state(s);
            break;
        }
        pthread_mutex_unlock(&s->lock);
        rc = what == JOB ? send_pages(l, &s->jobs[number]) : send_sync(l);
        pthread_mutex_lock(&s->lock);
        note(s, rc);
        if (rc < 0) {
            break;
        }
        if (what == JOB) {
            job_is_done(l, number);
        } else {
            sync_is_done(l);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int mig_mfd_send_channel(struct mig_mfd_sender *s, const struct mig_kernels *k, unsigned id,
                         const struct mig_fd *fd)
{
    struct lane l = {.s = s, .k = k, .fd = fd, .id = id};
    int64_t rc = open_lane(&l);

    if (rc == 0) {
        rc = introduce(&l);
    }
    pthread_mutex_lock(&s->lock);
    note(s, rc);
    pthread_mutex_unlock(&s->lock);
    if (rc >= 0) {
        rc = work(&l);
    }
    close_lane(&l);
    return (int)rc;
}
