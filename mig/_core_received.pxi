# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "received.h" nogil:
    void mig_received_mark(const mig_ram_parser *p, uint64_t *received)
    int mig_received_blank(mig_pagelog *log, const int64_t *where, uint64_t npages,
                           const uint64_t *received)


def mark_received(RamParser parser not None, Bitmap received not None):
    """Set the bits of the parser's last burst; threads may do so at the same time."""
    if parser.c.npages == 0:
        return
    if received.nbits < parser.table[parser.c.current].npages:
        raise ValueError("the bitmap is shorter than the block")
    mig_received_mark(&parser.c, received.words)


def blank_missing(PageLog log not None, size_t number, Bitmap received not None):
    """Write zeros where the file has pages of a block, by number, that are not received."""
    cdef uint64_t npages
    cdef int rc
    if number >= log.parser.c.nblocks:
        raise IndexError(f"block {number} of {log.parser.c.nblocks}")
    npages = log.parser.table[number].npages
    if received.nbits != npages:
        raise ValueError(f"a bitmap of {received.nbits} bits for {npages} pages")
    with nogil:
        rc = mig_received_blank(&log.c, log.where[number], npages, received.words)
    check(rc)
