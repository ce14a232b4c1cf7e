/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Sending without the kernel's copy (MSG_ZEROCOPY), with account of what the kernel still reads. */
#ifndef MIG_ZEROCOPY_H
#define MIG_ZEROCOPY_H

#include "mig.h"

struct mig_zero_copy {
    const struct mig_fd *fd;
    uint32_t sent, settled; /* calls that the kernel has not copied, and those it is done with */
    bool any, missed_all;   /* since the last mig_zero_copy_missed() */
};

/* 0, or -errno when the socket cannot do it. */
int mig_zero_copy_open(struct mig_zero_copy *z, const struct mig_fd *fd);
/* As mig_fd_writev(); the kernel may read the bytes until mig_zero_copy_settle(). */
int64_t mig_zero_copy_writev(struct mig_zero_copy *z, struct iovec *iov, size_t niov);
/* The same for bytes that may change afterwards. */
int64_t mig_zero_copy_put(struct mig_zero_copy *z, struct iovec *iov, size_t niov);
/* Waits until the kernel is done with everything. */
int mig_zero_copy_settle(struct mig_zero_copy *z);
/* Whether the kernel has copied all of what was sent since the last call. */
bool mig_zero_copy_missed(struct mig_zero_copy *z);

#endif
