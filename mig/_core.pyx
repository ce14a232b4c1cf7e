# SPDX-License-Identifier: LGPL-2.1-or-later
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: embedsignature=False, auto_pickle=False
# cython: autotestdict=False
"""The only Cython boundary: pin the buffers, check the arguments, make one C call, without the
GIL where it may be long, turn its return code into an exception in one place.

The module has no mutable state. An object is used by one thread at a time, except that
``Bitmap.set_atomic``, ``clear_atomic`` and ``drain`` may run beside each other on one bitmap, and
that a ``Workload`` has threads of its own.
"""

import errno as _errno
import mmap as _mmap
import os as _os

import numpy as _np

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.errno cimport EINVAL, errno
from libc.stdint cimport (
    INT64_MAX, SIZE_MAX, UINT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t,
)
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from mig._csrc cimport *

from mig.errors import (
    CancelledError, ChannelError, IdleTimeoutError, KernelError, KvmError, KvmUnavailableError,
    MigError, PeerError, XbzrleError,
)


class RamRecordError(MigError):
    """A RAM record that cannot be: the loader adds offset and section.

    capability: the feature that it belongs to, where that is not supported; else None
    """

    def __init__(self, message, *, capability=None):
        super().__init__(message)
        self.capability = capability


cdef dict _RAM_ERRORS = {
    MIG_E_RAM_NO_BLOCK: "record says CONTINUE before any block was named",
    MIG_E_RAM_UNKNOWN_BLOCK: "record names a block that the block list does not have",
    MIG_E_RAM_BAD_OFFSET: "page lies outside its block",
    MIG_E_RAM_BAD_CODING: "XBZRLE record of an unknown encoding",
    MIG_E_RAM_BAD_LENGTH: "coded page of more bytes than it can have",
    MIG_E_RAM_BAD_FILL: "page filled with a byte that is not 0: only sources older than QEMU 2.0 "
                        "send these",
    MIG_E_RAM_BAD_ZLIB: "compressed page is corrupt, or not of a page's length",
}


cdef dict _XBZRLE_ERRORS = {
    MIG_E_XBZRLE_TRUNCATED: "encoding ends within a run",
    MIG_E_XBZRLE_LENGTH: "run of no bytes, or of a length that takes more than two bytes",
    MIG_E_XBZRLE_PAST_PAGE: "run goes past the end of the page",
}


cdef int64_t check(int64_t rc) except -1:
    """The one place where a C return code becomes an exception."""
    if rc >= 0:
        return rc
    if rc == MIG_E_CANCELLED:
        raise CancelledError("cancelled")
    if rc == MIG_E_TIMEOUT:
        raise IdleTimeoutError("no byte moved for the idle limit: the other side is stuck or gone")
    if rc == MIG_E_NOMEM:
        raise MemoryError
    if rc == MIG_E_GONE:
        raise PeerError("the destination went away: the connection for urgent pages is over")
    if rc == MIG_E_SERVER_BROKEN:
        raise ChannelError("the connection broke off in the middle of what was being sent")
    if rc == MIG_E_MAPPED_SHORT:
        raise ChannelError("the file has become shorter while it was read")
    if rc in _RAM_ERRORS:
        raise RamRecordError(_RAM_ERRORS[rc])
    if rc in _XBZRLE_ERRORS:
        raise XbzrleError(_XBZRLE_ERRORS[rc])
    raise ChannelError(_os.strerror(<int>-rc)) from OSError(<int>-rc, _os.strerror(<int>-rc))


include "_core_kernels.pxi"
include "_core_bitmap.pxi"
include "_core_pages.pxi"
include "_core_xbzrle.pxi"
include "_core_compress.pxi"
include "_core_out.pxi"
include "_core_ram.pxi"
include "_core_received.pxi"
include "_core_analyze.pxi"
include "_core_mappedlog.pxi"
include "_core_mapped.pxi"
include "_core_fd.pxi"
include "_core_landing.pxi"
include "_core_pageserver.pxi"
include "_core_multifd.pxi"
include "_core_workload.pxi"
include "_core_track.pxi"
include "_core_uffdclients.pxi"
include "_core_snapshot.pxi"
include "_core_uffd.pxi"
include "_core_kvm.pxi"
