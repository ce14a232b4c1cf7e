# SPDX-License-Identifier: LGPL-2.1-or-later
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: embedsignature=False, freethreading_compatible=True, auto_pickle=False
# cython: autotestdict=False
"""The only Cython boundary: pin the buffers, check the arguments, make one C call without the
GIL, turn its return code into an exception in one place.

The module has no mutable state. An object is used by one thread at a time, except that
``Bitmap.set_atomic`` and ``Bitmap.drain`` may run beside each other on one bitmap.
"""

import errno as _errno
import os as _os

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from mig._csrc cimport *

from mig.errors import (
    CancelledError, ChannelError, IdleTimeoutError, KernelError, MigError,
)


class RamRecordError(MigError):
    """A RAM record that cannot be: the loader adds offset and section."""


cdef dict _RAM_ERRORS = {
    MIG_E_RAM_NO_BLOCK: "record says CONTINUE before any block was named",
    MIG_E_RAM_UNKNOWN_BLOCK: "record names a block that the block list does not have",
    MIG_E_RAM_BAD_OFFSET: "page lies outside its block",
}


cdef int64_t check(int64_t rc) except -1:
    """The one place where a C return code becomes an exception."""
    if rc >= 0:
        return rc
    if rc == MIG_E_CANCELLED:
        raise CancelledError("cancelled")
    if rc == MIG_E_TIMEOUT:
        raise IdleTimeoutError("no byte moved for the idle limit: the other side is stuck or gone")
    if rc == MIG_E_NOMEM:
        raise MemoryError
    if rc in _RAM_ERRORS:
        raise RamRecordError(_RAM_ERRORS[rc])
    raise ChannelError(_os.strerror(<int>-rc)) from OSError(<int>-rc, _os.strerror(<int>-rc))


# ---- kernels ---------------------------------------------------------------------------------

@cython.final
cdef class Kernels:
    """The C kernels of one instruction set; all families give the same bits."""
    cdef const mig_kernels *k

    @property
    def name(self):
        return self.k.name.decode()

    def is_zero(self, data):
        cdef Py_buffer view
        cdef bint result
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        result = self.k.is_zero(<const uint8_t *>view.buf, <size_t>view.len)
        PyBuffer_Release(&view)
        return result

    def zero_pages(self, Pages pages not None, const uint64_t[::1] index not None):
        cdef size_t n = <size_t>index.shape[0], nzero
        cdef Bitmap zero = Bitmap(n)
        if n == 0:
            return zero, 0
        pages.check_indexes(&index[0], n)
        pages.pins += 1
        with nogil:
            nzero = mig_zero_pages(self.k, &pages.c, &index[0], n, zero.words)
        pages.pins -= 1
        return zero, nzero

    def __repr__(self):
        return f"<Kernels {self.name!r}>"


def kernel_names():
    names = []
    while mig_kernels_name(len(names)) != NULL:
        names.append(mig_kernels_name(len(names)).decode())
    return tuple(names)


def kernels(name=None):
    cdef Kernels found = Kernels.__new__(Kernels)
    cdef bytes wanted
    cdef int rc
    if name is None:
        rc = mig_kernels_select(NULL, &found.k)
    else:
        wanted = name.encode()
        rc = mig_kernels_select(wanted, &found.k)
    if rc == MIG_E_KERNEL_UNKNOWN:
        raise KernelError(f"no kernel is called {name!r}; there are {', '.join(kernel_names())}")
    if rc == MIG_E_KERNEL_NOT_BUILT:
        raise KernelError(f"kernel {name!r} is not in this build of mig")
    if rc == MIG_E_KERNEL_NO_CPU:
        raise KernelError(f"this CPU cannot run kernel {name!r}")
    return found


# MIG_KERNEL is a demand, not a preference: importing fails when it cannot be met.
KERNELS = kernels(_os.environ.get("MIG_KERNEL") or None)


# ---- bitmaps ---------------------------------------------------------------------------------

cdef const char *WORD_FORMAT = b"Q"


@cython.final
cdef class Bitmap:
    """``nbits`` bits over 64-bit words, bit i in word i // 64; exports its words ('Q')."""
    cdef uint64_t *words
    cdef readonly uint64_t nbits
    cdef size_t nwords
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]
    cdef const mig_kernels *k

    def __cinit__(self, uint64_t nbits, *, bint fill=False):
        self.nbits = nbits
        self.nwords = mig_bitmap_nwords(nbits)
        self.k = (<Kernels>KERNELS).k
        # one word at least, so that an empty bitmap still has an address
        self.words = <uint64_t *>calloc(self.nwords or 1, sizeof(uint64_t))
        if self.words == NULL:
            raise MemoryError
        if fill:
            mig_bitmap_set(self.words, 0, nbits)

    def __dealloc__(self):
        free(self.words)

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.shape[0] = <Py_ssize_t>self.nwords
        self.strides[0] = sizeof(uint64_t)
        view.buf = self.words
        view.obj = self
        view.len = <Py_ssize_t>self.nwords * <Py_ssize_t>sizeof(uint64_t)
        view.readonly = 0
        view.itemsize = sizeof(uint64_t)
        view.format = NULL
        if flags & PyBUF_FORMAT:
            view.format = <char *>WORD_FORMAT
        view.ndim = 1
        view.shape = self.shape if flags & PyBUF_ND else NULL
        view.strides = self.strides if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL

    def __len__(self):
        return self.nbits

    cdef int check_range(self, uint64_t first, uint64_t nbits) except -1:
        if first > self.nbits or nbits > self.nbits - first:
            raise IndexError(f"bits {first}..{first + nbits} of a bitmap of {self.nbits}")
        return 0

    def set(self, uint64_t first, uint64_t nbits=1):
        self.check_range(first, nbits)
        mig_bitmap_set(self.words, first, nbits)

    def clear(self, uint64_t first, uint64_t nbits=1):
        self.check_range(first, nbits)
        mig_bitmap_clear(self.words, first, nbits)

    def __getitem__(self, uint64_t bit):
        self.check_range(bit, 1)
        return mig_bitmap_test(self.words, bit)

    def count(self, first=None, nbits=None):
        cdef uint64_t start = 0 if first is None else first
        cdef uint64_t n
        self.check_range(start, 0)
        n = self.nbits - start if nbits is None else nbits
        self.check_range(start, n)
        return mig_bitmap_count(self.k, self.words, start, n)

    def next_set(self, uint64_t start=0):
        return mig_bitmap_next_set(self.words, self.nbits, start)

    def next_clear(self, uint64_t start=0):
        return mig_bitmap_next_clear(self.words, self.nbits, start)

    def take(self, uint64_t start, uint64_t[::1] out not None):
        if out.shape[0] == 0:
            return 0
        return mig_bitmap_take(self.words, self.nbits, start, &out[0], <size_t>out.shape[0])

    cdef int check_same(self, Bitmap other) except -1:
        if other.nbits != self.nbits:
            raise ValueError(f"bitmaps of {self.nbits} and {other.nbits} bits")
        return 0

    def merge(self, Bitmap other not None, *, Kernels kernels=None):
        cdef const mig_kernels *k = self.k if kernels is None else kernels.k
        self.check_same(other)
        return k.merge(self.words, other.words, self.nwords)

    def popcount(self, Kernels kernels not None):
        """All set bits by the named kernels; for tests and benchmarks of one family."""
        return kernels.k.popcount(self.words, self.nwords)

    def set_atomic(self, uint64_t bit):
        self.check_range(bit, 1)
        return mig_bitmap_set_atomic(self.words, bit)

    def drain(self, Bitmap source not None):
        self.check_same(source)
        return mig_bitmap_drain(self.words, source.words, self.nwords)


# ---- pages -----------------------------------------------------------------------------------

@cython.final
cdef class Pages:
    """The pages of one RAM block in a pinned buffer.

    data: contiguous bytes; without ``where`` page i is at i * page_size.
    where: int64 per page, the byte offset in ``data`` of each page (never 0), PAGE_ZERO for a
    zero page without storage, PAGE_NONE for one that was never sent.
    """
    cdef mig_pages c
    cdef Py_buffer data
    cdef Py_buffer places
    cdef readonly bint writable
    cdef Py_ssize_t pins

    def __cinit__(self, data, size_t page_size, *, where=None, bint writable=False):
        if page_size < 64 or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size} is not a power of two of at least 64")
        PyObject_GetBuffer(data, &self.data, PyBUF_CONTIG if writable else PyBUF_CONTIG_RO)
        self.writable = writable
        self.c.base = <uint8_t *>self.data.buf
        self.c.page_size = page_size
        if where is None:
            self.c.npages = <uint64_t>self.data.len // page_size
        else:
            PyObject_GetBuffer(where, &self.places, PyBUF_CONTIG_RO)
            if self.places.itemsize != sizeof(int64_t):
                raise ValueError("where must hold 64-bit integers")
            self.c.where = <const int64_t *>self.places.buf
            self.c.npages = <uint64_t>self.places.len // sizeof(int64_t)
            self.check_places()

    def __dealloc__(self):
        PyBuffer_Release(&self.places)
        PyBuffer_Release(&self.data)

    def pin(self):
        """Somebody is going to need the pages until unpin()."""
        self.pins += 1

    def unpin(self):
        """Undo pin()."""
        self.pins -= 1

    def release(self):
        """Let go of the buffer; BufferError while it is pinned or pages of it are queued."""
        if self.pins:
            raise BufferError("the pages are in use by a migration")
        self.c.npages = 0
        self.c.base = NULL
        self.c.where = NULL
        PyBuffer_Release(&self.places)
        PyBuffer_Release(&self.data)

    cdef int check_places(self) except -1:
        cdef uint64_t i
        for i in range(self.c.npages):
            if (self.c.where[i] > self.data.len
                    or (self.c.where[i] > 0
                        and <size_t>(self.data.len - self.c.where[i]) < self.c.page_size)):
                raise ValueError(f"page {i} lies outside of the data")
        return 0

    cdef int check_indexes(self, const uint64_t *index, size_t n) except -1:
        cdef size_t i
        for i in range(n):
            if index[i] >= self.c.npages:
                raise IndexError(f"page {index[i]} of {self.c.npages}")
        return 0

    @property
    def npages(self):
        return self.c.npages

    @property
    def page_size(self):
        return self.c.page_size

    def count_stored(self, const uint64_t[::1] index not None):
        """How many of the pages index[...] have storage."""
        cdef size_t i, n = 0
        for i in range(<size_t>index.shape[0]):
            if index[i] >= self.c.npages:
                raise IndexError(f"page {index[i]} of {self.c.npages}")
            n += self.c.where == NULL or self.c.where[index[i]] > 0
        return n


# ---- outgoing bytes --------------------------------------------------------------------------

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


# ---- RAM records in --------------------------------------------------------------------------

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
}


@cython.final
cdef class RamParser:
    """Parses bursts of PAGE and ZERO records.

    blocks: (name, number of pages) in the order of their numbers
    capacity: most records of one burst
    """
    cdef mig_ram_parser c
    cdef mig_ram_block *table
    cdef list names

    def __cinit__(self, blocks, size_t page_size, size_t capacity=4096):
        cdef size_t i
        if page_size < 64 or page_size & (page_size - 1) or page_size > 1 << 30:
            raise ValueError(f"page size {page_size} is not a power of two of at least 64")
        if capacity == 0 or capacity > 1 << 24:
            raise ValueError(f"capacity {capacity}")
        self.names = [bytes(name) for name, _ in blocks]
        self.table = <mig_ram_block *>calloc(len(self.names) or 1, sizeof(mig_ram_block))
        self.c.page = <uint64_t *>malloc(capacity * sizeof(uint64_t))
        self.c.src = <int64_t *>malloc(capacity * sizeof(int64_t))
        if self.table == NULL or self.c.page == NULL or self.c.src == NULL:
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

    def place(self, data, size_t start, Pages pages not None, Bitmap received not None,
              bint fresh):
        """Copies the last burst's pages into memory and sets their bits in ``received``."""
        cdef Py_buffer view
        cdef const mig_kernels *k = (<Kernels>KERNELS).k
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
            pages.pins += 1
            with nogil:
                mig_ram_place(k, &pages.c, received.words, fresh,
                              <const uint8_t *>view.buf + start, self.c.page, self.c.src,
                              self.c.npages)
            pages.pins -= 1
        finally:
            PyBuffer_Release(&view)

    def index(self, int64_t offset, int64_t[::1] where not None):
        """Notes in where[page] the file offset of the last burst's pages, or PAGE_ZERO."""
        if self.c.npages == 0:
            return
        if <uint64_t>where.shape[0] < self.table[self.c.current].npages:
            raise ValueError("where is shorter than the block")
        if mig_ram_index(&where[0], offset, self.c.page, self.c.src, self.c.npages):
            raise RamRecordError("page filled with a byte that is not 0: only sources older than "
                                 "QEMU 2.0 send these")


@cython.final
@cython.no_gc  # so that parser is there in __dealloc__
cdef class PageLog:
    """A stream file while it is written: each page has one record, rewritten in place
    (csrc/pagelog.c). Shares the block table of ``parser``.

    direct_fd: the same file opened with O_DIRECT, -1 to write through the page cache
    """
    cdef mig_pagelog c
    cdef RamParser parser
    cdef int64_t **where
    cdef uint8_t *zeros

    def __cinit__(self, int fd, RamParser parser not None, *, int direct_fd=-1):
        cdef size_t i
        cdef uint64_t npages
        self.parser = parser
        self.c.current = -1
        self.c.page_size = parser.c.page_size
        self.zeros = <uint8_t *>calloc(1, parser.c.page_size)
        self.where = <int64_t **>calloc(parser.c.nblocks or 1, sizeof(int64_t *))
        if self.zeros == NULL or self.where == NULL:
            raise MemoryError
        self.c.zeros = self.zeros
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

    @property
    def tail(self):
        """Length of the file so far."""
        return mig_appender_tail(&self.c.file)

    def append(self, const uint8_t[::1] data not None):
        """Writes bytes that are no page records."""
        if data.shape[0]:
            check(mig_append(&self.c.file, &data[0], <size_t>data.shape[0]))

    def put(self, data, size_t start):
        """Writes the last burst of the parser; data and start are those it parsed."""
        cdef Py_buffer view
        cdef mig_ram_parser *p = &self.parser.c
        cdef int rc
        if p.npages == 0:
            return
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            self.parser.check_last(&view, start)
            with nogil:
                rc = mig_pagelog_put(&self.c, p.current, &p.blocks[p.current],
                                     self.where[p.current], <const uint8_t *>view.buf + start,
                                     p.page, p.src, p.npages)
            if rc == -_errno.EINVAL:
                raise RamRecordError("page filled with a byte that is not 0: only sources older "
                                     "than QEMU 2.0 send these")
            check(rc)
        finally:
            PyBuffer_Release(&view)

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


# ---- descriptors -----------------------------------------------------------------------------

@cython.final
cdef class Descriptor:
    """Reads and writes one file descriptor; every wait ends by ``cancel_fd`` or the idle limit.

    fd: owned by the caller; O_NONBLOCK unless it is a socket or a regular file
    timeout: seconds that may pass without a byte moving, None for ever
    """
    cdef mig_fd c

    def __cinit__(self, int fd, *, int cancel_fd=-1, bint is_socket=False, timeout=None):
        self.c.fd = fd
        self.c.cancel_fd = cancel_fd
        self.c.is_socket = is_socket
        self.timeout = timeout

    @property
    def timeout(self):
        return None if self.c.timeout_ms < 0 else self.c.timeout_ms / 1000.0

    @timeout.setter
    def timeout(self, value):
        self.c.timeout_ms = -1 if value is None else max(1, min(int(value * 1000), 2**31 - 1))

    def readinto(self, data, size_t start, size_t at_least):
        """Fills data[start:]; fewer than at_least bytes mean end of file."""
        cdef Py_buffer view
        cdef int64_t n
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG)
        try:
            if start > <size_t>view.len or at_least > <size_t>view.len - start:
                raise IndexError(f"{at_least} bytes at {start} of {view.len}")
            with nogil:
                n = mig_fd_read(&self.c, <uint8_t *>view.buf + start, at_least,
                                <size_t>view.len - start)
            return check(n)
        finally:
            PyBuffer_Release(&view)

    def send(self, OutQueue out not None):
        """Writes all that is in the queue and empties it; returns the number of bytes."""
        cdef int64_t n
        with nogil:
            n = mig_fd_writev(&self.c, out.c.iov, out.c.niov)
        out.clear()
        return check(n)
