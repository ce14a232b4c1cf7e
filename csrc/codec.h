/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Compressed streams that live as long as a connection, cut into packets: zlib and zstd. */
#ifndef MIG_CODEC_H
#define MIG_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum mig_codec {
    MIG_CODEC_NONE,
    MIG_CODEC_ZLIB,
    MIG_CODEC_ZSTD,
    MIG_CODEC_ADAPTIVE, /* each page in its own way: adaptive.h */
};

/* The error codes belong to the list in mig.h. */
enum mig_codec_error {
    MIG_E_CODEC_DATA = -5040,  /* not what the encoder makes */
    MIG_E_CODEC_SHORT = -5041, /* it ends before all that was announced has come out of it */
    MIG_E_CODEC_LONG = -5042,  /* more comes out of it than was announced */
};

struct mig_coder {
    enum mig_codec codec;
    void *state;
};

/* The largest encoding of `nbytes` bytes, flushed. */
size_t mig_codec_bound(enum mig_codec codec, size_t nbytes);

/* 0 or MIG_E_NOMEM; level as the library means it. */
int mig_encoder_open(struct mig_coder *c, enum mig_codec codec, int level);
/* Encodes the next `nbytes` bytes and flushes, so that a decoder gets all of them; returns the
 * length of the encoding. `max` is mig_codec_bound() at least. */
int64_t mig_encode(struct mig_coder *c, const uint8_t *bytes, size_t nbytes, uint8_t *out,
                   size_t max);
void mig_encoder_close(struct mig_coder *c);

int mig_decoder_open(struct mig_coder *c, enum mig_codec codec);
/* Decodes what one flush has written: exactly `nbytes` bytes come out, and nothing is left over.
 * 0 or MIG_E_CODEC_*. */
int mig_decode(struct mig_coder *c, const uint8_t *in, size_t nin, uint8_t *bytes, size_t nbytes);
void mig_decoder_close(struct mig_coder *c);

#endif
