/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Giving memory to a unix socket without a copy: the socket holds the pages themselves until the
 * other end has read them. */
#ifndef MIG_SPLICE_H
#define MIG_SPLICE_H

#include <signal.h>

#include "mig.h"

struct mig_splice {
    const struct mig_fd *fd;
    int pipe[2];
    size_t room; /* bytes that the socket takes without a wait when it is ready */
    sigset_t before;
};

/* 1, or 0 where it cannot be done or does not pay: anything but a unix socket, Linux before 6.5.
 * Until it is closed, which the same thread does, the thread is not told of broken pipes. */
int mig_splice_open(struct mig_splice *s, const struct mig_fd *fd);
void mig_splice_close(struct mig_splice *s);
/* As mig_fd_writev(); the bytes may be read until mig_splice_settle(). */
int64_t mig_splice_writev(struct mig_splice *s, struct iovec *iov, size_t niov);
/* Waits until the other end has read everything. */
int mig_splice_settle(struct mig_splice *s);

#endif
