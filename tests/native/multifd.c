/* SPDX-License-Identifier: LGPL-2.1-or-later
 * multifd without Python: several channels that send to several that receive, for every codec, into
 * memory and into a page log, under ThreadSanitizer and under AddressSanitizer; headers there and
 * back; channels cut at every kind of place. */
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "check.h"
#include "endian.h"
#include "multifd.h"

/* Instead of libc's: memory that it does not take. */
static bool refuses;

ssize_t vmsplice(int fd, const struct iovec *iov, size_t niov, unsigned flags)
{
    if (refuses) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_vmsplice, fd, iov, niov, flags);
}

enum { PAGE_SIZE = 4096, NPAGES = 700, CHANNELS = 3, ROUNDS = 7 };

static const struct mig_kernels *k;
static uint8_t zeros[PAGE_SIZE], scratch[PAGE_SIZE];

/* ---- a guest at each end --------------------------------------------------------------------- */

struct ends {
    struct mig_mfd_sender sender;
    struct mig_mfd_receiver receiver;
    struct mig_fd out[CHANNELS], in[CHANNELS];
    uint8_t *source, *target;
    struct mig_pages from, to;
    struct mig_ram_block ram;
    struct mig_mfd_block block;
    uint64_t received[(NPAGES + 63) / 64];
    int64_t where[NPAGES];
    struct mig_pagelog log;
    pthread_mutex_t log_lock;
    int rc_out[CHANNELS], rc_in[CHANNELS];
};

struct lane {
    struct ends *e;
    unsigned id;
};

static void *sending(void *arg)
{
    const struct lane *l = arg;

    l->e->rc_out[l->id] = mig_mfd_send_channel(&l->e->sender, k, l->id, &l->e->out[l->id]);
    shutdown(l->e->out[l->id].fd, SHUT_WR);
    return NULL;
}

static void *receiving(void *arg)
{
    const struct lane *l = arg;
    struct mig_mfd_place place = {.offset = MIG_MFD_INIT};
    uint8_t first[MIG_MFD_INIT];

    if (mig_fd_read(&l->e->in[l->id], first, MIG_MFD_INIT, MIG_MFD_INIT) < MIG_MFD_INIT) {
        return NULL; /* stopped before */
    }
    CHECK(mig_load_be32(first) == MIG_MFD_MAGIC && first[24] == l->id);
    l->e->rc_in[l->id] =
        mig_mfd_receive_channel(&l->e->receiver, k, l->id, &l->e->in[l->id], &place);
    return NULL;
}

static uint64_t rnd(void)
{
    static uint64_t seed = 88172645463325252u;

    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

/* What the guest writes between two rounds: a third of its pages, some of them with zeros, with a
 * word, or with what nothing makes smaller. */
static void write_pages(struct ends *e, unsigned round)
{
    for (size_t i = round % 3; i < NPAGES; i += 3) {
        uint8_t *page = e->source + i * PAGE_SIZE;

        if (i % 5 == 4) {
            page[(17 * round) % PAGE_SIZE] = (uint8_t)(round + 1);
        } else if (i % 5 == 3) {
            for (size_t at = 0; at < PAGE_SIZE; at++) {
                page[at] = (uint8_t)(rnd() >> 32);
            }
        } else {
            memset(page, i % 5 ? (int)(i + round) & 0xff : 0, PAGE_SIZE);
        }
    }
}

static void ends_open(struct ends *e, enum mig_codec codec, size_t nslots, bool to_log)
{
    memset(e, 0, sizeof(*e));
    CHECK(mig_mfd_sender_open(&e->sender, CHANNELS, PAGE_SIZE) == 0);
    CHECK(mig_mfd_receiver_open(&e->receiver, CHANNELS, PAGE_SIZE) == 0);
    e->sender.codec = e->receiver.codec = codec;
    e->sender.level = 1;
    e->sender.splice = true;
    if (codec == MIG_CODEC_ADAPTIVE) {
        CHECK(mig_adaptive_open(&e->sender.adaptive, nslots, PAGE_SIZE) == 0);
    }
    for (int i = 0; i < CHANNELS; i++) {
        int fds[2];

        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
        e->out[i] = e->in[i] = (struct mig_fd){.cancel_fd = -1, .is_socket = true,
                                               .timeout_ms = 60000};
        e->out[i].fd = fds[0];
        e->in[i].fd = fds[1];
    }
    e->source = calloc(NPAGES, PAGE_SIZE);
    e->target = calloc(NPAGES, PAGE_SIZE);
    e->from = (struct mig_pages){.base = e->source, .npages = NPAGES, .page_size = PAGE_SIZE};
    e->to = (struct mig_pages){.base = e->target, .npages = NPAGES, .page_size = PAGE_SIZE};
    e->ram = (struct mig_ram_block){.name = "ram", .name_len = 3, .npages = NPAGES};
    e->block = (struct mig_mfd_block){.received = e->received, .fresh = true,
                                      .pages = to_log ? NULL : &e->to, .where = e->where};
    e->receiver.ram_blocks = &e->ram;
    e->receiver.blocks = &e->block;
    e->receiver.nblocks = 1;
    pthread_mutex_init(&e->log_lock, NULL);
    e->receiver.log_lock = &e->log_lock;
    e->log = (struct mig_pagelog){.current = -1, .page_size = PAGE_SIZE, .zeros = zeros,
                                   .scratch = scratch, .kernels = k};
    CHECK(mig_appender_open(&e->log.file, memfd_create("log", 0), -1) == 0);
    CHECK(mig_append(&e->log.file, "0123456789abcdef", 16) == 0);
    e->receiver.log = to_log ? &e->log : NULL;
}

static void ends_close(struct ends *e)
{
    int fd = e->log.file.fd;

    mig_appender_close(&e->log.file);
    close(fd);
    mig_mfd_sender_close(&e->sender);
    mig_mfd_receiver_close(&e->receiver);
    pthread_mutex_destroy(&e->log_lock);
    for (int i = 0; i < CHANNELS; i++) {
        close(e->out[i].fd);
        close(e->in[i].fd);
    }
    free(e->source);
    free(e->target);
}

static void start(struct ends *e, struct lane *lanes, pthread_t *threads)
{
    for (unsigned i = 0; i < CHANNELS; i++) {
        lanes[i] = (struct lane){e, i};
        CHECK(pthread_create(&threads[2 * i], NULL, sending, &lanes[i]) == 0);
        CHECK(pthread_create(&threads[2 * i + 1], NULL, receiving, &lanes[i]) == 0);
    }
}

/* As the engine does: who waits for the other end is not told by the other end. */
static void stop(struct ends *e)
{
    mig_mfd_stop(&e->sender);
    mig_mfd_receive_stop(&e->receiver);
    for (int i = 0; i < CHANNELS; i++) {
        shutdown(e->out[i].fd, SHUT_RDWR);
    }
}

static void join(pthread_t *threads)
{
    for (int i = 0; i < 2 * CHANNELS; i++) {
        pthread_join(threads[i], NULL);
    }
}

static void check_equal(struct ends *e, bool to_log)
{
    static uint8_t page[PAGE_SIZE];

    if (!to_log) {
        CHECK(memcmp(e->source, e->target, (size_t)NPAGES * PAGE_SIZE) == 0);
        return;
    }
    CHECK(mig_appender_finish(&e->log.file) == 0);
    for (size_t i = 0; i < NPAGES; i++) {
        const uint8_t *want = e->source + i * PAGE_SIZE;

        CHECK(e->where[i] != MIG_PAGE_NONE);
        if (e->where[i] > 0) {
            CHECK(pread(e->log.file.fd, page, PAGE_SIZE, e->where[i]) == PAGE_SIZE);
        }
        CHECK(memcmp(e->where[i] > 0 ? page : zeros, want, PAGE_SIZE) == 0);
    }
}

/* The main stream brings the odd pages, while the channels bring the others. */
static void place_odd(struct ends *e, bool to_log)
{
    uint64_t index[NPAGES / 2];
    int64_t src[NPAGES / 2];
    uint32_t length[NPAGES / 2];
    uint16_t kind[NPAGES / 2];
    struct mig_ram_parser burst = {.blocks = &e->ram, .nblocks = 1, .page_size = PAGE_SIZE,
                                   .page = index, .src = src, .length = length, .kind = kind,
                                   .npages = NPAGES / 2};

    for (size_t i = 0; i < NPAGES / 2; i++) {
        size_t page = 2 * i + 1;
        bool zero = k->is_zero(e->source + page * PAGE_SIZE, PAGE_SIZE);

        index[i] = page;
        src[i] = zero ? -1 : (int64_t)(page * PAGE_SIZE);
        length[i] = PAGE_SIZE;
        kind[i] = zero ? MIG_RAM_ZERO : MIG_RAM_PAGE;
    }
    if (!to_log) {
        CHECK(mig_ram_place(k, &burst, &e->to, e->received, true, e->source) == 0);
        return;
    }
    pthread_mutex_lock(&e->log_lock);
    CHECK(mig_pagelog_put(&e->log, &burst, e->where, e->source) == 0);
    pthread_mutex_unlock(&e->log_lock);
}

/* What the engine says between two rounds; nothing is queued. */
static void adapt(struct ends *e, unsigned round)
{
    struct mig_adaptive *a = &e->sender.adaptive;

    a->generation = round + 1;
    a->caching = round > 0;
    a->last_stage = round == ROUNDS - 1;
    a->link = round % 2 ? 1e6 : 1e10; /* by zstd, and otherwise */
}

/* Rounds over all pages with a SYNC behind each, as a migration makes them. */
static void migrate(enum mig_codec codec, size_t nslots, bool to_log)
{
    struct ends e;
    struct lane lanes[CHANNELS];
    pthread_t threads[2 * CHANNELS];
    uint64_t index[NPAGES / 2];

    ends_open(&e, codec, nslots, to_log);
    for (uint64_t i = 0; i < NPAGES / 2; i++) {
        index[i] = 2 * i;
    }
    start(&e, lanes, threads);
    for (unsigned round = 0; round < ROUNDS; round++) {
        write_pages(&e, round);
        adapt(&e, round);
        CHECK(mig_mfd_send(&e.sender, &e.from, 0, "ram", 3, index, NPAGES / 2, true) == 0);
        place_odd(&e, to_log);
        CHECK(mig_mfd_drain(&e.sender) == 0);
        CHECK(mig_mfd_sync(&e.sender) == 0);
        CHECK(mig_mfd_receive_sync(&e.receiver, 60000) == 0);
    }
    mig_mfd_finish(&e.sender);
    join(threads);
    for (int i = 0; i < CHANNELS; i++) {
        CHECK(e.rc_out[i] == 0 && e.rc_in[i] == 0);
    }
    CHECK(e.sender.nnormal == e.receiver.nnormal && e.sender.nzero == e.receiver.nzero);
    CHECK(e.sender.nbytes == e.receiver.nbytes + CHANNELS * MIG_MFD_INIT);
    CHECK(e.receiver.nnormal + e.receiver.nzero + e.sender.adaptive.nsame ==
          (uint64_t)NPAGES / 2 * ROUNDS);
    if (nslots >= MIG_ADAPTIVE_LOCKS) {
        for (int i = 0; i < MIG_NMETHODS; i++) {
            CHECK(e.sender.adaptive.npages[i]);
        }
        CHECK(e.sender.adaptive.nsame);
    }
    check_equal(&e, to_log);
    ends_close(&e);
}

/* One channel dies in the middle: whoever waits for it is told, at both ends. */
static void lose_a_channel(bool at_source)
{
    struct ends e;
    struct lane lanes[CHANNELS];
    pthread_t threads[2 * CHANNELS];
    uint64_t index[NPAGES];
    int rc = 0;

    ends_open(&e, MIG_CODEC_NONE, 0, false);
    for (uint64_t i = 0; i < NPAGES; i++) {
        index[i] = i;
    }
    write_pages(&e, 0);
    start(&e, lanes, threads);
    for (int i = 0; i < 1000 && rc == 0; i++) {
        rc = mig_mfd_send(&e.sender, &e.from, 0, "ram", 3, index, NPAGES, false);
        if (i == 3) {
            shutdown(at_source ? e.out[1].fd : e.in[1].fd, SHUT_RDWR);
        }
        rc = rc ? rc : mig_mfd_sync(&e.sender);
        rc = rc ? rc : mig_mfd_receive_sync(&e.receiver, 60000);
    }
    CHECK(rc == MIG_E_MFD_STOPPED || rc == MIG_E_MFD_GONE);
    CHECK(mig_mfd_sync(&e.sender) == MIG_E_MFD_STOPPED);
    rc = mig_mfd_receive_sync(&e.receiver, 60000);
    CHECK(rc == MIG_E_MFD_STOPPED || rc == MIG_E_MFD_GONE);
    stop(&e);
    join(threads);
    CHECK(e.rc_out[1] == -EPIPE);
    for (int i = 0; i < CHANNELS; i++) {
        CHECK(i == 1 || e.rc_out[i] == MIG_E_MFD_STOPPED || e.rc_out[i] == -EPIPE ||
              e.rc_out[i] == -ECONNRESET);
    }
    ends_close(&e);
}

/* Nobody reads: a stop ends every wait. */
static void *stopping(void *arg)
{
    usleep(20000);
    stop(arg);
    return NULL;
}

static void stop_in_the_middle(void)
{
    struct ends e;
    struct lane lanes[CHANNELS];
    pthread_t threads[2 * CHANNELS], stopper;
    int rc;

    ends_open(&e, MIG_CODEC_ZSTD, 0, false);
    start(&e, lanes, threads);
    CHECK(pthread_create(&stopper, NULL, stopping, &e) == 0);
    rc = mig_mfd_receive_sync(&e.receiver, 60000);
    CHECK(rc == MIG_E_MFD_STOPPED || rc == MIG_E_MFD_GONE);
    pthread_join(stopper, NULL);
    CHECK(mig_mfd_sync(&e.sender) == MIG_E_MFD_STOPPED);
    join(threads);
    ends_close(&e);
}

/* ---- headers --------------------------------------------------------------------------------- */

static void check_header(size_t page_size)
{
    size_t max = mig_mfd_max_pages(page_size), nbytes = mig_mfd_packet_nbytes(page_size);
    uint64_t *page = malloc(max * 8), *again = malloc(max * 8);
    struct mig_mfd_packet p = {.flags = MIG_MFD_SYNC | MIG_MFD_ZSTD, .number = UINT64_MAX - 1,
                               .next_size = UINT32_MAX, .page = page, .name = "pc.ram"};
    struct mig_mfd_packet q = {.page = again};
    uint8_t *wire = malloc(nbytes); /* without slack: a byte too many is seen */

    for (size_t normal = 0; normal <= max; normal += 1 + max / 7) {
        for (size_t i = 0; i < max; i++) {
            page[i] = i * 3;
        }
        p.normal = (uint32_t)normal;
        p.zero = (uint32_t)(max - normal);
        mig_mfd_put(&p, page_size, wire);
        CHECK(mig_mfd_get(&q, page_size, wire) == 0);
        CHECK(q.flags == p.flags && q.normal == p.normal && q.zero == p.zero &&
              q.next_size == p.next_size && q.number == p.number && !strcmp(q.name, p.name));
        CHECK(memcmp(page, again, max * 8) == 0);
    }
    for (size_t at = 0; at < 36; at++) {
        uint8_t old = wire[at];

        for (int bit = 0; bit < 8; bit++) {
            wire[at] ^= (uint8_t)(1 << bit);
            mig_mfd_get(&q, page_size, wire);
            wire[at] = old;
        }
    }
    memset(wire + 64, 'x', MIG_MFD_NAME);
    CHECK(mig_mfd_get(&q, page_size, wire) == 0 && strlen(q.name) == MIG_MFD_NAME - 1);
    free(wire);
    free(page);
    free(again);
}

int main(void)
{
    /* as a shell starts it: a connection that breaks must not end the program */
    signal(SIGPIPE, SIG_DFL);
    CHECK(mig_kernels_select(NULL, &k) == 0);
    for (size_t page_size = 1024; page_size <= 1 << 20; page_size *= 4) {
        check_header(page_size);
    }
    for (int codec = MIG_CODEC_NONE; codec <= MIG_CODEC_ZSTD; codec++) {
        migrate((enum mig_codec)codec, 0, false);
        migrate((enum mig_codec)codec, 0, true);
    }
    refuses = true;
    migrate(MIG_CODEC_NONE, 0, false);
    refuses = false;
    /* none, as many as locks, some, and more than there are pages */
    for (size_t nslots = 0; nslots <= 1024; nslots = nslots ? nslots * 4 : MIG_ADAPTIVE_LOCKS) {
        migrate(MIG_CODEC_ADAPTIVE, nslots, false);
        migrate(MIG_CODEC_ADAPTIVE, nslots, true);
    }
    lose_a_channel(true);
    lose_a_channel(false);
    stop_in_the_middle();
    printf("fine\n");
    return 0;
}
