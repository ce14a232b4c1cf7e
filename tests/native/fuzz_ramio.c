/* SPDX-License-Identifier: LGPL-2.1-or-later
 * libFuzzer target: RAM records from a hostile peer through parser, placement and page log.
 *
 *   clang -g -O1 -std=gnu11 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
 *       -D_GNU_SOURCE -Icsrc -o fuzz_ramio tests/native/fuzz_ramio.c $(ls csrc/[a-z]*.c)
 *   ./fuzz_ramio -max_len=8192 -max_total_time=60 CORPUS_FOLDER
 *
 * The first byte of the input chooses page size, capacity and how the rest is cut; the rest are
 * records. Checked: what the parser says lies within its input and its blocks, cutting the input
 * changes nothing, encoding what was parsed and parsing that gives it back, and the page log's
 * file, parsed again, holds what memory holds. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "compress.h"

enum { NBLOCKS = 3, MAX_PAGES = 70, MAX_CAPACITY = 64, OUT_ARENA = 1 << 16, OUT_IOV = 512, MAX_PACKED = 3 };

static const struct mig_ram_block blocks[NBLOCKS] = {
    {.name = "a", .name_len = 1, .npages = 3},
    {.name = "ram", .name_len = 3, .npages = MAX_PAGES},
    {.name = "empty", .name_len = 5, .npages = 0},
};

struct guest {
    size_t page_size;
    uint8_t *memory[NBLOCKS]; /* exactly as long as the block: one byte more is a report */
    uint64_t *received[NBLOCKS];
};

static void guest_open(struct guest *g, size_t page_size)
{
    g->page_size = page_size;
    for (int i = 0; i < NBLOCKS; i++) {
        g->memory[i] = calloc(1, blocks[i].npages * page_size);
        g->received[i] = calloc(mig_bitmap_nwords(blocks[i].npages), sizeof(uint64_t));
    }
}

static void guest_close(struct guest *g)
{
    for (int i = 0; i < NBLOCKS; i++) {
        free(g->memory[i]);
        free(g->received[i]);
    }
}

static struct mig_pages guest_pages(const struct guest *g, int64_t block)
{
    return (struct mig_pages){.base = g->memory[block],
                              .npages = blocks[block].npages,
                              .page_size = g->page_size};
}

static void guests_equal(const struct guest *a, const struct guest *b)
{
    for (int i = 0; i < NBLOCKS; i++) {
        size_t nbytes = blocks[i].npages * a->page_size;

        CHECK(nbytes == 0 || memcmp(a->memory[i], b->memory[i], nbytes) == 0);
        for (uint64_t page = 0; page < blocks[i].npages; page++) {
            CHECK(mig_bitmap_test(a->received[i], page) == mig_bitmap_test(b->received[i], page));
        }
    }
}

static void parser_open(struct mig_ram_parser *p, size_t page_size, size_t capacity)
{
    *p = (struct mig_ram_parser){
        .blocks = blocks, .nblocks = NBLOCKS, .page_size = page_size, .current = -1,
        .page = malloc(capacity * sizeof(uint64_t)), .src = malloc(capacity * sizeof(int64_t)),
        .length = malloc(capacity * sizeof(uint32_t)), .kind = malloc(capacity * sizeof(uint16_t)),
        .packed = malloc(MAX_PACKED * sizeof(uint32_t)), .intact = malloc(MAX_PACKED * sizeof(int)),
        .unpacked = malloc(MAX_PACKED * page_size), .max_packed = MAX_PACKED,
        .capacity = capacity,
    };
}

static void parser_close(struct mig_ram_parser *p)
{
    free(p->page);
    free(p->src);
    free(p->length);
    free(p->kind);
    free(p->packed);
    free(p->intact);
    free(p->unpacked);
}

static void check_results(const struct mig_ram_parser *p, int stop, size_t len)
{
    size_t nfill = 0, nxbzrle = 0, npacked = 0;

    CHECK(p->consumed <= len);
    CHECK(p->npages <= p->capacity);
    CHECK(p->current >= -1 && p->current < NBLOCKS);
    CHECK(p->npages == 0 || p->current >= 0);
    for (size_t i = 0; i < p->npages; i++) {
        CHECK(p->page[i] < blocks[p->current].npages);
        if (p->src[i] >= 0) {
            CHECK((size_t)p->src[i] >= MIG_RAM_WORD);
            CHECK((size_t)p->src[i] + p->length[i] <= p->consumed);
            if (p->kind[i] == MIG_RAM_XBZRLE) {
                CHECK(p->length[i] <= p->page_size);
                nxbzrle++;
            } else if (p->kind[i] == MIG_RAM_COMPRESS) {
                CHECK(p->length[i] <= mig_ram_compress_bound(p->page_size));
                CHECK(p->packed[npacked] == i);
                npacked++;
            } else {
                CHECK(p->kind[i] == MIG_RAM_PAGE && p->length[i] == p->page_size);
            }
        } else {
            CHECK(p->src[i] >= -256 && p->kind[i] == MIG_RAM_ZERO && p->length[i] == 0);
            nfill++;
        }
    }
    CHECK(p->nfill == nfill && p->nxbzrle == nxbzrle && p->npacked == npacked);
    CHECK(npacked <= p->max_packed);
    switch (stop) {
    case MIG_RAM_STOP_MORE:
        /* what is wanted is more than is there, and no more than one record */
        CHECK(p->need > len - p->consumed);
        CHECK(p->need <= MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME + MIG_RAM_COMPRESS_FIELDS +
                               mig_ram_compress_bound(p->page_size));
        break;
    case MIG_RAM_STOP_FULL:
        CHECK(p->npages == p->capacity || p->npacked == p->max_packed);
        break;
    case MIG_RAM_STOP_SWITCH:
        CHECK(p->npages > 0);
        break;
    case MIG_RAM_STOP_EOS:
    case MIG_RAM_STOP_OTHER:
    case MIG_E_RAM_NO_BLOCK:
    case MIG_E_RAM_UNKNOWN_BLOCK:
    case MIG_E_RAM_BAD_OFFSET:
    case MIG_E_RAM_BAD_CODING:
    case MIG_E_RAM_BAD_LENGTH:
        break;
    default:
        CHECK(!"a known stop");
    }
}

/* Selecting takes measurements. */
static const struct mig_kernels *kernels(void)
{
    static const struct mig_kernels *k;

    CHECK(k || mig_kernels_select(NULL, &k) == 0);
    return k;
}

/* As a loader does: what is compressed is inflated first. */
static int inflate_pages(struct mig_ram_parser *p, const uint8_t *buf)
{
    static struct mig_decompressor *z;
    int rc;

    CHECK(z || mig_decompressor_open(&z, 2) == 0);
    rc = mig_decompress(z, p, buf);
    if (rc < 0) {
        CHECK(rc == MIG_E_RAM_BAD_ZLIB);
        CHECK(p->wrong < p->npages && p->kind[p->wrong] == MIG_RAM_COMPRESS);
        CHECK(mig_ram_record_offset(p, buf, p->wrong) + MIG_RAM_WORD + MIG_RAM_COMPRESS_FIELDS <=
              (size_t)p->src[p->wrong]);
    }
    return rc;
}

/* 0 or the error of a difference; then its record lies within the burst. */
static int place(struct mig_ram_parser *p, struct guest *g, const uint8_t *buf, bool fresh)
{
    struct mig_pages pages;
    size_t at;
    int rc;

    if (!p->npages) {
        return 0;
    }
    rc = inflate_pages(p, buf);
    if (rc < 0) {
        return rc;
    }
    pages = guest_pages(g, p->current);
    rc = mig_ram_place(kernels(), p, &pages, g->received[p->current], fresh, buf);
    if (rc < 0) {
        CHECK(rc <= MIG_E_XBZRLE_TRUNCATED && rc >= MIG_E_XBZRLE_PAST_PAGE);
        CHECK(p->wrong < p->npages && p->kind[p->wrong] == MIG_RAM_XBZRLE);
        at = mig_ram_record_offset(p, buf, p->wrong);
        CHECK(at + MIG_RAM_WORD + MIG_RAM_XBZRLE_FIELDS <= (size_t)p->src[p->wrong]);
        CHECK((buf[at + 7] & MIG_RAM_XBZRLE) && at < p->consumed);
    }
    return rc;
}

/* Encodes the burst from the guest's memory and parses it: the same pages come out. */
static void encode_again(const struct mig_ram_parser *p, struct guest *g)
{
    static uint8_t arena[OUT_ARENA];
    static struct iovec iov[OUT_IOV];
    struct mig_out out = {.iov = iov, .max_iov = OUT_IOV, .arena = arena, .arena_size = OUT_ARENA};
    struct mig_pages pages = guest_pages(g, p->current);
    const struct mig_ram_block *block = &blocks[p->current];
    uint64_t zero[mig_bitmap_nwords(MAX_CAPACITY)];
    struct mig_ram_parser again;
    uint8_t *flat;
    size_t done, at = 0;

    CHECK(mig_zero_pages(kernels(), &pages, p->page, p->npages, zero) <= p->npages);
    done = mig_ram_encode(&out, &pages, block->name, block->name_len, p->page, 0, p->npages, zero);
    CHECK(done == p->npages);
    CHECK(out.niov <= out.max_iov && out.used <= out.arena_size);
    flat = malloc(out.nbytes);
    for (size_t i = 0; i < out.niov; i++) {
        CHECK(at + iov[i].iov_len <= out.nbytes);
        memcpy(flat + at, iov[i].iov_base, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    CHECK(at == out.nbytes);
    parser_open(&again, p->page_size, p->npages + 1);
    CHECK(mig_ram_parse(&again, flat, at) == MIG_RAM_STOP_MORE);
    CHECK(again.consumed == at && again.npages == p->npages && again.current == p->current);
    for (size_t i = 0; i < p->npages; i++) {
        const uint8_t *page = g->memory[p->current] + p->page[i] * p->page_size;

        CHECK(again.page[i] == p->page[i]);
        if (again.src[i] < 0) {
            CHECK(again.src[i] == -1 && kernels()->is_zero(page, p->page_size));
        } else {
            CHECK(memcmp(flat + again.src[i], page, p->page_size) == 0);
        }
    }
    parser_close(&again);
    free(flat);
}

struct log {
    struct mig_pagelog c;
    int fd;
    int64_t *where[NBLOCKS];
    uint8_t *zeros, *scratch;
    bool ok; /* false once a fill byte was refused */
};

static void log_open(struct log *log, size_t page_size)
{
    log->zeros = calloc(1, page_size);
    log->scratch = malloc(page_size);
    log->ok = true;
    log->c = (struct mig_pagelog){.current = -1, .page_size = page_size, .zeros = log->zeros,
                                  .scratch = log->scratch, .kernels = kernels()};
    log->fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(log->fd >= 0);
    CHECK(mig_appender_open(&log->c.file, log->fd, -1) == 0);
    CHECK(mig_append(&log->c.file, "0123456789abcdef", 16) == 0);
    for (int i = 0; i < NBLOCKS; i++) {
        log->where[i] = calloc(blocks[i].npages, sizeof(int64_t));
    }
}

static void log_put(struct log *log, struct mig_ram_parser *p, const uint8_t *buf, int placed)
{
    int rc;

    if (!log->ok || !p->npages) {
        return;
    }
    if (placed == MIG_E_RAM_BAD_ZLIB) {
        log->ok = false; /* a loader does not come here */
        return;
    }
    rc = mig_pagelog_put(&log->c, p, log->where[p->current], buf);
    log->ok = rc == 0;
    if (rc == MIG_E_RAM_BAD_FILL) {
        CHECK(p->wrong < p->npages && p->src[p->wrong] < -1);
    } else {
        /* the same difference is wrong in a file as in memory */
        CHECK(rc == placed);
    }
}

/* The file's records, put into a guest that has received nothing, make the same guest; no page
 * has two records. */
static void log_check(struct log *log, const struct guest *g)
{
    struct guest copy;
    struct mig_ram_parser p;
    uint8_t *file;
    size_t nbytes, at = 0, nrecords = 0, nreceived = 0;
    int stop = MIG_RAM_STOP_FULL;

    for (int i = 0; i < NBLOCKS; i++) {
        CHECK(mig_pagelog_zeros(&log->c, i, &blocks[i], log->where[i]) == 0);
    }
    CHECK(mig_appender_finish(&log->c.file) == 0);
    nbytes = (size_t)mig_appender_tail(&log->c.file) - 16;
    file = malloc(nbytes);
    CHECK(pread(log->fd, file, nbytes, 16) == (ssize_t)nbytes);
    guest_open(&copy, g->page_size);
    parser_open(&p, g->page_size, 7);
    while (stop == MIG_RAM_STOP_FULL || stop == MIG_RAM_STOP_SWITCH) {
        stop = mig_ram_parse(&p, file + at, nbytes - at);
        check_results(&p, stop, nbytes - at);
        CHECK(p.nxbzrle + p.npacked == 0 && place(&p, &copy, file + at, true) == 0);
        nrecords += p.npages;
        at += p.consumed;
    }
    CHECK(stop == MIG_RAM_STOP_MORE && at == nbytes);
    guests_equal(&copy, g);
    for (int i = 0; i < NBLOCKS; i++) {
        for (uint64_t page = 0; page < blocks[i].npages; page++) {
            nreceived += mig_bitmap_test(g->received[i], page);
        }
    }
    CHECK(nrecords == nreceived);
    parser_close(&p);
    guest_close(&copy);
    free(file);
}

static void log_close(struct log *log)
{
    mig_appender_close(&log->c.file);
    close(log->fd);
    free(log->zeros);
    free(log->scratch);
    for (int i = 0; i < NBLOCKS; i++) {
        free(log->where[i]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const size_t page_sizes[] = {64, 128, 1024, 4096};
    static const size_t capacities[] = {1, 3, 16, MAX_CAPACITY};
    size_t page_size, capacity, step, at = 0, have = 0;
    struct mig_ram_parser p, cut;
    struct guest g, g_cut;
    struct log log;
    int stop = 0, stop_cut = 0, placed = 0, placed_cut = 0;
    uint8_t *buf;

    if (size < 1) {
        return -1;
    }
    page_size = page_sizes[data[0] & 3];
    capacity = capacities[data[0] >> 2 & 3];
    step = 1 + (data[0] >> 4) * 37;
    data++;
    size--;
    /* a buffer of its own, so that one byte too far is seen */
    buf = malloc(size);
    if (size) {
        memcpy(buf, data, size);
    }
    guest_open(&g, page_size);
    guest_open(&g_cut, page_size);
    parser_open(&p, page_size, capacity);
    parser_open(&cut, page_size, MAX_CAPACITY);
    log_open(&log, page_size);
    do {
        stop = mig_ram_parse(&p, buf + at, size - at);
        check_results(&p, stop, size - at);
        if (stop < 0) {
            break; /* a loader gives up here */
        }
        placed = place(&p, &g, buf + at, true);
        log_put(&log, &p, buf + at, placed);
        if (placed < 0) {
            break;
        }
        if (p.npages) {
            encode_again(&p, &g);
        }
        at += p.consumed;
    } while (stop == MIG_RAM_STOP_FULL || stop == MIG_RAM_STOP_SWITCH || stop == MIG_RAM_STOP_EOS);

    /* the same bytes in small pieces, each in a buffer of its own, into dirty memory */
    for (size_t done = 0; stop_cut >= 0 && stop_cut != MIG_RAM_STOP_OTHER;) {
        uint8_t *piece = malloc(have);

        if (have) {
            memcpy(piece, buf + done, have);
        }
        stop_cut = mig_ram_parse(&cut, piece, have);
        check_results(&cut, stop_cut, have);
        if (stop_cut >= 0) {
            placed_cut = place(&cut, &g_cut, piece, false);
        }
        free(piece);
        if (placed_cut < 0) {
            break;
        }
        done += cut.consumed;
        have -= cut.consumed;
        if (stop_cut == MIG_RAM_STOP_MORE) {
            if (done + have == size) {
                break;
            }
            have += step < size - done - have ? step : size - done - have;
        }
    }
    /* the whole burst is parsed before a difference is seen to be wrong: another error may be first */
    CHECK(placed || placed_cut || stop_cut == stop);
    CHECK(stop < 0 || stop_cut < 0 || (placed_cut < 0) == (placed < 0));
    if (stop >= 0 && placed == 0) {
        /* of a burst that ends in an error nothing is placed, and bursts are cut differently */
        guests_equal(&g, &g_cut);
    }
    if (log.ok) {
        log_check(&log, &g);
    }
    log_close(&log);
    parser_close(&p);
    parser_close(&cut);
    guest_close(&g);
    guest_close(&g_cut);
    free(buf);
    return 0;
}
