/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Reads one connection of a source in postcopy and places its pages: see uffd.h. Everything that
 * comes while nothing goes wrong is done here; what is left needs no page to be placed. */
#include "endian.h"
#include "uffd.h"

enum {
    SECTION_HEADER = 5, /* type, be32 id: of a footer, too */
    COMMAND_HEADER = 5, /* type, be16 command, be16 length */
    PING_BYTES = 4,
};

static const uint8_t *at(const struct mig_uffd_stream *s) { return s->buf + s->start; }

static void skip(struct mig_uffd_stream *s, size_t nbytes) { s->start += nbytes; }

/* Has `nbytes` bytes unread in the buffer, which is larger than any record. */
static int need(struct mig_uffd_stream *s, size_t nbytes)
{
    size_t have = s->end - s->start;
    int64_t got;

    if (have >= nbytes) {
        return 0;
    }
    memmove(s->buf, at(s), have);
    s->base += s->start;
    s->start = 0;
    s->end = have;
    got = mig_fd_read(s->fd, s->buf + have, nbytes - have, s->size - have);
    if (got < 0) {
        return (int)got;
    }
    s->end += (size_t)got;
    return s->end < nbytes ? MIG_E_UFFD_TRUNCATED : 0;
}

/* ---- pages ----------------------------------------------------------------------------------- */

/* One page of a unit that is larger: it is placed when all of it is there. */
static int gather(struct mig_uffd_stream *s, size_t number, uint64_t page, const uint8_t *bytes,
                  int filling)
{
    const struct mig_uffd_block *block = s->u->blocks + number;
    size_t page_size = s->u->page_size;
    uint64_t pages = block->unit / page_size, place = page % pages;
    uint8_t *to = s->unit + place * page_size;

    if (s->block >= 0 ? s->block != (int64_t)number || s->next != page : place != 0) {
        return MIG_E_UFFD_ORDER;
    }
    if (place == 0) {
        s->all_zero = true;
    }
    if (bytes) {
        memcpy(to, bytes, page_size);
    } else {
        memset(to, filling, page_size);
    }
    s->all_zero = s->all_zero && !bytes && filling == 0;
    s->block = (int64_t)number;
    s->next = page + 1;
    if (place + 1 < pages) {
        return 0;
    }
    s->block = -1;
    return mig_uffd_place(s->u, number, page / pages, s->all_zero ? NULL : s->unit);
}

static int place_burst(struct mig_uffd_stream *s)
{
    const struct mig_ram_parser *p = s->parser;
    size_t number = (size_t)p->current;

    for (size_t i = 0; i < p->npages; i++) {
        const uint8_t *bytes = p->kind[i] == MIG_RAM_PAGE ? at(s) + p->src[i] : NULL;
        int filling = bytes ? 0 : (int)(-1 - p->src[i]), rc;

        if (p->kind[i] != MIG_RAM_PAGE && p->kind[i] != MIG_RAM_ZERO) {
            return MIG_E_RAM_CODED;
        }
        if (s->block >= 0 || filling || s->u->blocks[number].unit > s->u->page_size) {
            rc = gather(s, number, p->page[i], bytes, filling);
        } else {
            rc = mig_uffd_place(s->u, number, p->page[i], bytes);
        }
        if (rc < 0) {
            return rc;
        }
        s->normal += bytes != NULL;
        s->zero += bytes == NULL;
    }
    return 0;
}

static int read_records(struct mig_uffd_stream *s)
{
    for (;;) {
        int stop = mig_ram_parse(s->parser, at(s), s->end - s->start);
        int rc = stop < 0 ? stop : place_burst(s);

        if (rc < 0) {
            return rc;
        }
        skip(s, s->parser->consumed);
        if (stop == MIG_RAM_STOP_EOS) {
            return MIG_UFFD_END;
        }
        if (stop == MIG_RAM_STOP_OTHER) {
            return MIG_UFFD_OTHER;
        }
        if (stop == MIG_RAM_STOP_MORE) {
            rc = need(s, s->parser->need);
            if (rc < 0) {
                return rc;
            }
        }
    }
}

/* ---- what is around them --------------------------------------------------------------------- */

static int check_id(struct mig_uffd_stream *s)
{
    int rc = need(s, SECTION_HEADER);

    if (rc == 0 && mig_load_be32(at(s) + 1) != s->section_id) {
        rc = MIG_E_UFFD_SECTION;
    }
    return rc;
}

static int read_section(struct mig_uffd_stream *s)
{
    bool last = *at(s) == MIG_TYPE_END;
    int rc = check_id(s);

    if (rc == 0) {
        skip(s, SECTION_HEADER);
        rc = read_records(s);
    }
    if (rc == 0 && s->footers) {
        rc = check_id(s);
        if (rc == 0 && *at(s) != MIG_TYPE_FOOTER) {
            rc = MIG_E_UFFD_SECTION;
        }
        if (rc == 0) {
            skip(s, SECTION_HEADER);
        }
    }
    s->ended = last && rc == 0;
    return rc;
}

/* PING is answered; anything else is left for the caller. */
static int read_command(struct mig_uffd_stream *s)
{
    uint8_t pong[] = {0, MIG_RETURN_PONG, 0, PING_BYTES, 0, 0, 0, 0};
    int rc = need(s, COMMAND_HEADER + PING_BYTES);

    if (rc < 0) {
        return rc == MIG_E_UFFD_TRUNCATED ? MIG_UFFD_OTHER : rc;
    }
    if (at(s)[1] || at(s)[2] != MIG_COMMAND_PING || at(s)[3] || at(s)[4] != PING_BYTES) {
        return MIG_UFFD_OTHER;
    }
    memcpy(pong + 4, at(s) + COMMAND_HEADER, PING_BYTES);
    skip(s, COMMAND_HEADER + PING_BYTES);
    /* when it cannot be said the next read says why */
    (void)mig_reply_send(s->reply, pong, sizeof(pong));
    return 0;
}

static int read_item(struct mig_uffd_stream *s, bool *over)
{
    int rc = need(s, 1);

    if (rc < 0) {
        return rc;
    }
    switch (*at(s)) {
    case MIG_TYPE_PART:
    case MIG_TYPE_END:
        return s->ended ? MIG_UFFD_OTHER : read_section(s);
    case MIG_TYPE_COMMAND:
        return read_command(s);
    case MIG_TYPE_EOF:
        if (s->ended) {
            skip(s, 1);
            *over = true;
            return 0;
        }
    }
    return MIG_UFFD_OTHER;
}

static int read_all(struct mig_uffd_stream *s)
{
    bool over = false;
    int rc = 0;

    while (rc == 0 && !over) {
        rc = read_item(s, &over);
    }
    return rc;
}

int mig_uffd_read(struct mig_uffd_stream *s)
{
    int rc;

    s->block = -1;
    mig_uffd_enter(s->u);
    rc = s->bare ? read_records(s) : read_all(s);
    if (rc == MIG_UFFD_END && s->block >= 0) {
        /* it would never be placed, and its guest would find zeros */
        rc = MIG_E_UFFD_ORDER;
    }
    mig_uffd_leave(s->u);
    return rc;
}
