# SPDX-License-Identifier: LGPL-2.1-or-later

MAX_XBZRLE_PAGE = MIG_XBZRLE_MAX_PAGE
CACHE_OVERFLOW = MIG_CACHE_OVERFLOW
CACHE_MISS = MIG_CACHE_MISS
CACHE_REFUSED = MIG_CACHE_REFUSED


cdef int check_xbzrle_page(size_t nbytes) except -1:
    if nbytes > MIG_XBZRLE_MAX_PAGE:
        raise ValueError(f"a page of {nbytes} bytes: XBZRLE takes {MIG_XBZRLE_MAX_PAGE} at most")
    return 0


cdef int64_t encode_page(const uint8_t[::1] old, const uint8_t[::1] new, uint8_t[::1] out,
                         Kernels kernels, bint update) except? -2:
    cdef const mig_kernels *k = (<Kernels>KERNELS).k if kernels is None else kernels.k
    cdef size_t nbytes = <size_t>old.shape[0], room = <size_t>out.shape[0]
    cdef uint8_t nothing
    cdef uint8_t *dst = &out[0] if room else &nothing
    cdef int64_t length
    if old.shape[0] != new.shape[0]:
        raise ValueError(f"pages of {old.shape[0]} and {new.shape[0]} bytes")
    check_xbzrle_page(nbytes)
    if nbytes == 0:
        return 0
    if update:
        length = k.xbzrle_update(<uint8_t *>&old[0], &new[0], nbytes, dst, room)
    else:
        length = k.xbzrle_encode(&old[0], &new[0], nbytes, dst, room)
    return -1 if length == MIG_XBZRLE_OVERFLOW else length


def xbzrle_encode(const uint8_t[::1] old not None, const uint8_t[::1] new not None,
                  uint8_t[::1] out not None, *, Kernels kernels=None):
    """Encode one page into ``out``; returns the length, or -1 on overflow."""
    return encode_page(old, new, out, kernels, False)


def xbzrle_update(uint8_t[::1] old not None, const uint8_t[::1] new not None,
                  uint8_t[::1] out not None, *, Kernels kernels=None):
    """``xbzrle_encode``, after which old is equal to new."""
    return encode_page(old, new, out, kernels, True)


def xbzrle_decode(const uint8_t[::1] encoding not None, uint8_t[::1] page not None, *,
                  Kernels kernels=None):
    """Lay an encoding over a page; returns where its last run ended."""
    cdef const mig_kernels *k = (<Kernels>KERNELS).k if kernels is None else kernels.k
    cdef uint8_t nothing
    check_xbzrle_page(<size_t>page.shape[0])
    if encoding.shape[0] == 0:
        return 0
    return check(k.xbzrle_decode(&encoding[0], <size_t>encoding.shape[0],
                                 &page[0] if page.shape[0] else &nothing,
                                 <size_t>page.shape[0]))


def xbzrle_encode_pages(Pages old not None, Pages new not None, uint8_t[::1] out not None,
                        int32_t[::1] lengths not None, *, Kernels kernels=None):
    """Encode page after page into ``out``, one encoding behind the other.

    lengths[i] becomes the length of page i's encoding, 0 when nothing has changed, -1 on overflow
    (more than a page). Returns (pages done, bytes used): all pages, unless less than a page's
    bytes were left in ``out``.
    """
    cdef const mig_kernels *k = (<Kernels>KERNELS).k if kernels is None else kernels.k
    cdef size_t page_size = old.c.page_size, n = <size_t>old.c.npages, i = 0, used = 0
    cdef size_t room = <size_t>out.shape[0]
    cdef int64_t length
    check_xbzrle_page(page_size)
    if (new.c.page_size != page_size or new.c.npages != n or <size_t>lengths.shape[0] < n
            or old.is_table() or new.is_table()):
        raise ValueError("the pages, or the lengths, do not fit each other")
    if n == 0 or room < page_size:
        return 0, 0
    old.pins += 1
    new.pins += 1
    with nogil:
        while i < n and room - used >= page_size:
            length = k.xbzrle_encode(old.c.base + i * page_size, new.c.base + i * page_size,
                                     page_size, &out[used], page_size)
            if length == MIG_XBZRLE_OVERFLOW:
                lengths[i] = -1
            else:
                lengths[i] = <int32_t>length
                used += <size_t>length
            i += 1
            if used == room:
                break
    old.pins -= 1
    new.pins -= 1
    return i, used


def xbzrle_decode_pages(const uint8_t[::1] encodings not None,
                        const int32_t[::1] lengths not None, Pages pages not None, *,
                        Kernels kernels=None):
    """Lay the encodings of ``xbzrle_encode_pages`` over page after page.

    Lengths of 0 and below leave their page alone. Returns the number of bytes used.
    """
    cdef const mig_kernels *k = (<Kernels>KERNELS).k if kernels is None else kernels.k
    cdef size_t page_size = pages.c.page_size, n = <size_t>lengths.shape[0], i, used = 0
    cdef size_t have = <size_t>encodings.shape[0]
    cdef int32_t length
    cdef int64_t rc = 0
    check_xbzrle_page(page_size)
    if pages.is_table() or not pages.writable or pages.c.npages < n:
        raise ValueError("the pages do not fit the lengths")
    pages.pins += 1
    with nogil:
        for i in range(n):
            # once: somebody may be writing it
            length = (<volatile const int32_t *>&lengths[i])[0]
            if length <= 0:
                continue
            if <size_t>length > have - used:
                rc = MIG_E_XBZRLE_TRUNCATED
                break
            rc = k.xbzrle_decode(&encodings[used], <size_t>length,
                                 pages.c.base + i * page_size, page_size)
            if rc < 0:
                break
            used += <size_t>length
    pages.pins -= 1
    check(rc)
    return used


@cython.final
cdef class XbzrleCache:
    """Pages as they were last sent: what a sender encodes changed pages against.

    Direct-mapped as QEMU's page cache is: the page at ``address`` is in slot
    (address / page_size) mod npages or nowhere. A page that was used in this generation (bitmap
    sync) or the one before keeps its slot; another that belongs there is then refused.

    nbytes:    memory for pages: page_size times a power of two
    page_size: bytes, a power of two from 64 to 65536
    kernels:   the family of C kernels to use; the default one when None

    Counters of ``encode`` and ``OutQueue.encode_deltas``: hits, misses; of the hits: unchanged,
    overflows, encoded_pages with encoded_bytes. Of ``encode_deltas`` only: refused (of the misses),
    zeros, and record_bytes: as QEMU counts them, of XBZRLE records without their words, and
    a page for each overflow. They go on over ``resize``.

    While an OutQueue holds pages of the cache the cache is bound to it: BufferError then from all
    that changes pages.

    Memory is taken as pages are inserted, where the host has huge pages 2 MiB at a time.
    ValueError: sizes that cannot be. MemoryError: the memory cannot be had. One thread at a time;
    RuntimeError otherwise.
    """
    cdef mig_cache c
    cdef const mig_kernels *k
    cdef bint busy
    cdef size_t pins
    cdef size_t queue
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef readonly uint64_t overflows
    cdef readonly uint64_t unchanged
    cdef readonly uint64_t encoded_pages
    cdef readonly uint64_t encoded_bytes
    cdef readonly uint64_t record_bytes
    cdef readonly uint64_t refused
    cdef readonly uint64_t zeros

    def __cinit__(self, nbytes, size_t page_size=4096, *, Kernels kernels=None):
        if page_size < 64 or page_size > MIG_XBZRLE_MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"page size {page_size} is not a power of two from 64 to "
                             f"{MIG_XBZRLE_MAX_PAGE}")
        self.k = (<Kernels>KERNELS).k if kernels is None else kernels.k
        self.c.page_size = page_size
        self.open(nbytes)

    cdef int open(self, nbytes) except -1:
        """Begins anew with an empty cache; the old one stays when the new one cannot be had."""
        cdef mig_cache c
        cdef object npages = nbytes // self.c.page_size
        if nbytes < self.c.page_size:
            raise ValueError(f"cache size {nbytes} is smaller than the page size")
        if npages & (npages - 1) or nbytes != npages * self.c.page_size:
            raise ValueError(f"cache size {nbytes} is not a power of two of pages")
        if npages >> 48 or mig_cache_open(&c, npages, self.c.page_size) < 0:
            raise MemoryError(f"no memory for an XBZRLE cache of {nbytes} bytes")
        mig_cache_close(&self.c)
        self.c = c
        return 0

    def __dealloc__(self):
        mig_cache_close(&self.c)

    @property
    def page_size(self):
        return self.c.page_size

    @property
    def npages(self):
        """Number of slots."""
        return self.c.nslots

    @property
    def nbytes(self):
        """Bytes of all slots together."""
        return self.c.nslots * self.c.page_size

    @property
    def used(self):
        """Number of slots with a page in them."""
        return self.c.used

    cdef int check_idle(self) except -1:
        if self.busy:
            raise RuntimeError("the cache is in use by another thread")
        return 0

    cdef int check_address(self, uint64_t address) except -1:
        self.check_idle()
        if address & (self.c.page_size - 1):
            raise ValueError(f"address {address:#x} is not a multiple of the page size")
        return 0

    cdef int check_unbound(self) except -1:
        self.check_idle()
        if self.pins:
            raise BufferError("pages of the cache are on their way out")
        return 0

    cdef int bind(self, size_t queue) except -1:
        """Pages are about to be put into the queue at that address."""
        self.check_idle()
        if self.pins and self.queue != queue:
            raise BufferError("pages of the cache are on their way out in another queue")
        self.queue = queue
        return 0

    cdef void unbind(self):
        """The queue has let go of the pages that one call has put into it."""
        self.pins -= 1
        if self.pins == 0:
            self.c.epoch += 1

    cdef void add(self, mig_delta *d):
        """Counts what a batch has led to."""
        self.misses += d.missed + d.refused
        self.refused += d.refused
        self.hits += d.unchanged + d.overflows + d.encoded
        self.unchanged += d.unchanged
        self.overflows += d.overflows
        self.encoded_pages += d.encoded
        self.encoded_bytes += d.encoded_bytes
        self.record_bytes += d.record_bytes
        self.zeros += d.zero

    def resize(self, nbytes):
        """Change the size, which throws the contents away; on any error nothing has changed."""
        self.check_unbound()
        self.open(nbytes)

    def lookup(self, uint64_t address, uint64_t generation):
        """Whether the page is in the cache; if so, note that it is used."""
        self.check_address(address)
        return mig_cache_lookup(&self.c, address, generation) != NULL

    def insert(self, uint64_t address, page, uint64_t generation):
        """Put a page (None: zeros) into the cache; False when another page keeps the slot."""
        cdef const uint8_t[::1] data
        self.check_unbound()
        self.check_address(address)
        if page is None:
            return mig_cache_insert(&self.c, address, NULL, generation) != NULL
        data = page
        if <size_t>data.shape[0] != self.c.page_size:
            raise ValueError(f"{data.shape[0]} bytes: a page has {self.c.page_size}")
        return mig_cache_insert(&self.c, address, &data[0], generation) != NULL

    def page(self, uint64_t address):
        """A copy of the cached page, None when it is not there; its age stays."""
        cdef size_t slot
        self.check_address(address)
        slot = <size_t>(address >> self.c.page_shift) & (self.c.nslots - 1)
        if self.c.slots[slot].address != address:
            return None
        return (<const char *>self.c.pages + slot * self.c.stride)[:self.c.page_size]

    cdef Pages check_pages(self, pages, const uint64_t[::1] index, uint64_t address):
        """The Pages object behind any buffer, whose pages index[...] exist."""
        cdef Pages found = pages if isinstance(pages, Pages) else Pages(pages, self.c.page_size)
        self.check_unbound()
        self.check_numbers(found, index, address)
        return found

    cdef int check_numbers(self, Pages found, const uint64_t[::1] index,
                           uint64_t address) except -1:
        self.check_address(address)
        if found.c.page_size != self.c.page_size:
            raise ValueError(f"pages of {found.c.page_size} bytes, a cache of {self.c.page_size}")
        if found.c.npages and address > UINT64_MAX - found.c.npages * found.c.page_size + 1:
            raise ValueError(f"a block at {address:#x} goes past the end of the address space")
        if index.shape[0]:
            found.check_indexes(&index[0], <size_t>index.shape[0])
        return 0

    cdef int check_source(self, Pages found, const uint64_t[::1] index,
                          uint64_t address) except -1:
        self.check_numbers(found, index, address)
        if found.is_table():
            raise ValueError("pages of a file do not change")
        return 0

    def insert_pages(self, pages, index, uint64_t generation, *, uint64_t address=0):
        """``insert`` pages index[...] of a block that starts at ``address``; how many were."""
        cdef const uint64_t[::1] numbers = page_numbers(index)
        cdef Pages source = self.check_pages(pages, numbers, address)
        cdef size_t n = <size_t>numbers.shape[0], i, done = 0
        source.pins += 1
        self.busy = True
        with nogil:
            for i in range(n):
                done += mig_cache_insert(&self.c, address + numbers[i] * self.c.page_size,
                                         mig_page(&source.c, numbers[i]), generation) != NULL
        self.busy = False
        source.pins -= 1
        return done

    def encode(self, pages, index, uint64_t generation, uint8_t[::1] out not None, *,
               uint64_t address=0, bint last_stage=False):
        """Encode pages index[...] of a block at ``address`` against the cache, and cache them.

        pages:      any buffer of pages (or a Pages object)
        index:      page numbers in the block
        generation: number of the bitmap sync
        out:        gets the encodings, one behind the other; a page's bytes at least
        address:    of the block, in the space that the cache is addressed by

        Returns (results, used): int32 for each page that is done, and bytes of ``out``. All pages
        are done unless less than a page's bytes were left. A result is the length of an
        encoding, 0 when the page is as it was (send nothing), or says to send the page whole:
        CACHE_MISS (it is in the cache now), CACHE_OVERFLOW (its encoding would be longer than
        a page) or CACHE_REFUSED (it is not in the cache).

        The guest may go on writing: what was cached is what was encoded, and a whole page has to be
        sent from the cache too. In the last stage, when the guest stands still, no cached page
        changes. Matches save_xbzrle_page().
        """
        cdef const uint64_t[::1] numbers = page_numbers(index)
        cdef Pages source = self.check_pages(pages, numbers, address)
        cdef size_t n = <size_t>numbers.shape[0], used = 0, done, i
        cdef int32_t[::1] results
        if source.is_table():
            raise ValueError("pages of a file do not change")
        if <size_t>out.shape[0] < self.c.page_size:
            raise ValueError(f"out has {out.shape[0]} bytes: a page's are needed at least")
        array = _np.empty(n, dtype=_np.int32)
        if n == 0:
            return array, 0
        results = array
        source.pins += 1
        self.busy = True
        with nogil:
            done = mig_cache_encode(self.k, &self.c, &source.c, address, &numbers[0], n,
                                    generation, last_stage, &out[0], <size_t>out.shape[0],
                                    &results[0], &used)
            for i in range(done):
                self.account(results[i])
        self.busy = False
        source.pins -= 1
        return array[:done], used

    cdef void account(self, int32_t result) noexcept nogil:
        if result == MIG_CACHE_MISS or result == MIG_CACHE_REFUSED:
            self.misses += 1
            return
        self.hits += 1
        if result == MIG_CACHE_SAME:
            self.unchanged += 1
        elif result == MIG_CACHE_OVERFLOW:
            self.overflows += 1
        else:
            self.encoded_pages += 1
            self.encoded_bytes += <uint64_t>result
