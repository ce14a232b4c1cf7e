/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Writes behind our back: see aio.h. */
#include "aio.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

uint64_t mig_aio_open(size_t nwrites)
{
    aio_context_t context = 0;

    return syscall(SYS_io_setup, nwrites, &context) == 0 ? context : 0;
}

void mig_aio_close(uint64_t aio)
{
    if (aio) {
        syscall(SYS_io_destroy, aio);
    }
}

struct iocb mig_aio_write(int fd, const void *bytes, size_t nbytes, int64_t offset, uint64_t tag)
{
    return (struct iocb){
        .aio_data = tag,
        .aio_lio_opcode = IOCB_CMD_PWRITE,
        .aio_fildes = (uint32_t)fd,
        .aio_buf = (uint64_t)(uintptr_t)bytes,
        .aio_nbytes = nbytes,
        .aio_offset = offset,
    };
}

int64_t mig_aio_submit(uint64_t aio, struct iocb **writes, size_t n)
{
    long done;

    do {
        done = syscall(SYS_io_submit, aio, (long)n, writes);
    } while (done < 0 && errno == EINTR);
    if (done < 0) {
        return -errno;
    }
    return done ? done : -EIO;
}

int64_t mig_aio_reap(uint64_t aio, size_t min, struct io_event *events, size_t max)
{
    long n;

    do {
        n = syscall(SYS_io_getevents, aio, (long)min, (long)max, events, NULL);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}
