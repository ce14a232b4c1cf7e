/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Pages as zlib streams: see compress.h. */
#include "compress.h"

#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "endian.h"
#include "pool.h"

/* ---- out ----------------------------------------------------------------------------------- */

struct mig_compressor {
    struct mig_pool *pool;
    unsigned nthreads, nstreams;
    size_t page_size, bound, max_jobs;
    z_stream *streams; /* one for each thread, as the copies are */
    uint8_t *copies;
    const struct mig_pages *pages;
    size_t njobs;
    uint64_t *index;  /* page numbers of the jobs, ascending as they were given */
    uint8_t *packed;  /* `bound` bytes for each */
    uint32_t *length; /* how many of them are in use; 0: it failed */
};

size_t mig_compress_room(size_t page_size)
{
    return MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME + MIG_RAM_COMPRESS_FIELDS +
           mig_ram_compress_bound(page_size);
}

int mig_compressor_open(struct mig_compressor **opened, unsigned nthreads, int level,
                        size_t page_size, size_t max_jobs)
{
    struct mig_compressor *z = calloc(1, sizeof(*z));
    int rc = MIG_E_NOMEM;

    *opened = NULL;
    if (!z) {
        return MIG_E_NOMEM;
    }
    z->nthreads = nthreads;
    z->page_size = page_size;
    z->bound = mig_ram_compress_bound(page_size);
    z->max_jobs = max_jobs;
    z->streams = calloc(nthreads, sizeof(*z->streams));
    z->copies = malloc(nthreads * page_size);
    z->index = calloc(max_jobs, sizeof(*z->index));
    z->packed = malloc(max_jobs * z->bound);
    z->length = calloc(max_jobs, sizeof(*z->length));
    if (z->streams && z->copies && z->index && z->packed && z->length) {
        while (z->nstreams < nthreads && deflateInit(&z->streams[z->nstreams], level) == Z_OK) {
            z->nstreams++;
        }
        if (z->nstreams == nthreads) {
            rc = mig_pool_open(&z->pool, nthreads);
        }
    }
    if (rc < 0) {
        mig_compressor_close(z);
        return rc;
    }
    *opened = z;
    return 0;
}

void mig_compressor_close(struct mig_compressor *z)
{
    if (!z) {
        return;
    }
    mig_pool_close(z->pool);
    for (unsigned i = 0; i < z->nstreams; i++) {
        deflateEnd(&z->streams[i]);
    }
    free(z->streams);
    free(z->copies);
    free(z->index);
    free(z->packed);
    free(z->length);
    free(z);
}

static void compress_page(void *context, unsigned thread, size_t job)
{
    struct mig_compressor *z = context;
    z_stream *stream = &z->streams[thread];
    uint8_t *copy = z->copies + thread * z->page_size;

    memcpy(copy, mig_page(z->pages, z->index[job]), z->page_size);
    stream->next_in = copy;
    stream->avail_in = (uInt)z->page_size;
    stream->next_out = z->packed + job * z->bound;
    stream->avail_out = (uInt)z->bound;
    z->length[job] = 0;
    if (deflateReset(stream) == Z_OK && deflate(stream, Z_FINISH) == Z_STREAM_END) {
        z->length[job] = (uint32_t)(z->bound - stream->avail_out);
    }
}

size_t mig_compress_start(struct mig_compressor *z, const struct mig_pages *pages,
                          const uint64_t *index, size_t n, const uint64_t *zero, size_t max)
{
    size_t njobs = 0;

    if (max > z->max_jobs) {
        max = z->max_jobs;
    }
    for (size_t i = 0; i < n && njobs < max; i++) {
        if (mig_page(pages, index[i]) && !(zero && mig_bitmap_test(zero, i))) {
            z->index[njobs++] = index[i];
        }
    }
    z->pages = pages;
    z->njobs = njobs;
    if (njobs) {
        mig_pool_start(z->pool, compress_page, z, njobs);
    }
    return njobs;
}

bool mig_compress_is_done(struct mig_compressor *z)
{
    return mig_pool_is_idle(z->pool);
}

int mig_compress_wait(struct mig_compressor *z)
{
    mig_pool_wait(z->pool);
    for (size_t i = 0; i < z->njobs; i++) {
        if (z->length[i] == 0) {
            return MIG_E_NOMEM;
        }
    }
    return 0;
}

const uint64_t *mig_compress_jobs(const struct mig_compressor *z, size_t *n)
{
    *n = z->njobs;
    return z->index;
}

/* The record of a finished job; its length. There is room for it. */
static size_t put_job(struct mig_out *out, const struct mig_compressor *z, size_t job,
                      const char *name, size_t name_len)
{
    uint64_t word = z->index[job] * z->page_size | MIG_RAM_COMPRESS;
    uint8_t *at = out->arena + out->used;
    size_t nbytes = MIG_RAM_WORD;

    mig_store_be64(at, name ? word : word | MIG_RAM_CONTINUE);
    if (name) {
        at[nbytes] = (uint8_t)name_len;
        memcpy(at + nbytes + 1, name, name_len);
        nbytes += 1 + name_len;
    }
    mig_store_be32(at + nbytes, z->length[job]);
    nbytes += MIG_RAM_COMPRESS_FIELDS;
    memcpy(at + nbytes, z->packed + job * z->bound, z->length[job]);
    nbytes += z->length[job];
    mig_out_arena(out, nbytes);
    return nbytes;
}

/* The first job at or after `from` whose page is at or after the i-th; jobs are in the order of
 * index[]. */
static size_t job_of(const struct mig_compressor *z, size_t from, uint64_t page)
{
    while (from < z->njobs && z->index[from] < page) {
        from++;
    }
    return from;
}

size_t mig_compress_encode(struct mig_out *out, struct mig_compressor *z,
                           const struct mig_pages *pages, const char *name, size_t name_len,
                           const uint64_t *index, size_t first, size_t n, const uint64_t *zero,
                           bool skip, struct mig_compress_counts *counts)
{
    size_t room = mig_compress_room(z->page_size), job = 0, i;

    for (i = first; i < n; i++) {
        job = job_of(z, job, index[i]);
        if (job < z->njobs && z->index[job] == index[i]) {
            if (skip) {
                continue;
            }
            if (out->arena_size - out->used < room || out->niov == out->max_iov) {
                break;
            }
            counts->compressed++;
            counts->record_bytes += put_job(out, z, job, name, name_len) - MIG_RAM_WORD;
        } else if (mig_ram_encode(out, pages, name, name_len, index, i, i + 1, zero) == i) {
            break;
        }
        name = NULL;
    }
    return i;
}

/* ---- in ------------------------------------------------------------------------------------ */

struct mig_decompressor {
    struct mig_pool *pool;
    unsigned nthreads, nstreams;
    z_stream *streams;
    /* the burst that is worked on */
    const struct mig_ram_parser *parser;
    const uint8_t *buf;
};

int mig_decompressor_open(struct mig_decompressor **opened, unsigned nthreads)
{
    struct mig_decompressor *z = calloc(1, sizeof(*z));
    int rc = MIG_E_NOMEM;

    *opened = NULL;
    if (!z) {
        return MIG_E_NOMEM;
    }
    z->nthreads = nthreads;
    z->streams = calloc(nthreads, sizeof(*z->streams));
    if (z->streams) {
        while (z->nstreams < nthreads && inflateInit(&z->streams[z->nstreams]) == Z_OK) {
            z->nstreams++;
        }
        if (z->nstreams == nthreads) {
            rc = mig_pool_open(&z->pool, nthreads);
        }
    }
    if (rc < 0) {
        mig_decompressor_close(z);
        return rc;
    }
    *opened = z;
    return 0;
}

void mig_decompressor_close(struct mig_decompressor *z)
{
    if (!z) {
        return;
    }
    mig_pool_close(z->pool);
    for (unsigned i = 0; i < z->nstreams; i++) {
        inflateEnd(&z->streams[i]);
    }
    free(z->streams);
    free(z);
}

static void decompress_page(void *context, unsigned thread, size_t packed)
{
    struct mig_decompressor *z = context;
    const struct mig_ram_parser *p = z->parser;
    z_stream *stream = &z->streams[thread];
    size_t i = p->packed[packed];
    bool whole;

    stream->next_in = (Bytef *)(uintptr_t)(z->buf + p->src[i]);
    stream->avail_in = p->length[i];
    stream->next_out = p->unpacked + packed * p->page_size;
    stream->avail_out = (uInt)p->page_size;
    /* never more than a page is written, whatever the stream would become */
    whole = inflateReset(stream) == Z_OK && inflate(stream, Z_FINISH) == Z_STREAM_END &&
            stream->avail_out == 0;
    p->intact[packed] = whole;
}

int mig_decompress(struct mig_decompressor *z, struct mig_ram_parser *p, const uint8_t *buf)
{
    if (!p->npacked) {
        return 0;
    }
    z->parser = p;
    z->buf = buf;
    mig_pool_start(z->pool, decompress_page, z, p->npacked);
    mig_pool_wait(z->pool);
    for (size_t packed = 0; packed < p->npacked; packed++) {
        if (!p->intact[packed]) {
            p->wrong = p->packed[packed];
            return MIG_E_RAM_BAD_ZLIB;
        }
    }
    return 0;
}
