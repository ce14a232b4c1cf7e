/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The C half of mig: loops over pages, records and file descriptors. Nothing here knows Python,
 * keeps global state or allocates in a loop.
 *
 * Every function returns a value >= 0, or -errno of a failed system call, or one of MIG_E_*.
 * MIG_E_* lie below every -errno, so one signed number carries all three.
 */
#ifndef MIG_H
#define MIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum mig_error {
    MIG_E_CANCELLED = -5000,   /* the cancel descriptor became readable */
    MIG_E_TIMEOUT = -5001,     /* no byte moved for the time allowed */
    MIG_E_NOMEM = -5002,
    MIG_E_KERNEL_UNKNOWN = -5010,   /* no kernel of that name exists */
    MIG_E_KERNEL_NOT_BUILT = -5011, /* it exists for another architecture or compiler */
    MIG_E_KERNEL_NO_CPU = -5012,    /* it is here, but this CPU cannot run it */
    MIG_E_RAM_NO_BLOCK = -5020,     /* CONTINUE before any block was named */
    MIG_E_RAM_UNKNOWN_BLOCK = -5021,
    MIG_E_RAM_BAD_OFFSET = -5022,   /* a page that is not inside its block */
    MIG_E_RAM_BAD_CODING = -5023,   /* an XBZRLE record in another encoding than XBZRLE */
    MIG_E_RAM_BAD_LENGTH = -5024,   /* a coded page of more bytes than one can have */
    MIG_E_RAM_BAD_FILL = -5025,     /* a fill byte that is not 0, where that has no place */
    MIG_E_RAM_CODED = -5026,        /* a coded page, where only plain ones have a place */
    MIG_E_RAM_BAD_ZLIB = -5027,     /* a compressed page that is corrupt, or not of a page's length */
    MIG_E_XBZRLE_TRUNCATED = -5030, /* the encoding ends within a run */
    MIG_E_XBZRLE_LENGTH = -5031,    /* a run of no bytes, or a length of three bytes */
    MIG_E_XBZRLE_PAST_PAGE = -5032, /* a run that goes past the page */
    MIG_E_MAPPED_SHORT = -5040,     /* a file ends before what was found in it */
    MIG_E_GONE = -5041,             /* the connection for urgent pages was closed too early */
    MIG_E_SERVER_BROKEN = -5042,    /* somebody else broke off in the middle of the stream */
    MIG_XBZRLE_OVERFLOW = -5033,    /* no error: the encoding does not fit */
};

/* ---- kernels (cpu.c): one table per instruction set, chosen by name ------------------------- */

enum mig_bitop { MIG_BITOP_AND, MIG_BITOP_OR, MIG_BITOP_ANDNOT, MIG_BITOP_NOT };

struct mig_kernels {
    const char *name;
    /* true when all nbytes bytes are 0; any alignment, any length (0 bytes are zero) */
    bool (*is_zero)(const uint8_t *bytes, size_t nbytes);
    /* number of set bits */
    uint64_t (*popcount)(const uint64_t *words, size_t nwords);
    /* dst |= src; returns how many bits of dst were newly set */
    uint64_t (*merge)(uint64_t *dst, const uint64_t *src, size_t nwords);
    /* dst &= src, dst |= src, dst &= ~src, dst = ~src */
    void (*combine)(enum mig_bitop op, uint64_t *dst, const uint64_t *src, size_t nwords);
    /* Indexes of the first `max` set bits at or after `from`, ascending; returns their number.
     * take() also clears them. Entries of out past that number may be written. */
    size_t (*bits)(const uint64_t *words, uint64_t nbits, uint64_t from, uint64_t *out,
                   size_t max);
    size_t (*take)(uint64_t *words, uint64_t nbits, uint64_t from, uint64_t *out, size_t max);
    /* Runs of set bits at or after `from`: first bit, end, first bit, end, ...; `max` is even. */
    size_t (*edges)(const uint64_t *words, uint64_t nbits, uint64_t from, uint64_t *out,
                    size_t max);
    /* XBZRLE of two pages of nbytes (MIG_XBZRLE_MAX_PAGE at most): length of the encoding, 0 when
     * they are equal, or MIG_XBZRLE_OVERFLOW when it needs more than `max` bytes or a run is
     * longer than the format can say. Bytes of dst past the encoding may be written. */
    int64_t (*xbzrle_encode)(const uint8_t *old, const uint8_t *new, size_t nbytes, uint8_t *dst,
                             size_t max);
    /* The same, and old becomes new, also on overflow. Another thread may write new meanwhile:
     * what old becomes and what is encoded comes from one and the same read. */
    int64_t (*xbzrle_update)(uint8_t *old, const uint8_t *new, size_t nbytes, uint8_t *dst,
                             size_t max);
    /* Lays an encoding over a page; returns where in the page its last run ended, or
     * MIG_E_XBZRLE_*, after which part of the page may have changed. */
    int64_t (*xbzrle_decode)(const uint8_t *src, size_t nsrc, uint8_t *page, size_t nbytes);
};

extern const struct mig_kernels mig_kernels_scalar;

/* Sets *found to the named kernels, or to the fastest this CPU runs when name is NULL. */
int mig_kernels_select(const char *name, const struct mig_kernels **found);
/* The name of the i-th known kernel family, or NULL past the last. */
const char *mig_kernels_name(size_t i);

/* ---- bitmaps (bitmap.c): bit i is bit i % 64 of word i / 64 --------------------------------- */

static inline size_t mig_bitmap_nwords(uint64_t nbits)
{
    return (size_t)(nbits / 64 + (nbits % 64 != 0));
}

static inline bool mig_bitmap_test(const uint64_t *words, uint64_t bit)
{
    return words[bit / 64] >> (bit % 64) & 1;
}

/* The same of a bitmap that other threads set bits of. */
static inline bool mig_bitmap_test_atomic(const uint64_t *words, uint64_t i)
{
    return __atomic_load_n(&words[i / 64], __ATOMIC_RELAXED) >> (i % 64) & 1;
}

static inline void mig_bitmap_put(uint64_t *words, uint64_t bit)
{
    words[bit / 64] |= UINT64_C(1) << (bit % 64);
}

void mig_bitmap_set(uint64_t *words, uint64_t first, uint64_t nbits);
void mig_bitmap_clear(uint64_t *words, uint64_t first, uint64_t nbits);
uint64_t mig_bitmap_count(const struct mig_kernels *k, const uint64_t *words, uint64_t first,
                          uint64_t nbits);
/* dst |= src; returns how many bits were newly set. */
uint64_t mig_bitmap_merge(const struct mig_kernels *k, uint64_t *dst, const uint64_t *src,
                          uint64_t nbits);
/* A bitwise operation; bits of dst past the size become 0. */
void mig_bitmap_combine(const struct mig_kernels *k, enum mig_bitop op, uint64_t *dst,
                        const uint64_t *src, uint64_t nbits);
/* First set (clear) bit at or after `from`; nbits when there is none. */
uint64_t mig_bitmap_next_set(const uint64_t *words, uint64_t nbits, uint64_t from);
uint64_t mig_bitmap_next_clear(const uint64_t *words, uint64_t nbits, uint64_t from);
/* Runs of set bits at or after `from` as pairs first, end; at most `max` of them, and at most
 * `budget` bits in all, for which the last one is cut. Returns the number of runs. */
size_t mig_bitmap_runs(const struct mig_kernels *k, const uint64_t *words, uint64_t nbits,
                       uint64_t from, uint64_t *runs, size_t max, uint64_t budget);
/* Sets all bits of every aligned group of bits (a power of two) that has one set. */
void mig_bitmap_round(uint64_t *words, uint64_t nbits, uint64_t group);
/* Little-endian, 8 bytes for each word, bits past the size 0: the recovery bitmap. */
void mig_bitmap_to_wire(const uint64_t *words, uint64_t nbits, uint8_t *bytes);
void mig_bitmap_from_wire(uint64_t *words, uint64_t nbits, const uint8_t *bytes);
/* Sets (clears) bits so that concurrent users lose none; returns how many were clear (set). */
uint64_t mig_bitmap_set_atomic(uint64_t *words, uint64_t first, uint64_t nbits);
uint64_t mig_bitmap_clear_atomic(uint64_t *words, uint64_t first, uint64_t nbits);
/* Moves src into dst word by word with an atomic exchange, clearing src; returns newly set bits. */
uint64_t mig_bitmap_drain(uint64_t *dst, uint64_t *src, uint64_t nbits);

/* ---- pages: where the pages of one RAM block are ------------------------------------------- */

/* Places of pages without storage. NONE is 0, so that a table of places costs no memory where
 * nothing was put into it. */
enum { MIG_PAGE_NONE = 0, MIG_PAGE_ZERO = -1 };

struct mig_pages {
    uint8_t *base;
    /* byte offset of each page from base (a whole file, so never 0), MIG_PAGE_ZERO or
     * MIG_PAGE_NONE; NULL: page i is at base + i * page_size */
    const int64_t *where;
    /* without `where`: bits of the pages that have storage; NULL: all have */
    const uint64_t *stored;
    uint64_t npages;
    size_t page_size;
};

/* The page's bytes, NULL when it is a page without storage (it reads as zeros). */
static inline const uint8_t *mig_page(const struct mig_pages *pages, uint64_t index)
{
    if (!pages->where) {
        if (pages->stored && !mig_bitmap_test(pages->stored, index)) {
            return NULL;
        }
        return pages->base + index * pages->page_size;
    }
    return pages->where[index] <= 0 ? NULL : pages->base + pages->where[index];
}

/* Sets bit i of zero[] when page index[i] (page i when index is NULL) is zero, clears it otherwise;
 * returns how many are. Every index must be below npages. */
size_t mig_zero_pages(const struct mig_kernels *k, const struct mig_pages *pages,
                      const uint64_t *index, size_t n, uint64_t *zero);

/* ---- XBZRLE page cache (pagecache.c) --------------------------------------------------------- */

enum {
    MIG_XBZRLE_MAX_PAGE = 1 << 16,
    /* an entry of another page is replaced when it was not used for so many bitmap syncs */
    MIG_CACHE_LIFETIME = 2,
};

struct mig_cache_slot {
    uint64_t address; /* UINT64_MAX: empty */
    uint64_t age;     /* generation of its last use */
    uint64_t queued;  /* epoch in which the copy was last put on the way out by reference */
};

/* Direct-mapped: the page at `address` is in slot (address / page_size) % nslots or nowhere. */
struct mig_cache {
    struct mig_cache_slot *slots;
    uint8_t *pages;
    size_t nslots; /* a power of two */
    size_t page_size, stride;
    unsigned page_shift;
    size_t used; /* slots that are not empty */
    size_t mapped;
    uint64_t epoch; /* from 1: goes up when nothing that is on its way out is in the cache */
};

/* 0 or MIG_E_NOMEM. Pages take memory as they are put into the cache, 2 MiB at a time. */
int mig_cache_open(struct mig_cache *c, size_t nslots, size_t page_size);
void mig_cache_close(struct mig_cache *c);

/* The cached copy of the page, noting its use; NULL when it is not there. */
uint8_t *mig_cache_lookup(struct mig_cache *c, uint64_t address, uint64_t generation);
/* Puts the page (NULL: zeros) into the cache; its copy, or NULL when the slot is kept by another
 * page. */
uint8_t *mig_cache_insert(struct mig_cache *c, uint64_t address, const uint8_t *page,
                          uint64_t generation);

/* What a sender does with one page; other results are lengths of an encoding. */
enum mig_cache_result {
    MIG_CACHE_SAME = 0,      /* as it was sent last: nothing to send */
    MIG_CACHE_OVERFLOW = -1, /* send it whole */
    MIG_CACHE_MISS = -2,     /* it is in the cache now; send it whole */
    MIG_CACHE_REFUSED = -3,  /* it is not in the cache; send it whole */
};

/* Whether the copy in the page's slot is on its way out: neither it nor its page may change. */
bool mig_cache_is_queued(const struct mig_cache *c, uint64_t address);
/* Says so, until the epoch ends. */
void mig_cache_queue(struct mig_cache *c, uint64_t address);
/* One page that is to be sent: its encoding (at most `max` bytes, and any bytes of out[0..max) may
 * be written), or what else is to be done. In the last stage, when the guest stands still, no
 * cached page changes. *copy: the cached copy that has to be sent in place of a page that is in
 * the cache, as the guest may have changed it since; else NULL. */
int32_t mig_cache_encode_page(const struct mig_kernels *k, struct mig_cache *c,
                              const uint8_t *page, uint64_t address, uint64_t generation,
                              bool last_stage, uint8_t *out, size_t max, const uint8_t **copy);
/* Has the page and its copy brought into the processor's caches. */
void mig_cache_fetch(const struct mig_cache *c, const uint8_t *page, uint64_t address);

/* Encodes pages index[0..n) of a block at `address` against the cache and puts them into it, in
 * the last stage (the guest stands still) without changing a page. Encodings follow each other in out;
 * result[i] is one of the above or a length. A page that is in the cache has to be sent from there,
 * as the guest may have changed it since. Returns the number of pages done: all, unless fewer than
 * a page's bytes are left of `max`. *used: bytes of out. Pages need storage. */
size_t mig_cache_encode(const struct mig_kernels *k, struct mig_cache *c,
                        const struct mig_pages *pages, uint64_t address, const uint64_t *index,
                        size_t n, uint64_t generation, bool last_stage, uint8_t *out, size_t max,
                        int32_t *result, size_t *used);

/* ---- outgoing bytes: headers in an arena, pages by reference, in wire order ----------------- */

struct mig_out {
    struct iovec *iov;
    size_t niov, max_iov;
    uint8_t *arena; /* never moves while iov points into it */
    size_t used, arena_size;
    uint64_t nbytes; /* sum of the iovecs */
};

/* Appends bytes that stay where they are, and bytes just written at the end of the arena. There has
 * to be an iovec left. */
void mig_out_bytes(struct mig_out *out, const uint8_t *bytes, size_t nbytes);
void mig_out_arena(struct mig_out *out, size_t nbytes);
/* Appends bytes by copy; false when there is no room for all of them. */
bool mig_out_copy(struct mig_out *out, const void *bytes, size_t nbytes);

/* ---- RAM records (ramio.c) ----------------------------------------------------------------- */

/* Flags of a record word; compared with mig/wire.py by a test. */
enum mig_ram_flag {
    MIG_RAM_ZERO = 0x02,
    MIG_RAM_MEM_SIZE = 0x04,
    MIG_RAM_PAGE = 0x08,
    MIG_RAM_EOS = 0x10,
    MIG_RAM_CONTINUE = 0x20,
    MIG_RAM_XBZRLE = 0x40,
    MIG_RAM_COMPRESS = 0x100,
};

enum {
    MIG_RAM_WORD = 8,
    MIG_RAM_MAX_NAME = 255,
    MIG_RAM_XBZRLE_FIELDS = 3, /* the encoding, and the length of what follows */
    MIG_RAM_XBZRLE_CODING = 1, /* the only encoding there is */
    MIG_RAM_COMPRESS_FIELDS = 4, /* the length of what follows */
};

/* Longest zlib stream that a page can be given, as zlib's own compressBound() says. */
static inline size_t mig_ram_compress_bound(size_t page_size)
{
    return page_size + (page_size >> 12) + (page_size >> 14) + (page_size >> 25) + 13;
}

/* Appends the records of pages index[first..n) of one block to `out`: ZERO where bit i of zero[]
 * is set (or the page has no storage), PAGE otherwise. `name` is given when the first record must
 * name its block, NULL when the stream is already in it. Returns the first i that did not fit. */
size_t mig_ram_encode(struct mig_out *out, const struct mig_pages *pages, const char *name,
                      size_t name_len, const uint64_t *index, size_t first, size_t n,
                      const uint64_t *zero);

struct mig_ram_block {
    const char *name;
    size_t name_len;
    uint64_t npages;
};

/* Why mig_ram_parse() stopped. */
enum mig_ram_stop {
    MIG_RAM_STOP_MORE,   /* the next record is incomplete: `need` bytes of it are wanted */
    MIG_RAM_STOP_FULL,   /* the page arrays are full */
    MIG_RAM_STOP_SWITCH, /* the next record changes to another block */
    MIG_RAM_STOP_EOS,    /* end of the section's payload, consumed */
    MIG_RAM_STOP_OTHER,  /* `word` is a record this parser leaves to its caller, not consumed */
};

/* A parser keeps the current block from call to call, as the stream does over sections. */
struct mig_ram_parser {
    const struct mig_ram_block *blocks;
    size_t nblocks;
    size_t page_size;
    int64_t current; /* index into blocks, -1 before the first */
    /* of each record of the last burst: */
    uint64_t *page;   /* page index */
    int64_t *src;     /* offset of its bytes in the buffer, or -1 - fill byte */
    uint32_t *length; /* how many bytes, 0 of a fill byte */
    uint16_t *kind;   /* its flag: MIG_RAM_PAGE, _ZERO, _XBZRLE or _COMPRESS */
    size_t capacity;
    /* of its compressed pages, by their order in the burst: which record, what mig_decompress() (see
     * compress.h) has made of them, and whether that is a page; max_packed of them at most */
    uint32_t *packed;
    uint8_t *unpacked;
    int *intact;
    size_t max_packed;
    /* results of the last call: records in all, with a fill byte, with XBZRLE, compressed; bytes */
    size_t npages, nfill, nxbzrle, npacked, consumed, need;
    size_t wrong; /* the record at which placing the burst stopped with an error */
    uint64_t word;
};

/* Parses one burst of page records, all of one block (`current`). After an error there are no
 * pages, and `current` is the block of the record that is wrong, -1 for none. */
int mig_ram_parse(struct mig_ram_parser *p, const uint8_t *buf, size_t len);

/* Appends the records of a batch, pages that are in the cache as their difference: XBZRLE. */
struct mig_delta {
    const struct mig_kernels *kernels;
    struct mig_cache *cache;
    uint64_t address; /* of the block, in the space that the cache is addressed by */
    uint64_t generation;
    bool last_stage;
    /* what became of the pages; encoded_bytes: of encodings; record_bytes: as QEMU counts them, of
     * records without their words, a page for each overflow */
    uint64_t zero, missed, refused, unchanged, overflows, encoded;
    uint64_t encoded_bytes, record_bytes;
};

/* Bytes of arena that a record may take. */
static inline size_t mig_delta_room(size_t page_size)
{
    return MIG_RAM_WORD + 1 + MIG_RAM_MAX_NAME + MIG_RAM_XBZRLE_FIELDS + page_size;
}

/* As mig_ram_encode(), against the cache, and zero pages refresh it. A page that has not changed
 * makes no record, so `name` may still be wanted by the next batch. Pages have storage, of at least
 * 128 bytes. Stops before a page whose slot holds bytes that are still in `out`. */
size_t mig_delta_encode(struct mig_out *out, struct mig_delta *d, const struct mig_pages *pages,
                        const char *name, size_t name_len, const uint64_t *index, size_t first,
                        size_t n, const uint64_t *zero);

/* ---- what becomes of a burst (ramplace.c) ---------------------------------------------------- */

/* Puts the last burst's pages, inflated where they were compressed, where they belong and sets their bits in `received`. Zeros are not
 * written to a page that is zero already: that would only allocate it. `fresh` says that memory
 * whose bit is clear reads as zeros; then it is not even looked at. A difference is laid over what
 * is there. 0, or MIG_E_XBZRLE_* at record `wrong`. */
int mig_ram_place(const struct mig_kernels *k, struct mig_ram_parser *p,
                  const struct mig_pages *pages, uint64_t *received, bool fresh,
                  const uint8_t *buf);

/* Notes where each page of the last burst is in a file: start + src, or MIG_PAGE_ZERO. 0, or
 * MIG_E_RAM_BAD_FILL or _CODED at record `wrong`: it has no place in a file. */
int mig_ram_index(struct mig_ram_parser *p, int64_t *where, int64_t start);

/* Where record `i` of the last burst begins in its buffer. */
size_t mig_ram_record_offset(const struct mig_ram_parser *p, const uint8_t *buf, size_t i);

/* ---- appender (appender.c): a file that grows at its end, and is changed before it ----------- */

enum { MIG_CHUNK = 1 << 20, MIG_NCHUNKS = 8 };

struct mig_appender {
    int fd;
    int direct_fd;  /* the same file with O_DIRECT, -1: write through the page cache */
    uint64_t aio;   /* 0: none */
    uint8_t *chunks;
    size_t current; /* the chunk that is being filled */
    int64_t base;   /* its file offset */
    size_t used;    /* bytes in it */
    bool busy[MIG_NCHUNKS];
    size_t nbusy;
    int64_t grown;  /* length that the file was given ahead */
    int error;      /* of a chunk that came back */
};

/* The descriptors stay the caller's. */
int mig_appender_open(struct mig_appender *a, int fd, int direct_fd);
/* Writes what is not written yet and gives the file its length; 0 or -errno. */
int mig_appender_finish(struct mig_appender *a);
void mig_appender_close(struct mig_appender *a);

static inline int64_t mig_appender_tail(const struct mig_appender *a)
{
    return a->base + (int64_t)a->used;
}

int mig_append(struct mig_appender *a, const void *bytes, size_t nbytes);
/* Changes bytes before the tail. */
int mig_overwrite(struct mig_appender *a, int64_t offset, const void *bytes, size_t nbytes);
/* Reads bytes before the tail. */
int mig_read_back(struct mig_appender *a, int64_t offset, void *bytes, size_t nbytes);
/* Has the blocks around that place read, when mig_overwrite() would have to wait for them. */
void mig_overwrite_soon(const struct mig_appender *a, int64_t offset, size_t nbytes);
/* pwrite until done; 0 or -errno. */
int mig_pwrite_all(int fd, const void *bytes, size_t nbytes, int64_t offset);
/* pread until done; 0 or -errno, -EIO where the file ends. */
int mig_pread_all(int fd, void *bytes, size_t nbytes, int64_t offset);

/* ---- page log (pagelog.c): a stream file whose pages are rewritten in place ------------------ */

/* The records of a stream file as they are laid down: a page gets a record at the tail when it
 * first has contents and keeps that place, so the file never holds a page twice. */
struct mig_pagelog {
    struct mig_appender file;
    int64_t current; /* the block that the record at the tail is in, -1 none */
    size_t page_size;
    const uint8_t *zeros; /* page_size zero bytes */
    uint8_t *scratch;     /* page_size bytes */
    const struct mig_kernels *kernels;
};

/* Lays down the parser's last burst, inflated, updating where[] of its block. 0, -errno, or at record `wrong`
 * MIG_E_RAM_BAD_FILL or MIG_E_XBZRLE_*. */
int mig_pagelog_put(struct mig_pagelog *log, struct mig_ram_parser *p, int64_t *where,
                    const uint8_t *buf);
/* Appends a ZERO record for every page of the block that was sent and has no contents. */
int mig_pagelog_zeros(struct mig_pagelog *log, int64_t number, const struct mig_ram_block *block,
                      const int64_t *where);

/* ---- descriptors (fdio.c) ------------------------------------------------------------------- */

struct mig_fd {
    int fd;
    int cancel_fd; /* readable: give up with MIG_E_CANCELLED; -1: none */
    bool is_socket;
    int timeout_ms; /* longest wait for one byte to move, -1 for ever */
    const struct mig_fd *with; /* whoever hangs up there is gone here, too: MIG_E_GONE; NULL: none */
};

/* Waits for these events of poll(), of which there may be none even so: 0, MIG_E_CANCELLED,
 * MIG_E_TIMEOUT or -errno. */
int mig_fd_wait(const struct mig_fd *f, short events);
/* Reads at least `min` and at most `max` bytes, taking more than min only while no wait is
 * needed. Fewer than min means end of file. */
int64_t mig_fd_read(const struct mig_fd *f, uint8_t *buf, size_t min, size_t max);
/* Reads a byte at least, and what more is there without waiting: up to IOV_MAX iovecs. 0 means end
 * of file. */
int64_t mig_fd_readv_some(const struct mig_fd *f, struct iovec *iov, size_t niov);
/* Goes past n bytes of the iovecs, changing the one that they end in. */
void mig_iov_skip(struct iovec **iov, size_t *niov, size_t n);
/* Fills all; the iovecs are consumed (changed) while it goes. Fewer bytes mean end of file. */
int64_t mig_fd_readv(const struct mig_fd *f, struct iovec *iov, size_t niov);
/* Writes all; the iovecs are consumed (changed) while it goes. Returns the number of bytes. */
int64_t mig_fd_writev(const struct mig_fd *f, struct iovec *iov, size_t niov);

#endif
