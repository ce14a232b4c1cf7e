/* SPDX-License-Identifier: LGPL-2.1-or-later
 * vmsplice() into a pipe, and on into a unix socket: see splice.h. */
#include "splice.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum {
    PIPE_NBYTES = 512 << 10,  /* a packet of multifd */
    LEAST_NBYTES = 128 << 10, /* with less a copy is sooner made */
};

/* Before 6.5 such a socket takes pages one by one, and blocks whatever it was told. */
static bool kernel_can(void)
{
    struct utsname name;
    int major = 0, minor = 0;

    return uname(&name) == 0 && sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
           (major > 6 || (major == 6 && minor >= 5));
}

/* A peer that stops reading sees what is written to the pages that it has not read. */
static bool is_trusted(const struct mig_fd *fd)
{
    struct ucred peer;
    int domain;
    socklen_t domain_len = sizeof(domain), peer_len = sizeof(peer);

    return fd->is_socket &&
           getsockopt(fd->fd, SOL_SOCKET, SO_DOMAIN, &domain, &domain_len) == 0 &&
           domain == AF_UNIX &&
           getsockopt(fd->fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_len) == 0 &&
           (peer.uid == geteuid() || peer.uid == 0);
}

/* Who has many pipes gets small ones; a sandbox may not have splice(). */
static bool has_pipe(struct mig_splice *s)
{
    if (pipe2(s->pipe, O_CLOEXEC | O_NONBLOCK) < 0) {
        return false;
    }
    fcntl(s->pipe[1], F_SETPIPE_SZ, PIPE_NBYTES);
    if (fcntl(s->pipe[1], F_GETPIPE_SZ) >= LEAST_NBYTES &&
        splice(s->pipe[0], NULL, s->fd->fd, NULL, 0, 0) == 0) {
        return true;
    }
    close(s->pipe[0]);
    close(s->pipe[1]);
    return false;
}

static sigset_t broken_pipe(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    return set;
}

bool mig_splice_open(struct mig_splice *s, const struct mig_fd *fd)
{
    sigset_t broken = broken_pipe(), pending;

    *s = (struct mig_splice){.fd = fd};
    if (!kernel_can() || !is_trusted(fd) || !has_pipe(s)) {
        return false;
    }
    /* splice() knows neither MSG_DONTWAIT nor MSG_NOSIGNAL */
    s->flags = fcntl(fd->fd, F_GETFL);
    fcntl(fd->fd, F_SETFL, s->flags | O_NONBLOCK);
    sigpending(&pending);
    s->was_pending = sigismember(&pending, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &broken, &s->mask);
    return true;
}

void mig_splice_close(struct mig_splice *s)
{
    sigset_t broken = broken_pipe();
    struct timespec at_once = {0};

    close(s->pipe[0]);
    close(s->pipe[1]);
    fcntl(s->fd->fd, F_SETFL, s->flags);
    if (!s->was_pending) {
        sigtimedwait(&broken, NULL, &at_once);
    }
    pthread_sigmask(SIG_SETMASK, &s->mask, NULL);
}

/* What is in the pipe, into the socket. */
static int pass_on(struct mig_splice *s, size_t nbytes)
{
    while (nbytes) {
        ssize_t n = splice(s->pipe[0], NULL, s->fd->fd, NULL, nbytes, 0);
        int rc = 0;

        if (n > 0) {
            nbytes -= (size_t)n;
        } else if (n < 0 && errno == EAGAIN) {
            rc = mig_fd_wait(s->fd, POLLOUT);
        } else if (n == 0 || errno != EINTR) {
            rc = n == 0 ? -EPIPE : -errno;
        }
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

int64_t mig_splice_writev(struct mig_splice *s, struct iovec *iov, size_t niov)
{
    int64_t total = 0;

    while (niov) {
        ssize_t n = vmsplice(s->pipe[1], iov, niov < IOV_MAX ? niov : IOV_MAX, 0);
        int64_t rc;

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            /* memory without pages of its own, or a sandbox that does not have this one */
            rc = mig_fd_writev(s->fd, iov, niov);
            return rc < 0 ? rc : total + rc;
        }
        mig_iov_skip(&iov, &niov, (size_t)n);
        rc = pass_on(s, (size_t)n);
        if (rc < 0) {
            return rc;
        }
        total += n;
    }
    return total;
}
