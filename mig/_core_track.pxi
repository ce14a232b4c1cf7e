# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "track.h" nogil:
    enum mig_track_method:
        MIG_TRACK_SCAN
        MIG_TRACK_FAULTS

    struct mig_track_block:
        uint8_t *base
        uint64_t npages
        size_t page_size
        bint anonymous

    struct mig_track:
        pass

    int mig_track_probe(mig_track_method method, bint user_mode_only)
    int mig_track_open(mig_track *t, mig_track_method method, bint user_mode_only,
                       mig_track_block *blocks, size_t nblocks)
    int64_t mig_track_sync(mig_track *t, const mig_kernels *k, const mig_track_block *block,
                           uint64_t *dirty)
    void mig_track_close(mig_track *t)


cdef dict _TRACK_METHODS = {"pagemap-scan": MIG_TRACK_SCAN, "userfaultfd": MIG_TRACK_FAULTS}


cdef int64_t check_track(int64_t rc) except -1:
    """OSError, MemoryError; what they mean to a user, mig.dirty.track knows."""
    if rc == MIG_E_NOMEM:
        raise MemoryError
    if rc < 0:
        raise OSError(<int>-rc, _os.strerror(<int>-rc))
    return rc


def probe_write_log(str method not None, *, bint user_mode_only=False):
    """Nothing when WriteLog works by that method in this process.

    KeyError: no such method. OSError: EOPNOTSUPP when the kernel cannot, ENOSYS when it has no
    userfaultfd, EPERM when this process may not use it.
    """
    check_track(mig_track_probe(_TRACK_METHODS[method], user_mode_only))


@cython.final
@cython.no_gc  # so that pages is whole in __dealloc__
cdef class WriteLog:
    """Logs writes to memory of this process from its making to close(); pins the pages meanwhile.

    method: 'pagemap-scan' or 'userfaultfd'
    blocks: of each block its Pages and whether it is private memory of no file
    user_mode_only: 'userfaultfd' without privileges; the kernel's own writes to the memory, as
        for read(2) into it, fail with EFAULT

    ValueError: pages that do not begin and end with the host's, or are not all in one writable
    buffer. OSError: the kernel does not do it.
    """
    cdef mig_track c
    cdef mig_track_block *blocks
    cdef list pages
    cdef bint opened

    def __cinit__(self, str method not None, blocks, *, bint user_mode_only=False):
        cdef mig_track_method how = _TRACK_METHODS[method]
        cdef size_t nblocks = len(blocks), i
        cdef Pages pages
        cdef int rc
        self.pages = []
        self.blocks = <mig_track_block *>calloc(nblocks or 1, sizeof(mig_track_block))
        if self.blocks == NULL:
            raise MemoryError
        for i, (some, anonymous) in enumerate(blocks):
            pages = some
            self.check_pages(pages)
            self.blocks[i].base = pages.c.base
            self.blocks[i].npages = pages.c.npages
            self.blocks[i].page_size = pages.c.page_size
            self.blocks[i].anonymous = anonymous
            pages.pin()
            self.pages.append(pages)
        with nogil:
            rc = mig_track_open(&self.c, how, user_mode_only, self.blocks, nblocks)
        self.opened = rc >= 0
        check_track(rc)

    cdef int check_pages(self, Pages pages) except -1:
        cdef size_t host_page = _mmap.PAGESIZE
        if pages.c.where != NULL or not pages.writable or pages.c.base == NULL:
            raise ValueError("the pages are not in one writable buffer")
        if pages.c.page_size % host_page:
            raise ValueError(f"pages of {pages.c.page_size} bytes are smaller than those of this"
                             f" host, {host_page}: which of them are written cannot be seen")
        if <size_t>pages.c.base % host_page:
            raise ValueError("the memory does not begin at a page of the host")
        return 0

    def __dealloc__(self):
        if self.pages is not None:
            self.close()
        free(self.blocks)

    def sync(self, size_t block, Bitmap dirty not None):
        """Set the bits of the pages of a block, by number, that were written since the last time.

        Returns how many were clear. A write that goes on meanwhile is in this sync or in the next.
        """
        cdef int64_t fresh
        if block >= <size_t>len(self.pages):
            raise IndexError(f"block {block} of {len(self.pages)}")
        if dirty.nbits != self.blocks[block].npages:
            raise ValueError(f"a bitmap of {dirty.nbits} bits for"
                             f" {self.blocks[block].npages} pages")
        with nogil:
            fresh = mig_track_sync(&self.c, dirty.k, &self.blocks[block], dirty.words)
        return check_track(fresh)

    def close(self):
        """End logging and let go of the pages; more than once is the same."""
        cdef Pages pages
        if self.opened:
            with nogil:
                mig_track_close(&self.c)
            self.opened = False
        for pages in self.pages:
            pages.unpin()
        self.pages = []
