# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "mapped.h" nogil:
    struct mig_mapped:
        const mig_kernels *kernels
        int fd
        int direct_fd
        bint no_direct
        mig_pool *pool

    int64_t mig_mapped_write(mig_mapped *m, const mig_pages *pages, const uint64_t *index,
                             size_t n, const uint64_t *zero, uint64_t *stored, int64_t offset)
    int64_t mig_mapped_read(mig_mapped *m, const mig_pages *pages, const uint64_t *stored,
                            uint64_t first, uint64_t end, int64_t offset, bint fresh)
    int mig_mapped_bitmap(const mig_mapped *m, uint64_t *words, uint64_t nbits, int64_t offset)
    int mig_mapped_put(const mig_mapped *m, const uint8_t *bytes, size_t nbytes, int64_t offset)

cdef extern from "pool.h" nogil:
    struct mig_pool:
        pass

    int mig_pool_open(mig_pool **pool, unsigned nthreads)
    void mig_pool_close(mig_pool *pool)


@cython.final
cdef class PageFile:
    """Reads and writes pages at their fixed places of a file: page i at offset + i * page_size.

    fd:        of a regular file; owned by the caller, who keeps it open
    direct_fd: of the same file with O_DIRECT, for pages that are aligned; -1: none. Where the
               file system refuses it, ``fd`` is used.
    nthreads:  that work on the pages of one call; 1: the caller's alone

    Its position in the file is neither used nor changed. One thread at a time uses it.

    ValueError: what does not fit each other. ChannelError: the system's errors.
    """
    cdef mig_mapped m

    def __cinit__(self, int fd, *, int direct_fd=-1, unsigned nthreads=1):
        check_threads(nthreads)
        self.m.kernels = (<Kernels>KERNELS).k
        self.m.fd = fd
        self.m.direct_fd = direct_fd
        if nthreads > 1:
            check(mig_pool_open(&self.m.pool, nthreads))

    def __dealloc__(self):
        mig_pool_close(self.m.pool)

    cdef int check_range(self, uint64_t offset, uint64_t nbytes) except -1:
        if offset > <uint64_t>INT64_MAX or nbytes > <uint64_t>INT64_MAX - offset:
            raise ValueError(f"{nbytes} bytes at {offset} are past what a file can have")
        return 0

    cdef int check_block(self, Pages pages, Bitmap stored, uint64_t offset) except -1:
        if stored.nbits != pages.c.npages:
            raise ValueError(f"{stored.nbits} bits for {pages.c.npages} pages")
        return self.check_range(offset, pages.c.npages * pages.c.page_size)

    def write(self, Pages pages not None, const uint64_t[::1] index not None, Bitmap zero,
              Bitmap stored not None, uint64_t offset):
        """Write pages index[...] of a block, ascending; returns the bytes that were written.

        zero:   bit i set when page index[i] is known to be zero: it is not written
        stored: gets the bit of each page, set when it was written, else clear
        offset: of page 0 in the file
        """
        cdef size_t n = <size_t>index.shape[0]
        cdef const uint64_t *zero_words = NULL
        cdef const uint64_t *numbers
        cdef int64_t rc
        self.check_block(pages, stored, offset)
        if zero is not None:
            if zero.nbits < n:
                raise ValueError("zero has fewer bits than index has pages")
            zero_words = zero.words
        if n == 0:
            return 0
        numbers = &index[0]
        pages.check_indexes(numbers, n)
        pages.pins += 1
        with nogil:
            rc = mig_mapped_write(&self.m, &pages.c, numbers, n, zero_words, stored.words,
                                  <int64_t>offset)
        pages.pins -= 1
        return check(rc)

    def read(self, Pages pages not None, Bitmap stored not None, uint64_t first, uint64_t end,
             uint64_t offset, *, bint fresh=False):
        """Read pages first..end - 1 of a block to where they belong; returns the bytes read.

        stored: bits of the pages that the file has; the others become zero
        offset: of page 0 in the file
        fresh:  all of the memory is zero already
        """
        cdef int64_t rc
        self.check_block(pages, stored, offset)
        if not pages.writable or pages.is_table():
            raise ValueError("pages are read into memory that can be written")
        if first > end or end > pages.c.npages:
            raise IndexError(f"pages {first} to {end} of {pages.c.npages}")
        pages.pins += 1
        with nogil:
            rc = mig_mapped_read(&self.m, &pages.c, stored.words, first, end, <int64_t>offset,
                                 fresh)
        pages.pins -= 1
        return check(rc)

    def read_bitmap(self, uint64_t nbits, uint64_t offset):
        """A bitmap of little-endian 64-bit words at ``offset``; bits past its size are ignored.

        Where the file has zeros it takes no memory.
        """
        cdef Bitmap bitmap
        cdef int rc
        self.check_range(offset, nbits // 64 * 8 + 8)
        bitmap = Bitmap(nbits)
        with nogil:
            rc = mig_mapped_bitmap(&self.m, bitmap.words, nbits, <int64_t>offset)
        check(rc)
        return bitmap

    def put(self, const uint8_t[::1] data not None, uint64_t offset):
        """Write bytes."""
        cdef size_t nbytes = <size_t>data.shape[0]
        cdef const uint8_t *bytes_
        cdef int rc
        self.check_range(offset, nbytes)
        if nbytes == 0:
            return
        bytes_ = &data[0]
        with nogil:
            rc = mig_mapped_put(&self.m, bytes_, nbytes, <int64_t>offset)
        check(rc)
