/* SPDX-License-Identifier: LGPL-2.1-or-later
 * vmsplice() into a pipe, and on into a unix socket: see splice.h. */
#include "splice.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

enum {
    MAX_IOV = 1024,         /* IOV_MAX of Linux */
    PIPE_NBYTES = 1 << 20,  /* what anybody may ask for */
    SMALLEST_ROOM = 64 << 10,
    LOOK_NS = 50 * 1000, /* between two looks at what the socket holds */
};

/* Before 6.5 such a socket took pages one by one, and no other kind of socket gains. */
static bool kernel_can(void)
{
    struct utsname name;
    int major = 0, minor = 0;

    return uname(&name) == 0 && sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
           (major > 6 || (major == 6 && minor >= 5));
}

static bool is_unix(const struct mig_fd *fd)
{
    int domain = -1;
    socklen_t length = sizeof(domain);

    return fd->is_socket &&
           getsockopt(fd->fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain == AF_UNIX;
}

int mig_splice_open(struct mig_splice *s, const struct mig_fd *fd)
{
    int buffer;
    socklen_t length = sizeof(buffer);
    sigset_t broken;

    *s = (struct mig_splice){.fd = fd, .pipe = {-1, -1}};
    if (!is_unix(fd) || !kernel_can() || pipe2(s->pipe, O_CLOEXEC | O_NONBLOCK) < 0) {
        return 0;
    }
    /* a smaller one will do where many have large ones already */
    fcntl(s->pipe[1], F_SETPIPE_SZ, PIPE_NBYTES);
    /* the socket is ready when three quarters of its buffer are free */
    if (getsockopt(fd->fd, SOL_SOCKET, SO_SNDBUF, &buffer, &length) == 0) {
        s->room = (size_t)buffer / 2;
    }
    s->room = s->room < SMALLEST_ROOM ? SMALLEST_ROOM : s->room;
    /* splice() knows no MSG_NOSIGNAL */
    sigemptyset(&broken);
    sigaddset(&broken, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &broken, &s->before);
    return 1;
}

void mig_splice_close(struct mig_splice *s)
{
    struct timespec at_once = {0};
    sigset_t broken;

    if (s->pipe[0] < 0) {
        return;
    }
    close(s->pipe[0]);
    close(s->pipe[1]);
    sigemptyset(&broken);
    sigaddset(&broken, SIGPIPE);
    sigtimedwait(&broken, NULL, &at_once);
    pthread_sigmask(SIG_SETMASK, &s->before, NULL);
}

/* What is in the pipe, into the socket. It is not to wait there, where nothing can cancel it. */
static int pass_on(struct mig_splice *s, size_t nbytes)
{
    while (nbytes) {
        size_t room = nbytes < s->room ? nbytes : s->room;
        int rc = mig_fd_wait(s->fd, POLLOUT);

        if (rc < 0) {
            return rc;
        }
        while (room) {
            ssize_t n = splice(s->pipe[0], NULL, s->fd->fd, NULL, room, 0);

            if (n > 0) {
                room -= (size_t)n;
                nbytes -= (size_t)n;
            } else if (n < 0 && errno == EAGAIN) {
                break;
            } else if (n == 0 || errno != EINTR) {
                return n == 0 ? -EPIPE : -errno;
            }
        }
    }
    return 0;
}

int64_t mig_splice_writev(struct mig_splice *s, struct iovec *iov, size_t niov)
{
    int64_t total = 0;

    while (niov) {
        ssize_t n = vmsplice(s->pipe[1], iov, niov < MAX_IOV ? niov : MAX_IOV, 0);
        int64_t rc;

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            /* memory without pages of its own, or a sandbox that does not have it */
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

int mig_splice_settle(struct mig_splice *s)
{
    int before = 0;
    double since = 0;

    for (;;) {
        struct pollfd cancel = {.fd = s->fd->cancel_fd, .events = POLLIN};
        struct timespec look = {.tv_nsec = LOOK_NS};
        int left;

        if (ioctl(s->fd->fd, SIOCOUTQ, &left) < 0) {
            return -errno;
        }
        if (left == 0) {
            return 0;
        }
        if (left != before) {
            before = left;
            since = mig_now();
        } else if (s->fd->timeout_ms >= 0 && mig_now() - since > s->fd->timeout_ms / 1e3) {
            return MIG_E_TIMEOUT;
        }
        if (ppoll(&cancel, 1, &look, NULL) > 0) {
            return MIG_E_CANCELLED;
        }
    }
}
