/* SPDX-License-Identifier: LGPL-2.1-or-later
 * A file that grows by whole chunks: see mig.h. With O_DIRECT the chunks are written behind our
 * back (kernel AIO), so that neither the page cache nor a copy into it stands between the network
 * and the disk. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include "aio.h"
#include "mig.h"

/* A file system waits for a direct write that makes the file longer: it is made longer ahead. */
enum { GROW = 256 << 20 };

int mig_pwrite_all(int fd, const void *bytes, size_t nbytes, int64_t offset)
{
    const uint8_t *p = bytes;

    while (nbytes) {
        ssize_t n = pwrite(fd, p, nbytes, (off_t)offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -ENOSPC;
        }
        p += n;
        nbytes -= (size_t)n;
        offset += n;
    }
    return 0;
}

int mig_pread_all(int fd, void *bytes, size_t nbytes, int64_t offset)
{
    uint8_t *p = bytes;

    while (nbytes) {
        ssize_t n = pread(fd, p, nbytes, (off_t)offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        p += n;
        nbytes -= (size_t)n;
        offset += n;
    }
    return 0;
}

int mig_appender_open(struct mig_appender *a, int fd, int direct_fd)
{
    size_t nbytes = MIG_NCHUNKS * (size_t)MIG_CHUNK;
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    memset(a, 0, sizeof(*a));
    a->fd = fd;
    a->direct_fd = direct_fd;
    if (memory == MAP_FAILED) {
        return MIG_E_NOMEM;
    }
    a->chunks = memory;
    /* without AIO direct writes are made one by one */
    a->aio = direct_fd >= 0 ? mig_aio_open(MIG_NCHUNKS) : 0;
    return 0;
}

static uint8_t *chunk(const struct mig_appender *a, size_t i)
{
    return a->chunks + i * MIG_CHUNK;
}

/* Waits until at least `min` chunks have come back; notes the first error. */
static int reap(struct mig_appender *a, size_t min)
{
    struct io_event events[MIG_NCHUNKS];
    int64_t n = mig_aio_reap(a->aio, min, events, MIG_NCHUNKS);

    if (n < 0) {
        return (int)n;
    }
    for (int64_t i = 0; i < n; i++) {
        a->busy[events[i].data] = false;
        a->nbusy--;
        if (events[i].res != MIG_CHUNK && a->error == 0) {
            a->error = events[i].res < 0 ? (int)events[i].res : -ENOSPC;
        }
    }
    return a->error;
}

static int wait_all(struct mig_appender *a)
{
    int rc = 0;

    while (a->nbusy && rc == 0) {
        rc = reap(a, a->nbusy);
    }
    return rc;
}

static int submit(struct mig_appender *a)
{
    struct iocb io = mig_aio_write(a->direct_fd, chunk(a, a->current), MIG_CHUNK, a->base,
                                   a->current);
    struct iocb *list[1] = {&io};
    int64_t rc = mig_aio_submit(a->aio, list, 1);

    if (rc < 0) {
        return (int)rc;
    }
    a->busy[a->current] = true;
    a->nbusy++;
    return 0;
}

/* Ends the current chunk, which is full, and finds another. */
static int next_chunk(struct mig_appender *a)
{
    int rc;

    if (a->direct_fd < 0) {
        rc = mig_pwrite_all(a->fd, chunk(a, a->current), MIG_CHUNK, a->base);
    } else {
        if (a->base + MIG_CHUNK > a->grown) {
            a->grown = a->base + GROW;
            if (ftruncate(a->fd, (off_t)a->grown) < 0) {
                return -errno;
            }
        }
        rc = a->aio ? submit(a) : mig_pwrite_all(a->direct_fd, chunk(a, 0), MIG_CHUNK, a->base);
    }
    if (rc == 0 && a->nbusy == MIG_NCHUNKS) {
        rc = reap(a, 1);
    }
    if (rc < 0) {
        return rc;
    }
    while (a->busy[a->current]) {
        a->current = (a->current + 1) % MIG_NCHUNKS;
    }
    a->base += MIG_CHUNK;
    a->used = 0;
    return 0;
}

int mig_append(struct mig_appender *a, const void *bytes, size_t nbytes)
{
    const uint8_t *p = bytes;

    while (nbytes) {
        size_t room = MIG_CHUNK - a->used, n = nbytes < room ? nbytes : room;

        memcpy(chunk(a, a->current) + a->used, p, n);
        a->used += n;
        p += n;
        nbytes -= n;
        if (a->used == MIG_CHUNK) {
            int rc = next_chunk(a);

            if (rc < 0) {
                return rc;
            }
        }
    }
    return 0;
}

void mig_overwrite_soon(const struct mig_appender *a, int64_t offset, size_t nbytes)
{
    if (a->direct_fd >= 0 && offset < a->base) {
        (void)posix_fadvise(a->fd, (off_t)offset, (off_t)nbytes, POSIX_FADV_WILLNEED);
    }
}

int mig_overwrite(struct mig_appender *a, int64_t offset, const void *bytes, size_t nbytes)
{
    const uint8_t *p = bytes;
    size_t written = 0;

    if (offset < a->base) {
        int rc = wait_all(a);

        written = a->base - offset < (int64_t)nbytes ? (size_t)(a->base - offset) : nbytes;
        if (rc == 0) {
            rc = mig_pwrite_all(a->fd, p, written, offset);
        }
        if (rc < 0) {
            return rc;
        }
    }
    memcpy(chunk(a, a->current) + (offset + (int64_t)written - a->base), p + written,
           nbytes - written);
    return 0;
}

int mig_read_back(struct mig_appender *a, int64_t offset, void *bytes, size_t nbytes)
{
    uint8_t *p = bytes;
    size_t written = 0;

    if (offset < a->base) {
        int rc = wait_all(a);

        written = a->base - offset < (int64_t)nbytes ? (size_t)(a->base - offset) : nbytes;
        if (rc == 0) {
            rc = mig_pread_all(a->fd, p, written, offset);
        }
        if (rc < 0) {
            return rc;
        }
    }
    memcpy(p + written, chunk(a, a->current) + (offset + (int64_t)written - a->base),
           nbytes - written);
    return 0;
}

int mig_appender_finish(struct mig_appender *a)
{
    int rc = wait_all(a);

    if (rc == 0) {
        rc = mig_pwrite_all(a->fd, chunk(a, a->current), a->used, a->base);
    }
    if (rc == 0 && ftruncate(a->fd, (off_t)mig_appender_tail(a)) < 0) {
        rc = -errno;
    }
    return rc;
}

void mig_appender_close(struct mig_appender *a)
{
    mig_aio_close(a->aio);
    if (a->chunks) {
        munmap(a->chunks, MIG_NCHUNKS * (size_t)MIG_CHUNK);
    }
    memset(a, 0, sizeof(*a));
}
