# SPDX-License-Identifier: LGPL-2.1-or-later

cdef extern from "workload.h" nogil:
    enum mig_pattern:
        MIG_PATTERN_FULL
        MIG_PATTERN_WORDS
        MIG_PATTERN_SEQUENTIAL
        MIG_PATTERN_HOT

    enum mig_fill:
        MIG_FILL_RANDOM
        MIG_FILL_ZERO
        MIG_FILL_HALF
        MIG_FILL_COMPRESSIBLE

    enum:
        MIG_MAX_WORKERS
        MIG_NFIRST
        MIG_WORKER_NWORDS

    struct mig_workload_config:
        uint64_t seed
        uint64_t set_pages
        uint64_t rate
        uint64_t nworkers
        mig_pattern pattern
        mig_fill fill

    struct mig_corrupt:
        uint64_t page
        uint64_t count
        uint64_t offset
        uint64_t expected
        uint64_t found

    struct mig_worker_state:
        uint64_t rng

    struct mig_verdict:
        uint64_t npages
        uint64_t ncorrupt
        uint64_t nledger
        mig_corrupt *first

    struct mig_workload:
        pass

    int mig_workload_open(mig_workload **made, const mig_workload_config *config,
                          const mig_pages *ram, uint8_t *ledger, uint64_t *ram_marks,
                          uint64_t *ledger_marks)
    void mig_workload_close(mig_workload *w)
    void mig_workload_fill(mig_workload *w)
    void mig_workload_pause(mig_workload *w)
    void mig_workload_resume(mig_workload *w)
    void mig_workload_throttle(mig_workload *w, unsigned percent)
    void mig_workload_limit(mig_workload *w, uint64_t worker, unsigned share)
    void mig_workload_set_rate(mig_workload *w, uint64_t rate)
    void mig_workload_get(mig_workload *w, uint64_t worker, mig_worker_state *state)
    int mig_workload_put(mig_workload *w, uint64_t worker, const mig_worker_state *state)
    void mig_workload_verify(mig_workload *w, mig_verdict *verdict)


MAX_WORKERS = MIG_MAX_WORKERS
# numbers that stand in the device state
PATTERNS = {
    "full": MIG_PATTERN_FULL,
    "words": MIG_PATTERN_WORDS,
    "sequential": MIG_PATTERN_SEQUENTIAL,
    "hot": MIG_PATTERN_HOT,
}
FILLS = {
    "random": MIG_FILL_RANDOM,
    "zero": MIG_FILL_ZERO,
    "half": MIG_FILL_HALF,
    "compressible": MIG_FILL_COMPRESSIBLE,
}
# the words of a worker's state, in order
WORKER_FIELDS = (
    "rng", "position", "writes", "ticks", "last_tick", "longest_gap", "switchover_gap", "checksum",
    "refused", "page", "count", "offset", "expected", "found",
)


@cython.final
cdef class Workload:
    """Threads that write ``ram`` and check it against ``ledger``; they stand still at first.

    ram, ledger: pinned until close(); 8 bytes of the ledger for each page
    marks:       bitmaps of ram and ledger in which every write is marked, or None

    Any thread, except close(). ValueError for what cannot be, OSError without threads.
    """
    cdef mig_workload *w
    cdef readonly Pages ram
    cdef readonly Pages ledger
    cdef Bitmap ram_marks
    cdef Bitmap ledger_marks
    cdef readonly uint64_t nworkers

    def __cinit__(self, Pages ram not None, Pages ledger not None, *, uint64_t seed,
                  uint64_t set_pages, uint64_t rate, uint64_t nworkers, pattern, fill,
                  marks=None):
        cdef mig_workload_config config
        cdef uint64_t *ram_words = NULL
        cdef uint64_t *ledger_words = NULL
        if not ram.writable or not ledger.writable or ram.c.where or ledger.c.where:
            raise ValueError("a workload needs memory that it can write")
        if ram.c.npages > ledger.c.npages * (ledger.c.page_size // 8):
            raise ValueError(f"the ledger has no room for {ram.c.npages} pages")
        if marks is not None:
            self.ram_marks, self.ledger_marks = marks
            self.ram_marks.check_range(0, ram.c.npages)
            self.ledger_marks.check_range(0, ledger.c.npages)
            if ram.c.page_size != ledger.c.page_size:
                raise ValueError("ram and ledger have pages of different sizes")
            ram_words, ledger_words = self.ram_marks.words, self.ledger_marks.words
        config.seed, config.set_pages, config.rate = seed, set_pages, rate
        config.nworkers = nworkers
        config.pattern, config.fill = PATTERNS[pattern], FILLS[fill]
        rc = mig_workload_open(&self.w, &config, &ram.c, ledger.c.base, ram_words, ledger_words)
        if rc == -_errno.EINVAL:
            raise ValueError(f"{nworkers} workers cannot write {set_pages} of {ram.c.npages} pages")
        if rc < 0 and rc != MIG_E_NOMEM:
            raise OSError(-rc, _os.strerror(-rc))
        check(rc)
        self.nworkers = nworkers
        self.ram, self.ledger = ram, ledger
        ram.pins += 1
        ledger.pins += 1

    def __dealloc__(self):
        self.end()

    cdef end(self):
        if self.w == NULL:
            return
        with nogil:
            mig_workload_close(self.w)
        self.w = NULL
        self.ram.pins -= 1
        self.ledger.pins -= 1

    def close(self):
        """End the threads and let go of the memory. No other call may be under way."""
        self.end()

    cdef int check_open(self) except -1:
        if self.w == NULL:
            raise ValueError("the workload is closed")
        return 0

    def fill(self):
        """Put the pages' first contents and an empty ledger; only before the first resume()."""
        self.check_open()
        with nogil:
            mig_workload_fill(self.w)

    def pause(self):
        """Return when no thread writes any more."""
        self.check_open()
        with nogil:
            mig_workload_pause(self.w)

    def resume(self):
        """Let them write."""
        self.check_open()
        with nogil:
            mig_workload_resume(self.w)

    def throttle(self, unsigned percent):
        """Have them stand still for ``percent`` (0..99) of the time."""
        self.check_open()
        if percent > 99:
            raise ValueError(f"throttle of {percent} percent: 0 to 99 can be")
        with nogil:
            mig_workload_throttle(self.w, percent)

    def limit(self, uint64_t worker, double share):
        """Have one worker stand still for this share of the time, 0 to 0.99."""
        self.check_open()
        if worker >= self.nworkers:
            raise IndexError(f"worker {worker} of {self.nworkers}")
        if not 0 <= share <= 0.99:
            raise ValueError(f"a share of {share}: 0 to 0.99 can be")
        cdef unsigned of_10000 = <unsigned>(share * 10000 + 0.5)
        with nogil:
            mig_workload_limit(self.w, worker, of_10000)

    def set_rate(self, uint64_t rate):
        """Bytes of dirtied memory per second from now on, of all threads; 0: no limit."""
        self.check_open()
        if rate >> 63:
            raise ValueError(f"a rate of {rate} bytes per second")
        with nogil:
            mig_workload_set_rate(self.w, rate)

    def state(self):
        """What each worker is at: uint64 array of shape (nworkers, len(WORKER_FIELDS))."""
        cdef uint64_t[:, ::1] out
        cdef uint64_t i
        self.check_open()
        array = _np.empty((self.nworkers, MIG_WORKER_NWORDS), dtype=_np.uint64)
        out = array
        with nogil:
            for i in range(self.nworkers):
                mig_workload_get(self.w, i, <mig_worker_state *>&out[i, 0])
        return array

    def set_state(self, const uint64_t[:, ::1] state not None):
        """Set what state() gave; only while they stand still. ValueError where it cannot be."""
        cdef uint64_t i
        self.check_open()
        if (<uint64_t>state.shape[0] != self.nworkers
                or state.shape[1] != MIG_WORKER_NWORDS):
            raise ValueError(f"{state.shape[0]} workers of {state.shape[1]} words, not"
                             f" {self.nworkers} of {MIG_WORKER_NWORDS}")
        for i in range(self.nworkers):
            if mig_workload_put(self.w, i, <const mig_worker_state *>&state[i, 0]) < 0:
                raise ValueError(f"worker {i} is outside of its pages")

    def verify(self):
        """Check every page: (pages, corrupt pages, workers whose ledger is wrong, list).

        The list has (page, count, offset, expected, found) of the first few corrupt pages.
        """
        cdef mig_verdict verdict
        cdef uint64_t i
        self.check_open()
        with nogil:
            mig_workload_verify(self.w, &verdict)
        first = [
            (verdict.first[i].page, verdict.first[i].count, verdict.first[i].offset,
             verdict.first[i].expected, verdict.first[i].found)
            for i in range(min(verdict.ncorrupt, <uint64_t>MIG_NFIRST))
        ]
        return verdict.npages, verdict.ncorrupt, verdict.nledger, first
