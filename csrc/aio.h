/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Writes that the kernel makes behind our back (kernel AIO): of files opened with O_DIRECT, others
 * it writes at once. */
#ifndef MIG_AIO_H
#define MIG_AIO_H

#include <linux/aio_abi.h>
#include <stddef.h>
#include <stdint.h>

/* A context for so many writes at a time; 0: there is none to be had. */
uint64_t mig_aio_open(size_t nwrites);
/* Waits for what is in flight, whose bytes must not go before. */
void mig_aio_close(uint64_t aio);

/* A write of nbytes to an offset of a file; tag: what its event has for data. */
struct iocb mig_aio_write(int fd, const void *bytes, size_t nbytes, int64_t offset, uint64_t tag);
/* Begins with the first of n writes, 1 at least: their number or -errno. -EAGAIN: the kernel has as
 * many as it takes. */
int64_t mig_aio_submit(uint64_t aio, struct iocb **writes, size_t n);
/* Waits until `min` writes have come back; tells of up to `max`: their number or -errno. */
int64_t mig_aio_reap(uint64_t aio, size_t min, struct io_event *events, size_t max);

#endif
