/* SPDX-License-Identifier: LGPL-2.1-or-later
 * What both ways of tracking writes share: a userfaultfd that write-protects the blocks. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "protect.h"
#include "track.h"

/* of Linux 6.4 and 6.7; the headers of a distribution are older than the kernel it may run on */
#define FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
#define FEATURE_WP_ASYNC (UINT64_C(1) << 15)
#define NEW_USERFAULTFD _IO(0xAA, 0x00)

enum { USER_MODE_ONLY = 1 };

uint64_t mig_track_nbytes(const struct mig_track_block *block)
{
    return block->npages * block->page_size;
}

static int open_userfaultfd(int flags)
{
    int fd = (int)syscall(SYS_userfaultfd, flags), device;

    if (fd >= 0 || errno != EPERM) {
        return fd < 0 ? -errno : fd;
    }
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        return -EPERM;
    }
    fd = ioctl(device, NEW_USERFAULTFD, flags);
    fd = fd < 0 ? -EPERM : fd;
    close(device);
    return fd;
}

int mig_track_userfaultfd(uint64_t features, bool user_mode_only)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int fd = open_userfaultfd(O_CLOEXEC | O_NONBLOCK | (user_mode_only ? USER_MODE_ONLY : 0));

    if (fd == -EINVAL) {
        return -EOPNOTSUPP; /* a kernel that does not know USER_MODE_ONLY */
    }
    if (fd < 0) {
        return fd;
    }
    /* a kernel refuses features it does not know, or leaves out what its machine cannot do */
    if (ioctl(fd, UFFDIO_API, &api) < 0 || (api.features & features) != features) {
        close(fd);
        return -EOPNOTSUPP;
    }
    return fd;
}

static int open_files(struct mig_track *t, bool user_mode_only)
{
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;

    t->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (t->pagemap < 0) {
        return -errno;
    }
    if (t->method == MIG_TRACK_SCAN) {
        int rc = mig_pagescan_probe(t->pagemap);

        if (rc < 0) {
            return rc;
        }
        /* no fault ever comes here: without privileges it is the same, kernel's writes included */
        features |= FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED;
        user_mode_only = true;
    }
    for (size_t i = 0; i < t->nblocks; i++) {
        if (!t->blocks[i].anonymous) {
            features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        }
    }
    t->uffd = mig_track_userfaultfd(features, user_mode_only);
    return t->uffd < 0 ? t->uffd : 0;
}

static void clear(struct mig_track *t, enum mig_track_method method)
{
    memset(t, 0, sizeof(*t));
    t->method = method;
    t->uffd = t->pagemap = t->stop_fd = -1;
    t->host_page = (size_t)sysconf(_SC_PAGESIZE);
}

int mig_track_probe(enum mig_track_method method, bool user_mode_only)
{
    struct mig_track t;
    int rc;

    clear(&t, method);
    rc = open_files(&t, user_mode_only);
    mig_track_close(&t);
    return rc;
}

static int register_blocks(struct mig_track *t)
{
    for (; t->nregistered < t->nblocks; t->nregistered++) {
        const struct mig_track_block *block = t->blocks + t->nregistered;
        struct uffdio_register range = {
            .range = {.start = (uintptr_t)block->base, .len = mig_track_nbytes(block)},
            .mode = UFFDIO_REGISTER_MODE_WP,
        };

        /* a page that was given back is in no page table, and so under no protection */
        if (t->method == MIG_TRACK_FAULTS && block->anonymous) {
            range.mode |= UFFDIO_REGISTER_MODE_MISSING;
        }
        if (ioctl(t->uffd, UFFDIO_REGISTER, &range) < 0) {
            return -errno;
        }
    }
    return 0;
}

void mig_track_unregister(struct mig_track *t)
{
    for (size_t i = 0; i < t->nregistered; i++) {
        struct uffdio_range range = {.start = (uintptr_t)t->blocks[i].base,
                                     .len = mig_track_nbytes(t->blocks + i)};

        /* also wakes who waits there; it fails where memory is mapped no more */
        ioctl(t->uffd, UFFDIO_UNREGISTER, &range);
    }
}

int mig_track_protect(const struct mig_track *t, const uint8_t *at, uint64_t nbytes, bool on)
{
    int rc = mig_protect(t->uffd, at, nbytes, on);

    return rc == -ENOENT || rc == -ESRCH ? 0 : rc;
}

static int make_bits(struct mig_track *t)
{
    for (size_t i = 0; i < t->nblocks; i++) {
        struct mig_track_block *block = t->blocks + i;
        uint64_t nbits = t->method == MIG_TRACK_SCAN ? mig_track_nbytes(block) / t->host_page
                                                     : block->npages;

        block->bits = calloc(mig_bitmap_nwords(nbits), sizeof(*block->bits));
        if (block->bits == NULL) {
            return MIG_E_NOMEM;
        }
    }
    return 0;
}

int mig_track_open(struct mig_track *t, enum mig_track_method method, bool user_mode_only,
                   struct mig_track_block *blocks, size_t nblocks)
{
    int rc;

    clear(t, method);
    t->blocks = blocks;
    t->nblocks = nblocks;
    for (size_t i = 0; i < nblocks; i++) {
        blocks[i].bits = NULL;
    }
    rc = open_files(t, user_mode_only);
    if (rc == 0) {
        rc = make_bits(t);
    }
    if (rc == 0 && method == MIG_TRACK_FAULTS) {
        rc = mig_wpfaults_prepare(t);
    }
    if (rc == 0) {
        rc = register_blocks(t);
    }
    if (rc == 0) {
        rc = method == MIG_TRACK_FAULTS ? mig_wpfaults_start(t) : mig_pagescan_start(t);
    }
    if (rc < 0) {
        mig_track_close(t);
    }
    return rc;
}

int64_t mig_track_sync(struct mig_track *t, const struct mig_kernels *k,
                       const struct mig_track_block *block, uint64_t *dirty)
{
    return t->method == MIG_TRACK_FAULTS ? mig_wpfaults_sync(t, k, block, dirty)
                                         : mig_pagescan_sync(t, block, dirty);
}

static void close_fd(int *fd)
{
    if (*fd >= 0) {
        close(*fd);
    }
    *fd = -1;
}

void mig_track_close(struct mig_track *t)
{
    mig_track_unregister(t);
    mig_wpfaults_stop(t);
    close_fd(&t->uffd);
    close_fd(&t->pagemap);
    for (size_t i = 0; i < t->nblocks; i++) {
        free(t->blocks[i].bits);
        t->blocks[i].bits = NULL;
    }
    t->nblocks = t->nregistered = 0;
}
