# SPDX-License-Identifier: LGPL-2.1-or-later
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
