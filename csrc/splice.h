/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Giving memory to a unix socket without a copy: the socket holds the pages themselves until the
 * other end has read them, and what is written to them before may arrive in place of what was
 * there. */
#ifndef MIG_SPLICE_H
#define MIG_SPLICE_H

#include <signal.h>

#include "mig.h"

struct mig_splice {
    const struct mig_fd *fd;
    int pipe[2], flags; /* the socket's */
    sigset_t mask;      /* the thread's */
    bool was_pending;   /* a SIGPIPE */
};

/* Whether it can be done, and pays: a unix socket to somebody who may look into our memory anyway,
 * Linux 6.5. The socket must be ours alone; until mig_splice_close(), in the same thread, it does
 * not block, and the thread is not told of broken pipes. */
bool mig_splice_open(struct mig_splice *s, const struct mig_fd *fd);
void mig_splice_close(struct mig_splice *s);
/* As mig_fd_writev(). */
int64_t mig_splice_writev(struct mig_splice *s, struct iovec *iov, size_t niov);

#endif
