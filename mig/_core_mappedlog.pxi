# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "mappedlog.h" nogil:
    struct mig_mappedlog_block:
        int64_t offset
        uint64_t *present
        uint64_t *written

    struct mig_mappedlog:
        int fd, direct_fd
        size_t page_size
        const mig_mappedlog_block *blocks
        const mig_kernels *kernels

    struct mig_mappedlog_writer:
        pass

    int mig_mappedlog_open(mig_mappedlog_writer *w, const mig_mappedlog *file)
    void mig_mappedlog_close(mig_mappedlog_writer *w)
    int mig_mappedlog_put(mig_mappedlog_writer *w, mig_ram_parser *p, const uint8_t *buf)
    int mig_mappedlog_flush(mig_mappedlog_writer *w)
    int mig_mappedlog_expect(mig_mappedlog_writer *w, const mig_mappedlog_block *block)


@cython.final
@cython.no_gc  # so that the bitmaps are there in __dealloc__
cdef class MappedLog(_BurstLog):
    """The pages of a mapped-ram file while it is written, each in its place (csrc/mappedlog.c).

    fd:        the file, of its full length already; stays the caller's
    parser:    has the blocks
    offsets:   where the first page of each block is, in bytes
    direct_fd: the same file opened with O_DIRECT, -1 to write through the page cache
    """
    cdef mig_mappedlog c
    cdef mig_mappedlog_writer writer
    cdef mig_mappedlog_block *blocks
    #: by block, the pages that have contents; all others are zero
    cdef readonly tuple present
    cdef tuple written

    def __cinit__(self, int fd, RamParser parser not None, offsets, *, int direct_fd=-1):
        cdef size_t i
        if len(offsets) != parser.c.nblocks:
            raise ValueError(f"{len(offsets)} offsets for {parser.c.nblocks} blocks")
        npages = [parser.table[i].npages for i in range(parser.c.nblocks)]
        self.present = tuple(Bitmap(n) for n in npages)
        self.written = tuple(Bitmap(n) for n in npages)
        self.blocks = <mig_mappedlog_block *>calloc(parser.c.nblocks or 1,
                                                    sizeof(mig_mappedlog_block))
        if self.blocks == NULL:
            raise MemoryError
        for i in range(parser.c.nblocks):
            self.blocks[i].offset = offsets[i]
            self.blocks[i].present = (<Bitmap>self.present[i]).words
            self.blocks[i].written = (<Bitmap>self.written[i]).words
        self.c.fd = fd
        self.c.direct_fd = direct_fd
        self.c.page_size = parser.c.page_size
        self.c.blocks = self.blocks
        self.c.kernels = (<Kernels>KERNELS).k
        check(mig_mappedlog_open(&self.writer, &self.c))

    def __dealloc__(self):
        mig_mappedlog_close(&self.writer)
        free(self.blocks)

    cdef int put_burst(self, mig_ram_parser *p, const uint8_t *buf) noexcept nogil:
        return mig_mappedlog_put(&self.writer, p, buf)

    def flush(self):
        """All that was put stands in the file when this returns; channels flush for themselves."""
        cdef int rc
        with nogil:
            pthread_mutex_lock(&self.lock)
            rc = mig_mappedlog_flush(&self.writer)
            pthread_mutex_unlock(&self.lock)
        check(rc)
