# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "uffd.h" nogil:
    enum:
        MIG_E_UFFD_ORDER
        MIG_E_UFFD_TRUNCATED
        MIG_E_UFFD_SECTION
        MIG_E_UFFD_MISSING
        MIG_UFFD_BUCKETS
        MIG_UFFD_OTHER
        MIG_TYPE_EOF
        MIG_TYPE_PART
        MIG_TYPE_END
        MIG_TYPE_COMMAND
        MIG_TYPE_FOOTER
        MIG_COMMAND_PING
        MIG_RETURN_PONG
        MIG_RETURN_REQ_PAGES_ID
        MIG_RETURN_REQ_PAGES

    struct mig_reply:
        pthread_mutex_t lock
        mig_fd fd
        int64_t block

    int mig_reply_send(mig_reply *r, const void *data, size_t nbytes)

    struct mig_waits:
        uint64_t bucket[160]
        int64_t blocked[1024]
        size_t nvcpus
        int64_t all_blocked

    uint64_t mig_waits_limit(size_t bucket)
    void mig_waits_vcpus(mig_waits *w, const uint32_t *vcpus, size_t n)

    struct mig_uffd_block:
        uint8_t *base
        uint64_t npages
        size_t unit
        bint anonymous
        const char *name
        size_t name_len
        uint64_t *received
        bint huge

    struct mig_uffd:
        pthread_mutex_t lock
        size_t page_size
        mig_waits waits
        uint64_t nwanted
        uint64_t nasked

    int mig_uffd_add_client(mig_uffd *u, mig_uffd_client *client)
    void mig_uffd_remove_client(mig_uffd *u, mig_uffd_client *client)

    int mig_uffd_probe()
    int mig_uffd_discard(uint8_t *at, size_t nbytes, bint anonymous)
    int mig_uffd_open(mig_uffd *u, mig_uffd_block *blocks, size_t nblocks, size_t page_size,
                      mig_reply *reply)
    void mig_uffd_close(mig_uffd *u)
    int mig_uffd_ask_again(mig_uffd *u, const mig_kernels *k)
    int mig_uffd_drain(mig_uffd *u)
    int mig_uffd_await_readers(mig_uffd *u, size_t n, int64_t timeout_ns)
    bint mig_uffd_settle(mig_uffd *u)
    void mig_uffd_interrupt(mig_uffd *u, bint on)

    struct mig_uffd_stream:
        mig_uffd *u
        mig_ram_parser *parser
        const mig_fd *fd
        mig_reply *reply
        uint32_t section_id
        bint footers
        bint bare
        uint8_t *buf
        size_t size
        size_t start
        size_t end
        uint8_t *unit
        uint64_t base
        uint64_t normal
        uint64_t zero

    int mig_uffd_read(mig_uffd_stream *s)


POSTCOPY_NUMBERS = {
    "SectionType": {
        "EOF": MIG_TYPE_EOF,
        "PART": MIG_TYPE_PART,
        "END": MIG_TYPE_END,
        "COMMAND": MIG_TYPE_COMMAND,
        "FOOTER": MIG_TYPE_FOOTER,
    },
    "CommandType": {"PING": MIG_COMMAND_PING},
    "ReturnType": {
        "PONG": MIG_RETURN_PONG,
        "REQ_PAGES_ID": MIG_RETURN_REQ_PAGES_ID,
        "REQ_PAGES": MIG_RETURN_REQ_PAGES,
    },
}

#: bytes that are read ahead of the pages that are placed: they make urgent ones wait
cdef size_t _UFFD_READ_AHEAD = 1 << 18


cdef dict _UFFD_ERRORS = {
    MIG_E_UFFD_ORDER: "pages of one host page do not follow each other, or are not all there",
    MIG_E_UFFD_SECTION: "a section, or its footer, of another id",
}


def probe_page_faults():
    """Nothing when page faults can be served here; OSError as probe_write_log()."""
    check_track(mig_uffd_probe())


def discard_memory(Pages pages not None, uint64_t first, uint64_t npages, bint anonymous):
    """Give pages of the host back: they read as zeros then, or are missing; OSError.

    anonymous: private memory of no file
    """
    cdef int rc
    if first > pages.c.npages or npages > pages.c.npages - first or pages.c.where != NULL:
        raise IndexError(f"{npages} pages at {first} of {pages.c.npages}")
    with nogil:
        rc = mig_uffd_discard(pages.c.base + first * pages.c.page_size,
                              npages * pages.c.page_size, anonymous)
    check_track(rc)


@cython.final
cdef class PageRequests:
    """The return path of a postcopy: several threads write to it, and over a break nobody."""
    cdef mig_reply c
    cdef Descriptor target

    def __cinit__(self):
        pthread_mutex_init(&self.c.lock, NULL)
        self.c.fd.fd = -1
        self.c.block = -1

    def __dealloc__(self):
        pthread_mutex_destroy(&self.c.lock)

    def attach(self, Descriptor target):
        """Write there from now on; None: nowhere. What waits to write has to be cancelled before.
        """
        with nogil:
            pthread_mutex_lock(&self.c.lock)
        self.target = target
        self.c.block = -1
        if target is None:
            self.c.fd.fd = -1
        else:
            self.c.fd = target.c
        pthread_mutex_unlock(&self.c.lock)

    def send(self, const uint8_t[::1] data not None):
        """Write all of a message; without effect while there is nowhere to write to."""
        cdef int rc = 0
        if data.shape[0]:
            with nogil:
                rc = mig_reply_send(&self.c, &data[0], <size_t>data.shape[0])
        check(rc)


@cython.final
@cython.no_gc  # so that what it uses is there in __dealloc__
cdef class FaultServer:
    """Serves accesses to memory that is not there, from its making to close().

    blocks: of each block its name, Pages, bytes that are placed at once (the larger of host and
        target page), bitmap of pages received so far, whether it is private memory of no file, and
        whether the kernel is to make huge pages of it afterwards

    OSError: the kernel does not do it.
    """
    cdef mig_uffd c
    cdef mig_uffd_block *blocks
    cdef list kept
    cdef list clients
    cdef PageRequests requests
    cdef size_t largest
    cdef bint opened

    def __cinit__(self, blocks, size_t page_size, PageRequests requests not None):
        cdef Pages pages
        cdef Bitmap received
        cdef size_t i, nblocks = len(blocks)
        cdef int rc
        self.requests = requests
        self.kept = []
        self.clients = []
        self.blocks = <mig_uffd_block *>calloc(nblocks or 1, sizeof(mig_uffd_block))
        if self.blocks == NULL:
            raise MemoryError
        self.largest = 1
        for i, (name, some, unit, bits, anonymous, huge) in enumerate(blocks):
            pages, received = some, bits
            self.check_block(pages, received, page_size, unit)
            self.blocks[i].base = pages.c.base
            self.blocks[i].npages = pages.c.npages
            self.blocks[i].unit = unit
            self.blocks[i].anonymous = anonymous
            self.blocks[i].huge = huge
            self.blocks[i].name = <const char *>(<bytes>name)
            self.blocks[i].name_len = <size_t>len(name)
            self.blocks[i].received = received.words
            self.largest = max(self.largest, <size_t>unit)
            pages.pin()
            self.kept.append((name, pages, received))
        with nogil:
            rc = mig_uffd_open(&self.c, self.blocks, nblocks, page_size, &requests.c)
        self.opened = rc >= 0
        check_track(rc)

    cdef int check_block(self, Pages pages, Bitmap received, size_t page_size,
                         size_t unit) except -1:
        cdef size_t host_page = _mmap.PAGESIZE
        if (pages.c.where != NULL or not pages.writable or pages.c.page_size != page_size
                or received.nbits != pages.c.npages):
            raise ValueError("memory does not fit the block")
        if unit == 0 or unit % page_size or unit % host_page or pages.c.npages * page_size % unit:
            raise ValueError(f"{pages.c.npages * page_size} bytes of memory are not placed in"
                             f" pieces of {unit}")
        if <size_t>pages.c.base % host_page:
            raise ValueError("the memory does not begin at a page of the host")
        return 0

    def __dealloc__(self):
        if self.kept is not None:
            self.close()
        free(self.blocks)

    @property
    def wanted(self):
        """How many places, of the size that is placed at once, are asked for and not there yet."""
        return self.c.nwanted

    @property
    def asked(self):
        """For how many the source was asked."""
        return self.c.nasked

    def ask_again(self):
        """Ask for all that is wanted, on another connection; pages can come again."""
        cdef const mig_kernels *k = (<Kernels>KERNELS).k
        cdef int rc
        self.check_open()
        with nogil:
            mig_uffd_interrupt(&self.c, False)
            rc = mig_uffd_ask_again(&self.c, k)
        check(rc)

    def drain(self):
        """Wait until nothing is wanted; ChannelError when nothing will come any more."""
        cdef int rc
        self.check_open()
        with nogil:
            rc = mig_uffd_drain(&self.c)
        if rc == MIG_E_UFFD_MISSING:
            raise ChannelError("the connection for urgent pages ended before all of them came")
        check(rc)

    def interrupt(self):
        """Nothing will come any more. Any thread."""
        if self.opened:
            mig_uffd_interrupt(&self.c, True)

    cdef int check_open(self) except -1:
        if not self.opened:
            raise ValueError("the memory is served no more")
        return 0

    def add_client(self, FaultClient client not None):
        """Serve another process, too, until close(); OSError when there are too many.

        ValueError for what it does not map in whole pieces.
        """
        cdef mig_uffd_mapping *mapping
        cdef size_t i, number
        cdef int rc
        self.check_open()
        if client.served or client.c.fd < 0:
            raise ValueError("the client is served, or has ended, already")
        names = [name for name, _, _ in self.kept]
        for i, (name, _, _, _) in enumerate(client.mappings):
            mapping = client.c.mappings + i
            if name not in names:
                raise ValueError(f"there is no block {name!r}")
            number = names.index(name)
            nbytes = self.blocks[number].npages * self.c.page_size
            if mapping.nbytes == 0 or mapping.offset > nbytes \
                    or mapping.nbytes > nbytes - mapping.offset:
                raise ValueError(f"block {name!r} has {nbytes} bytes")
            if ((mapping.offset | mapping.nbytes) % self.blocks[number].unit
                    or mapping.address % <size_t>_mmap.PAGESIZE):
                raise ValueError(f"block {name!r} has pages of {self.blocks[number].unit}")
            mapping.block = number
        with nogil:
            rc = mig_uffd_add_client(&self.c, &client.c)
        check_track(rc)
        client.served = True
        self.clients.append(client)

    def remove_client(self, FaultClient client not None):
        """Serve it no more; without effect when it is not served here."""
        if client not in self.clients:
            return
        with nogil:
            mig_uffd_remove_client(&self.c, &client.c)
        client.served = False
        self.clients.remove(client)

    def await_readers(self, size_t n, timeout=None):
        """Wait until so many connections are being read without Python's lock; whether they are.

        timeout: seconds, None: until it is so, or interrupt() is called
        """
        cdef int64_t ns = -1 if timeout is None else <int64_t>(timeout * 1e9)
        cdef int rc
        self.check_open()
        with nogil:
            rc = mig_uffd_await_readers(&self.c, n, ns)
        return rc != 0

    def settle(self):
        """The devices are loaded, or will not be: from now on who waits does so for ever.

        Before, when somebody waits and nobody reads, memory is given up: ChannelError then.
        """
        cdef bint kept
        self.check_open()
        with nogil:
            kept = mig_uffd_settle(&self.c)
        if not kept:
            raise ChannelError("the source left while the devices waited for memory")

    def set_vcpus(self, threads):
        """Count from now on how long these threads wait, by their ids.

        0 stands for the next thread that waits and is none of the others.
        """
        cdef uint32_t[::1] ids = _np.array(threads, dtype=_np.uint32)
        cdef uint32_t none = 0
        self.check_open()
        with nogil:
            pthread_mutex_lock(&self.c.lock)
            mig_waits_vcpus(&self.c.waits, &ids[0] if ids.shape[0] else &none,
                            <size_t>ids.shape[0])
            pthread_mutex_unlock(&self.c.lock)

    def times(self):
        """Seconds that each vCPU waited, that all of them did together, and latencies.

        Latencies of faults: (below so many seconds, how many) of each class that has any.
        """
        if self.opened:
            with nogil:
                pthread_mutex_lock(&self.c.lock)
        try:
            return (
                [self.c.waits.blocked[i] / 1e9 for i in range(self.c.waits.nvcpus)],
                self.c.waits.all_blocked / 1e9,
                [(mig_waits_limit(i) / 1e6, self.c.waits.bucket[i])
                 for i in range(MIG_UFFD_BUCKETS) if self.c.waits.bucket[i]],
            )
        finally:
            if self.opened:
                pthread_mutex_unlock(&self.c.lock)

    def close(self):
        """End serving and let go of the pages; more than once is the same. Readers must be gone."""
        cdef Pages pages
        if self.opened:
            # first: other threads may ask for times meanwhile
            self.opened = False
            with nogil:
                mig_uffd_close(&self.c)
        while self.clients:
            (<FaultClient>self.clients.pop()).served = False
        for _, pages, _ in self.kept:
            pages.unpin()
        self.kept = []


@cython.final
cdef class PageReader:
    """Reads one connection of a source in postcopy, and places its pages, without Python's lock.

    data: what of it was read already
    bare: it brings records of pages and nothing else, until EOS

    After run(), whether it raised or not: ``offset`` of what comes next from the start of data,
    and the numbers of pages with contents and zero.
    """
    cdef mig_uffd_stream c
    cdef FaultServer server
    cdef RamParser parser
    cdef uint8_t *memory
    cdef uint8_t *unit

    def __cinit__(self, FaultServer server not None, RamParser parser not None, *,
                  const uint8_t[::1] data not None, uint32_t section_id=0, bint footers=False,
                  bint bare=False):
        cdef size_t nbytes = <size_t>data.shape[0], i
        server.check_open()
        if parser.c.nblocks != <size_t>len(server.kept):
            raise ValueError("a parser of other blocks")
        for i in range(parser.c.nblocks):
            if (parser.table[i].npages != server.blocks[i].npages
                    or parser.c.page_size != server.c.page_size):
                raise ValueError("a parser of other blocks")
        self.server = server
        self.parser = parser
        self.c.u = &server.c
        self.c.parser = &parser.c
        self.c.reply = &server.requests.c
        self.c.section_id = section_id
        self.c.footers = footers
        self.c.bare = bare
        # room for any record
        self.c.size = max(nbytes, _UFFD_READ_AHEAD) + parser.c.page_size + 512
        self.memory = <uint8_t *>malloc(self.c.size)
        self.unit = <uint8_t *>malloc(server.largest)
        if self.memory == NULL or self.unit == NULL:
            raise MemoryError
        self.c.buf = self.memory
        self.c.unit = self.unit
        if nbytes:
            memcpy(self.memory, &data[0], nbytes)
        self.c.end = nbytes

    def __dealloc__(self):
        free(self.memory)
        free(self.unit)

    @property
    def offset(self):
        return self.c.base + self.c.start

    @property
    def normal(self):
        return self.c.normal

    @property
    def zero(self):
        return self.c.zero

    def run(self, Descriptor source not None):
        """Read until the end; False when something comes that it leaves to its caller.

        RamRecordError: what is wrong at offset. EOFError: it ends there. Others as in reading.
        """
        cdef int rc
        self.server.check_open()
        self.c.fd = &source.c
        with nogil:
            rc = mig_uffd_read(&self.c)
        self.c.fd = NULL
        if rc == MIG_E_UFFD_TRUNCATED:
            raise EOFError
        if rc in _UFFD_ERRORS:
            raise RamRecordError(_UFFD_ERRORS[rc])
        self.parser.check_record(rc)
        return rc != MIG_UFFD_OTHER
