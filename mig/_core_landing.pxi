# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "landing.h" nogil:
    struct mig_landing:
        pass

    struct mig_landed:
        uint64_t npages
        size_t held
        bint more

    void mig_land_in_memory(mig_landing *l, const mig_pages *pages, uint64_t *received,
                            uint64_t npages, uint64_t next)
    void mig_land_in_file(mig_landing *l, mig_mappedlog_writer *w,
                          const mig_mappedlog_block *block, uint64_t npages)
    int mig_land(const mig_fd *fd, mig_landing *l, uint8_t *buf, size_t held, size_t capacity,
                 mig_landed *result)
    bint mig_land_likely(const mig_ram_parser *p, bint ordered)


cdef object _land_on(Descriptor fd, mig_landing *landing, data, size_t held):
    """See land_in_memory()."""
    cdef Py_buffer view
    cdef mig_landed result
    cdef int rc
    PyObject_GetBuffer(data, &view, PyBUF_CONTIG)
    try:
        if held > <size_t>view.len:
            raise IndexError(f"{held} bytes of {view.len}")
        with nogil:
            rc = mig_land(&fd.c, landing, <uint8_t *>view.buf, held, <size_t>view.len, &result)
    finally:
        PyBuffer_Release(&view)
    check(rc)
    return result.npages, result.held, result.more


def land_in_memory(Descriptor fd not None, RamParser parser not None, Pages pages not None,
                   Bitmap received not None, data, size_t held):
    """Reads on straight into memory, after a burst of pages that followed each other.

    data: a buffer whose first ``held`` bytes are of the next record, there again when it returns
    pages: of the parser's block; where `received` is clear it reads as zeros

    Returns the number of pages, how many bytes of the next record are in the buffer, and whether
    more of the same can be read at once, by another call before the parser's next burst; None,
    having done nothing, when none are to be expected.
    """
    cdef mig_ram_parser *p = &parser.c
    cdef mig_landing landing
    cdef size_t i
    if not mig_land_likely(p, True):
        return None
    if (not pages.writable or pages.c.where != NULL or pages.c.page_size != p.page_size
            or pages.c.npages < p.blocks[p.current].npages
            or received.nbits < p.blocks[p.current].npages):
        raise ValueError("memory does not fit the block")
    mig_land_in_memory(&landing, &pages.c, received.words, p.blocks[p.current].npages,
                       p.page[p.npages - 1] + 1)
    pages.pins += 1
    try:
        result = _land_on(fd, &landing, data, held)
    finally:
        pages.pins -= 1
    # the next call goes on behind these: as if the burst had been that much further on
    for i in range(p.npages):
        p.page[i] += <uint64_t>result[0]
    return result


def land_in_file(Descriptor fd not None, RamParser parser not None, MappedLog file not None,
                 data, size_t held):
    """The same into a file of the parser's blocks, for any pages; no other thread may put any."""
    cdef mig_ram_parser *p = &parser.c
    cdef mig_landing landing
    cdef const mig_mappedlog_block *block
    if not mig_land_likely(p, False):
        return None
    if file.parser is not parser:
        raise ValueError("a parser of other blocks")
    block = &file.blocks[p.current]
    check(mig_mappedlog_expect(&file.writer, block))
    mig_land_in_file(&landing, &file.writer, block, p.blocks[p.current].npages)
    return _land_on(fd, &landing, data, held)
