/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Private: what the XBZRLE encoder and decoder share. */
#ifndef MIG_XBZRLE_H
#define MIG_XBZRLE_H

enum {
    MIG_XBZRLE_LONG = 0x80,      /* lengths from here on take two bytes */
    MIG_XBZRLE_MAX_RUN = 0x3fff, /* longest run that the format can say */
};

#endif
