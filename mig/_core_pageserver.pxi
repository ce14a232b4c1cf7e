# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "pageserver.h" nogil:
    enum:
        MIG_SERVER_FRAME

    struct mig_served_block:
        const char *name
        size_t name_len
        const mig_pages *pages
        uint64_t *dirty
        uint64_t host_npages
        bint detect_zero
        bint ignored

    struct mig_served:
        uint32_t block
        bint sent
        uint64_t first
        uint64_t npages

    struct mig_server:
        bint tells_sent
        int wake_fd
        pthread_mutex_t pages
        uint64_t left
        int64_t begun
        uint64_t begun_first
        uint64_t begun_end
        bint hurries
        mig_served *notes
        size_t nnotes
        unsigned waiting
        bint open
        mig_fd in_ "in"
        size_t start
        size_t end
        int64_t last
        uint64_t nasked
        uint64_t nnormal
        uint64_t nzero
        uint64_t nbytes

    int mig_server_open(mig_server *s, const mig_kernels *k, const mig_served_block *blocks,
                        size_t nblocks, size_t page_size)
    void mig_server_stop(mig_server *s)
    void mig_server_close(mig_server *s)
    void mig_server_attach(mig_server *s, const mig_fd *out, bint beside, bint detects,
                           const uint8_t *head, size_t nhead, const uint8_t *tail, size_t ntail)
    void mig_server_detach(mig_server *s)
    int mig_server_take_turn(mig_server *s)
    void mig_server_give_turn(mig_server *s, bint broken)
    int mig_server_run(mig_server *s)
    int64_t mig_server_read(mig_server *s, uint8_t *to, size_t n)
    int mig_server_answer(mig_server *s, size_t block, uint64_t first, uint64_t npages)


@cython.final
@cython.no_gc  # so that what it uses is there in __dealloc__
cdef class PageServer:
    """Answers requests of a destination in postcopy, in the thread that reads them.

    blocks: of each block its name, Pages, bitmap of pages that nobody has taken, pages of a host
        page, whether to look for zero pages, and whether no page of it is sent
    wake_fd: eventfd, rung when there are notes or no page is left; -1: none
    tells_sent: also note what was sent

    Some thread may take pages itself, and write to the same stream: between ``lock_pages`` and
    ``unlock_pages``, and ``take_turn`` and ``give_turn``. ``left``, ``begun`` and ``take_notes``
    are for who has the pages.
    """
    cdef mig_server c
    cdef mig_served_block *blocks
    cdef size_t nblocks
    cdef list kept
    cdef Descriptor source, target
    cdef bint opened

    def __cinit__(self, blocks, size_t page_size, *, int wake_fd=-1, bint tells_sent=False):
        cdef Pages pages
        cdef Bitmap dirty
        cdef size_t i
        self.kept = []
        self.nblocks = <size_t>len(blocks)
        self.blocks = <mig_served_block *>calloc(self.nblocks or 1, sizeof(mig_served_block))
        if self.blocks == NULL:
            raise MemoryError
        for i, (name, some, bits, host_npages, detect_zero, ignored) in enumerate(blocks):
            pages, dirty = some, bits
            if pages.c.page_size != page_size or dirty.nbits != pages.c.npages:
                raise ValueError("pages or bitmap do not fit the block")
            if not 0 < len(name) <= MIG_RAM_MAX_NAME or host_npages < 1:
                raise ValueError(f"block name of {len(name)} bytes, {host_npages} pages together")
            self.blocks[i].name = <const char *>(<bytes>name)
            self.blocks[i].name_len = <size_t>len(name)
            self.blocks[i].pages = &pages.c
            self.blocks[i].dirty = dirty.words
            self.blocks[i].host_npages = host_npages
            self.blocks[i].detect_zero = detect_zero
            self.blocks[i].ignored = ignored
            pages.pin()
            self.kept.append((name, pages, dirty))
        self.opened = True
        check(mig_server_open(&self.c, (<Kernels>KERNELS).k, self.blocks, self.nblocks, page_size))
        self.c.wake_fd = wake_fd
        self.c.tells_sent = tells_sent

    def __dealloc__(self):
        if self.kept is not None:
            self.close()
        if self.opened:
            mig_server_close(&self.c)
        free(self.blocks)

    def close(self):
        """Let go of the pages; there is no return path from now on. More than once is the same."""
        cdef Pages pages
        for _, pages, _ in self.kept:
            pages.unpin()
        self.kept = []
        self.source = None
        self.nblocks = 0
        if self.opened:
            mig_server_stop(&self.c)

    # ---- the return path: one thread

    def listen(self, Descriptor source not None):
        """Read the return path from there: another connection's."""
        self.source = source
        self.c.in_ = source.c
        self.c.start = self.c.end = 0
        self.c.last = -1

    def run(self):
        """Answer requests until something comes that cannot be answered: readinto() has it next.

        PeerError: the connection for urgent pages is over; ChannelError and others as of
        Descriptor, of what is read and of what is written.
        """
        cdef int rc
        if self.source is None:
            raise ValueError("there is no return path")
        with nogil:
            rc = mig_server_run(&self.c)
        check(rc)

    def readinto(self, data, size_t start, size_t at_least):
        """Fill data[start:] with ``at_least`` bytes, never more; fewer mean end of stream."""
        cdef Py_buffer view
        cdef int64_t n
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG)
        try:
            if start > <size_t>view.len or at_least > <size_t>view.len - start:
                raise IndexError(f"{at_least} bytes at {start} of {view.len}")
            if self.source is None:
                raise ValueError("there is no return path")
            with nogil:
                n = mig_server_read(&self.c, <uint8_t *>view.buf + start, at_least)
            return check(n)
        finally:
            PyBuffer_Release(&view)

    @property
    def timeout(self):
        """Seconds that reading may wait for a byte, None for ever: that of where it listens."""
        return self.source.timeout

    @timeout.setter
    def timeout(self, value):
        self.source.timeout = value
        self.c.in_.timeout_ms = self.source.c.timeout_ms

    @property
    def last(self):
        """Number of the block that was asked for last, None: there is none."""
        return None if self.c.last < 0 else self.c.last

    @last.setter
    def last(self, size_t value):
        if value >= self.nblocks:
            raise IndexError(f"block {value} of {self.nblocks}")
        self.c.last = <int64_t>value

    # ---- any thread

    def attach(self, Descriptor target not None, bytes head=b"", bytes tail=b"", *,
               bint beside=False, bint detects=True):
        """Answer over that from now on.

        head, tail: around the records of each answer
        beside: it is a connection of its own, and whoever closes it too early is gone
        detects: whether to look for zero pages in blocks that say so
        """
        cdef const uint8_t *before = <const uint8_t *><const char *>head
        cdef const uint8_t *behind = <const uint8_t *><const char *>tail
        cdef size_t nhead = <size_t>len(head), ntail = <size_t>len(tail)
        if nhead > MIG_SERVER_FRAME or ntail > MIG_SERVER_FRAME:
            raise ValueError(f"{nhead} and {ntail} bytes around an answer")
        with nogil:
            mig_server_attach(&self.c, &target.c, beside, detects, before, nhead, behind, ntail)
        self.target = target

    def detach(self):
        """Answer nobody from now on. What waits to write has to be cancelled before."""
        with nogil:
            mig_server_detach(&self.c)
        self.target = None

    @property
    def attached(self):
        """Whether requests are answered."""
        return self.c.open

    def answer(self, size_t block, uint64_t first, uint64_t npages):
        """Send what nobody has taken of these pages, host pages as a whole; as run() does."""
        cdef int rc
        if block >= self.nblocks:
            raise IndexError(f"block {block} of {self.nblocks}")
        if not npages or first >= self.blocks[block].pages.npages or (
                npages > self.blocks[block].pages.npages - first):
            raise IndexError(f"{npages} pages at {first} of {self.blocks[block].pages.npages}")
        with nogil:
            rc = mig_server_answer(&self.c, block, first, npages)
        check(rc)

    def take_turn(self):
        """Have the stream, once no answer waits for it; raises what broke it."""
        cdef int rc
        with nogil:
            rc = mig_server_take_turn(&self.c)
        check(rc)

    def give_turn(self, bint broken=False):
        """Undo take_turn().

        broken: what was begun will not be finished: nothing can follow until the next attach()
        """
        mig_server_give_turn(&self.c, broken)

    @property
    def waiting(self):
        """Answers that wait for the stream."""
        return self.c.waiting

    @property
    def asked(self):
        """Pages that were asked for so far."""
        return self.c.nasked

    @property
    def sent(self):
        """Pages with contents, zero pages, and bytes that answers had so far."""
        return self.c.nnormal, self.c.nzero, self.c.nbytes

    # ---- who has the pages

    def lock_pages(self):
        """Have the pages: no answer takes any until unlock_pages()."""
        with nogil:
            pthread_mutex_lock(&self.c.pages)

    def unlock_pages(self):
        """Undo lock_pages()."""
        pthread_mutex_unlock(&self.c.pages)

    @property
    def left(self):
        """Pages that nobody has taken; any thread may read it."""
        return self.c.left

    @left.setter
    def left(self, uint64_t value):
        self.c.left = value

    @property
    def hurries(self):
        """Whether somebody waits for the host page that was begun; any thread may read it."""
        return self.c.hurries

    def begin(self, block, uint64_t first=0, uint64_t end=0):
        """Leave a host page of a block alone: its first pages are taken. block None: there is none.
        """
        cdef int64_t number = -1 if block is None else block
        if number != self.c.begun or first != self.c.begun_first:
            self.c.hurries = False
        self.c.begun, self.c.begun_first, self.c.begun_end = number, first, end

    def take_notes(self):
        """Return what has happened since the last call, as (block, first page, pages, sent).

        sent: False: they were asked for
        """
        cdef size_t i
        notes = [(self.c.notes[i].block, self.c.notes[i].first, self.c.notes[i].npages,
                  bool(self.c.notes[i].sent)) for i in range(self.c.nnotes)]
        self.c.nnotes = 0
        return notes
