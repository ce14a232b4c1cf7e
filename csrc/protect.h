/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Write protection of this process's memory by a userfaultfd, for those that tend its faults. */
#ifndef MIG_PROTECT_H
#define MIG_PROTECT_H

#include <stdbool.h>
#include <stdint.h>

/* Protects memory from writes, or lets writers go on. 0 or -errno; -ENOENT, -ESRCH: some of it, or
 * its owner, was let go. */
int mig_protect(int uffd, const uint8_t *at, uint64_t nbytes, bool on);
/* Waits for faults; false: stop_fd says that it is over. */
bool mig_protect_await(int uffd, int stop_fd);

#endif
