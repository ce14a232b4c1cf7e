/* SPDX-License-Identifier: LGPL-2.1-or-later
 * The fault thread: asks the source for pages that somebody waits for, each once. See uffd.h. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "endian.h"
#include "thread.h"
#include "uffd.h"

enum {
    MAX_MESSAGES = 64,
    MAX_RUNS = 64,
    RETURN_HEADER = 4,
    REQUEST = 12,
    /* be32: what one request may ask for, in whole units whatever these are */
    MAX_REQUEST = 1 << 30,
};

int64_t mig_uffd_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- the return path ------------------------------------------------------------------------- */

/* The caller holds the lock. */
static int send_all(struct mig_reply *r, const void *bytes, size_t nbytes)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = nbytes};
    int64_t rc = r->fd.fd < 0 ? 0 : mig_fd_writev(&r->fd, &iov, 1);

    return rc < 0 ? (int)rc : 0;
}

int mig_reply_send(struct mig_reply *r, const void *bytes, size_t nbytes)
{
    int rc;

    pthread_mutex_lock(&r->lock);
    rc = send_all(r, bytes, nbytes);
    pthread_mutex_unlock(&r->lock);
    return rc;
}

/* be16 type, be16 length, be64 start, be32 length, [counted name] */
static int ask(struct mig_reply *r, int64_t number, const struct mig_uffd_block *block,
               uint64_t start, uint64_t nbytes)
{
    uint8_t message[RETURN_HEADER + REQUEST + 1 + MIG_RAM_MAX_NAME];
    size_t length = REQUEST;
    int rc;

    pthread_mutex_lock(&r->lock);
    mig_store_be64(message + RETURN_HEADER, start);
    for (int i = 0; i < 4; i++) {
        message[RETURN_HEADER + 8 + i] = (uint8_t)(nbytes >> (24 - 8 * i));
    }
    message[0] = message[2] = 0;
    message[1] = MIG_RETURN_REQ_PAGES;
    if (r->block != number) {
        message[1] = MIG_RETURN_REQ_PAGES_ID;
        message[RETURN_HEADER + REQUEST] = (uint8_t)block->name_len;
        memcpy(message + RETURN_HEADER + REQUEST + 1, block->name, block->name_len);
        length += 1 + block->name_len;
        r->block = number;
    }
    message[2] = (uint8_t)(length >> 8);
    message[3] = (uint8_t)length;
    rc = send_all(r, message, RETURN_HEADER + length);
    pthread_mutex_unlock(&r->lock);
    return rc;
}

/* ---- faults ---------------------------------------------------------------------------------- */

struct run {
    size_t block;
    uint64_t first, end; /* units */
};

static bool is_received(const struct mig_uffd *u, const struct mig_uffd_block *block, uint64_t unit)
{
    uint64_t pages = block->unit / u->page_size, first = unit * pages;

    return mig_bitmap_next_clear(block->received, first + pages, first) == first + pages;
}

static int64_t find_block(const struct mig_uffd *u, uint64_t address)
{
    for (size_t i = 0; i < u->nblocks; i++) {
        uint64_t base = (uintptr_t)u->blocks[i].base;

        if (address >= base && address - base < u->blocks[i].npages * u->page_size) {
            return (int64_t)i;
        }
    }
    return -1;
}

/* Notes a unit that is to be asked for, with its neighbour where that is one of these, too. */
static size_t add_run(struct run *runs, size_t n, size_t block, uint64_t unit)
{
    for (size_t i = 0; i < n; i++) {
        if (runs[i].block == block && runs[i].end == unit) {
            runs[i].end++;
            return n;
        }
        if (runs[i].block == block && runs[i].first == unit + 1) {
            runs[i].first--;
            return n;
        }
    }
    runs[n] = (struct run){.block = block, .first = unit, .end = unit + 1};
    return n + 1;
}

/* A unit that is not there: asked for once, whoever waits. */
static size_t want(struct mig_uffd *u, size_t number, uint64_t unit, struct run *runs, size_t n)
{
    struct mig_uffd_block *block = u->blocks + number;

    if (mig_bitmap_test(block->wanted, unit)) {
        return n;
    }
    mig_bitmap_put(block->wanted, unit);
    u->nwanted++;
    u->nasked++;
    pthread_cond_broadcast(&u->arrived);
    return add_run(runs, n, number, unit);
}

static size_t note(struct mig_uffd *u, const struct uffd_msg *msg, struct run *runs, size_t n)
{
    uint64_t address = msg->arg.pagefault.address, unit;
    int64_t number = find_block(u, address);
    const struct mig_uffd_block *block;

    if (msg->event != UFFD_EVENT_PAGEFAULT || number < 0) {
        return n;
    }
    block = u->blocks + number;
    unit = (address - (uintptr_t)block->base) / block->unit;
    if (is_received(u, block, unit)) {
        mig_uffd_supply(u, block, unit);
        return n;
    }
    mig_waits_begin(&u->waits, (uintptr_t)block->base + unit * block->unit,
                    msg->arg.pagefault.feat.ptid, mig_uffd_now());
    return want(u, (size_t)number, unit, runs, n);
}

/* The same of another process, whose waits are not counted: it is no vCPU. */
static size_t note_client(struct mig_uffd *u, const struct mig_uffd_client *client,
                          const struct uffd_msg *msg, struct run *runs, size_t n)
{
    uint64_t unit;
    size_t number;

    if (msg->event != UFFD_EVENT_PAGEFAULT ||
        !mig_uffd_client_find(u, client, msg->arg.pagefault.address, &number, &unit)) {
        return n;
    }
    if (is_received(u, u->blocks + number, unit)) {
        mig_uffd_supply(u, u->blocks + number, unit);
        mig_uffd_wake_clients(u, number, unit);
        return n;
    }
    return want(u, number, unit, runs, n);
}

static int ask_run(struct mig_uffd *u, const struct run *run)
{
    const struct mig_uffd_block *block = u->blocks + run->block;
    uint64_t most = block->unit < MAX_REQUEST ? MAX_REQUEST / block->unit : 1;

    for (uint64_t unit = run->first; unit < run->end; unit += most) {
        uint64_t n = run->end - unit < most ? run->end - unit : most;
        int rc = ask(u->reply, (int64_t)run->block, block, unit * block->unit, n * block->unit);

        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* One that only ever polls as broken would never let the thread wait. */
static bool is_broken(const struct mig_uffd_client *client)
{
    struct pollfd fd = {.fd = client->fd, .events = POLLIN};

    return poll(&fd, 1, 0) > 0 && (fd.revents & ~POLLIN);
}

/* What one userfaultfd has to tell; client: whose it is, NULL: this process's own. */
static void serve(struct mig_uffd *u, struct mig_uffd_client *client)
{
    struct uffd_msg messages[MAX_MESSAGES];
    struct run runs[MAX_MESSAGES];
    size_t nruns = 0;
    ssize_t got = 0;

    pthread_mutex_lock(&u->lock);
    if (client == NULL) {
        got = read(u->fd, messages, sizeof(messages));
    } else if (mig_uffd_has_client(u, client)) {
        client->broken = is_broken(client);
        got = client->broken ? 0 : read(client->fd, messages, sizeof(messages));
    }
    for (size_t i = 0; got > 0 && i < (size_t)got / sizeof(*messages); i++) {
        nruns = client ? note_client(u, client, messages + i, runs, nruns)
                       : note(u, messages + i, runs, nruns);
    }
    pthread_mutex_unlock(&u->lock);
    /* while the source does not read, pages that are on their way can still be placed */
    for (size_t i = 0; i < nruns; i++) {
        (void)ask_run(u, runs + i);
    }
}

static void *serve_all(void *argument)
{
    struct mig_uffd *u = argument;
    struct mig_uffd_client *clients[MIG_UFFD_CLIENTS];
    struct pollfd fds[2 + MIG_UFFD_CLIENTS];

    for (;;) {
        size_t n = 0;
        bool stopping;

        pthread_mutex_lock(&u->lock);
        stopping = u->stopping;
        for (size_t i = 0; i < u->nclients; i++) {
            if (!u->clients[i]->broken) {
                fds[2 + n] = (struct pollfd){.fd = u->clients[i]->fd, .events = POLLIN};
                clients[n++] = u->clients[i];
            }
        }
        pthread_mutex_unlock(&u->lock);
        if (stopping) {
            return NULL;
        }
        fds[0] = (struct pollfd){.fd = u->fd, .events = POLLIN};
        fds[1] = (struct pollfd){.fd = u->news_fd, .events = POLLIN};
        poll(fds, 2 + n, -1);
        if (fds[1].revents) {
            eventfd_t count;

            eventfd_read(u->news_fd, &count);
        }
        if (fds[0].revents) {
            serve(u, NULL);
        }
        for (size_t i = 0; i < n; i++) {
            if (fds[2 + i].revents) {
                serve(u, clients[i]);
            }
        }
    }
}

int mig_uffd_start(struct mig_uffd *u)
{
    int rc = mig_thread_start(&u->thread, serve_all, u, "mig-faults");

    u->has_thread = rc == 0;
    return rc;
}

int mig_uffd_ask_again(struct mig_uffd *u, const struct mig_kernels *k)
{
    int rc = 0;

    for (size_t i = 0; i < u->nblocks && rc == 0; i++) {
        const struct mig_uffd_block *block = u->blocks + i;
        uint64_t nunits = block->npages * u->page_size / block->unit, from = 0;
        uint64_t edges[2 * MAX_RUNS];
        size_t n;

        do {
            pthread_mutex_lock(&u->lock);
            n = mig_bitmap_runs(k, block->wanted, nunits, from, edges, MAX_RUNS, nunits);
            pthread_mutex_unlock(&u->lock);
            for (size_t j = 0; j < n && rc == 0; j++) {
                struct run run = {.block = i, .first = edges[2 * j], .end = edges[2 * j + 1]};

                rc = ask_run(u, &run);
                from = run.end;
            }
        } while (n == MAX_RUNS && rc == 0);
    }
    return rc;
}
