# SPDX-License-Identifier: LGPL-2.1-or-later
cdef extern from "uffd.h" nogil:
    struct mig_uffd_mapping:
        size_t block
        uint64_t offset
        uint64_t nbytes
        uint64_t address

    struct mig_uffd_client:
        int fd
        mig_uffd_mapping *mappings
        size_t nmappings

    int mig_uffd_client_open(mig_uffd_client *client, int fd)
    void mig_uffd_client_close(mig_uffd_client *client)


@cython.final
cdef class FaultClient:
    """Another process that waits for memory which it maps, too, until end().

    fd: its userfaultfd, of which a copy is kept; ValueError for anything else
    mappings: of each part that it maps the block's name, first byte and number of bytes there, and
        the address in that process
    """
    cdef mig_uffd_client c
    cdef list mappings
    cdef bint served

    def __cinit__(self, int fd, mappings):
        cdef size_t i
        self.c.fd = -1
        self.mappings = list(mappings)
        self.c.mappings = <mig_uffd_mapping *>calloc(len(self.mappings) or 1,
                                                     sizeof(mig_uffd_mapping))
        if self.c.mappings == NULL:
            raise MemoryError
        for i, (_, offset, nbytes, address) in enumerate(self.mappings):
            self.c.mappings[i].offset = offset
            self.c.mappings[i].nbytes = nbytes
            self.c.mappings[i].address = address
        self.c.nmappings = <size_t>len(self.mappings)
        rc = mig_uffd_client_open(&self.c, fd)
        if rc == -_errno.EINVAL:
            raise ValueError(f"descriptor {fd} is no userfaultfd")
        check_track(rc)

    def __dealloc__(self):
        mig_uffd_client_close(&self.c)
        free(self.c.mappings)

    def end(self):
        """Memory is as any other there; more than once is the same. No server has it any more."""
        if self.served:
            raise ValueError("the client is served")
        with nogil:
            mig_uffd_client_close(&self.c)
