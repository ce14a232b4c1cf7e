# SPDX-License-Identifier: LGPL-2.1-or-later
PAGE_NONE = MIG_PAGE_NONE
PAGE_ZERO = MIG_PAGE_ZERO

STOP_MORE = MIG_RAM_STOP_MORE
STOP_FULL = MIG_RAM_STOP_FULL
STOP_SWITCH = MIG_RAM_STOP_SWITCH
STOP_EOS = MIG_RAM_STOP_EOS
STOP_OTHER = MIG_RAM_STOP_OTHER

RAM_FLAGS = {
    "ZERO": MIG_RAM_ZERO,
    "MEM_SIZE": MIG_RAM_MEM_SIZE,
    "PAGE": MIG_RAM_PAGE,
    "EOS": MIG_RAM_EOS,
    "CONTINUE": MIG_RAM_CONTINUE,
    "XBZRLE": MIG_RAM_XBZRLE,
    "COMPRESS_PAGE": MIG_RAM_COMPRESS,
}


#: bytes of compressed pages that one burst may become
cdef size_t _INFLATED = 4 << 20


@cython.final
cdef class RamParser:
    """Parses bursts of page records: PAGE, ZERO, XBZRLE and COMPRESS_PAGE.

    blocks: (name, number of pages) in the order of their numbers
    capacity: most records of one burst
    threads: that inflate compressed pages; they begin when the first one comes
    """
    cdef mig_decompressor *inflating
    cdef unsigned threads
    cdef mig_ram_parser c
    cdef mig_ram_block *table
    cdef list names

    def __cinit__(self, blocks, size_t page_size, size_t capacity=4096, *,
                  unsigned threads=2):
        cdef size_t i
        if page_size < 64 or page_size & (page_size - 1) or page_size > 1 << 30:
            raise ValueError(f"page size {page_size} is not a power of two of at least 64")
        if capacity == 0 or capacity > 1 << 24:
            raise ValueError(f"capacity {capacity}")
        check_threads(threads)
        self.threads = threads
        self.names = [bytes(name) for name, _ in blocks]
        self.table = <mig_ram_block *>calloc(len(self.names) or 1, sizeof(mig_ram_block))
        self.c.page = <uint64_t *>malloc(capacity * sizeof(uint64_t))
        self.c.src = <int64_t *>malloc(capacity * sizeof(int64_t))
        self.c.length = <uint32_t *>malloc(capacity * sizeof(uint32_t))
        self.c.kind = <uint16_t *>malloc(capacity * sizeof(uint16_t))
        self.c.max_packed = min(capacity, max(1, _INFLATED // page_size))
        self.c.packed = <uint32_t *>malloc(self.c.max_packed * sizeof(uint32_t))
        self.c.intact = <bint *>malloc(self.c.max_packed * sizeof(bint))
        if (self.table == NULL or self.c.page == NULL or self.c.src == NULL
                or self.c.length == NULL or self.c.kind == NULL
                or self.c.packed == NULL or self.c.intact == NULL):
            raise MemoryError
        for i, (_, npages) in enumerate(blocks):
            if len(self.names[i]) > MIG_RAM_MAX_NAME:
                raise ValueError("block name of more than 255 bytes")
            self.table[i].name = <const char *>(<bytes>self.names[i])
            self.table[i].name_len = <size_t>len(self.names[i])
            self.table[i].npages = npages
        self.c.blocks = self.table
        self.c.nblocks = <size_t>len(self.names)
        self.c.page_size = page_size
        self.c.current = -1
        self.c.capacity = capacity

    def __dealloc__(self):
        free(self.table)
        free(self.c.page)
        free(self.c.src)
        free(self.c.length)
        free(self.c.kind)
        free(self.c.packed)
        free(self.c.intact)
        free(self.c.unpacked)
        mig_decompressor_close(self.inflating)

    def parse(self, data, size_t start, size_t end):
        """Parses data[start:end] up to the next STOP_*; see the properties for the results."""
        cdef Py_buffer view
        cdef int stop
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            if start > end or end > <size_t>view.len:
                raise IndexError(f"{start}..{end} of {view.len} bytes")
            stop = mig_ram_parse(&self.c, <const uint8_t *>view.buf + start, end - start)
            return check(stop)
        finally:
            PyBuffer_Release(&view)

    @property
    def current(self):
        """Number of the block that the parsed pages belong to, -1 before the first."""
        return self.c.current

    @property
    def npages(self):
        return self.c.npages

    @property
    def nfill(self):
        """How many of the parsed pages are fill (zero) records."""
        return self.c.nfill

    @property
    def nxbzrle(self):
        """How many of the parsed pages are differences."""
        return self.c.nxbzrle

    @property
    def npacked(self):
        """How many of the parsed pages are compressed."""
        return self.c.npacked

    @property
    def consumed(self):
        return self.c.consumed

    @property
    def need(self):
        """After STOP_MORE: bytes of the next record that must be there to go on."""
        return self.c.need

    @property
    def word(self):
        """After STOP_OTHER: the word of the record that was not consumed."""
        return self.c.word

    cdef size_t check_last(self, Py_buffer *view, size_t start) except? 0:
        """The results of the last parse refer to `consumed` bytes from start."""
        if start > <size_t>view.len or self.c.consumed > <size_t>view.len - start:
            raise IndexError(f"a burst of {self.c.consumed} bytes at {start} of {view.len}")
        return self.c.npages

    def records(self):
        """The last burst as [(page index, source)]; for tests and tools."""
        return [(self.c.page[i], self.c.src[i]) for i in range(self.c.npages)]

    def kinds(self):
        """The last burst as [(flag, length of the bytes at source)]; for tests and tools."""
        return [(self.c.kind[i], self.c.length[i]) for i in range(self.c.npages)]

    def wrong_offset(self, data, size_t start):
        """Where the record begins, in the last burst, at which what became of it went wrong."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            self.check_last(&view, start)
            return mig_ram_record_offset(&self.c, <const uint8_t *>view.buf + start,
                                         min(self.c.wrong, self.c.npages))
        finally:
            PyBuffer_Release(&view)

    cdef int check_record(self, int rc) except -1:
        """``check`` for what one record of a burst has led to."""
        if rc == MIG_E_RAM_CODED:
            if self.c.kind[self.c.wrong] == MIG_RAM_COMPRESS:
                raise RamRecordError("RAM record COMPRESS_PAGE is not supported here",
                                     capability="compress")
            raise RamRecordError("RAM record XBZRLE is not supported here", capability="xbzrle")
        if rc in _XBZRLE_ERRORS:
            raise RamRecordError(f"XBZRLE page: {_XBZRLE_ERRORS[rc]}")
        check(rc)
        return 0

    cdef int open_inflating(self) except -1:
        """Everything that compressed pages need is there when a burst has some."""
        if self.c.npacked:
            if self.c.unpacked == NULL:
                self.c.unpacked = <uint8_t *>malloc(self.c.max_packed * self.c.page_size)
                if self.c.unpacked == NULL:
                    raise MemoryError
            if self.inflating == NULL:
                check(mig_decompressor_open(&self.inflating, self.threads))
        return 0

    def place(self, data, size_t start, Pages pages not None, Bitmap received not None,
              bint fresh):
        """Copies the last burst's pages into memory and sets their bits in ``received``."""
        cdef Py_buffer view
        cdef const mig_kernels *k = (<Kernels>KERNELS).k
        cdef int rc
        if self.c.npages == 0:
            return
        if (not pages.writable or pages.c.where != NULL
                or pages.c.page_size != self.c.page_size
                or pages.c.npages < self.table[self.c.current].npages
                or received.nbits < self.table[self.c.current].npages):
            raise ValueError("memory does not fit the block")
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            self.check_last(&view, start)
            self.open_inflating()
            pages.pins += 1
            with nogil:
                rc = mig_decompress(self.inflating, &self.c, <const uint8_t *>view.buf + start)
                if rc == 0:
                    rc = mig_ram_place(k, &self.c, &pages.c, received.words, fresh,
                                       <const uint8_t *>view.buf + start)
            pages.pins -= 1
            self.check_record(rc)
        finally:
            PyBuffer_Release(&view)

    def index(self, int64_t offset, int64_t[::1] where not None):
        """Notes in where[page] the file offset of the last burst's pages, or PAGE_ZERO."""
        if self.c.npages == 0:
            return
        if <uint64_t>where.shape[0] < self.table[self.c.current].npages:
            raise ValueError("where is shorter than the block")
        self.check_record(mig_ram_index(&self.c, &where[0], offset))


@cython.no_gc  # so that parser is there in __dealloc__
cdef class _BurstLog:
    """A file that takes the pages of bursts, from the connections of one guest."""
    cdef RamParser parser
    cdef pthread_mutex_t lock  # held while the file is used: two connections may bring pages

    def __cinit__(self, int fd, RamParser parser not None, *args, **kwargs):
        pthread_mutex_init(&self.lock, NULL)
        self.parser = parser

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef int put_burst(self, mig_ram_parser *p, const uint8_t *buf) noexcept nogil:
        """Puts a burst, inflated, into the file, in order."""
        return -EINVAL

    def put(self, data, size_t start, RamParser parser=None):
        """Writes the last burst of the parser; data and start are those it parsed.

        parser: another one of the same blocks, whose pages come on a connection of their own
        """
        cdef RamParser source = self.parser if parser is None else parser
        cdef mig_ram_parser *p = &source.c
        cdef Py_buffer view
        cdef int rc
        if (p.nblocks != self.parser.c.nblocks or p.page_size != self.parser.c.page_size
                or (p.npages and p.blocks[p.current].npages
                    > self.parser.c.blocks[p.current].npages)):
            raise ValueError("a parser of other blocks")
        if p.npages == 0:
            return
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            source.check_last(&view, start)
            source.open_inflating()
            with nogil:
                rc = mig_decompress(source.inflating, p, <const uint8_t *>view.buf + start)
                if rc == 0:
                    pthread_mutex_lock(&self.lock)
                    rc = self.put_burst(p, <const uint8_t *>view.buf + start)
                    pthread_mutex_unlock(&self.lock)
            source.check_record(rc)
        finally:
            PyBuffer_Release(&view)


@cython.final
@cython.no_gc  # so that parser is there in __dealloc__
cdef class PageLog(_BurstLog):
    """A stream file while it is written: each page has one record, rewritten in place
    (csrc/pagelog.c). Shares the block table of ``parser``.

    direct_fd: the same file opened with O_DIRECT, -1 to write through the page cache
    """
    cdef mig_pagelog c
    cdef int64_t **where
    cdef uint8_t *zeros
    cdef uint8_t *scratch

    def __cinit__(self, int fd, RamParser parser not None, *, int direct_fd=-1):
        cdef size_t i
        cdef uint64_t npages
        self.c.current = -1
        self.c.page_size = parser.c.page_size
        self.zeros = <uint8_t *>calloc(1, parser.c.page_size)
        self.where = <int64_t **>calloc(parser.c.nblocks or 1, sizeof(int64_t *))
        self.scratch = <uint8_t *>malloc(parser.c.page_size)
        if self.zeros == NULL or self.where == NULL or self.scratch == NULL:
            raise MemoryError
        self.c.zeros = self.zeros
        self.c.scratch = self.scratch
        self.c.kernels = (<Kernels>KERNELS).k
        check(mig_appender_open(&self.c.file, fd, direct_fd))
        for i in range(parser.c.nblocks):
            npages = parser.table[i].npages
            self.where[i] = <int64_t *>calloc(<size_t>(npages or 1), sizeof(int64_t))
            if self.where[i] == NULL:
                raise MemoryError

    def __dealloc__(self):
        cdef size_t i
        mig_appender_close(&self.c.file)
        if self.where != NULL:
            for i in range(self.parser.c.nblocks):
                free(self.where[i])
        free(self.where)
        free(self.zeros)
        free(self.scratch)

    @property
    def tail(self):
        """Length of the file so far."""
        return mig_appender_tail(&self.c.file)

    def append(self, const uint8_t[::1] data not None):
        """Writes bytes that are no page records."""
        if data.shape[0]:
            check(mig_append(&self.c.file, &data[0], <size_t>data.shape[0]))

    cdef int put_burst(self, mig_ram_parser *p, const uint8_t *buf) noexcept nogil:
        return mig_pagelog_put(&self.c, p, self.where[p.current], buf)

    def put_zeros(self):
        """Appends the ZERO records of all pages that were sent and have no contents."""
        cdef size_t i
        cdef int rc
        for i in range(self.parser.c.nblocks):
            with nogil:
                rc = mig_pagelog_zeros(&self.c, <int64_t>i, &self.parser.c.blocks[i],
                                       self.where[i])
            check(rc)

    def finish(self):
        """Writes all that is not written yet."""
        cdef int rc
        with nogil:
            rc = mig_appender_finish(&self.c.file)
        check(rc)
