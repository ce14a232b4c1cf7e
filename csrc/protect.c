/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Write protection by a userfaultfd: see protect.h. */
#include "protect.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>

int mig_protect(int uffd, const uint8_t *at, uint64_t nbytes, bool on)
{
    struct uffdio_writeprotect arg = {
        .range = {.start = (uintptr_t)at, .len = nbytes},
        .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };

    while (ioctl(uffd, UFFDIO_WRITEPROTECT, &arg) < 0) {
        if (errno != EAGAIN) {
            return -errno;
        }
        sched_yield();
    }
    return 0;
}

bool mig_protect_await(int uffd, int stop_fd)
{
    struct pollfd fds[2] = {{.fd = uffd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};

    poll(fds, 2, -1);
    return fds[1].revents == 0;
}
