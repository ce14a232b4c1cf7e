# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_result "statfs":
        uint64_t f_type
        uint64_t f_bsize
    int fstatfs(int fd, statfs_result *result)

cdef extern from "<linux/magic.h>":
    enum:
        HUGETLBFS_MAGIC


def fd_page_size(int fd):
    """Bytes of the host's pages that memory mapped from ``fd`` is made of; OSError.

    A file on hugetlbfs has the page size of its mount, any other the host's: the block size of
    other file systems is no page size.
    """
    cdef statfs_result found
    if fstatfs(fd, &found) < 0:
        raise OSError(errno, _os.strerror(errno))
    return found.f_bsize if found.f_type == HUGETLBFS_MAGIC else _mmap.PAGESIZE


cdef page_numbers(index):
    """A copy of page numbers as uint64: they stay what they were when they were checked."""
    array = _np.asarray(index)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"page numbers are integers, not {array.dtype}")
    return array.astype(_np.uint64, order="C")


@cython.final
@cython.no_gc  # so that the words of stored are there as long as pages
cdef class Pages:
    """The pages of one RAM block in a pinned buffer.

    data: contiguous bytes; without ``where`` whole pages, page i at i * page_size.
    where: int64 per page, the byte offset in ``data`` of each page (never 0), PAGE_ZERO for a
    zero page without storage, PAGE_NONE for one that was never sent.
    stored: without ``where``, a bit for each page that has storage; the others are zero, whatever
    ``data`` holds there.
    """
    cdef mig_pages c
    cdef Py_buffer data
    cdef Py_buffer places
    cdef readonly bint writable
    cdef Py_ssize_t pins
    cdef Bitmap stored

    def __cinit__(self, data, size_t page_size, *, where=None, Bitmap stored=None,
                  bint writable=False):
        if page_size < 64 or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size} is not a power of two of at least 64")
        PyObject_GetBuffer(data, &self.data, PyBUF_CONTIG if writable else PyBUF_CONTIG_RO)
        self.writable = writable
        self.c.base = <uint8_t *>self.data.buf
        self.c.page_size = page_size
        if where is None:
            if <size_t>self.data.len % page_size:
                raise ValueError(f"{self.data.len} bytes are not a whole number of pages of"
                                 f" {page_size}")
            self.c.npages = <uint64_t>self.data.len // page_size
            if stored is not None:
                if stored.nbits != self.c.npages or writable:
                    raise ValueError("stored has a bit for each page, which are only read")
                self.stored = stored
                self.c.stored = stored.words
        elif stored is not None:
            raise ValueError("either where or stored")
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
        self.c.stored = NULL
        PyBuffer_Release(&self.places)
        PyBuffer_Release(&self.data)

    cdef bint is_table(self) noexcept:
        """Whether they are those of a file, of which not every page has storage."""
        return self.c.where != NULL or self.c.stored != NULL

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
    def hva(self):
        """Address of the first byte in this process; 0 after release()."""
        return <size_t>self.c.base

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
            n += mig_page(&self.c, index[i]) != NULL
        return n

    def without_storage(self, const uint64_t[::1] index not None):
        """A bit for each of the pages index[...]: whether it is a zero page without storage."""
        cdef Bitmap found = Bitmap(<uint64_t>index.shape[0])
        cdef size_t i
        for i in range(<size_t>index.shape[0]):
            if index[i] >= self.c.npages:
                raise IndexError(f"page {index[i]} of {self.c.npages}")
            if mig_page(&self.c, index[i]) == NULL:
                mig_bitmap_set(found.words, i, 1)
        return found
