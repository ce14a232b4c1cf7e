/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Requests of a destination in postcopy are answered by the thread that reads them: every other one
 * that a page had to pass through would be waited for. Somebody else sends the pages that nobody
 * waits for; the two share the bitmaps, and the stream unless answers have a connection of their own.
 *
 *   return path                        bitmaps              stream
 *   be16 type, be16 length             lock `pages`         `turn`
 *   3: be64 offset, be32 length,  -->  take what is    -->  [head] records [tail]
 *      len, name of the block          dirty
 *   4: be64 offset, be32 length
 *
 * `turn` is had from before pages are taken until they are sent: who has had it when no page is left
 * knows that all are on their way. */
#include "pageserver.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "endian.h"
#include "wire.h"

enum {
    HEADER = 4,
    RANGE = 12, /* offset and length */
};

/* ---- making --------------------------------------------------------------------------------- */

static uint64_t most_host_npages(const struct mig_served_block *blocks, size_t nblocks)
{
    uint64_t most = 1;

    for (size_t i = 0; i < nblocks; i++) {
        most = blocks[i].host_npages > most ? blocks[i].host_npages : most;
    }
    return most;
}

static int allocate(struct mig_server *s)
{
    struct mig_out *q = &s->queue;
    size_t record = MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME + 1;

    /* a piece goes on to the end of the host page that its last page is in */
    s->max_index = MIG_SERVER_BATCH + (size_t)most_host_npages(s->blocks, s->nblocks);
    q->max_iov = 2 * MIG_SERVER_BATCH + 4;
    q->arena_size = (MIG_RAM_WORD + 1) * MIG_SERVER_BATCH + 2 * record + 2 * MIG_SERVER_FRAME;
    s->index = malloc(s->max_index * sizeof *s->index);
    s->zero = malloc(mig_bitmap_nwords(MIG_SERVER_BATCH) * sizeof *s->zero);
    s->notes = malloc(MIG_SERVER_NOTES * sizeof *s->notes);
    q->iov = malloc(q->max_iov * sizeof *q->iov);
    q->arena = malloc(q->arena_size);
    return s->index && s->zero && s->notes && q->iov && q->arena ? 0 : MIG_E_NOMEM;
}

int mig_server_open(struct mig_server *s, const struct mig_kernels *k,
                    const struct mig_served_block *blocks, size_t nblocks, size_t page_size)
{
    memset(s, 0, sizeof *s);
    s->k = k;
    s->blocks = blocks;
    s->nblocks = nblocks;
    s->page_size = page_size;
    s->begun = s->named = s->last = s->in.fd = s->out.fd = s->wake_fd = -1;
    pthread_mutex_init(&s->pages, NULL);
    pthread_mutex_init(&s->turn, NULL);
    pthread_cond_init(&s->turned, NULL);
    s->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return s->kick_fd < 0 ? -errno : allocate(s);
}

void mig_server_stop(struct mig_server *s)
{
    if (s->kick_fd >= 0) {
        close(s->kick_fd);
    }
    s->kick_fd = s->wake_fd = -1;
}

void mig_server_close(struct mig_server *s)
{
    mig_server_stop(s);
    free(s->index);
    free(s->zero);
    free(s->notes);
    free(s->queue.iov);
    free(s->queue.arena);
    pthread_cond_destroy(&s->turned);
    pthread_mutex_destroy(&s->turn);
    pthread_mutex_destroy(&s->pages);
}

static void ring(int fd)
{
    uint64_t one = 1;

    if (fd >= 0) {
        /* one that is full is readable all the same */
        ssize_t n = write(fd, &one, sizeof one);

        (void)n;
    }
}

static void silence(int fd)
{
    uint64_t count;
    ssize_t n = read(fd, &count, sizeof count);

    (void)n;
}

/* ---- the stream ----------------------------------------------------------------------------- */

/* Whether the stream is ours; what broke it, if it is not. With `turn` held. */
static int begin_turn(struct mig_server *s)
{
    if (!s->broken) {
        s->writing = true;
    }
    return s->broken;
}

int mig_server_take_turn(struct mig_server *s)
{
    int rc;

    pthread_mutex_lock(&s->turn);
    while (s->writing || s->waiting) {
        pthread_cond_wait(&s->turned, &s->turn);
    }
    rc = begin_turn(s);
    pthread_mutex_unlock(&s->turn);
    return rc;
}

static int take_turn_first(struct mig_server *s)
{
    int rc;

    pthread_mutex_lock(&s->turn);
    __atomic_add_fetch(&s->waiting, 1, __ATOMIC_RELAXED);
    while (s->writing) {
        pthread_cond_wait(&s->turned, &s->turn);
    }
    __atomic_sub_fetch(&s->waiting, 1, __ATOMIC_RELAXED);
    rc = begin_turn(s);
    pthread_cond_broadcast(&s->turned);
    pthread_mutex_unlock(&s->turn);
    return rc;
}

/* The first reason counts. */
static void break_off(struct mig_server *s, int reason)
{
    pthread_mutex_lock(&s->turn);
    s->broken = s->broken ? s->broken : reason;
    pthread_mutex_unlock(&s->turn);
}

static void end_turn(struct mig_server *s)
{
    pthread_mutex_lock(&s->turn);
    s->writing = false;
    pthread_cond_broadcast(&s->turned);
    pthread_mutex_unlock(&s->turn);
}

void mig_server_give_turn(struct mig_server *s, bool broken)
{
    if (broken) {
        break_off(s, MIG_E_SERVER_BROKEN);
    }
    end_turn(s);
}

/* Has the stream, whatever its state. */
static void seize(struct mig_server *s)
{
    pthread_mutex_lock(&s->turn);
    while (s->writing) {
        pthread_cond_wait(&s->turned, &s->turn);
    }
    s->writing = true;
    pthread_mutex_unlock(&s->turn);
}

void mig_server_attach(struct mig_server *s, const struct mig_fd *out, bool beside,
                       bool detects, const uint8_t *head, size_t nhead, const uint8_t *tail,
                       size_t ntail)
{
    seize(s);
    s->broken = 0;
    s->out = *out;
    /* who is gone is seen on the return path */
    s->out.with = beside ? &s->in : NULL;
    s->beside = beside;
    s->detects = detects;
    s->named = -1;
    memcpy(s->head, head, nhead);
    memcpy(s->tail, tail, ntail);
    s->nhead = nhead;
    s->ntail = ntail;
    __atomic_store_n(&s->open, true, __ATOMIC_RELEASE);
    end_turn(s);
    ring(s->kick_fd);
}

void mig_server_detach(struct mig_server *s)
{
    seize(s);
    __atomic_store_n(&s->open, false, __ATOMIC_RELEASE);
    s->out.fd = -1;
    end_turn(s);
    ring(s->kick_fd);
}

/* The pages index[0..n) of a block, MIG_SERVER_BATCH at most. */
static int send_batch(struct mig_server *s, size_t number, const uint64_t *index, size_t n)
{
    const struct mig_served_block *b = &s->blocks[number];
    bool names = !s->beside || s->named != (int64_t)number;
    struct mig_out *q = &s->queue;
    size_t nzero = 0;
    int64_t sent;

    q->niov = q->used = 0;
    q->nbytes = 0;
    if (s->detects && b->detect_zero) {
        nzero = mig_zero_pages(s->k, b->pages, index, n, s->zero);
    } else {
        memset(s->zero, 0, mig_bitmap_nwords(n) * sizeof *s->zero);
        for (size_t i = 0; i < n; i++) {
            nzero += !mig_page(b->pages, index[i]);
        }
    }
    mig_out_copy(q, s->head, s->nhead);
    mig_ram_encode(q, b->pages, names ? b->name : NULL, b->name_len, index, 0, n, s->zero);
    mig_out_copy(q, s->tail, s->ntail);
    sent = mig_fd_writev(&s->out, q->iov, q->niov);
    if (sent < 0) {
        return (int)sent;
    }
    s->named = (int64_t)number;
    __atomic_add_fetch(&s->nzero, nzero, __ATOMIC_RELAXED);
    __atomic_add_fetch(&s->nnormal, n - nzero, __ATOMIC_RELAXED);
    __atomic_add_fetch(&s->nbytes, (uint64_t)sent, __ATOMIC_RELAXED);
    return 0;
}

/* ---- pages ---------------------------------------------------------------------------------- */

/* With `pages` held. What finds no room is a hint less. */
static void note(struct mig_server *s, size_t block, bool sent, uint64_t first, uint64_t npages)
{
    if (s->nnotes < MIG_SERVER_NOTES) {
        s->notes[s->nnotes++] = (struct mig_served){(uint32_t)block, sent, first, npages};
    }
}

/* Where `first..end` meets the host page that the other has begun: *from..*to, or nothing. */
static bool meets_begun(const struct mig_server *s, size_t block, uint64_t first, uint64_t end,
                        uint64_t *from, uint64_t *to)
{
    if (s->begun != (int64_t)block || first >= s->begun_end || s->begun_first >= end) {
        return false;
    }
    *from = first > s->begun_first ? first : s->begun_first;
    *to = end < s->begun_end ? end : s->begun_end;
    return true;
}

/* Whether anything of first..end can be taken; notes who waits for what is being sent. */
static bool is_worth(struct mig_server *s, size_t block, uint64_t first, uint64_t end)
{
    const uint64_t *dirty = s->blocks[block].dirty;
    uint64_t from = end, to = end, left;

    if (meets_begun(s, block, first, end, &from, &to)) {
        s->hurries = true;
    }
    left = mig_bitmap_count(s->k, dirty, first, from - first);
    return left || mig_bitmap_count(s->k, dirty, to, end - to);
}

/* Takes what is dirty of first..end, at most max_index pages; returns how many. */
static size_t take_pages(struct mig_server *s, size_t block, uint64_t first, uint64_t end)
{
    uint64_t *dirty = s->blocks[block].dirty, from = end, to = end;
    size_t n;

    pthread_mutex_lock(&s->pages);
    if (meets_begun(s, block, first, end, &from, &to)) {
        s->hurries = true;
    }
    n = s->k->take(dirty, from, first, s->index, s->max_index);
    if (to < end) {
        n += s->k->take(dirty, end, to, s->index + n, s->max_index - n);
    }
    s->left -= n;
    pthread_mutex_unlock(&s->pages);
    return n;
}

static void note_sent(struct mig_server *s, size_t block, const uint64_t *index, size_t n)
{
    size_t i, begin = 0;

    pthread_mutex_lock(&s->pages);
    for (i = 1; i <= n; i++) {
        if (i == n || index[i] != index[i - 1] + 1) {
            note(s, block, true, index[begin], i - begin);
            begin = i;
        }
    }
    pthread_mutex_unlock(&s->pages);
}

/* Takes and sends pages first..end, whole host pages. */
static int answer_piece(struct mig_server *s, size_t block, uint64_t first, uint64_t end)
{
    size_t n, done, m;
    int rc = take_turn_first(s);

    if (rc < 0) {
        return rc;
    }
    n = s->open ? take_pages(s, block, first, end) : 0;
    for (done = 0; done < n && rc == 0; done += m) {
        m = n - done < MIG_SERVER_BATCH ? n - done : MIG_SERVER_BATCH;
        rc = send_batch(s, block, s->index + done, m);
    }
    if (n && rc == 0 && s->tells_sent) {
        note_sent(s, block, s->index, n);
    }
    if (rc < 0) {
        /* a record may have been begun: whatever followed would be taken for the rest of it */
        break_off(s, rc);
    }
    end_turn(s);
    return rc;
}

int mig_server_answer(struct mig_server *s, size_t block, uint64_t first, uint64_t npages)
{
    const struct mig_served_block *b = &s->blocks[block];
    uint64_t host = b->host_npages, end = (first + npages + host - 1) / host * host, piece;
    bool worth, wakes;
    int rc = 0;

    first -= first % host;
    end = end < b->pages->npages ? end : b->pages->npages;
    pthread_mutex_lock(&s->pages);
    /* also of what is on its way already: who waits for that will soon be past it */
    note(s, block, false, first, end - first);
    worth = is_worth(s, block, first, end);
    /* whoever is inside a host page may be asleep, and has the stream */
    wakes = s->begun >= 0;
    pthread_mutex_unlock(&s->pages);
    if (wakes) {
        ring(s->wake_fd);
    }
    for (; worth && first < end && rc == 0; first = piece) {
        piece = (first + MIG_SERVER_BATCH + host - 1) / host * host;
        piece = piece < end ? piece : end;
        rc = answer_piece(s, block, first, piece);
    }
    __atomic_add_fetch(&s->nasked, npages, __ATOMIC_RELAXED);
    /* there is something to be noted, and perhaps no page left */
    ring(s->wake_fd);
    return rc;
}

/* ---- the return path ------------------------------------------------------------------------- */

static int64_t find_block(const struct mig_server *s, const uint8_t *name, size_t len)
{
    for (size_t i = 0; i < s->nblocks; i++) {
        if (s->blocks[i].name_len == len && memcmp(s->blocks[i].name, name, len) == 0) {
            return (int64_t)i;
        }
    }
    return -1;
}

/* Answers the message at the head of the buffer. 1: done; 0: it is not one to be answered, or not
 * whole, which *more tells. */
static int answer_next(struct mig_server *s, bool *more)
{
    const uint8_t *at = s->buf + s->start, *range = at + HEADER;
    size_t held = s->end - s->start, length, name_len;
    uint64_t first, npages;
    unsigned type;
    int64_t block;
    int rc;

    *more = held < HEADER;
    if (*more) {
        return 0;
    }
    type = mig_load_be16(at);
    length = mig_load_be16(at + 2);
    if ((type != MIG_RETURN_REQ_PAGES || length != RANGE) &&
        (type != MIG_RETURN_REQ_PAGES_ID || length <= RANGE ||
         length > RANGE + 1 + MIG_RAM_MAX_NAME)) {
        return 0;
    }
    *more = held < HEADER + length;
    if (*more) {
        return 0;
    }
    block = s->last;
    if (type == MIG_RETURN_REQ_PAGES_ID) {
        name_len = range[RANGE];
        block = length == RANGE + 1 + name_len ? find_block(s, range + RANGE + 1, name_len) : -1;
    }
    first = mig_load_be64(range) / s->page_size;
    npages = mig_load_be32(range + 8) / s->page_size;
    /* what is wrong with it is found out by who says so */
    if (block < 0 || s->blocks[block].ignored || !npages ||
        mig_load_be64(range) % s->page_size || mig_load_be32(range + 8) % s->page_size ||
        first >= s->blocks[block].pages->npages ||
        npages > s->blocks[block].pages->npages - first ||
        !__atomic_load_n(&s->open, __ATOMIC_ACQUIRE)) {
        return 0;
    }
    s->last = block;
    s->start += HEADER + length;
    rc = mig_server_answer(s, (size_t)block, first, npages);
    return rc < 0 ? rc : 1;
}

/* Whether a connection beside is of use: until the last page is taken. */
static bool watches(struct mig_server *s)
{
    bool used;

    pthread_mutex_lock(&s->pages);
    used = s->left != 0;
    pthread_mutex_unlock(&s->pages);
    return used && s->beside && __atomic_load_n(&s->open, __ATOMIC_ACQUIRE);
}

/* Waits for bytes of the return path: 1 when there are some, 0 when something else has changed. */
static int await_bytes(struct mig_server *s)
{
    struct pollfd fds[4] = {
        {.fd = s->in.fd, .events = POLLIN},
        {.fd = s->in.cancel_fd, .events = POLLIN},
        {.fd = s->kick_fd, .events = POLLIN},
        {.fd = watches(s) ? s->out.fd : -1, .events = POLLIN},
    };

    if (poll(fds, 4, s->in.timeout_ms) < 0) {
        return errno == EINTR ? 0 : -errno;
    }
    if (fds[1].revents) {
        return MIG_E_CANCELLED;
    }
    if (fds[2].revents) {
        silence(s->kick_fd);
    }
    if (fds[0].revents) {
        return 1;
    }
    /* the destination says nothing there */
    if (fds[3].revents && watches(s)) {
        break_off(s, MIG_E_GONE);
        return MIG_E_GONE;
    }
    return fds[2].revents || fds[3].revents ? 0 : MIG_E_TIMEOUT;
}

/* Adds what is there to the buffer: how much, 0 when nothing more comes, or an error. */
static int64_t fill(struct mig_server *s)
{
    struct iovec room;
    int64_t n;

    memmove(s->buf, s->buf + s->start, s->end - s->start);
    s->end -= s->start;
    s->start = 0;
    room = (struct iovec){.iov_base = s->buf + s->end, .iov_len = sizeof s->buf - s->end};
    n = mig_fd_readv_some(&s->in, &room, 1);
    s->end += n > 0 ? (size_t)n : 0;
    return n;
}

int mig_server_run(struct mig_server *s)
{
    for (;;) {
        bool more;
        int rc = answer_next(s, &more);

        if (rc < 0 || (rc == 0 && !more)) {
            return rc;
        }
        if (rc == 0) {
            rc = await_bytes(s);
            if (rc == 1) {
                int64_t n = fill(s);

                if (n <= 0) {
                    return (int)n;
                }
            } else if (rc < 0) {
                return rc;
            }
        }
    }
}

int64_t mig_server_read(struct mig_server *s, uint8_t *to, size_t n)
{
    size_t held = s->end - s->start;
    int64_t rest;

    if (held > n) {
        held = n;
    }
    memcpy(to, s->buf + s->start, held);
    s->start += held;
    rest = n > held ? mig_fd_read(&s->in, to + held, n - held, n - held) : 0;
    return rest < 0 ? rest : (int64_t)held + rest;
}
