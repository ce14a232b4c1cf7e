/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Records of RAM and the page log in the driver. */
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"

/* Records of odd page sizes out, in, into memory and into a page log, in buffers without slack. */
static void check_page_size(const struct mig_kernels *k, size_t page_size)
{
    enum { NPAGES = 67 };
    const struct mig_ram_block block = {.name = "ram", .name_len = 3, .npages = NPAGES};
    uint8_t *memory = malloc(NPAGES * page_size), *copy = calloc(NPAGES, page_size);
    uint8_t *zeros = calloc(1, page_size), *scratch = malloc(page_size), *flat;
    uint64_t index[NPAGES], zero[2], received[2] = {0}, page[NPAGES];
    uint32_t length[NPAGES];
    uint16_t kind[NPAGES];
    int64_t src[NPAGES], *where = calloc(NPAGES, sizeof(*where));
    struct mig_pages from = {.base = memory, .npages = NPAGES, .page_size = page_size}, to = from;
    struct mig_out out = {.max_iov = 2 * NPAGES + 2, .arena_size = 4096};
    struct mig_pagelog log = {.current = -1, .page_size = page_size, .zeros = zeros,
                              .scratch = scratch, .kernels = k};
    struct mig_ram_parser p = {.blocks = &block, .nblocks = 1, .page_size = page_size,
                               .current = -1, .page = page, .src = src, .length = length,
                               .kind = kind, .capacity = NPAGES};
    size_t at = 0;

    for (size_t i = 0; i < NPAGES; i++) {
        memset(memory + i * page_size, i % 3 ? (int)i : 0, page_size);
        index[i] = i;
    }
    CHECK(mig_zero_pages(k, &from, index, NPAGES, zero) == 23);
    out.iov = malloc(out.max_iov * sizeof(*out.iov));
    out.arena = malloc(out.arena_size);
    CHECK(mig_ram_encode(&out, &from, "ram", 3, index, 0, NPAGES, zero) == NPAGES);
    flat = malloc(out.nbytes);
    for (size_t i = 0; i < out.niov; i++) {
        memcpy(flat + at, out.iov[i].iov_base, out.iov[i].iov_len);
        at += out.iov[i].iov_len;
    }
    for (size_t cut = 0; cut < at; cut += cut < 600 ? 1 : page_size / 2 + 1) {
        uint8_t *piece = malloc(cut);

        memcpy(piece, flat, cut);
        p.current = -1;
        CHECK(mig_ram_parse(&p, piece, cut) == MIG_RAM_STOP_MORE);
        CHECK(p.consumed <= cut && p.need > cut - p.consumed);
        free(piece);
    }
    p.current = -1;
    mig_ram_parse(&p, flat, at);
    CHECK(p.consumed == at && p.npages == NPAGES);
    to.base = copy;
    CHECK(mig_ram_place(k, &p, &to, received, true, flat) == 0);
    CHECK(memcmp(copy, memory, NPAGES * page_size) == 0);
    CHECK(mig_appender_open(&log.file, memfd_create("log", 0), -1) == 0);
    CHECK(mig_pagelog_put(&log, &p, where, flat) == 0);
    CHECK(mig_pagelog_put(&log, &p, where, flat) == 0);
    CHECK(mig_pagelog_zeros(&log, 0, &block, where) == 0);
    CHECK((size_t)mig_appender_tail(&log.file) == at);
    CHECK(mig_appender_finish(&log.file) == 0);
    close(log.file.fd);
    mig_appender_close(&log.file);
    free(memory);
    free(copy);
    free(zeros);
    free(scratch);
    free(flat);
    free(where);
    free(out.iov);
    free(out.arena);
}

/* A guest that is written between passes, sent against a cache, and loaded from what was sent, every
 * piece in a buffer of its own length. */
static void check_deltas(const struct mig_kernels *k, size_t page_size, size_t nslots)
{
    enum { NPAGES = 23, PASSES = 12 };
    const struct mig_ram_block block = {.name = "ram", .name_len = 3, .npages = NPAGES};
    struct piece memory = piece_open(NPAGES * page_size, 0), copy = piece_open(NPAGES * page_size, 0);
    uint64_t index[NPAGES], zero[1], received[1] = {0}, page[NPAGES];
    int64_t src[NPAGES];
    uint32_t length[NPAGES];
    uint16_t kind[NPAGES];
    struct mig_pages from = {.base = memory.bytes, .npages = NPAGES, .page_size = page_size};
    struct mig_pages to = {.base = copy.bytes, .npages = NPAGES, .page_size = page_size};
    struct mig_out out = {.max_iov = 8, .arena_size = mig_delta_room(page_size) + 20};
    struct mig_ram_parser p = {.blocks = &block, .nblocks = 1, .page_size = page_size,
                               .current = -1, .page = page, .src = src, .length = length,
                               .kind = kind, .capacity = NPAGES};
    struct mig_cache cache;
    struct mig_delta d = {.kernels = k, .cache = &cache, .address = 3 * page_size};
    bool named = false;

    memset(memory.bytes, 0, memory.nbytes);
    memset(copy.bytes, 0, copy.nbytes);
    CHECK(mig_cache_open(&cache, nslots, page_size) == 0);
    out.iov = malloc(out.max_iov * sizeof(*out.iov));
    out.arena = malloc(out.arena_size);
    for (d.generation = 1; d.generation <= PASSES; d.generation++) {
        d.last_stage = d.generation == PASSES;
        for (size_t i = 0; i < NPAGES; i++) {
            uint64_t most = below(4) ? 6 : below(3) ? 0 : page_size;

            index[i] = i;
            for (uint64_t n = below(most + 1); n > 0; n--) {
                memory.bytes[i * page_size + below(page_size)] = (uint8_t)rnd();
            }
            if (!below(9)) {
                memset(memory.bytes + i * page_size, 0, page_size);
            }
        }
        mig_zero_pages(k, &from, index, NPAGES, zero);
        for (size_t done = 0; done < NPAGES;) {
            size_t before = done, at = 0;
            uint8_t *flat;

            done = mig_delta_encode(&out, &d, &from, named ? NULL : "ram", 3, index, done, NPAGES,
                                    zero);
            CHECK(done > before && out.niov <= out.max_iov && out.used <= out.arena_size);
            named |= out.nbytes > 0;
            flat = malloc(out.nbytes);
            for (size_t i = 0; i < out.niov; i++) {
                memcpy(flat + at, out.iov[i].iov_base, out.iov[i].iov_len);
                at += out.iov[i].iov_len;
            }
            CHECK(mig_ram_parse(&p, flat, at) >= 0 && p.consumed == at);
            CHECK(mig_ram_place(k, &p, &to, received, true, flat) == 0);
            free(flat);
            out.niov = out.used = out.nbytes = 0;
            cache.epoch++;
        }
        CHECK(memcmp(copy.bytes, memory.bytes, memory.nbytes) == 0);
    }
    CHECK(d.missed + d.refused + d.unchanged + d.overflows + d.encoded + d.zero == NPAGES * PASSES);
    mig_cache_close(&cache);
    piece_close(&memory);
    piece_close(&copy);
    free(out.iov);
    free(out.arena);
}

void check_records(const struct mig_kernels *k)
{
    for (size_t page_size = 64; page_size <= 8192; page_size *= 2) {
        check_page_size(k, page_size);
    }
    for (size_t page_size = 128; page_size <= 65536; page_size *= 2) {
        for (size_t nslots = 1; nslots <= 64; nslots *= 8) {
            check_deltas(k, page_size, nslots);
        }
    }
}
