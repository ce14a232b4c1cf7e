"""XBZRLE, byte by byte: runs of unchanged and changed bytes in turn."""

from __future__ import annotations

from functools import lru_cache

MAX_RUN = 0x3FFF

TRUNCATED = "truncated"
LENGTH = "length"
PAST_PAGE = "past page"


class RefusedError(Exception):
    """Not an encoding; the argument is TRUNCATED, LENGTH or PAST_PAGE."""


def put_length(length: int) -> bytes:
    return bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])


@lru_cache(maxsize=64)
def full_encoding(old: bytes, new: bytes) -> bytes | None:
    """The encoding whatever its length; None when a run is too long for the format."""
    out = bytearray()
    at = 0
    while True:
        start = at
        while start < len(new) and old[start] == new[start]:
            start += 1
        if start == len(new):
            return bytes(out)
        end = start
        while end < len(new) and old[end] != new[end]:
            end += 1
        if start - at > MAX_RUN or end - start > MAX_RUN:
            return None
        out += put_length(start - at) + put_length(end - start) + new[start:end]
        at = end


def encode(old: bytes, new: bytes, dlen: int) -> bytes | None:
    """The encoding, b"" for equal pages, None on overflow."""
    assert len(old) == len(new)
    if not old:
        return b""
    out = full_encoding(old, new)
    if out is None or len(out) > dlen or (old[-1] == new[-1] and len(out) + 2 > dlen):
        return None
    return out


def get_length(src: bytes, at: int) -> tuple[int, int]:
    """A length and where it ends."""
    if len(src) - at < 2:
        raise RefusedError(TRUNCATED)
    if src[at] < 0x80:
        return src[at], at + 1
    if src[at + 1] >= 0x80:
        raise RefusedError(LENGTH)
    return src[at] & 0x7F | src[at + 1] << 7, at + 2


def decode(src: bytes, page: bytearray) -> int:
    """Lays the encoding over the page; returns where the last changed run ended."""
    at = to = 0
    while at < len(src):
        first = at == 0
        unchanged, at = get_length(src, at)
        if unchanged == 0 and not first:
            raise RefusedError(LENGTH)
        to += unchanged
        if to > len(page):
            raise RefusedError(PAST_PAGE)
        changed, at = get_length(src, at)
        if changed == 0:
            raise RefusedError(LENGTH)
        if to + changed > len(page):
            raise RefusedError(PAST_PAGE)
        if at + changed > len(src):
            raise RefusedError(TRUNCATED)
        page[to : to + changed] = src[at : at + changed]
        at += changed
        to += changed
    return to
