/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Guest memory that is not all there: who touches a missing page stops until a userfaultfd has been
 * given it. A thread here asks the source for it; threads that read from the source place what
 * comes. None of them needs Python, whose lock the one who stopped may hold.
 *
 *   uffd.c        memory: discard, register, place
 *   uffdclients.c other processes that map the same memory
 *   uffdfaults.c  the fault thread, and what it asks for
 *   uffdtimes.c   how long who waited
 *   uffdlisten.c  reads one connection and places its pages */
#ifndef MIG_UFFD_H
#define MIG_UFFD_H

#include <pthread.h>

#include "mig.h"
#include "wire.h"

enum mig_uffd_error {
    MIG_E_UFFD_ORDER = -5050,     /* pages of a host page that do not follow each other */
    MIG_E_UFFD_TRUNCATED = -5051, /* the connection ended within something */
    MIG_E_UFFD_SECTION = -5052,   /* a section, or a footer, of another id */
    MIG_E_UFFD_MISSING = -5053,   /* who was to bring the pages that are wanted has gone */
};

/* ---- the return path ------------------------------------------------------------------------- */

/* Written by several threads, and from time to time by none. */
struct mig_reply {
    pthread_mutex_t lock;
    struct mig_fd fd; /* fd.fd < 0: nobody listens */
    int64_t block;    /* that requests name when they name none, -1 */
};

/* What cannot be written is left out: the break is seen by who reads. 0, or an error. */
int mig_reply_send(struct mig_reply *r, const void *bytes, size_t nbytes);

/* ---- block times ----------------------------------------------------------------------------- */

enum {
    MIG_UFFD_WAITS = 1024, /* threads that may wait at a time and be timed */
    MIG_UFFD_VCPUS = 1024,
    /* of latencies in microseconds: four for each power of two */
    MIG_UFFD_BUCKETS = 4 * 40,
};

struct mig_wait {
    uint64_t address; /* of the host page */
    int64_t since;    /* ns */
    uint32_t thread;
};

struct mig_waits {
    struct mig_wait wait[MIG_UFFD_WAITS];
    size_t n;
    uint64_t bucket[MIG_UFFD_BUCKETS];
    /* threads of vCPUs (0: the next that waits and is none of the others), how long each has waited
     * (ns), and all of them at the same time */
    uint32_t vcpus[MIG_UFFD_VCPUS];
    int64_t blocked[MIG_UFFD_VCPUS];
    size_t nvcpus, down;
    int64_t last_begin, all_blocked;
};

/* Whose waiting is counted from now on. */
void mig_waits_vcpus(struct mig_waits *w, const uint32_t *vcpus, size_t n);
void mig_waits_begin(struct mig_waits *w, uint64_t address, uint32_t thread, int64_t now);
void mig_waits_end(struct mig_waits *w, uint64_t address, int64_t now);
size_t mig_waits_bucket(uint64_t microseconds);
/* Latencies of a bucket are below this (microseconds). */
uint64_t mig_waits_limit(size_t bucket);

/* ---- memory ---------------------------------------------------------------------------------- */

struct mig_uffd_block {
    uint8_t *base;
    uint64_t npages;    /* of the target */
    size_t unit;        /* bytes that are placed at once: the larger of host and target page */
    bool anonymous;     /* private, of no file */
    const char *name;
    size_t name_len;
    uint64_t *received; /* a bit for each page of the target */
    uint64_t *wanted;   /* for each unit: asked for, and not there yet */
    bool can_zero;      /* UFFDIO_ZEROPAGE works */
    bool huge;          /* the kernel is to make huge pages of it afterwards */
};

enum { MIG_UFFD_CLIENTS = 62 };

/* Part of a block as another process maps it; in whole units. */
struct mig_uffd_mapping {
    size_t block;
    uint64_t offset, nbytes; /* in the block */
    uint64_t address;        /* there */
};

/* Another process, which waits at a userfaultfd of its own. */
struct mig_uffd_client {
    int fd;
    struct mig_uffd_mapping *mappings;
    size_t nmappings;
    bool broken;
};

struct mig_uffd {
    int fd;
    int news_fd; /* there is something new in what the fault thread has to do */
    struct mig_uffd_block *blocks;
    size_t nblocks, nregistered;
    size_t page_size;
    uint8_t *zeros;      /* a unit of the largest block */
    struct mig_reply *reply;
    bool has_thread, has_lock;
    pthread_t thread;
    /* over wanted, waits and the rest */
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    struct mig_waits waits;
    uint64_t nwanted, nasked;
    bool interrupted;
    size_t nreaders, nactive; /* connections that were begun to be read, and are being read */
    /* Until it is settled that the guest runs here, who waits may be who loads its devices, with
     * Python's lock: when nobody is left to bring the page, memory is given up. */
    bool settled, given_up;
    bool stopping;
    struct mig_uffd_client *clients[MIG_UFFD_CLIENTS];
    size_t nclients;
};

/* 0 when it works here; -EOPNOTSUPP, -ENOSYS, -EPERM as mig_track_probe(). */
int mig_uffd_probe(void);
/* Gives memory back, so that it is missing: 0 or -errno. */
int mig_uffd_discard(uint8_t *at, size_t nbytes, bool anonymous);
/* Registers the blocks and starts the fault thread. The caller gives memory that is zero. */
int mig_uffd_open(struct mig_uffd *u, struct mig_uffd_block *blocks, size_t nblocks,
                  size_t page_size, struct mig_reply *reply);
/* Memory is as any other then; who still waits finds zeros. Twice is once. */
void mig_uffd_close(struct mig_uffd *u);

/* Places a unit, NULL: zeros, marks it received and wakes who waits. What is there already stays as
 * it is. 0 or -errno. Any thread. */
int mig_uffd_place(struct mig_uffd *u, size_t block, uint64_t unit, const uint8_t *bytes);
/* Has a unit that was received be there: zeros of precopy were never written. */
int mig_uffd_supply(struct mig_uffd *u, const struct mig_uffd_block *block, uint64_t unit);

int mig_uffd_start(struct mig_uffd *u);
/* Asks for everything that is wanted, on another connection. */
int mig_uffd_ask_again(struct mig_uffd *u, const struct mig_kernels *k);
/* Waits until nothing is wanted; MIG_E_UFFD_MISSING when nothing more will come. */
int mig_uffd_drain(struct mig_uffd *u);
/* Waits until so many connections are being read, whatever Python's lock does from then on: 1; or
 * until mig_uffd_interrupt(), or for so long: 0. Negative: for ever. */
int mig_uffd_await_readers(struct mig_uffd *u, size_t n, int64_t timeout_ns);
/* The devices are loaded, or will not be: whether memory was not given up. */
bool mig_uffd_settle(struct mig_uffd *u);
/* Around the reading of a connection. */
void mig_uffd_enter(struct mig_uffd *u);
void mig_uffd_leave(struct mig_uffd *u);
/* Whether pages may still come. */
void mig_uffd_interrupt(struct mig_uffd *u, bool on);
int64_t mig_uffd_now(void);

/* ---- other processes -------------------------------------------------------------------------- */

/* Takes a copy of a userfaultfd: 0, -EINVAL when it is none, -errno. */
int mig_uffd_client_open(struct mig_uffd_client *client, int fd);
/* Memory of its mappings is as any other there; who waits finds what is there. Twice is once. */
void mig_uffd_client_close(struct mig_uffd_client *client);
/* Serves its faults: 0, or -ENOSPC. Any thread, as the next one. */
int mig_uffd_add_client(struct mig_uffd *u, struct mig_uffd_client *client);
void mig_uffd_remove_client(struct mig_uffd *u, struct mig_uffd_client *client);
/* The caller of these holds the lock. */
bool mig_uffd_has_client(const struct mig_uffd *u, const struct mig_uffd_client *client);
bool mig_uffd_client_find(const struct mig_uffd *u, const struct mig_uffd_client *client,
                          uint64_t address, size_t *block, uint64_t *unit);
void mig_uffd_wake_clients(const struct mig_uffd *u, size_t block, uint64_t unit);

/* ---- reading a connection -------------------------------------------------------------------- */

struct mig_uffd_stream {
    struct mig_uffd *u;
    struct mig_ram_parser *parser;
    const struct mig_fd *fd;
    struct mig_reply *reply;
    uint32_t section_id;
    bool footers;
    bool bare;          /* records and nothing else, until EOS */
    uint8_t *buf;
    size_t size, start, end;
    uint8_t *unit;      /* the unit that is gathered, as large as the largest */
    int64_t block;      /* it is of, -1: none is begun */
    uint64_t next;      /* page that follows in it */
    bool all_zero, ended;
    uint64_t base;      /* bytes that came before buf */
    uint64_t normal, zero;
};

enum mig_uffd_stop { MIG_UFFD_END, MIG_UFFD_OTHER };

/* Reads and places until the end of the stream, or up to something that is neither section nor
 * PING. An error of MIG_E_RAM_*, MIG_E_UFFD_*, or of reading and placing. */
int mig_uffd_read(struct mig_uffd_stream *s);

#endif
