/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Fuzz target of multifd's receiving side. A recipe becomes a channel's bytes, right in most
 * places, or the input is these bytes; they are received into memory and into a page log, which
 * must agree. SYNCs are released beforehand, so that none waits.
 *
 *   recipe  := options packet*
 *   options := byte: bits 0-1 codec (3: adaptive), 2 raw, 3 memory that is not fresh
 *   packet  := flags normal zero name length(2) excess how offset* data
 */
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "endian.h"
#include "multifd.h"

enum { PAGE_SIZE = 16384, NBLOCKS = 2, MAX_PAGES = MIG_MFD_DATA / PAGE_SIZE, ROOM = 8 << 20 };
enum { RAW = 4, STALE = 8 };
/* how a packet is made */
enum { FULL_DATA = 1, ENCODED = 2, DAMAGED = 4, ANY_ALLOC = 8 };

static const struct mig_ram_block blocks[NBLOCKS] = {
    {.name = "ram", .name_len = 3, .npages = 16},
    {.name = "vga", .name_len = 3, .npages = 3},
};

struct input {
    const uint8_t *at;
    size_t left;
};

static uint8_t take(struct input *in)
{
    return in->left ? in->left--, *in->at++ : 0;
}

struct channel {
    uint8_t *bytes;
    size_t nbytes;
};

/* Data of an adaptive packet: of each page the method, and what differs, are the input's. */
static size_t put_adaptive(struct input *in, const uint8_t *pages, size_t npages,
                           struct mig_coder *coder, uint8_t *out)
{
    static uint8_t zstd[MIG_MFD_DATA], raw[MIG_MFD_DATA], deltas[5 * 64];
    size_t nzstd = 0, nraw = 0, ndelta = 0, used = 0, at = npages;

    for (size_t i = 0; i < npages; i++) {
        const uint8_t *page = pages + i * PAGE_SIZE;

        out[i] = take(in) % 8;
        if (out[i] == MIG_METHOD_DELTA) {
            uint8_t skip = take(in), length = take(in) % 4;

            mig_store_be16(out + at + 2 * ndelta++, 2u + length);
            deltas[used++] = skip & 0x7f;
            deltas[used++] = length;
            memcpy(deltas + used, page, length);
            used += length;
        } else if (out[i] == MIG_METHOD_ZSTD) {
            memcpy(zstd + nzstd++ * PAGE_SIZE, page, PAGE_SIZE);
        } else {
            out[i] = out[i] == 7 ? 7 : MIG_METHOD_RAW; /* 7: no method */
            memcpy(raw + nraw++ * PAGE_SIZE, page, PAGE_SIZE);
        }
    }
    at += 2 * ndelta;
    memcpy(out + at, deltas, used);
    at += used;
    if (nzstd) {
        int64_t n = mig_encode(coder, zstd, nzstd * PAGE_SIZE, out + at + 4,
                               mig_codec_bound(MIG_CODEC_ZSTD, nzstd * PAGE_SIZE));

        CHECK(n >= 0);
        mig_store_be32(out + at, (uint32_t)n);
        at += 4 + (size_t)n;
    }
    memcpy(out + at, raw, nraw * PAGE_SIZE);
    return at + nraw * PAGE_SIZE;
}

/* Data of a packet: from the input, or pages made of it, and those perhaps encoded. */
static size_t put_data(struct input *in, size_t length, size_t npages, unsigned how,
                       bool adaptive, struct mig_coder *coder, uint8_t *out)
{
    static uint8_t plain[MIG_MFD_DATA];
    size_t nbytes = npages * PAGE_SIZE;
    int64_t n;

    if (!(how & (FULL_DATA | ENCODED))) {
        length = length < in->left ? length : in->left;
        if (length) {
            memcpy(out, in->at, length);
        }
        in->at += length;
        in->left -= length;
        return length;
    }
    for (size_t i = 0; i < npages; i++) {
        memset(plain + i * PAGE_SIZE, take(in), PAGE_SIZE);
        plain[i * PAGE_SIZE] = take(in);
    }
    if (!(how & ENCODED) || coder->codec == MIG_CODEC_NONE || !nbytes) {
        memcpy(out, plain, nbytes);
        return nbytes;
    }
    if (adaptive) {
        return put_adaptive(in, plain, npages, coder, out);
    }
    n = mig_encode(coder, plain, nbytes, out, mig_codec_bound(coder->codec, nbytes));
    CHECK(n >= 0);
    return (size_t)n;
}

static void put_packet(struct input *in, struct channel *c, bool adaptive,
                       struct mig_coder *coder)
{
    uint8_t *head = c->bytes + c->nbytes, *data = head + mig_mfd_packet_nbytes(PAGE_SIZE);
    uint64_t page[2 * 64] = {0};
    struct mig_mfd_packet p = {.page = page, .number = c->nbytes};
    unsigned excess, how, name;
    size_t length;

    p.flags = take(in);
    p.normal = take(in) % 64;
    p.zero = take(in) % 64;
    name = take(in);
    length = (size_t)take(in) << 8;
    length |= take(in);
    excess = take(in);
    how = take(in);
    if (name < 0xf0) {
        memcpy(p.name, blocks[name % NBLOCKS].name, 3);
    } else {
        memset(p.name, 'x', name);
    }
    for (size_t i = 0; i < p.normal + p.zero; i++) {
        uint8_t at = take(in);

        page[i] = at == 0xff ? UINT64_MAX / PAGE_SIZE : at % 20;
    }
    length = put_data(in, length, p.normal < MAX_PAGES ? p.normal : MAX_PAGES, how, adaptive,
                      coder, data);
    p.next_size = (uint32_t)(length + (size_t)(int)(int8_t)excess);
    if (p.normal + p.zero <= MAX_PAGES) {
        mig_mfd_put(&p, PAGE_SIZE, head);
    } else {
        struct mig_mfd_packet less = p;

        less.normal = less.zero = 0;
        mig_mfd_put(&less, PAGE_SIZE, head);
        mig_store_be32(head + 16, p.normal);
        mig_store_be32(head + 32, p.zero);
    }
    if (how & ANY_ALLOC) {
        mig_store_be32(head + 12, take(in));
    }
    if (how & DAMAGED) {
        size_t at = (size_t)take(in) << 8 | take(in);

        head[at % (mig_mfd_packet_nbytes(PAGE_SIZE) + length)] ^= take(in);
    }
    c->nbytes += mig_mfd_packet_nbytes(PAGE_SIZE) + length;
}

static enum mig_codec codec_of(uint8_t options)
{
    static const enum mig_codec codecs[] = {MIG_CODEC_NONE, MIG_CODEC_ZLIB, MIG_CODEC_ZSTD,
                                            MIG_CODEC_ADAPTIVE};

    return codecs[options & 3];
}

static void make_channel(struct input *in, uint8_t options, struct channel *c)
{
    struct mig_coder coder;
    bool adaptive = codec_of(options) == MIG_CODEC_ADAPTIVE;

    c->nbytes = 0;
    if (options & RAW) {
        c->nbytes = in->left;
        memcpy(c->bytes, in->at, in->left);
        return;
    }
    CHECK(mig_encoder_open(&coder, adaptive ? MIG_CODEC_ZSTD : codec_of(options), 1) == 0);
    while (in->left && c->nbytes < ROOM / 2) {
        put_packet(in, c, adaptive, &coder);
    }
    mig_encoder_close(&coder);
}

struct guest {
    uint8_t *memory[NBLOCKS];
    struct mig_pages pages[NBLOCKS];
    uint64_t received[NBLOCKS];
    int64_t *where[NBLOCKS];
};

static const struct mig_kernels *kernels(void)
{
    static const struct mig_kernels *k;

    CHECK(k || mig_kernels_select(NULL, &k) == 0);
    return k;
}

/* A difference to a page that never came is one to zeros in the log: so it is in memory then. */
static bool is_fresh(uint8_t options)
{
    return !(options & STALE) || codec_of(options) == MIG_CODEC_ADAPTIVE;
}

static bool is_delta_error(int rc)
{
    return rc == MIG_E_XBZRLE_TRUNCATED || rc == MIG_E_XBZRLE_LENGTH ||
           rc == MIG_E_XBZRLE_PAST_PAGE;
}

/* Receives the channel's bytes; the log is NULL for memory. */
static int receive(const struct channel *c, uint8_t options, struct guest *g,
                   struct mig_pagelog *log, struct mig_mfd_place *place)
{
    pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
    struct mig_mfd_block table[NBLOCKS];
    struct mig_mfd_receiver r;
    struct mig_fd fd = {.fd = memfd_create("channel", 0), .cancel_fd = -1, .timeout_ms = -1};
    int rc;

    CHECK(pwrite(fd.fd, c->bytes, c->nbytes, 0) == (ssize_t)c->nbytes);
    CHECK(mig_mfd_receiver_open(&r, 1, PAGE_SIZE) == 0);
    for (int i = 0; i < NBLOCKS; i++) {
        table[i] = (struct mig_mfd_block){.received = &g->received[i],
                                          .pages = log ? NULL : &g->pages[i],
                                          .fresh = is_fresh(options), .where = g->where[i]};
    }
    r.codec = codec_of(options);
    r.ram_blocks = blocks;
    r.blocks = table;
    r.nblocks = NBLOCKS;
    r.log = log;
    r.log_lock = &log_lock;
    r.syncs = UINT64_MAX;
    *place = (struct mig_mfd_place){.offset = 0};
    rc = mig_mfd_receive_channel(&r, kernels(), 0, &fd, place);
    CHECK(place->offset <= c->nbytes);
    CHECK(rc == 0 || (rc <= MIG_E_CODEC_DATA && rc >= MIG_E_CODEC_LONG) ||
          (rc <= MIG_E_MFD_MAGIC && rc >= MIG_E_MFD_CUT) || rc == MIG_E_MFD_FLAGS ||
          is_delta_error(rc));
    CHECK(rc != 0 || place->offset == c->nbytes);
    CHECK(r.ended[0] == (int64_t)place->offset && r.nbytes == place->offset);
    mig_mfd_receiver_close(&r);
    close(fd.fd);
    return rc;
}

static void compare(const struct guest *g, const struct mig_pagelog *log)
{
    static uint8_t page[PAGE_SIZE];

    for (int i = 0; i < NBLOCKS; i++) {
        for (uint64_t n = 0; n < blocks[i].npages; n++) {
            int64_t at = g->where[i][n];
            const uint8_t *there = g->memory[i] + n * PAGE_SIZE;

            CHECK((at != MIG_PAGE_NONE) == mig_bitmap_test(&g->received[i], n));
            if (at > 0) {
                CHECK(pread(log->file.fd, page, PAGE_SIZE, at) == PAGE_SIZE);
                CHECK(memcmp(page, there, PAGE_SIZE) == 0);
            } else if (at == MIG_PAGE_ZERO) {
                CHECK(kernels()->is_zero(there, PAGE_SIZE));
            }
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t zeros[PAGE_SIZE], scratch[PAGE_SIZE];
    static struct channel c;
    struct input in = {.at = data, .left = size};
    struct mig_pagelog log = {.current = -1, .page_size = PAGE_SIZE, .zeros = zeros,
                              .scratch = scratch, .kernels = kernels()};
    struct mig_mfd_place into_memory, into_log;
    struct guest g = {.received = {0}};
    uint8_t options = take(&in);
    int rc, fd;

    if (!c.bytes) {
        c.bytes = malloc(ROOM + (size_t)2 * MIG_MFD_DATA);
    }
    make_channel(&in, options, &c);
    for (int i = 0; i < NBLOCKS; i++) {
        size_t nbytes = blocks[i].npages * PAGE_SIZE;

        g.memory[i] = malloc(nbytes);
        memset(g.memory[i], is_fresh(options) ? 0 : 0x5a, nbytes);
        g.pages[i] = (struct mig_pages){
            .base = g.memory[i], .npages = blocks[i].npages, .page_size = PAGE_SIZE};
        g.where[i] = calloc(blocks[i].npages, sizeof(int64_t));
    }
    fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(mig_appender_open(&log.file, fd, -1) == 0);
    CHECK(mig_append(&log.file, "0123456789abcdef", 16) == 0);
    rc = receive(&c, options, &g, NULL, &into_memory);
    CHECK(receive(&c, options, &g, &log, &into_log) == rc);
    CHECK(into_memory.offset == into_log.offset && into_memory.npackets == into_log.npackets);
    CHECK(strcmp(into_memory.name, into_log.name) == 0);
    CHECK(mig_appender_finish(&log.file) == 0);
    if (rc == 0) {
        /* of a packet that ends in an error memory may have a part */
        compare(&g, &log);
    }
    mig_appender_close(&log.file);
    close(fd);
    for (int i = 0; i < NBLOCKS; i++) {
        free(g.memory[i]);
        free(g.where[i]);
    }
    return 0;
}
