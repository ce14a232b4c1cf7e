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

    def encode_deltas(self, XbzrleCache cache not None, Pages pages not None, bytes name,
                      const uint64_t[::1] index not None, size_t first=0, Bitmap zero=None, *,
                      uint64_t address, uint64_t generation, bint last_stage=False):
        """``encode``, with pages that are in ``cache`` as their difference; see XbzrleCache.encode.

        address, generation, last_stage: as there

        A page that has not changed makes no record: the name may still be wanted after a batch.
        Cached copies are sent by reference, so the cache is bound to this queue until it is
        empty, and a page whose slot is on its way out does not fit.
        """
        cdef size_t n = <size_t>index.shape[0], done
        cdef size_t name_len = 0 if name is None else <size_t>len(name)
        cdef const char *name_ptr = NULL
        cdef const uint64_t *zero_words = NULL
        cdef const uint64_t *numbers
        cdef mig_delta d
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
        if mig_delta_room(cache.c.page_size) > self.c.arena_size:
            raise ValueError(f"an arena of {self.c.arena_size} bytes has no room for a page")
        cache.bind(<size_t><void *>self)
        cache.check_source(pages, index, address)
        if pages.c.page_size < 128:
            raise ValueError("XBZRLE records need pages of 128 bytes at least")
        cache.pins += 1
        self.refs.append(cache)
        pages.pins += 1
        self.refs.append(pages)
        memset(&d, 0, sizeof(d))
        d.kernels = cache.k
        d.cache = &cache.c
        d.address = address
        d.generation = generation
        d.last_stage = last_stage
        numbers = &index[0]
        cache.busy = True
        with nogil:
            done = mig_delta_encode(&self.c, &d, &pages.c, name_ptr, name_len, numbers, first, n,
                                    zero_words)
        cache.busy = False
        cache.add(&d)
        return done

    def encode_compressed(self, Compressor compressor not None, Pages pages not None, bytes name,
                          const uint64_t[::1] index not None, size_t first=0, Bitmap zero=None, *,
                          bint skip=False):
        """``encode``, with the records of pages that were compressed where they are among index.

        skip: leave pages out that are being compressed
        """
        cdef size_t n = <size_t>index.shape[0], done
        cdef size_t name_len = 0 if name is None else <size_t>len(name)
        cdef const char *name_ptr = NULL
        cdef const uint64_t *zero_words = NULL
        cdef mig_compress_counts counts
        if first >= n:
            return n
        if not skip:
            compressor.check_done()
        if name is not None:
            if name_len > MIG_RAM_MAX_NAME:
                raise ValueError(f"block name of {name_len} bytes")
            name_ptr = <const char *>name
        if zero is not None:
            if zero.nbits < n:
                raise ValueError("zero has fewer bits than index has pages")
            zero_words = zero.words
        if pages.c.page_size != compressor.page_size:
            raise ValueError(f"pages of {pages.c.page_size} bytes, not {compressor.page_size}")
        if mig_compress_room(compressor.page_size) > self.c.arena_size:
            raise ValueError(f"an arena of {self.c.arena_size} bytes has no room for a page")
        pages.check_indexes(&index[0], n)
        memset(&counts, 0, sizeof(counts))
        # copies of what is small by now: the GIL is kept
        done = mig_compress_encode(&self.c, compressor.c, &pages.c, name_ptr, name_len, &index[0],
                                   first, n, zero_words, skip, &counts)
        compressor.compressed += counts.compressed
        compressor.record_bytes += counts.record_bytes
        pages.pins += 1
        self.refs.append(pages)
        return done

    def clear(self):
        for ref in self.refs:
            if isinstance(ref, Pages):
                (<Pages>ref).pins -= 1
            else:
                (<XbzrleCache>ref).unbind()
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
