/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef MIG_WIRE_H
#define MIG_WIRE_H

/* Numbers of the wire; compared with mig/wire.py by a test. */
enum mig_wire_number {
    MIG_TYPE_EOF = 0x00,
    MIG_TYPE_PART = 0x02,
    MIG_TYPE_END = 0x03,
    MIG_TYPE_COMMAND = 0x08,
    MIG_TYPE_FOOTER = 0x7e,
    MIG_COMMAND_PING = 2,
    MIG_RETURN_PONG = 2,
    MIG_RETURN_REQ_PAGES_ID = 3,
    MIG_RETURN_REQ_PAGES = 4,
};

#endif
