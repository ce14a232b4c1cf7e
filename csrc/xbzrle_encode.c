/* SPDX-License-Identifier: LGPL-2.1-or-later
 * XBZRLE encoder: the difference of two pages as (unchanged run, changed run, changed bytes)*.
 *
 * scan() compares the pages 64 bytes at a time and lists the edges, the positions where unchanged
 * and changed bytes meet: start, end, start, end, ... emit() writes the runs between them. Edges
 * alone tell what is too dense to fit, and sparse pages have few of them. One body serves all
 * families; they differ in how 64 bytes are compared and how the set bits of a word are listed.
 *
 * The updating form makes the old page equal to the new one in the same pass. The guest may write
 * the new page meanwhile, so what is compared is stored from the same read, and the encoding takes
 * its bytes from there. (A look at whether a group has changed at all decides only where that is
 * done.) */
#include <string.h>

#include "kernels.h"
#include "xbzrle.h"

enum {
    BLOCK = 64,   /* bytes compared at a time */
    GROUP = 256,  /* bytes that are looked at together first: most are unchanged */
    CHUNK = 4096, /* bytes whose edges are listed before they are emitted */
    WIDE = 32,    /* bytes that short runs are copied by, whatever their length */
    SLACK = 64,   /* room behind a run that is emitted by wide stores */
    NOT_OPEN = 1 << 20,
};

/* Reads memory that somebody may be writing; left to itself a compiler reads it again rather than
 * keep what it has read. */
#define ONCE(type, from)                                                                        \
    __extension__({                                                                             \
        typedef type once __attribute__((aligned(1), may_alias));                               \
        *(const volatile once *)(const void *)(from);                                           \
    })

/* What a family brings: */
/* GROUP bytes are equal. */
typedef bool (*same_fn)(const uint8_t *old, const uint8_t *new);
/* Which bytes of a block differ; `update` stores the new ones. */
typedef uint64_t (*diff_fn)(uint8_t *old, const uint8_t *new, bool update);
/* Lists the set bits of a word, each plus `base`; may write up to BLOCK entries whatever their
 * number, which it returns. */
typedef size_t (*list_fn)(uint64_t bits, size_t base, uint16_t *out);

struct scan {
    size_t nchanged, nedges; /* changed bytes and edges of this chunk */
    uint64_t open;           /* 1: the last byte was changed and its run goes on */
    size_t nwords;           /* blocks that have edges: where they begin, and the edges */
    uint16_t base[CHUNK / BLOCK + 1];
    uint64_t word[CHUNK / BLOCK + 1];
};

struct out {
    uint8_t *bytes;
    size_t used, max;
    size_t at;   /* where in the page the last run ended */
    size_t open; /* where a run started that goes on in the next chunk, or NOT_OPEN */
};

MIG_INLINE void scan_block(struct scan *s, uint64_t mask, size_t pos)
{
    uint64_t edges = mask ^ (mask << 1 | s->open);

    if (edges) {
        s->base[s->nwords] = (uint16_t)pos;
        s->word[s->nwords++] = edges;
        s->nedges += (size_t)__builtin_popcountll(edges);
    }
    s->open = mask >> 63;
    s->nchanged += (size_t)__builtin_popcountll(mask);
}

static uint64_t diff_tail(uint8_t *old, const uint8_t *new, size_t nbytes, bool update)
{
    uint64_t mask = 0;

    for (size_t i = 0; i < nbytes; i++) {
        uint8_t byte = ONCE(uint8_t, new + i);

        mask |= (uint64_t)(old[i] != byte) << i;
        if (update) {
            old[i] = byte;
        }
    }
    return mask;
}

/* Scans pages[pos..end) and returns end, or less when the runs need more than `limit`: a run takes
 * at least its bytes and one more for each of its edges. */
MIG_INLINE size_t scan(struct scan *s, uint8_t *old, const uint8_t *new, size_t pos, size_t end,
                       size_t limit, bool update, same_fn same, diff_fn diff)
{
    s->nchanged = s->nedges = s->nwords = 0;
    for (; end - pos >= GROUP; pos += GROUP) {
        if (!s->open && same(old + pos, new + pos)) {
            continue;
        }
        for (size_t i = pos; i < pos + GROUP; i += BLOCK) {
            uint64_t mask = diff(old + i, new + i, update);

            if (mask | s->open) {
                scan_block(s, mask, i);
            }
        }
        if (s->nchanged + s->nedges > limit) {
            return pos + GROUP;
        }
    }
    for (; end - pos >= BLOCK; pos += BLOCK) {
        scan_block(s, diff(old + pos, new + pos, update), pos);
    }
    if (pos < end) {
        scan_block(s, diff_tail(old + pos, new + pos, end - pos, update), pos);
    }
    return end;
}

static size_t put_length(uint8_t *dst, size_t length)
{
    dst[0] = (uint8_t)length;
    if (length < MIG_XBZRLE_LONG) {
        return 1;
    }
    dst[0] |= 0x80;
    dst[1] = (uint8_t)(length >> 7);
    return 2;
}

/* Any run, within the exact bounds of the result; false when it does not fit. */
static bool put_run(struct out *o, const uint8_t *page, size_t start, size_t end)
{
    size_t unchanged = start - o->at, changed = end - start, need;

    if (unchanged > MIG_XBZRLE_MAX_RUN || changed > MIG_XBZRLE_MAX_RUN) {
        return false;
    }
    need = 2 + changed;
    need += unchanged >= MIG_XBZRLE_LONG;
    need += changed >= MIG_XBZRLE_LONG;
    if (need > o->max - o->used) {
        return false;
    }
    o->used += put_length(o->bytes + o->used, unchanged);
    o->used += put_length(o->bytes + o->used, changed);
    memcpy(o->bytes + o->used, page + start, changed);
    o->used += changed;
    o->at = end;
    return true;
}

/* Emits the runs that have ended; false when one does not fit. */
MIG_INLINE bool emit(const struct scan *s, struct out *o, const uint8_t *page, size_t nbytes,
                     list_fn list)
{
    /* runs that are short and not in the last bytes take one look and mostly one store */
    size_t safe_end = nbytes < SLACK ? 0 : nbytes - SLACK;
    uint8_t *safe_put = o->bytes + (o->max < SLACK ? 0 : o->max - SLACK);
    uint8_t *put = o->bytes + o->used;
    uint16_t edge[CHUNK + 2 + BLOCK];
    size_t nedges = o->open != NOT_OPEN, at = o->at;

    edge[0] = (uint16_t)o->open;
    for (size_t i = 0; i < s->nwords; i++) {
        nedges += list(s->word[i], s->base[i], edge + nedges);
    }
    for (size_t i = 0; i + 1 < nedges; i += 2) {
        size_t start = edge[i], end = edge[i + 1];
        size_t unchanged = start - at, changed = end - start;

        if ((unchanged | changed) < MIG_XBZRLE_LONG && end < safe_end &&
            put + changed < safe_put) {
            const uint8_t *from = page + start;
            uint64_t head;

            memcpy(&head, from, 8);
            head = head << 16 | changed << 8 | unchanged;
            memcpy(put, &head, 8);
            put += 2;
            for (size_t done = 6; done < changed; done += WIDE) {
                memcpy(put + done, from + done, WIDE);
            }
            put += changed;
            at = end;
        } else {
            o->used = (size_t)(put - o->bytes);
            o->at = at;
            if (!put_run(o, page, start, end)) {
                return false;
            }
            put = o->bytes + o->used;
            at = end;
        }
    }
    o->used = (size_t)(put - o->bytes);
    o->at = at;
    o->open = nedges % 2 ? edge[nedges - 1] : NOT_OPEN;
    return true;
}

MIG_INLINE int64_t encode(uint8_t *old, const uint8_t *new, size_t nbytes, uint8_t *dst,
                          size_t max, bool update, same_fn same, diff_fn diff, list_fn list)
{
    const uint8_t *page = update ? old : new;
    struct out o = {.bytes = dst, .max = max, .open = NOT_OPEN};
    struct scan s;
    size_t pos = 0;

    s.open = 0;
    while (pos < nbytes) {
        size_t end = nbytes - pos > CHUNK ? pos + CHUNK : nbytes;

        pos = scan(&s, old, new, pos, end, max - o.used, update, same, diff);
        if (s.nchanged + s.nedges > max - o.used || !emit(&s, &o, page, nbytes, list)) {
            goto overflow;
        }
    }
    if (o.open != NOT_OPEN && !put_run(&o, page, o.open, nbytes)) {
        return MIG_XBZRLE_OVERFLOW;
    }
    /* where QEMU looks for room for one more run before it sees that there is none */
    if (nbytes && o.at != nbytes && max - o.used < 2) {
        return MIG_XBZRLE_OVERFLOW;
    }
    return (int64_t)o.used;

overflow:
    if (update) {
        memcpy(old + pos, new + pos, nbytes - pos);
    }
    return MIG_XBZRLE_OVERFLOW;
}

#define ENCODER(family, target)                                                                 \
    target int64_t mig_xbzrle_encode_##family(const uint8_t *old, const uint8_t *new,           \
                                              size_t nbytes, uint8_t *dst, size_t max)          \
    {                                                                                           \
        return encode((uint8_t *)old, new, nbytes, dst, max, false, same_##family,              \
                      diff_##family, list_##family);                                            \
    }                                                                                           \
    target int64_t mig_xbzrle_update_##family(uint8_t *old, const uint8_t *new, size_t nbytes,  \
                                              uint8_t *dst, size_t max)                         \
    {                                                                                           \
        return encode(old, new, nbytes, dst, max, true, same_##family, diff_##family,           \
                      list_##family);                                                           \
    }

/* ---- scalar --------------------------------------------------------------------------------- */

MIG_INLINE bool same_scalar(const uint8_t *old, const uint8_t *new)
{
    uint64_t any = 0;

    for (size_t i = 0; i < GROUP; i += 8) {
        uint64_t a, b;

        memcpy(&a, old + i, 8);
        memcpy(&b, new + i, 8);
        any |= a ^ b;
    }
    return !any;
}

MIG_INLINE uint64_t diff_scalar(uint8_t *old, const uint8_t *new, bool update)
{
    const uint64_t low = UINT64_C(0x7f7f7f7f7f7f7f7f);
    uint64_t mask = 0;

    for (size_t i = 0; i < BLOCK; i += 8) {
        uint64_t bytes = ONCE(uint64_t, new + i), x;

        memcpy(&x, old + i, sizeof(x));
        x ^= bytes;
        if (x) {
            /* bit 7 of every byte that is not 0, then those bits side by side */
            x = (((x & low) + low) | x) & ~low;
            mask |= (((x >> 7) * UINT64_C(0x0102040810204080)) >> 56) << i;
            if (update) {
                memcpy(old + i, &bytes, 8);
            }
        }
    }
    return mask;
}

MIG_INLINE size_t list_scalar(uint64_t bits, size_t base, uint16_t *out)
{
    size_t n = 0;

    for (; bits; bits &= bits - 1) {
        out[n++] = (uint16_t)(base + (size_t)__builtin_ctzll(bits));
    }
    return n;
}

ENCODER(scalar, )

#ifdef MIG_X86
/* ---- SSE2 ----------------------------------------------------------------------------------- */

MIG_INLINE bool same_sse2(const uint8_t *old, const uint8_t *new)
{
    __m128i any = _mm_setzero_si128();

    for (size_t i = 0; i < GROUP; i += 16) {
        any = _mm_or_si128(any, _mm_xor_si128(_mm_loadu_si128((const void *)(old + i)),
                                              _mm_loadu_si128((const void *)(new + i))));
    }
    return _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff;
}

MIG_INLINE uint64_t diff_sse2(uint8_t *old, const uint8_t *new, bool update)
{
    uint64_t equal = 0;

    for (size_t i = 0; i < BLOCK; i += 16) {
        __m128i bytes = ONCE(__m128i, new + i);
        __m128i same = _mm_cmpeq_epi8(bytes, _mm_loadu_si128((const void *)(old + i)));

        equal |= (uint64_t)(unsigned)_mm_movemask_epi8(same) << i;
        if (update) {
            _mm_storeu_si128((void *)(old + i), bytes);
        }
    }
    return ~equal;
}

#define list_sse2 list_scalar
ENCODER(sse2, )

/* ---- AVX2 ----------------------------------------------------------------------------------- */

MIG_TARGET_AVX2 MIG_INLINE bool same_avx2(const uint8_t *old, const uint8_t *new)
{
    __m256i any = _mm256_setzero_si256();

    for (size_t i = 0; i < GROUP; i += 32) {
        any = _mm256_or_si256(any, _mm256_xor_si256(_mm256_loadu_si256((const void *)(old + i)),
                                                    _mm256_loadu_si256((const void *)(new + i))));
    }
    return _mm256_testz_si256(any, any);
}

MIG_TARGET_AVX2 MIG_INLINE uint64_t diff_avx2(uint8_t *old, const uint8_t *new, bool update)
{
    __m256i low = ONCE(__m256i, new), high = ONCE(__m256i, new + 32);
    __m256i same_low = _mm256_cmpeq_epi8(low, _mm256_loadu_si256((const void *)old));
    __m256i same_high = _mm256_cmpeq_epi8(high, _mm256_loadu_si256((const void *)(old + 32)));
    uint64_t equal = (uint32_t)_mm256_movemask_epi8(same_low) |
                     (uint64_t)(uint32_t)_mm256_movemask_epi8(same_high) << 32;

    if (update && ~equal) {
        _mm256_storeu_si256((void *)old, low);
        _mm256_storeu_si256((void *)(old + 32), high);
    }
    return ~equal;
}

MIG_TARGET_AVX2 MIG_INLINE size_t list_avx2(uint64_t bits, size_t base, uint16_t *out)
{
    size_t n = (size_t)__builtin_popcountll(bits);

    /* eight at a time: how often is easier to predict than how many */
    for (size_t i = 0; i < n; i += 8) {
        for (size_t j = 0; j < 8; j++) {
            out[i + j] = (uint16_t)(base + _tzcnt_u64(bits));
            bits = _blsr_u64(bits);
        }
    }
    return n;
}

ENCODER(avx2, MIG_TARGET_AVX2)

/* ---- AVX-512 -------------------------------------------------------------------------------- */

/* A block is one comparison: looking at a group first would only be one more branch to miss. */
MIG_INLINE bool same_avx512(const uint8_t *old, const uint8_t *new)
{
    (void)old, (void)new;
    return false;
}

MIG_TARGET_AVX512 MIG_INLINE uint64_t diff_avx512(uint8_t *old, const uint8_t *new, bool update)
{
    __m512i bytes = ONCE(__m512i, new);
    uint64_t mask = _mm512_cmpneq_epi8_mask(bytes, _mm512_loadu_si512(old));

    if (update && mask) {
        _mm512_storeu_si512(old, bytes);
    }
    return mask;
}

MIG_TARGET_AVX512 MIG_INLINE size_t list_avx512(uint64_t bits, size_t base, uint16_t *out)
{
    const __m512i number = mig_byte_numbers();
    __m512i at = _mm512_maskz_compress_epi8(bits, number);
    __m512i add = _mm512_set1_epi16((short)base);
    size_t n = (size_t)__builtin_popcountll(bits);

    _mm512_storeu_si512(
        out, _mm512_add_epi16(add, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(at))));
    /* not at the number of places that the first store has: words of dense pages are around it */
    if (n > 20) {
        at = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(at, 1));
        _mm512_storeu_si512(out + 32, _mm512_add_epi16(add, at));
    }
    return n;
}

ENCODER(avx512, MIG_TARGET_AVX512)
#endif

#ifdef MIG_NEON
/* ---- NEON ----------------------------------------------------------------------------------- */

MIG_INLINE bool same_neon(const uint8_t *old, const uint8_t *new)
{
    uint8x16_t any = vdupq_n_u8(0);

    for (size_t i = 0; i < GROUP; i += 16) {
        any = vorrq_u8(any, veorq_u8(vld1q_u8(old + i), vld1q_u8(new + i)));
    }
    return vmaxvq_u8(any) == 0;
}

MIG_INLINE uint64_t diff_neon(uint8_t *old, const uint8_t *new, bool update)
{
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8x16_t bits[4];

    /* one bit of each byte that differs, then sums of neighbours until eight bits are a byte */
    for (size_t i = 0; i < 4; i++) {
        uint8x16_t bytes = ONCE(uint8x16_t, new + 16 * i);

        bits[i] = vbicq_u8(bit, vceqq_u8(bytes, vld1q_u8(old + 16 * i)));
        if (update) {
            vst1q_u8(old + 16 * i, bytes);
        }
    }
    bits[0] = vpaddq_u8(vpaddq_u8(bits[0], bits[1]), vpaddq_u8(bits[2], bits[3]));
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(bits[0], bits[0])), 0);
}

#define list_neon list_scalar
ENCODER(neon, )
#endif
