# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "snapshot.h" nogil:
    struct mig_snapshot_block:
        uint8_t *base
        uint64_t npages
        size_t unit
        bint anonymous
        uint64_t *pending
        uint64_t *ready
        int64_t *where

    struct mig_snapshot:
        int ready_fd
        bint populates
        uint64_t nstored
        uint64_t nfaults
        uint64_t nwaits

    enum:
        MIG_SNAPSHOT_GAP

    uint64_t mig_snapshot_store(uint64_t npages, size_t page_size)
    int mig_snapshot_open(mig_snapshot *s, const mig_kernels *k, mig_snapshot_block *blocks,
                          size_t nblocks, size_t page_size, uint8_t *store, uint64_t nslots,
                          uint64_t limit, bint detect_zero, bint populate)
    int mig_snapshot_arm(mig_snapshot *s)
    int mig_snapshot_protect(mig_snapshot *s)
    void mig_snapshot_close(mig_snapshot *s)
    int64_t mig_snapshot_save(mig_snapshot *s, size_t block, const uint64_t *index, size_t n)
    int64_t mig_snapshot_take(mig_snapshot *s, size_t block, uint64_t *index, size_t max)
    void mig_snapshot_free(mig_snapshot *s, size_t block, const uint64_t *index, size_t n)


# the mmap module names it from Python 3.13 on; this is its value on Linux
cdef int _MAP_NORESERVE = getattr(_mmap, "MAP_NORESERVE", 0x4000)


@cython.final
@cython.no_gc  # so that pages is whole in __dealloc__
cdef class Snapshot:
    """Copies of the pages of this process's memory, made before they change after protect().

    blocks: of each block its Pages, the bytes of a host page of it, whether it is private memory
        of no file, and a Bitmap of the pages that are wanted
    limit:  bytes of copies that wait to be taken before who writes has to wait; for a second, and
        when nobody takes copies meanwhile no longer
    detect_zero: keep no copy of zero pages
    populate: have all memory be there before, which kernels before Linux 6.4 need

    Memory that cannot be protected: ValueError, or OSError from the kernel. Threads: one that
    calls, and who writes the memory.
    """
    cdef mig_snapshot c
    cdef mig_snapshot_block *blocks
    cdef list pages
    cdef list bitmaps
    cdef list places
    cdef object store
    cdef readonly tuple copies
    cdef size_t page_size
    cdef bint opened

    def __cinit__(self, blocks, size_t page_size, *, uint64_t limit, bint detect_zero=True,
                  bint populate=False):
        cdef size_t nblocks = len(blocks), i
        cdef uint64_t nslots = 0
        cdef const mig_kernels *k = (<Kernels>KERNELS).k
        cdef int rc
        self.pages, self.bitmaps, self.places = [], [], []
        self.copies = ()
        self.page_size = page_size
        self.blocks = <mig_snapshot_block *>calloc(nblocks or 1, sizeof(mig_snapshot_block))
        if self.blocks == NULL:
            raise MemoryError
        for i, (pages, host_page, anonymous, wanted) in enumerate(blocks):
            nslots += self.add(&self.blocks[i], pages, page_size, host_page, anonymous, wanted)
        store = _mmap.mmap(-1, mig_snapshot_store(nslots, page_size), flags=_mmap.MAP_PRIVATE
                           | _mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self.store = store
        self.copies = tuple(Pages(store, page_size, where=where) for where in self.places)
        cdef uint8_t *at = (<Pages>self.copies[0]).c.base if nblocks else NULL
        with nogil:
            rc = mig_snapshot_open(&self.c, k, self.blocks, nblocks, page_size, at, nslots,
                                   limit // page_size, detect_zero, populate)
        self.opened = rc >= 0
        check_track(rc)

    cdef uint64_t add(self, mig_snapshot_block *block, Pages pages, size_t page_size,
                      size_t host_page, bint anonymous, Bitmap wanted) except? 0:
        cdef Bitmap pending = wanted.copy(), ready = Bitmap(pages.c.npages)
        cdef int64_t[::1] where
        if pages.c.where != NULL or not pages.writable or pages.c.base == NULL:
            raise ValueError("the pages are not in one writable buffer")
        if pages.c.page_size != page_size or wanted.nbits != pages.c.npages:
            raise ValueError("pages of another size, or another number of them, than is wanted")
        if host_page < _mmap.PAGESIZE or host_page & (host_page - 1):
            raise ValueError(f"there is no host page of {host_page} bytes")
        if <size_t>pages.c.base % host_page or pages.c.npages * page_size % host_page:
            raise ValueError("the memory does not begin and end with pages of the host")
        places = _np.zeros(pages.c.npages, dtype=_np.int64)
        where = places
        block.base = pages.c.base
        block.npages = pages.c.npages
        block.unit = max(host_page, page_size)
        block.anonymous = anonymous
        block.pending = pending.words
        block.ready = ready.words
        block.where = &where[0]
        pages.pin()
        self.pages.append(pages)
        self.bitmaps += [pending, ready]
        self.places.append(places)
        return pending.count()

    def __dealloc__(self):
        if self.pages is not None:
            self.close()
        free(self.blocks)

    cdef int check_block(self, size_t block, const uint64_t[::1] index) except -1:
        if not self.opened:
            raise ValueError("the snapshot is closed")
        if block >= <size_t>len(self.pages):
            raise IndexError(f"block {block} of {len(self.pages)}")
        if index.shape[0]:
            (<Pages>self.pages[block]).check_indexes(&index[0], <size_t>index.shape[0])
        return 0

    @property
    def fd(self):
        """Becomes readable when much waits to be taken."""
        return self.c.ready_fd if self.opened else -1

    @property
    def populates(self):
        """Whether memory had to be there to be protected."""
        return self.c.populates

    @property
    def faults(self):
        """Pages that were copied because somebody wrote to them. Any thread."""
        return self.c.nfaults

    @property
    def waits(self):
        """How often who wrote had to wait for room. Any thread."""
        return self.c.nwaits

    @property
    def waiting_bytes(self):
        """Bytes of copies that nobody has given back. Any thread."""
        return self.c.nstored * self.page_size

    def arm(self):
        """Protect all pages already, so that protect() has only those that are written to from now
        on. OSError."""
        cdef int rc
        if not self.opened:
            raise ValueError("the snapshot is closed")
        with nogil:
            rc = mig_snapshot_arm(&self.c)
        check_track(rc)

    def protect(self):
        """Protect all pages: what they hold now is what is copied. OSError."""
        cdef int rc
        if not self.opened:
            raise ValueError("the snapshot is closed")
        with nogil:
            rc = mig_snapshot_protect(&self.c)
        check_track(rc)

    def save(self, size_t block, const uint64_t[::1] index not None):
        """Copy those of the pages that are not copied yet, and let everybody write them.

        Returns how many they were. OSError: the snapshot is spoilt, and nothing is protected.
        """
        cdef size_t n = <size_t>index.shape[0]
        cdef const uint64_t *numbers
        cdef int64_t rc
        self.check_block(block, index)
        if not n:
            return 0
        numbers = &index[0]
        with nogil:
            rc = mig_snapshot_save(&self.c, block, numbers, n)
        return check_track(rc)

    def take(self, size_t block, uint64_t[::1] index not None, Bitmap dirty not None):
        """Put the next pages of which there are copies into index: (number of pages, cleared).

        They are pages of copies[block], until free(). Their bits in dirty are cleared, so many of
        which were set. OSError as save().
        """
        cdef size_t n = <size_t>index.shape[0], i
        cdef uint64_t cleared = 0
        cdef uint64_t *numbers
        cdef int64_t rc
        self.check_block(block, index[:0])
        if dirty.nbits != self.blocks[block].npages:
            raise ValueError(f"a bitmap of {dirty.nbits} bits for"
                             f" {self.blocks[block].npages} pages")
        if not n:
            return 0, 0
        numbers = &index[0]
        # microseconds, and nobody who needs the GIL has the lock: it is kept
        rc = mig_snapshot_take(&self.c, block, numbers, n)
        check_track(rc)
        for i in range(<size_t>rc):
            if mig_bitmap_test(dirty.words, numbers[i]):
                mig_bitmap_clear(dirty.words, numbers[i], 1)
                cleared += 1
        return rc, cleared

    def free(self, size_t block, const uint64_t[::1] index not None):
        """The copies of these pages, which were taken, are not needed any more."""
        self.check_block(block, index)
        if index.shape[0]:
            mig_snapshot_free(&self.c, block, &index[0], <size_t>index.shape[0])

    def close(self):
        """Memory is as any other again and nobody waits; more than once is the same."""
        cdef Pages pages
        if self.opened:
            with nogil:
                mig_snapshot_close(&self.c)
            self.opened = False
        for pages in self.pages:
            pages.unpin()
        self.pages = []
