# cython: language_level=3
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)


cdef extern from "mig.h" nogil:
    enum:
        MIG_E_CANCELLED
        MIG_E_TIMEOUT
        MIG_E_NOMEM
        MIG_E_KERNEL_UNKNOWN
        MIG_E_KERNEL_NOT_BUILT
        MIG_E_KERNEL_NO_CPU
        MIG_E_RAM_NO_BLOCK
        MIG_E_RAM_UNKNOWN_BLOCK
        MIG_E_RAM_BAD_OFFSET
        MIG_E_RAM_BAD_CODING
        MIG_E_RAM_BAD_LENGTH
        MIG_E_RAM_BAD_FILL
        MIG_E_RAM_CODED
        MIG_E_RAM_BAD_ZLIB
        MIG_E_XBZRLE_TRUNCATED
        MIG_E_XBZRLE_LENGTH
        MIG_E_XBZRLE_PAST_PAGE
        MIG_E_MAPPED_SHORT
        MIG_E_GONE
        MIG_E_SERVER_BROKEN
        MIG_XBZRLE_OVERFLOW

    enum mig_bitop:
        MIG_BITOP_AND
        MIG_BITOP_OR
        MIG_BITOP_ANDNOT
        MIG_BITOP_NOT

    struct mig_kernels:
        const char *name
        bint (*is_zero)(const uint8_t *, size_t) noexcept nogil
        size_t (*bits)(const uint64_t *words, uint64_t nbits, uint64_t start, uint64_t *out,
                       size_t max) noexcept nogil
        size_t (*take)(uint64_t *words, uint64_t nbits, uint64_t start, uint64_t *out,
                       size_t max) noexcept nogil
        int64_t (*xbzrle_encode)(const uint8_t *old, const uint8_t *new, size_t nbytes,
                                 uint8_t *dst, size_t max) noexcept nogil
        int64_t (*xbzrle_update)(uint8_t *old, const uint8_t *new, size_t nbytes, uint8_t *dst,
                                 size_t max) noexcept nogil
        int64_t (*xbzrle_decode)(const uint8_t *src, size_t nsrc, uint8_t *page,
                                 size_t nbytes) noexcept nogil

    int mig_kernels_select(const char *name, const mig_kernels **found)
    const char *mig_kernels_name(size_t i)

    size_t mig_bitmap_nwords(uint64_t nbits)
    bint mig_bitmap_test(const uint64_t *words, uint64_t bit)
    void mig_bitmap_set(uint64_t *words, uint64_t first, uint64_t nbits)
    void mig_bitmap_clear(uint64_t *words, uint64_t first, uint64_t nbits)
    uint64_t mig_bitmap_count(const mig_kernels *k, const uint64_t *words, uint64_t first,
                              uint64_t nbits)
    uint64_t mig_bitmap_next_set(const uint64_t *words, uint64_t nbits, uint64_t start)
    uint64_t mig_bitmap_next_clear(const uint64_t *words, uint64_t nbits, uint64_t start)
    uint64_t mig_bitmap_merge(const mig_kernels *k, uint64_t *dst, const uint64_t *src,
                              uint64_t nbits)
    void mig_bitmap_combine(const mig_kernels *k, mig_bitop op, uint64_t *dst,
                            const uint64_t *src, uint64_t nbits)
    size_t mig_bitmap_runs(const mig_kernels *k, const uint64_t *words, uint64_t nbits,
                           uint64_t start, uint64_t *runs, size_t max, uint64_t budget)
    void mig_bitmap_round(uint64_t *words, uint64_t nbits, uint64_t group)
    void mig_bitmap_to_wire(const uint64_t *words, uint64_t nbits, uint8_t *data)
    void mig_bitmap_from_wire(uint64_t *words, uint64_t nbits, const uint8_t *data)
    uint64_t mig_bitmap_set_atomic(uint64_t *words, uint64_t first, uint64_t nbits)
    uint64_t mig_bitmap_clear_atomic(uint64_t *words, uint64_t first, uint64_t nbits)
    uint64_t mig_bitmap_drain(uint64_t *dst, uint64_t *src, uint64_t nbits)

    enum:
        MIG_PAGE_NONE
        MIG_PAGE_ZERO

    struct mig_pages:
        uint8_t *base
        const int64_t *where
        const uint64_t *stored
        uint64_t npages
        size_t page_size

    const uint8_t *mig_page(const mig_pages *pages, uint64_t index)
    size_t mig_zero_pages(const mig_kernels *k, const mig_pages *pages, const uint64_t *index,
                          size_t n, uint64_t *zero)

    enum:
        MIG_XBZRLE_MAX_PAGE
        MIG_CACHE_SAME
        MIG_CACHE_OVERFLOW
        MIG_CACHE_MISS
        MIG_CACHE_REFUSED

    struct mig_cache_slot:
        uint64_t address
        uint64_t age

    struct mig_cache:
        mig_cache_slot *slots
        uint8_t *pages
        size_t nslots
        size_t page_size
        size_t stride
        unsigned page_shift
        size_t used
        uint64_t epoch

    int mig_cache_open(mig_cache *c, size_t nslots, size_t page_size)
    void mig_cache_close(mig_cache *c)
    uint8_t *mig_cache_lookup(mig_cache *c, uint64_t address, uint64_t generation)
    uint8_t *mig_cache_insert(mig_cache *c, uint64_t address, const uint8_t *page,
                              uint64_t generation)
    size_t mig_cache_encode(const mig_kernels *k, mig_cache *c, const mig_pages *pages,
                            uint64_t address, const uint64_t *index, size_t n,
                            uint64_t generation, bint last_stage, uint8_t *out, size_t max,
                            int32_t *result, size_t *used)

    struct mig_out:
        iovec *iov
        size_t niov
        size_t max_iov
        uint8_t *arena
        size_t used
        size_t arena_size
        uint64_t nbytes

    bint mig_out_copy(mig_out *out, const void *data, size_t nbytes)

    enum:
        MIG_RAM_ZERO
        MIG_RAM_MEM_SIZE
        MIG_RAM_PAGE
        MIG_RAM_EOS
        MIG_RAM_CONTINUE
        MIG_RAM_XBZRLE
        MIG_RAM_COMPRESS
        MIG_RAM_MAX_NAME
        MIG_RAM_STOP_MORE
        MIG_RAM_STOP_FULL
        MIG_RAM_STOP_SWITCH
        MIG_RAM_STOP_EOS
        MIG_RAM_STOP_OTHER

    size_t mig_ram_encode(mig_out *out, const mig_pages *pages, const char *name,
                          size_t name_len, const uint64_t *index, size_t first, size_t n,
                          const uint64_t *zero)

    struct mig_ram_block:
        const char *name
        size_t name_len
        uint64_t npages

    struct mig_ram_parser:
        const mig_ram_block *blocks
        size_t nblocks
        size_t page_size
        int64_t current
        uint64_t *page
        int64_t *src
        uint32_t *length
        uint16_t *kind
        size_t capacity
        uint32_t *packed
        uint8_t *unpacked
        bint *intact
        size_t max_packed
        size_t npages
        size_t nfill
        size_t nxbzrle
        size_t npacked
        size_t consumed
        size_t need
        size_t wrong
        uint64_t word

    int mig_ram_parse(mig_ram_parser *p, const uint8_t *buf, size_t n)

    struct mig_delta:
        const mig_kernels *kernels
        mig_cache *cache
        uint64_t address
        uint64_t generation
        bint last_stage
        uint64_t zero
        uint64_t missed
        uint64_t refused
        uint64_t unchanged
        uint64_t overflows
        uint64_t encoded
        uint64_t encoded_bytes
        uint64_t record_bytes

    size_t mig_delta_room(size_t page_size)
    size_t mig_delta_encode(mig_out *out, mig_delta *d, const mig_pages *pages, const char *name,
                            size_t name_len, const uint64_t *index, size_t first, size_t n,
                            const uint64_t *zero)

    int mig_ram_place(const mig_kernels *k, mig_ram_parser *p, const mig_pages *pages,
                      uint64_t *received, bint fresh, const uint8_t *buf)
    int mig_ram_index(mig_ram_parser *p, int64_t *where, int64_t start)
    size_t mig_ram_record_offset(const mig_ram_parser *p, const uint8_t *buf, size_t i)

    struct mig_appender:
        pass

    int mig_appender_open(mig_appender *a, int fd, int direct_fd)
    int mig_appender_finish(mig_appender *a)
    void mig_appender_close(mig_appender *a)
    int64_t mig_appender_tail(const mig_appender *a)
    int mig_append(mig_appender *a, const void *data, size_t nbytes)

    struct mig_pagelog:
        mig_appender file
        int64_t current
        size_t page_size
        const uint8_t *zeros
        uint8_t *scratch
        const mig_kernels *kernels

    int mig_pagelog_put(mig_pagelog *log, mig_ram_parser *p, int64_t *where, const uint8_t *buf)
    int mig_pagelog_zeros(mig_pagelog *log, int64_t number, const mig_ram_block *block,
                          const int64_t *where)

    struct mig_fd:
        int fd
        int cancel_fd
        bint is_socket
        int timeout_ms

    int64_t mig_fd_read(const mig_fd *f, uint8_t *buf, size_t min, size_t max)
    int64_t mig_fd_writev(const mig_fd *f, iovec *iov, size_t niov)
