/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Compressed streams: see codec.h. */
#include "codec.h"

#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#include "mig.h"

enum { MAX_WINDOW = 25 }; /* log2 of zstd's window: what level 20 uses, QEMU's highest */

size_t mig_codec_bound(enum mig_codec codec, size_t nbytes)
{
    /* a flush ends the block and may add an empty one */
    return codec == MIG_CODEC_ZLIB ? compressBound((uLong)nbytes) + 64
                                   : ZSTD_compressBound(nbytes) + 64;
}

/* ---- encoders ------------------------------------------------------------------------------- */

static void *open_zlib_encoder(int level)
{
    z_stream *zs = calloc(1, sizeof(*zs));

    if (zs && deflateInit(zs, level) != Z_OK) {
        free(zs);
        return NULL;
    }
    return zs;
}

static void *open_zstd_encoder(int level)
{
    ZSTD_CCtx *context = ZSTD_createCCtx();

    if (context &&
        ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level))) {
        ZSTD_freeCCtx(context);
        return NULL;
    }
    return context;
}

int mig_encoder_open(struct mig_coder *c, enum mig_codec codec, int level)
{
    c->codec = codec;
    c->state = codec == MIG_CODEC_ZLIB   ? open_zlib_encoder(level)
               : codec == MIG_CODEC_ZSTD ? open_zstd_encoder(level)
                                         : NULL;
    return c->state || codec == MIG_CODEC_NONE ? 0 : MIG_E_NOMEM;
}

static int64_t encode_zlib(z_stream *zs, const uint8_t *bytes, size_t nbytes, uint8_t *out,
                           size_t max)
{
    zs->next_in = (z_const Bytef *)bytes;
    zs->avail_in = (uInt)nbytes;
    zs->next_out = out;
    zs->avail_out = (uInt)max;
    /* room that is left over says that nothing is kept back */
    if (deflate(zs, Z_SYNC_FLUSH) != Z_OK || zs->avail_in || !zs->avail_out) {
        return MIG_E_CODEC_LONG;
    }
    return (int64_t)(max - zs->avail_out);
}

static int64_t encode_zstd(ZSTD_CCtx *context, const uint8_t *bytes, size_t nbytes, uint8_t *out,
                           size_t max)
{
    ZSTD_inBuffer in = {.src = bytes, .size = nbytes};
    ZSTD_outBuffer to = {.dst = out, .size = max};
    size_t left;

    do {
        left = ZSTD_compressStream2(context, &to, &in, ZSTD_e_flush);
        if (ZSTD_isError(left) || (left && to.pos == to.size)) {
            return MIG_E_CODEC_LONG;
        }
    } while (left || in.pos < in.size);
    return (int64_t)to.pos;
}

int64_t mig_encode(struct mig_coder *c, const uint8_t *bytes, size_t nbytes, uint8_t *out,
                   size_t max)
{
    return c->codec == MIG_CODEC_ZLIB ? encode_zlib(c->state, bytes, nbytes, out, max)
                                      : encode_zstd(c->state, bytes, nbytes, out, max);
}

void mig_encoder_close(struct mig_coder *c)
{
    if (c->state && c->codec == MIG_CODEC_ZLIB) {
        deflateEnd(c->state);
        free(c->state);
    } else if (c->state) {
        ZSTD_freeCCtx(c->state);
    }
    c->state = NULL;
}

/* ---- decoders ------------------------------------------------------------------------------- */

static void *open_zlib_decoder(void)
{
    z_stream *zs = calloc(1, sizeof(*zs));

    if (zs && inflateInit(zs) != Z_OK) {
        free(zs);
        return NULL;
    }
    return zs;
}

/* Its own limit would let a peer have 128 MiB for each channel. */
static void *open_zstd_decoder(void)
{
    ZSTD_DCtx *context = ZSTD_createDCtx();

    if (context && ZSTD_isError(ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, MAX_WINDOW))) {
        ZSTD_freeDCtx(context);
        return NULL;
    }
    return context;
}

int mig_decoder_open(struct mig_coder *c, enum mig_codec codec)
{
    c->codec = codec;
    c->state = codec == MIG_CODEC_ZLIB   ? open_zlib_decoder()
               : codec == MIG_CODEC_ZSTD ? open_zstd_decoder()
                                         : NULL;
    return c->state || codec == MIG_CODEC_NONE ? 0 : MIG_E_NOMEM;
}

/* Decodes into out[0..max) until it is full or the input used up; -1 when the data are wrong.
 * Input that makes no output, as the end of a flush does, is used up even when out is full. */
static int64_t step_zlib(z_stream *zs, const uint8_t *in, size_t *nin, uint8_t *out, size_t max)
{
    int rc;

    zs->next_in = (z_const Bytef *)in;
    zs->avail_in = (uInt)*nin;
    zs->next_out = out;
    zs->avail_out = (uInt)max;
    rc = inflate(zs, Z_SYNC_FLUSH);
    *nin = zs->avail_in;
    return rc == Z_OK || rc == Z_BUF_ERROR ? (int64_t)(max - zs->avail_out) : -1;
}

static int64_t step_zstd(ZSTD_DCtx *context, const uint8_t *in, size_t *nin, uint8_t *out,
                         size_t max)
{
    ZSTD_inBuffer from = {.src = in, .size = *nin};
    ZSTD_outBuffer to = {.dst = out, .size = max};
    size_t before;

    do {
        before = from.pos + to.pos;
        if (ZSTD_isError(ZSTD_decompressStream(context, &to, &from))) {
            return -1;
        }
    } while (from.pos + to.pos > before);
    *nin -= from.pos;
    return (int64_t)to.pos;
}

static int64_t step(struct mig_coder *c, const uint8_t *in, size_t *nin, uint8_t *out, size_t max)
{
    return c->codec == MIG_CODEC_ZLIB ? step_zlib(c->state, in, nin, out, max)
                                      : step_zstd(c->state, in, nin, out, max);
}

int mig_decode(struct mig_coder *c, const uint8_t *in, size_t nin, uint8_t *bytes, size_t nbytes)
{
    size_t left = nin;
    int64_t n = step(c, in, &left, bytes, nbytes);
    uint8_t excess;

    if (n < 0) {
        return MIG_E_CODEC_DATA;
    }
    if ((size_t)n < nbytes) {
        return left ? MIG_E_CODEC_DATA : MIG_E_CODEC_SHORT;
    }
    n = step(c, in + (nin - left), &left, &excess, 1);
    if (n < 0) {
        return MIG_E_CODEC_DATA;
    }
    return n || left ? MIG_E_CODEC_LONG : 0;
}

void mig_decoder_close(struct mig_coder *c)
{
    if (c->state && c->codec == MIG_CODEC_ZLIB) {
        inflateEnd(c->state);
        free(c->state);
    } else if (c->state) {
        ZSTD_freeDCtx(c->state);
    }
    c->state = NULL;
}
