# SPDX-License-Identifier: LGPL-2.1-or-later
@cython.final
@cython.no_gc  # so that refs is whole in __dealloc__
cdef class OutQueue:
    """Bytes on their way out, in wire order: headers by copy, pages by reference."""
    cdef mig_out c
    cdef list refs

    def __cinit__(self, size_t max_iov=1024, size_t arena_size=1 << 16):
        if max_iov < 4 or arena_size < 1024:
            raise ValueError("an OutQueue needs 4 iovecs and 1024 bytes of arena at least")
        self.refs = []
        self.c.max_iov = max_iov
        self.c.arena_size = arena_size
        self.c.iov = <iovec *>malloc(max_iov * sizeof(iovec))
        self.c.arena = <uint8_t *>malloc(arena_size)
        if self.c.iov == NULL or self.c.arena == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.refs is not None:
            self.clear()
        free(self.c.iov)
        free(self.c.arena)

    @property
    def nbytes(self):
        return self.c.nbytes

    def put(self, data):
        """Appends bytes by copy; False (and nothing done) when they do not fit."""
        cdef Py_buffer view
        cdef bint done
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        done = mig_out_copy(&self.c, view.buf, <size_t>view.len)
        PyBuffer_Release(&view)
        return done

    def encode(self, Pages pages not None, bytes name, const uint64_t[::1] index not None,
               size_t first=0, Bitmap zero=None):
        """Appends RAM records of pages index[first:]; returns the first position that did not fit.

        name: given when the first record must name its block, else None
        zero: bit i set when page index[i] is known to be zero
        """
        cdef size_t n = <size_t>index.shape[0], done
        cdef size_t name_len = 0 if name is None else <size_t>len(name)
        cdef const char *name_ptr = NULL
        cdef const uint64_t *zero_words = NULL
        if first >= n:
            return n
        if name is not None:
            if name_len > MIG_RAM_MAX_NAME:
                raise ValueError(f"block name of {name_len} bytes")
            name_ptr = <const char *>name
        if zero is not None:
            if zero.nbits < n:
                raise ValueError("zero has fewer bits than index has pages")
            zero_words = zero.words
        pages.check_indexes(&index[0], n)
        # microseconds: the pages themselves are not touched here, so the GIL is kept
        done = mig_ram_encode(&self.c, &pages.c, name_ptr, name_len, &index[0], first, n,
                              zero_words)
        pages.pins += 1
        self.refs.append(pages)
        return done

    def clear(self):
        cdef Pages pages
        for pages in self.refs:
            pages.pins -= 1
        self.refs.clear()
        self.c.niov = 0
        self.c.used = 0
        self.c.nbytes = 0

    def tobytes(self):
        cdef list parts = []
        cdef size_t i
        for i in range(self.c.niov):
            parts.append((<const char *>self.c.iov[i].iov_base)[:self.c.iov[i].iov_len])
        return b"".join(parts)

    @property
    def niov(self):
        return self.c.niov
