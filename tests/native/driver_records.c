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
    uint8_t *zeros = calloc(1, page_size), *flat;
    uint64_t index[NPAGES], zero[2], received[2] = {0}, page[NPAGES];
    int64_t src[NPAGES], *where = calloc(NPAGES, sizeof(*where));
    struct mig_pages from = {.base = memory, .npages = NPAGES, .page_size = page_size}, to = from;
    struct mig_out out = {.max_iov = 2 * NPAGES + 2, .arena_size = 4096};
    struct mig_pagelog log = {.current = -1, .page_size = page_size, .zeros = zeros};
    struct mig_ram_parser p = {.blocks = &block, .nblocks = 1, .page_size = page_size,
                               .current = -1, .page = page, .src = src, .capacity = NPAGES};
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
    mig_ram_place(k, &to, received, true, flat, page, src, NPAGES);
    CHECK(memcmp(copy, memory, NPAGES * page_size) == 0);
    CHECK(mig_appender_open(&log.file, memfd_create("log", 0), -1) == 0);
    CHECK(mig_pagelog_put(&log, 0, &block, where, flat, page, src, NPAGES) == 0);
    CHECK(mig_pagelog_put(&log, 0, &block, where, flat, page, src, NPAGES) == 0);
    CHECK(mig_pagelog_zeros(&log, 0, &block, where) == 0);
    CHECK((size_t)mig_appender_tail(&log.file) == at);
    CHECK(mig_appender_finish(&log.file) == 0);
    close(log.file.fd);
    mig_appender_close(&log.file);
    free(memory);
    free(copy);
    free(zeros);
    free(flat);
    free(where);
    free(out.iov);
    free(out.arena);
}

void check_records(const struct mig_kernels *k)
{
    for (size_t page_size = 64; page_size <= 8192; page_size *= 2) {
        check_page_size(k, page_size);
    }
}
