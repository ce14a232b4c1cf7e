# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "compress.h" nogil:
    struct mig_compressor:
        pass

    struct mig_decompressor:
        pass

    struct mig_compress_counts:
        uint64_t compressed
        uint64_t record_bytes

    int mig_compressor_open(mig_compressor **z, unsigned nthreads, int level, size_t page_size,
                            size_t max_jobs)
    void mig_compressor_close(mig_compressor *z)
    size_t mig_compress_start(mig_compressor *z, const mig_pages *pages, const uint64_t *index,
                              size_t n, const uint64_t *zero, size_t max)
    bint mig_compress_is_done(mig_compressor *z)
    int mig_compress_wait(mig_compressor *z)
    size_t mig_compress_encode(mig_out *out, mig_compressor *z, const mig_pages *pages,
                               const char *name, size_t name_len, const uint64_t *index,
                               size_t first, size_t n, const uint64_t *zero, bint skip,
                               mig_compress_counts *counts)
    const uint64_t *mig_compress_jobs(const mig_compressor *z, size_t *n)
    size_t mig_compress_room(size_t page_size)
    int mig_decompressor_open(mig_decompressor **z, unsigned nthreads)
    void mig_decompressor_close(mig_decompressor *z)
    int mig_decompress(mig_decompressor *z, mig_ram_parser *p, const uint8_t *buf)

cdef extern from "pool.h" nogil:
    enum:
        MIG_POOL_MAX_THREADS


cdef int check_threads(nthreads) except -1:
    if not 1 <= nthreads <= MIG_POOL_MAX_THREADS:
        raise ValueError(f"{nthreads} threads: 1 to {MIG_POOL_MAX_THREADS} can be")
    return 0


@cython.final
@cython.no_gc  # so that source is there in __dealloc__
cdef class Compressor:
    """Threads that compress pages, each to a zlib stream of its own.

    nthreads:  1 to 255
    level:     zlib's, 0 to 9
    page_size: bytes, a power of two
    max_jobs:  most pages that are worked on, or wait to be put, at once

    ``compressed`` and ``record_bytes`` count what OutQueue.encode_compressed() has put: pages, and
    bytes of their records without their words.

    ValueError: what cannot be. MemoryError, ChannelError: no memory, no threads. One thread at a
    time uses it.
    """
    cdef mig_compressor *c
    cdef Pages source
    cdef readonly size_t page_size
    cdef readonly size_t max_jobs
    cdef readonly uint64_t compressed
    cdef readonly uint64_t record_bytes

    def __cinit__(self, unsigned nthreads, int level, size_t page_size, size_t max_jobs):
        check_threads(nthreads)
        if not 0 <= level <= 9:
            raise ValueError(f"level {level}: zlib has 0 to 9")
        if page_size < 512 or page_size > 1 << 30 or page_size & (page_size - 1):
            raise ValueError(f"pages of {page_size} bytes cannot be compressed")
        if not 1 <= max_jobs <= 1 << 20:
            raise ValueError(f"{max_jobs} pages at once")
        self.page_size = page_size
        self.max_jobs = max_jobs
        check(mig_compressor_open(&self.c, nthreads, level, page_size, max_jobs))

    def __dealloc__(self):
        # waits for the threads, which read the pages
        mig_compressor_close(self.c)
        self.let_go()

    cdef void let_go(self):
        if self.source is not None:
            self.source.pins -= 1
            self.source = None

    def start(self, Pages pages not None, const uint64_t[::1] index not None, Bitmap zero=None, *,
              size_t most=UINT64_MAX):
        """Begin to compress the first pages of index[...] (ascending) that are not zero, ``most``
        and max_jobs of them; returns how many.

        What was started before must have been waited for. The pages are copied by the threads at
        any time until ``wait``.
        """
        cdef const uint64_t *zero_words = NULL
        cdef size_t n = <size_t>index.shape[0]
        if self.source is not None:
            raise RuntimeError("pages are being compressed")
        if pages.c.page_size != self.page_size:
            raise ValueError(f"pages of {pages.c.page_size} bytes, not {self.page_size}")
        if zero is not None:
            if zero.nbits < n:
                raise ValueError("zero has fewer bits than index has pages")
            zero_words = zero.words
        if n == 0:
            return 0
        pages.check_indexes(&index[0], n)
        self.source = pages
        pages.pins += 1
        return mig_compress_start(self.c, &pages.c, &index[0], n, zero_words, most)

    @property
    def done(self):
        """Whether ``wait`` would not wait."""
        return mig_compress_is_done(self.c)

    def wait(self):
        """Return the numbers (uint64) of the pages that are compressed now."""
        cdef size_t n = 0, i
        cdef const uint64_t *jobs
        cdef int rc
        cdef uint64_t[::1] numbers
        if self.source is None:
            return _np.empty(0, dtype=_np.uint64)
        with nogil:
            rc = mig_compress_wait(self.c)
        self.let_go()
        check(rc)
        jobs = mig_compress_jobs(self.c, &n)
        array = _np.empty(n, dtype=_np.uint64)
        numbers = array
        for i in range(n):
            numbers[i] = jobs[i]
        return array

    cdef int check_done(self) except -1:
        if self.source is not None:
            raise RuntimeError("pages are being compressed")
        return 0
