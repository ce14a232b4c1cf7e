/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Reading and writing descriptors to the end, with a cancel descriptor and an idle limit. Sockets
 * are driven with MSG_DONTWAIT; any other descriptor that can block is O_NONBLOCK already. */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

#include "mig.h"

int mig_fd_wait(const struct mig_fd *f, short events)
{
    struct pollfd fds[3] = {
        {.fd = f->fd, .events = events},
        {.fd = f->cancel_fd, .events = POLLIN},
        {.fd = f->with ? f->with->fd : -1, .events = POLLRDHUP},
    };
    int rc;

    do {
        rc = poll(fds, 3, f->timeout_ms);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0) {
        return -errno;
    }
    if (rc == 0) {
        return MIG_E_TIMEOUT;
    }
    return fds[1].revents ? MIG_E_CANCELLED : fds[2].revents ? MIG_E_GONE : 0;
}

static bool must_wait(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

int64_t mig_fd_read(const struct mig_fd *f, uint8_t *buf, size_t min, size_t max)
{
    size_t got = 0;
    bool was_reset = false;

    while (got < max) {
        ssize_t n = f->is_socket ? recv(f->fd, buf + got, max - got, MSG_DONTWAIT)
                                 : read(f->fd, buf + got, max - got);

        if (n > 0) {
            got += (size_t)n;
        } else if (n == 0) {
            break;
        } else if (must_wait(errno)) {
            int rc;

            if (got >= min) {
                break;
            }
            rc = mig_fd_wait(f, POLLIN);
            if (rc < 0) {
                return rc;
            }
        } else if (errno == ECONNRESET && !was_reset) {
            /* a unix socket says so before it gives out what the peer had said */
            was_reset = true;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return (int64_t)got;
}

static ssize_t read_some(const struct mig_fd *f, struct iovec *iov, size_t niov)
{
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = niov};

    return f->is_socket ? recvmsg(f->fd, &msg, MSG_DONTWAIT) : readv(f->fd, iov, (int)niov);
}

static ssize_t write_some(const struct mig_fd *f, struct iovec *iov, size_t niov)
{
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = niov};

    return f->is_socket ? sendmsg(f->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL)
                        : writev(f->fd, iov, (int)niov);
}

int64_t mig_fd_readv_some(const struct mig_fd *f, struct iovec *iov, size_t niov)
{
    bool was_reset = false;

    for (;;) {
        ssize_t n = read_some(f, iov, niov);
        int rc = 0;

        if (n >= 0) {
            return n;
        }
        if (must_wait(errno)) {
            rc = mig_fd_wait(f, POLLIN);
        } else if (errno == ECONNRESET && !was_reset) {
            was_reset = true; /* as above */
        } else if (errno != EINTR) {
            rc = -errno;
        }
        if (rc < 0) {
            return rc;
        }
    }
}

void mig_iov_skip(struct iovec **iov, size_t *niov, size_t n)
{
    while (*niov && n >= (*iov)->iov_len) {
        n -= (*iov)->iov_len;
        (*iov)++;
        (*niov)--;
    }
    if (*niov) {
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
        (*iov)->iov_len -= n;
    }
}

typedef ssize_t (*some_fn)(const struct mig_fd *f, struct iovec *iov, size_t niov);

/* Reads (POLLIN) or writes (POLLOUT) all; reading ends at the end of the file. */
static int64_t move_all(const struct mig_fd *f, struct iovec *iov, size_t niov, some_fn some,
                        short events)
{
    int64_t total = 0;

    while (niov) {
        ssize_t n = some(f, iov, niov < IOV_MAX ? niov : IOV_MAX);

        if (n == 0 && events == POLLIN) {
            break;
        }
        if (n < 0) {
            int rc = must_wait(errno) ? mig_fd_wait(f, events) : errno == EINTR ? 0 : -errno;

            if (rc < 0) {
                return rc;
            }
            continue;
        }
        total += n;
        mig_iov_skip(&iov, &niov, (size_t)n);
    }
    return total;
}

int64_t mig_fd_readv(const struct mig_fd *f, struct iovec *iov, size_t niov)
{
    return move_all(f, iov, niov, read_some, POLLIN);
}

int64_t mig_fd_writev(const struct mig_fd *f, struct iovec *iov, size_t niov)
{
    return move_all(f, iov, niov, write_some, POLLOUT);
}
