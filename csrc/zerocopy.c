/* SPDX-License-Identifier: LGPL-2.1-or-later
 * MSG_ZEROCOPY: see zerocopy.h. */
#include "zerocopy.h"

#include <errno.h>
#include <limits.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

int mig_zero_copy_open(struct mig_zero_copy *z, const struct mig_fd *fd)
{
    int on = 1;

    *z = (struct mig_zero_copy){.fd = fd, .missed_all = true};
    return setsockopt(fd->fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)) < 0 ? -errno : 0;
}

static void take_notice(struct mig_zero_copy *z, const struct sock_extended_err *e)
{
    if (e->ee_errno == 0 && e->ee_origin == SO_EE_ORIGIN_ZEROCOPY) {
        /* a range of calls, by number */
        z->settled += e->ee_data - e->ee_info + 1;
        z->any = true;
        z->missed_all = z->missed_all && (e->ee_code & SO_EE_CODE_ZEROCOPY_COPIED);
    }
}

/* Takes every notice that is there. */
static int reap(struct mig_zero_copy *z)
{
    for (;;) {
        char control[256];
        struct msghdr msg = {.msg_control = control, .msg_controllen = sizeof(control)};

        if (recvmsg(z->fd->fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno == EAGAIN ? 0 : -errno;
        }
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
            if ((c->cmsg_level == SOL_IP && c->cmsg_type == IP_RECVERR) ||
                (c->cmsg_level == SOL_IPV6 && c->cmsg_type == IPV6_RECVERR)) {
                struct sock_extended_err e;

                memcpy(&e, CMSG_DATA(c), sizeof(e));
                take_notice(z, &e);
            }
        }
    }
}

/* Waits for events or for notices, which it takes. */
static int wait_for(struct mig_zero_copy *z, short events)
{
    struct pollfd fds[2] = {{.fd = z->fd->fd, .events = events},
                            {.fd = z->fd->cancel_fd, .events = POLLIN}};
    int rc;

    do {
        rc = poll(fds, 2, z->fd->timeout_ms);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0) {
        return -errno;
    }
    if (rc == 0) {
        return MIG_E_TIMEOUT;
    }
    if (fds[1].revents) {
        return MIG_E_CANCELLED;
    }
    if (fds[0].revents & (POLLHUP | POLLNVAL)) {
        return -EPIPE;
    }
    return fds[0].revents & POLLERR ? reap(z) : 0;
}

static int64_t write_all(struct mig_zero_copy *z, struct iovec *iov, size_t niov, int flags)
{
    int64_t total = 0;

    while (niov) {
        struct msghdr msg = {.msg_iov = iov, .msg_iovlen = niov < IOV_MAX ? niov : IOV_MAX};
        ssize_t n = sendmsg(z->fd->fd, &msg, flags | MSG_DONTWAIT | MSG_NOSIGNAL);
        int rc = 0;

        if (n < 0 && errno == ENOBUFS && z->sent != z->settled) {
            /* as much memory as may be locked is: some must come back first */
            rc = wait_for(z, 0);
        } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            rc = wait_for(z, POLLOUT);
        } else if (n < 0 && errno != EINTR) {
            rc = -errno;
        }
        if (rc < 0) {
            return rc;
        }
        if (n < 0) {
            continue;
        }
        z->sent += flags != 0;
        total += n;
        mig_iov_skip(&iov, &niov, (size_t)n);
    }
    return total;
}

int64_t mig_zero_copy_writev(struct mig_zero_copy *z, struct iovec *iov, size_t niov)
{
    return write_all(z, iov, niov, MSG_ZEROCOPY);
}

int64_t mig_zero_copy_put(struct mig_zero_copy *z, struct iovec *iov, size_t niov)
{
    return write_all(z, iov, niov, 0);
}

int mig_zero_copy_settle(struct mig_zero_copy *z)
{
    int rc = reap(z);

    while (rc == 0 && z->sent != z->settled) {
        rc = wait_for(z, 0);
    }
    return rc;
}

bool mig_zero_copy_missed(struct mig_zero_copy *z)
{
    bool missed = z->any && z->missed_all;

    z->any = false;
    z->missed_all = true;
    return missed;
}
