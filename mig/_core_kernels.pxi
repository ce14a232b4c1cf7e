# SPDX-License-Identifier: LGPL-2.1-or-later

@cython.final
cdef class Kernels:
    """The C kernels of one instruction set; all families give the same bits."""
    cdef const mig_kernels *k

    def __cinit__(self):
        mig_kernels_select("scalar", &self.k)

    @property
    def name(self):
        return self.k.name.decode()

    def is_zero(self, data):
        cdef Py_buffer view
        cdef bint result
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        with nogil:
            result = self.k.is_zero(<const uint8_t *>view.buf, <size_t>view.len)
        PyBuffer_Release(&view)
        return result

    def zero_pages(self, Pages pages not None, index=None):
        """(Bitmap, count): bit i says that page index[i] (all: page i) is zero."""
        cdef const uint64_t[::1] numbers
        cdef const uint64_t *which = NULL
        cdef size_t n = <size_t>pages.c.npages, nzero
        cdef Bitmap zero
        if index is not None:
            numbers = page_numbers(index)
            n = <size_t>numbers.shape[0]
        zero = Bitmap(n)
        if n == 0:
            return zero, 0
        if index is not None:
            which = &numbers[0]
            pages.check_indexes(which, n)
        pages.pins += 1
        with nogil:
            nzero = mig_zero_pages(self.k, &pages.c, which, n, zero.words)
        pages.pins -= 1
        return zero, nzero

    def __repr__(self):
        return f"<Kernels {self.name!r}>"


def kernel_names(*, bint usable=False):
    """Families of kernels, best first; all that mig has, or those that run here."""
    cdef const mig_kernels *k
    cdef size_t i = 0
    names = []
    while mig_kernels_name(i) != NULL:
        if not usable or mig_kernels_select(mig_kernels_name(i), &k) == 0:
            names.append(mig_kernels_name(i).decode())
        i += 1
    return tuple(names)


def kernels(name=None):
    cdef Kernels found = Kernels.__new__(Kernels)
    cdef bytes wanted
    cdef int rc
    if name is None:
        rc = mig_kernels_select(NULL, &found.k)
    elif "\0" in name:
        rc = MIG_E_KERNEL_UNKNOWN
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
