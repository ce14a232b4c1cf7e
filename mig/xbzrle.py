"""XBZRLE: a changed page as its difference from the page before.

An encoding is (unchanged run, changed run, changed bytes)*: both lengths as ULEB128 of one or two
bytes, so at most 16383. The first unchanged run may be 0, and one at the end is left out. The
encoder gives QEMU's bytes; the decoder accepts what QEMU's accepts.

Pages have up to 65536 bytes. In those of more than 16383 a run may be too long for the format:
such a page overflows, however few of its bytes have changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mig import _core
from mig.wire import DEFAULT_PAGE_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

#: largest page, bytes
MAX_PAGE: int = _core.MAX_XBZRLE_PAGE
#: in place of a length: the encoding would be too long, send the page whole
OVERFLOW = -1


def _flat(data: Buffer, *, writable: bool = False) -> memoryview:
    view = memoryview(data)
    if writable and view.readonly:
        raise BufferError("the buffer is read-only")
    # a view without bytes cannot be cast
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def encode(old: Buffer, new: Buffer, limit: int | None = None) -> bytes | None:
    """Encode what makes ``new`` of ``old``, two pages of the same length.

    limit: bytes that the encoding may have; by default those of a page, as in QEMU

    Returns b"" when the pages are equal, None on overflow. ValueError: pages of different or too
    many bytes.
    """
    old, new = _flat(old), _flat(new)
    out = bytearray(len(new) if limit is None else limit)
    length = _core.xbzrle_encode(old, new, memoryview(out))
    return None if length == OVERFLOW else bytes(memoryview(out)[:length])


def decode(encoding: Buffer, page: Buffer) -> int:
    """Lay an encoding over ``page`` (writable), which holds the page before.

    Returns where in the page the last changed run ended. XbzrleError: no encoding of such a page;
    part of the page may have changed then, but nothing outside of it.
    """
    return _core.xbzrle_decode(_flat(encoding), _flat(page, writable=True))


def encode_pages(
    old: Buffer, new: Buffer, page_size: int = 1 << DEFAULT_PAGE_BITS
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Encode many pages at once; return (lengths, encodings one behind the other).

    old, new: the same number of whole pages of ``page_size`` bytes (a power of two from 64)

    lengths: int32 for each page: of its encoding, 0 when nothing changed, OVERFLOW (-1) when it
    would be longer than a page. The GIL is not held meanwhile, and nobody may write the pages
    (XbzrleCache.encode is for guests that run). ValueError: pages that do not fit each other, or
    a page size that cannot be.
    """
    before, after = _core.Pages(old, page_size), _core.Pages(new, page_size)
    # page for page the encoding is no longer than the page
    out = np.empty(after.npages * page_size, dtype=np.uint8)
    lengths = np.empty(after.npages, dtype=np.int32)
    _, used = _core.xbzrle_encode_pages(before, after, out, lengths)
    return lengths, out[:used]


def decode_pages(
    encodings: Buffer,
    lengths: NDArray[np.int32],
    pages: Buffer,
    page_size: int = 1 << DEFAULT_PAGE_BITS,
) -> int:
    """Lay encodings as `encode_pages` gives them over ``pages`` (writable), in place.

    Pages with a length of 0 or OVERFLOW are left alone. Returns the bytes of ``encodings`` that
    were used. XbzrleError: one of them is no encoding of its page. ValueError: fewer pages than
    lengths. BufferError: pages that cannot be written.
    """
    into = _core.Pages(pages, page_size, writable=True)
    return _core.xbzrle_decode_pages(_flat(encodings), lengths, into)
