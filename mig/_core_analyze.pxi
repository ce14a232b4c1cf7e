# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "tally.h" nogil:
    enum:
        MIG_TALLY_FAULTS

    struct mig_tally:
        uint64_t *sent
        uint64_t *zero
        uint64_t npages
        uint64_t nzero
        uint64_t normal
        uint64_t fill
        uint64_t xbzrle
        uint64_t compressed
        uint64_t repeated
        uint64_t filled
        uint64_t record_bytes
        uint64_t xbzrle_bytes
        uint64_t compressed_bytes

    struct mig_tally_fault:
        uint64_t offset
        int64_t block
        int error

    struct mig_walk_state "mig_walk":
        mig_ram_parser *parser
        mig_decompressor *inflating
        unsigned threads
        const mig_kernels *kernels
        mig_tally *blocks
        uint8_t *page
        bint mapped
        size_t consumed
        int64_t wrong_block
        mig_tally_fault faults[32]
        size_t nfaults

    int mig_walk(mig_walk_state *w, const uint8_t *buf, size_t n)

cdef extern from "pagediff.h" nogil:
    struct mig_pagediff:
        uint64_t same
        uint64_t differ
        uint64_t only_a
        uint64_t only_b

    void mig_pages_diff(const mig_kernels *k, const mig_pages *a, const mig_pages *b,
                        uint64_t first, uint64_t end, uint64_t *differ, mig_pagediff *counts)


@cython.final
@cython.no_gc  # so that parser is there in __dealloc__
cdef class RamWalker:
    """Walks over the records of `ram` sections and counts them; loads nothing (csrc/tally.c).

    blocks: (name, number of pages) in the order of their numbers
    mapped: the bytes are those of a mapped file: what was walked over is unmapped

    The current block is kept from call to call, as the stream does over sections.
    """
    cdef mig_walk_state c
    cdef RamParser parser

    def __cinit__(self, blocks, size_t page_size, *, bint mapped=False, unsigned threads=2):
        cdef size_t i, n
        # one more for records of a block that is not known any more: no name is that of it
        self.parser = RamParser([*blocks, (b"", UINT64_MAX)], page_size, threads=threads)
        n = self.parser.c.nblocks
        self.parser.table[n - 1].name_len = SIZE_MAX
        self.c.parser = &self.parser.c
        self.c.threads = threads
        self.c.kernels = (<Kernels>KERNELS).k
        self.c.mapped = mapped
        self.c.page = <uint8_t *>calloc(1, page_size)
        self.c.blocks = <mig_tally *>calloc(n or 1, sizeof(mig_tally))
        if self.c.page == NULL or self.c.blocks == NULL:
            raise MemoryError
        for i in range(n - 1):
            # memory is taken only where there are pages
            self.c.blocks[i].sent = new_words(self.parser.table[i].npages)
            self.c.blocks[i].zero = new_words(self.parser.table[i].npages)

    def __dealloc__(self):
        cdef size_t i
        if self.c.blocks != NULL:
            for i in range(self.parser.c.nblocks):
                free(self.c.blocks[i].sent)
                free(self.c.blocks[i].zero)
        free(self.c.blocks)
        free(self.c.page)
        mig_decompressor_close(self.c.inflating)

    def walk(self, data, size_t start, size_t end):
        """Walks over data[start:end]; returns STOP_MORE, STOP_EOS or STOP_OTHER.

        RamRecordError at a record that is wrong, which ``consumed`` is in front of.
        """
        cdef Py_buffer view
        cdef int stop
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            if start > end or end > <size_t>view.len:
                raise IndexError(f"{start}..{end} of {view.len} bytes")
            with nogil:
                stop = mig_walk(&self.c, <const uint8_t *>view.buf + start, end - start)
            return check(stop)
        finally:
            PyBuffer_Release(&view)

    def lose_block(self):
        """Something is left out: to which block records belong is not known up to the next name."""
        self.parser.c.current = <int64_t>self.parser.c.nblocks - 1

    @property
    def lost(self):
        """Records since then that could not be ascribed to a block."""
        cdef mig_tally *t = &self.c.blocks[self.parser.c.nblocks - 1]
        return t.normal + t.fill + t.xbzrle + t.compressed

    @property
    def consumed(self):
        """Bytes that the last walk went over."""
        return self.c.consumed

    @property
    def need(self):
        """After STOP_MORE: bytes of the next record that must be there to go on."""
        return self.parser.c.need

    @property
    def word(self):
        """After STOP_OTHER: the word of the record that was not consumed."""
        return self.parser.c.word

    @property
    def current(self):
        """Number of the block that the stream is in, -1 before the first."""
        return self.parser.c.current

    @property
    def wrong_block(self):
        """After an error: number of the block of the record that is wrong, or -1."""
        return self.c.wrong_block

    def faults(self):
        """Records of the last walk whose contents are wrong: how many there are, and of the first
        of them [(offset from the start of the walk, block, what is wrong)]."""
        cdef size_t i
        out = []
        for i in range(min(self.c.nfaults, <size_t>MIG_TALLY_FAULTS)):
            error = self.c.faults[i].error
            text = (f"XBZRLE page: {_XBZRLE_ERRORS[error]}" if error in _XBZRLE_ERRORS
                    else _RAM_ERRORS[error])
            out.append((self.c.faults[i].offset, self.c.faults[i].block, text))
        return self.c.nfaults, out

    def counts(self, size_t number):
        """What was counted of a block, by name; see csrc/tally.h."""
        cdef mig_tally *t
        if number >= self.parser.c.nblocks - 1:
            raise IndexError(f"block {number} of {self.parser.c.nblocks - 1}")
        t = &self.c.blocks[number]
        return {
            "npages": t.npages, "nzero": t.nzero, "normal": t.normal, "fill": t.fill,
            "xbzrle": t.xbzrle, "compressed": t.compressed, "repeated": t.repeated,
            "filled": t.filled, "record_bytes": t.record_bytes,
            "xbzrle_bytes": t.xbzrle_bytes, "compressed_bytes": t.compressed_bytes,
        }


cdef uint64_t *new_words(uint64_t npages) except NULL:
    cdef uint64_t *words = <uint64_t *>calloc(mig_bitmap_nwords(npages) or 1, sizeof(uint64_t))
    if words == NULL:
        raise MemoryError
    return words


def diff_pages(Pages a not None, Pages b not None, uint64_t first, uint64_t end,
               Bitmap differ not None):
    """Compares pages first..end of two blocks and sets the bits of those that differ.

    Returns how many are the same (also those that neither has), differ, are only in a, only in b.
    """
    cdef const mig_kernels *k = (<Kernels>KERNELS).k
    cdef mig_pagediff counts
    if a.c.page_size != b.c.page_size:
        raise ValueError(f"pages of {a.c.page_size} and of {b.c.page_size} bytes")
    if first > end or end > a.c.npages or end > b.c.npages or end > differ.nbits:
        raise IndexError(f"pages {first}..{end} of {a.c.npages} and {b.c.npages}")
    memset(&counts, 0, sizeof(counts))
    a.pins += 1
    b.pins += 1
    with nogil:
        mig_pages_diff(k, &a.c, &b.c, first, end, differ.words, &counts)
    a.pins -= 1
    b.pins -= 1
    return counts.same, counts.differ, counts.only_a, counts.only_b
