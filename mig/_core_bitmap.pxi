# SPDX-License-Identifier: LGPL-2.1-or-later

cdef const char *WORD_FORMAT = b"Q"


cdef _shortened(array, size_t n):
    """The first n rows; a copy where the array would keep much more memory."""
    return array[:n] if 2 * n >= <size_t>len(array) else array[:n].copy()


@cython.final
cdef class Bitmap:
    """``nbits`` bits, all clear (set with ``fill``), over 64-bit words.

    Bit i is bit i % 64 of word i // 64. The buffer protocol gives the words without a copy
    (``numpy.asarray(bitmap)``: uint64, shape ((nbits + 63) // 64,), writable); bits past the size
    that somebody sets there are ignored.

    One thread at a time, except that any number may use ``set_atomic`` and ``clear_atomic`` while
    one of them calls ``other.drain(bitmap)``.

    IndexError: bits outside of the bitmap (OverflowError: below 0). ValueError: bitmaps of
    different sizes.

    kernels: the family of C kernels to use; the default one when None
    """
    cdef uint64_t *words
    cdef readonly uint64_t nbits
    cdef size_t nwords
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]
    cdef const mig_kernels *k

    def __cinit__(self, uint64_t nbits, *, bint fill=False, Kernels kernels=None):
        self.nbits = nbits
        self.nwords = mig_bitmap_nwords(nbits)
        self.k = (<Kernels>KERNELS).k if kernels is None else kernels.k
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

    def __repr__(self):
        return f"<Bitmap of {self.nbits} bits, {self.count()} set>"

    cdef int check_range(self, uint64_t first, uint64_t nbits) except -1:
        if first > self.nbits or nbits > self.nbits - first:
            raise IndexError(f"{nbits} bits from {first} on, of a bitmap of {self.nbits}")
        return 0

    cdef int check_same(self, Bitmap other) except -1:
        if other.nbits != self.nbits:
            raise ValueError(f"bitmaps of {self.nbits} and {other.nbits} bits")
        return 0

    def copy(self):
        """A bitmap of its own with the same bits."""
        cdef Bitmap other = Bitmap(self.nbits)
        other.k = self.k
        memcpy(other.words, self.words, self.nwords * sizeof(uint64_t))
        return other

    # ---- ranges

    def set(self, uint64_t first, uint64_t nbits=1):
        """Set ``nbits`` bits from ``first`` on."""
        self.check_range(first, nbits)
        mig_bitmap_set(self.words, first, nbits)

    def clear(self, uint64_t first, uint64_t nbits=1):
        """Clear ``nbits`` bits from ``first`` on."""
        self.check_range(first, nbits)
        mig_bitmap_clear(self.words, first, nbits)

    def __getitem__(self, uint64_t bit):
        self.check_range(bit, 1)
        return mig_bitmap_test(self.words, bit)

    def count(self, first=None, nbits=None):
        """Number of set bits, of all or of ``nbits`` (default: the rest) from ``first`` on."""
        cdef uint64_t start = 0 if first is None else first
        cdef uint64_t n
        self.check_range(start, 0)
        n = self.nbits - start if nbits is None else nbits
        self.check_range(start, n)
        return mig_bitmap_count(self.k, self.words, start, n)

    def next_set(self, uint64_t start=0):
        """First set bit at or after ``start``; ``nbits`` when there is none."""
        return mig_bitmap_next_set(self.words, self.nbits, start)

    def next_clear(self, uint64_t start=0):
        """First clear bit at or after ``start``; ``nbits`` when there is none."""
        return mig_bitmap_next_clear(self.words, self.nbits, start)

    # ---- lists

    def take(self, uint64_t start, uint64_t[::1] out not None):
        """Move set bits at or after ``start`` into ``out`` as indexes, ascending.

        They are clear afterwards. Returns how many there were, len(out) at most; what is in
        ``out`` behind them may have changed.
        """
        if out.shape[0] == 0:
            return 0
        return self.k.take(self.words, self.nbits, start, &out[0], <size_t>out.shape[0])

    def indexes(self, uint64_t start=0, max_bits=None):
        """Indexes of set bits at or after ``start``: uint64 array, ascending.

        max_bits: length of the result at most
        """
        cdef uint64_t most = self.nbits - start if start < self.nbits else 0
        cdef uint64_t[::1] out
        cdef size_t n
        # with a limit nothing is counted: short lists cost nothing but themselves
        most = min(most, max_bits) if max_bits is not None else self.count(start) if most else 0
        array = _np.empty(most, dtype=_np.uint64)
        if most == 0:
            return array
        out = array
        n = self.k.bits(self.words, self.nbits, start, &out[0], <size_t>most)
        return _shortened(array, n)

    def runs(self, uint64_t start=0, max_runs=None, max_bits=None):
        """Runs of set bits at or after ``start``: uint64 array of shape (n, 2), (first, end).

        max_runs: length of the result at most
        max_bits: bits of all runs together at most, for which the last one is cut
        """
        cdef uint64_t left = self.nbits - start if start < self.nbits else 0
        cdef uint64_t budget = left if max_bits is None else min(left, max_bits)
        cdef uint64_t most = min((left + 1) // 2, budget)
        cdef uint64_t[:, ::1] out
        cdef size_t n
        if max_runs is not None:
            most = min(most, max_runs)
        elif most:
            most = min(most, self.count(start))
        array = _np.empty((most, 2), dtype=_np.uint64)
        if most == 0:
            return array
        out = array
        n = mig_bitmap_runs(self.k, self.words, self.nbits, start, &out[0, 0], <size_t>most,
                            budget)
        return _shortened(array, n)

    # ---- whole bitmaps

    cdef combine(self, mig_bitop op, Bitmap other):
        self.check_same(other)
        mig_bitmap_combine(self.k, op, self.words, other.words, self.nbits)
        return self

    def __iand__(self, Bitmap other not None):
        return self.combine(MIG_BITOP_AND, other)

    def __ior__(self, Bitmap other not None):
        return self.combine(MIG_BITOP_OR, other)

    def __isub__(self, Bitmap other not None):
        return self.combine(MIG_BITOP_ANDNOT, other)

    def complement(self):
        """Set what is clear and clear what is set."""
        self.combine(MIG_BITOP_NOT, self)

    def __eq__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.nbits == other.nbits and self.to_wire() == other.to_wire()

    __hash__ = None

    def merge(self, Bitmap other not None):
        """Set every bit that is set in ``other``; returns how many were not set before.

        With guest pages as bits: what a sync of the dirty bitmap does.
        """
        self.check_same(other)
        return mig_bitmap_merge(self.k, self.words, other.words, self.nbits)

    def fill_groups(self, uint64_t group):
        """Set all bits of every aligned group of ``group`` bits that has one set.

        With target pages as bits: a dirty page dirties its host page. ValueError unless ``group``
        is a power of two.
        """
        if group == 0 or group & (group - 1):
            raise ValueError(f"groups of {group} bits: not a power of two")
        mig_bitmap_round(self.words, self.nbits, group)

    def to_wire(self):
        """The bits as bytes, little-endian, a multiple of 8 bytes long, padded with zeros.

        The form of the received bitmap that a recovering postcopy migration sends.
        """
        cdef bytes data = b"\0" * (self.nwords * 8)
        mig_bitmap_to_wire(self.words, self.nbits, <uint8_t *>data)
        return data

    @staticmethod
    def from_wire(uint64_t nbits, const uint8_t[::1] data not None):
        """A bitmap of ``nbits`` bits from what ``to_wire`` gave; padding is ignored.

        ValueError when data is not as long as such a bitmap is.
        """
        cdef Bitmap bitmap = Bitmap(nbits)
        if <uint64_t>data.shape[0] != <uint64_t>bitmap.nwords * 8:
            raise ValueError(f"{data.shape[0]} bytes for {nbits} bits: {bitmap.nwords * 8} wanted")
        if nbits:
            mig_bitmap_from_wire(bitmap.words, nbits, &data[0])
        return bitmap

    # ---- concurrent users

    def set_atomic(self, uint64_t first, uint64_t nbits=1):
        """Set bits so that concurrent users lose none; returns how many were clear."""
        self.check_range(first, nbits)
        return mig_bitmap_set_atomic(self.words, first, nbits)

    def clear_atomic(self, uint64_t first, uint64_t nbits=1):
        """Clear bits so that concurrent users lose none; returns how many were set."""
        self.check_range(first, nbits)
        return mig_bitmap_clear_atomic(self.words, first, nbits)

    def drain(self, Bitmap source not None):
        """Move every set bit of ``source`` here; returns how many were not set here.

        Concurrent ``source.set_atomic`` calls lose no bit.
        """
        self.check_same(source)
        if source is self:
            raise ValueError("a bitmap cannot be drained into itself")
        return mig_bitmap_drain(self.words, source.words, self.nbits)
