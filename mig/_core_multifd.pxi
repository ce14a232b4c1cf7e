# SPDX-License-Identifier: LGPL-2.1-or-later

cdef extern from "multifd.h" nogil:
    enum:
        MIG_MFD_MAGIC
        MIG_MFD_VERSION
        MIG_MFD_INIT
        MIG_MFD_HEADER
        MIG_MFD_NAME
        MIG_MFD_DATA
        MIG_MFD_SYNC
        MIG_MFD_ZLIB
        MIG_MFD_ZSTD
        MIG_MFD_MAX_CHANNELS
        MIG_E_MFD_STOPPED
        MIG_E_MFD_GONE

    enum mig_codec:
        MIG_CODEC_NONE
        MIG_CODEC_ZLIB
        MIG_CODEC_ZSTD
        MIG_CODEC_ADAPTIVE

    int MIG_E_CODEC_DATA, MIG_E_CODEC_SHORT, MIG_E_CODEC_LONG
    int MIG_E_MFD_MAGIC, MIG_E_MFD_VERSION, MIG_E_MFD_PAGES, MIG_E_MFD_NAME, MIG_E_MFD_OFFSET
    int MIG_E_MFD_SIZE, MIG_E_MFD_CODEC, MIG_E_MFD_CUT, MIG_E_MFD_FLAGS

    enum:
        MIG_METHOD_RAW
        MIG_METHOD_DELTA
        MIG_METHOD_ZSTD

    struct mig_adaptive:
        bint caching, last_stage
        uint64_t generation
        double link
        uint64_t *npages
        uint64_t nsame

    int mig_adaptive_open(mig_adaptive *a, size_t nslots, size_t page_size)
    void mig_adaptive_zero(mig_adaptive *a, uint64_t address)

    struct mig_mfd_sender:
        mig_codec codec
        int level
        bint zero_copy, splice
        uint8_t *uuid
        mig_adaptive adaptive
        uint64_t nbytes, nnormal, nzero, copied

    int mig_mfd_sender_open(mig_mfd_sender *s, unsigned nchannels, size_t page_size)
    void mig_mfd_sender_close(mig_mfd_sender *s)
    int mig_mfd_send(mig_mfd_sender *s, const mig_pages *pages, uint64_t address, const char *name,
                     size_t name_len, const uint64_t *index, size_t n, bint scan)
    int mig_mfd_drain(mig_mfd_sender *s)
    int mig_mfd_sync(mig_mfd_sender *s)
    void mig_mfd_finish(mig_mfd_sender *s)
    void mig_mfd_stop(mig_mfd_sender *s)
    int mig_mfd_send_channel(mig_mfd_sender *s, const mig_kernels *k, unsigned id,
                             const mig_fd *fd)

    struct mig_mfd_block:
        const mig_pages *pages
        uint64_t *received
        bint fresh
        int64_t *where

    struct mig_mfd_receiver:
        mig_codec codec
        const mig_ram_block *ram_blocks
        const mig_mfd_block *blocks
        size_t nblocks
        mig_pagelog *log
        pthread_mutex_t *log_lock
        const mig_mappedlog *file
        uint64_t syncs
        uint64_t *reached
        int64_t *ended
        uint64_t nbytes, nnormal, nzero

    struct mig_mfd_place:
        uint64_t offset, npackets
        char *name

    int mig_mfd_receiver_open(mig_mfd_receiver *r, unsigned nchannels, size_t page_size)
    void mig_mfd_receiver_close(mig_mfd_receiver *r)
    int mig_mfd_receive_channel(mig_mfd_receiver *r, const mig_kernels *k, unsigned id,
                                const mig_fd *fd, mig_mfd_place *place)
    int mig_mfd_receive_sync(mig_mfd_receiver *r, int timeout_ms)
    void mig_mfd_receive_stop(mig_mfd_receiver *r)


MULTIFD = {
    "MAGIC": MIG_MFD_MAGIC,
    "VERSION": MIG_MFD_VERSION,
    "INIT": MIG_MFD_INIT,
    "HEADER": MIG_MFD_HEADER,
    "NAME": MIG_MFD_NAME,
    "DATA": MIG_MFD_DATA,
    "MAX_CHANNELS": MIG_MFD_MAX_CHANNELS,
}

MULTIFD_FLAGS = {"SYNC": MIG_MFD_SYNC, "ZLIB": MIG_MFD_ZLIB, "ZSTD": MIG_MFD_ZSTD}

cdef dict _CODECS = {
    "none": MIG_CODEC_NONE,
    "zlib": MIG_CODEC_ZLIB,
    "zstd": MIG_CODEC_ZSTD,
    "adaptive": MIG_CODEC_ADAPTIVE,
}

cdef dict _PACKET_ERRORS = {
    MIG_E_MFD_MAGIC: "no multifd packet starts here",
    MIG_E_MFD_FLAGS: "multifd packet with flags that are not known here",
    MIG_E_MFD_VERSION: "multifd packet of a version other than 1",
    MIG_E_MFD_PAGES: "multifd packet with more pages than one can have",
    MIG_E_MFD_NAME: "multifd packet names a block that the block list does not have",
    MIG_E_MFD_OFFSET: "multifd packet with a page that lies outside its block",
    MIG_E_MFD_SIZE: "multifd packet whose length of data does not fit its pages",
    MIG_E_MFD_CODEC: "multifd packet is not compressed as parameter multifd-compression says",
    MIG_E_MFD_CUT: "connection ends inside a multifd packet",
    MIG_E_XBZRLE_TRUNCATED: "a difference in a multifd packet ends within a run",
    MIG_E_XBZRLE_LENGTH: "a difference in a multifd packet has a run of a length that cannot be",
    MIG_E_XBZRLE_PAST_PAGE: "a difference in a multifd packet goes past its page",
    MIG_E_CODEC_DATA: "compressed data of a multifd packet are damaged",
    MIG_E_CODEC_SHORT: "compressed data of a multifd packet end before its pages",
    MIG_E_CODEC_LONG: "compressed data of a multifd packet hold more than its pages",
}


class MultifdPacketError(MigError):
    """A packet that cannot be, at ``offset`` bytes of its channel; ``block`` if it names one."""

    def __init__(self, message, offset, block):
        super().__init__(message)
        self.offset = offset
        self.block = block


class MultifdStoppedError(MigError):
    """The channels were told to stop, or one of them had an error."""


class MultifdGoneError(MigError):
    """A channel ended before the others came to the same SYNC."""


cdef int64_t check_lanes(int64_t rc) except -1:
    """`check` for what ends a whole set of channels."""
    if rc == MIG_E_MFD_STOPPED:
        raise MultifdStoppedError("stopped")
    if rc == MIG_E_MFD_GONE:
        raise MultifdGoneError("a multifd channel ended too early")
    return check(rc)


cdef unsigned check_lane_count(int n) except 0:
    if not 0 < n <= MIG_MFD_MAX_CHANNELS:
        raise ValueError(f"{n} channels, 1 to {MIG_MFD_MAX_CHANNELS} are possible")
    return <unsigned>n


@cython.final
cdef class MultifdSender:
    """Packets of pages, put into one queue and sent by whichever channel is free.

    compression: "none", "zlib", "zstd" or "adaptive", with its level (adaptive: zstd's)
    cache_size:  bytes of the cache of pages sent before, for "adaptive"; 0: no differences
    uuid:        16 bytes
    zero_copy:   have the kernel read the pages from where they are (TCP)
    splice:      a unix socket may be given the pages themselves: what is written to them before the
                 other end has read them may arrive in place of what was there

    `send`, `sync`, `finish` and `stop` belong to one thread (`stop` to any), `run` to one thread
    per channel.
    """
    cdef mig_mfd_sender c
    cdef unsigned nchannels
    cdef size_t page_size

    def __cinit__(self, int nchannels, size_t page_size, *, str compression="none", int level=0,
                  size_t cache_size=0, bytes uuid=bytes(16), bint zero_copy=False,
                  bint splice=False):
        cdef size_t nslots = cache_size // page_size
        if nslots & (nslots - 1):
            raise ValueError(f"cache size {cache_size} is not a power of two of pages")
        if len(uuid) != 16:
            raise ValueError("a UUID has 16 bytes")
        self.nchannels = check_lane_count(nchannels)
        self.page_size = page_size
        check(mig_mfd_sender_open(&self.c, self.nchannels, page_size))
        self.c.codec = _CODECS[compression]
        self.c.level = level
        self.c.zero_copy = zero_copy
        self.c.splice = splice
        if self.c.codec == MIG_CODEC_ADAPTIVE:
            # a difference has no more bytes than its be16 can say
            check(mig_adaptive_open(&self.c.adaptive, nslots if page_size <= 1 << 16 else 0,
                                    page_size))
        memcpy(self.c.uuid, <const char *>uuid, 16)

    def __dealloc__(self):
        mig_mfd_sender_close(&self.c)

    def send(self, Pages pages not None, bytes name not None, const uint64_t[::1] index not None,
             bint scan, uint64_t address=0):
        """Queue pages index[...] of the block; the pages must stay until the next `sync`.

        address: of the block, in the space that the cache of differences is addressed by
        scan: look for zero pages in the channels; pages without storage are always zero
        """
        cdef size_t n = <size_t>index.shape[0], name_len = <size_t>len(name)
        cdef const char *name_ptr = <const char *>name
        cdef int rc
        if name_len > MIG_RAM_MAX_NAME:
            raise ValueError(f"block name of {name_len} bytes")
        if pages.c.page_size != self.page_size:
            raise ValueError(f"pages of {pages.c.page_size} bytes, channels of {self.page_size}")
        if n == 0:
            return
        pages.check_indexes(&index[0], n)
        with nogil:
            rc = mig_mfd_send(&self.c, &pages.c, address, name_ptr, name_len, &index[0], n,
                              scan)
        check_lanes(rc)

    def drain(self):
        """Return when all is sent."""
        cdef int rc
        with nogil:
            rc = mig_mfd_drain(&self.c)
        check_lanes(rc)

    def sync(self):
        """Return when all is sent, and a SYNC behind it on every channel."""
        cdef int rc
        with nogil:
            rc = mig_mfd_sync(&self.c)
        check_lanes(rc)

    def adapt(self, *, uint64_t generation, bint caching, bint last_stage, double link):
        """What "adaptive" chooses by, from the next page on. Nothing may be queued.

        generation: number of the bitmap sync
        caching:    pages are kept, for differences to them
        last_stage: the guest stands still: what is kept stays as it is
        link:       bytes per second that one channel may send, 0: as many as it can
        """
        self.c.adaptive.generation = generation
        self.c.adaptive.caching = caching
        self.c.adaptive.last_stage = last_stage
        self.c.adaptive.link = link

    def note_zeros(self, const uint64_t[::1] index not None, uint64_t address):
        """Pages index[...] of the block at `address` go as zero pages, but not over a channel."""
        cdef size_t i, n = <size_t>index.shape[0]
        with nogil:
            for i in range(n):
                mig_adaptive_zero(&self.c.adaptive, address + index[i] * self.page_size)

    @property
    def methods(self):
        """Pages that "adaptive" has sent raw, as differences, by zstd; and those unchanged."""
        cdef mig_adaptive *a = &self.c.adaptive
        return (a.npages[MIG_METHOD_RAW], a.npages[MIG_METHOD_DELTA], a.npages[MIG_METHOD_ZSTD],
                a.nsame)

    def finish(self):
        """End the channels when all is sent."""
        mig_mfd_finish(&self.c)

    def stop(self):
        """End the channels, and every wait for them, now."""
        mig_mfd_stop(&self.c)

    def run(self, int channel, Descriptor fd not None):
        """Be one channel until `finish`; raises what ended it."""
        cdef int rc
        cdef const mig_kernels *k = (<Kernels>KERNELS).k
        if not 0 <= channel < <int>self.nchannels:
            raise ValueError(f"channel {channel} of {self.nchannels}")
        with nogil:
            rc = mig_mfd_send_channel(&self.c, k, <unsigned>channel, &fd.c)
        check_lanes(rc)

    @property
    def nbytes(self):
        """Bytes sent, over all channels."""
        return self.c.nbytes

    @property
    def normal(self):
        """Pages sent with contents."""
        return self.c.nnormal

    @property
    def zero(self):
        """Pages sent as zero pages."""
        return self.c.nzero

    @property
    def copied(self):
        """How often the kernel had copied all that it was not to copy, when a SYNC came."""
        return self.c.copied


@cython.final
cdef class MultifdReceiver:
    """Channels that put packets where their pages belong.

    parser: of the main stream; has the blocks

    Each block is given to `to_memory` or `refuse`, or all of them to `to_log` or
    `to_file`, before the first `run`.
    """
    cdef mig_mfd_receiver c
    cdef mig_mfd_block *blocks
    cdef mig_ram_block *table  # the parser's, but for blocks that are refused
    cdef RamParser parser
    cdef unsigned nchannels
    cdef list kept
    cdef set refused

    def __cinit__(self, RamParser parser not None, int nchannels, *, str compression="none"):
        cdef size_t i
        self.parser = parser
        self.kept = []
        self.refused = set()
        self.nchannels = check_lane_count(nchannels)
        self.blocks = <mig_mfd_block *>calloc(parser.c.nblocks or 1, sizeof(mig_mfd_block))
        self.table = <mig_ram_block *>calloc(parser.c.nblocks or 1, sizeof(mig_ram_block))
        if self.blocks == NULL or self.table == NULL:
            raise MemoryError
        for i in range(parser.c.nblocks):
            self.table[i] = parser.table[i]
        check(mig_mfd_receiver_open(&self.c, self.nchannels, parser.c.page_size))
        self.c.codec = _CODECS[compression]
        self.c.ram_blocks = self.table
        self.c.blocks = self.blocks
        self.c.nblocks = parser.c.nblocks

    def __dealloc__(self):
        mig_mfd_receiver_close(&self.c)
        free(self.blocks)
        free(self.table)

    def to_memory(self, size_t block, Pages pages not None, Bitmap received not None, bint fresh):
        """Put the pages of a block into memory; the arguments are those of RamParser.place()."""
        if block >= self.c.nblocks:
            raise IndexError(f"block {block} of {self.c.nblocks}")
        if (not pages.writable or pages.c.where != NULL
                or pages.c.page_size != self.parser.c.page_size
                or pages.c.npages < self.parser.table[block].npages
                or received.nbits < self.parser.table[block].npages):
            raise ValueError("memory does not fit the block")
        self.kept.append((pages, received))
        self.blocks[block].pages = &pages.c
        self.blocks[block].received = received.words
        self.blocks[block].fresh = fresh

    def refuse(self, size_t block):
        """Have every page of a block be an error: it is not to be sent."""
        if block >= self.c.nblocks:
            raise IndexError(f"block {block} of {self.c.nblocks}")
        # no page lies inside of it then
        self.table[block].npages = 0
        name = self.table[block].name[:self.table[block].name_len]
        self.refused.add((<bytes>name).decode("ascii", "backslashreplace"))

    def to_log(self, PageLog log not None):
        """Put all pages into a log of the same blocks."""
        cdef size_t i
        if log.parser is not self.parser:
            raise ValueError("the log has other blocks")
        self.kept.append(log)
        for i in range(self.c.nblocks):
            self.blocks[i].where = log.where[i]
        self.c.log = &log.c
        self.c.log_lock = &log.lock

    def to_file(self, MappedLog file not None):
        """Put all pages into a file of the same blocks."""
        if file.parser is not self.parser:
            raise ValueError("the file has other blocks")
        self.kept.append(file)
        self.c.file = &file.c

    def run(self, int channel, Descriptor fd not None, uint64_t offset=MIG_MFD_INIT):
        """Be one channel until it ends between two packets; raises what else ended it.

        offset: bytes of the channel that were read before
        """
        cdef mig_mfd_place place
        cdef const mig_kernels *k = (<Kernels>KERNELS).k
        cdef size_t i
        cdef int rc
        if not 0 <= channel < <int>self.nchannels:
            raise ValueError(f"channel {channel} of {self.nchannels}")
        for i in range(self.c.nblocks):
            if (self.c.log == NULL and self.c.file == NULL and self.blocks[i].pages == NULL
                    and self.table[i].npages):
                raise ValueError(f"nobody takes the pages of block {i}")
        place.offset = offset
        place.npackets = 0
        place.name[0] = 0
        with nogil:
            rc = mig_mfd_receive_channel(&self.c, k, <unsigned>channel, &fd.c, &place)
        if rc in _PACKET_ERRORS:
            name = (<bytes>place.name).decode("ascii", "backslashreplace")
            message = _PACKET_ERRORS[rc]
            if name in self.refused:
                message = f"block {name} should not be migrated"
            raise MultifdPacketError(message, place.offset, name or None)
        check_lanes(rc)

    def sync(self, timeout=None):
        """Wait until every channel has come to its next SYNC, and let them go on.

        timeout: seconds that may pass without a packet on any of them, None for ever
        """
        cdef int rc, ms = -1 if timeout is None else max(1, min(int(timeout * 1000), 2**31 - 1))
        with nogil:
            rc = mig_mfd_receive_sync(&self.c, ms)
        check_lanes(rc)

    def stop(self):
        """End every wait of the channels for each other. Any thread."""
        mig_mfd_receive_stop(&self.c)

    @property
    def ended(self):
        """By channel, the offset at which it ended before the SYNC that others are waiting at."""
        cdef unsigned i
        return {i: self.c.ended[i] for i in range(self.nchannels)
                if self.c.ended[i] >= 0 and self.c.reached[i] <= self.c.syncs}

    @property
    def nbytes(self):
        """Bytes of all packets."""
        return self.c.nbytes

    @property
    def normal(self):
        """Pages received with contents."""
        return self.c.nnormal

    @property
    def zero(self):
        """Pages received as zero pages."""
        return self.c.nzero
