"""FaultOrder: in which order a restored guest has wanted its pages; FaultLog: how that is noted.

A file of it (beside an image; all numbers big-endian)::

    8 octets   "MIGORDER"
    be32       version, 1
    be32       bytes of a page
    32 octets  which guest: see `identity`
    be64       number of runs
    be64 each  a run: 12 bits number of the block in the block list, 12 bits pages less one,
               40 bits first page
    be32       CRC-32 of all octets before

It says what is wanted first, nothing else: a wrong one makes a restore slower, never wrong.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mig.errors import MismatchError, StreamError, TruncatedError, UnsupportedError

MAGIC = b"MIGORDER"
VERSION = 1
#: runs of a file at most
MAX_RUNS = 1 << 22
#: requests that are noted of one migration
MAX_NOTED = 1 << 20

_HEAD = struct.Struct(">8sII32sQ")
_CRC = struct.Struct(">I")
#: octets of a file at most
MAX_NBYTES = _HEAD.size + 8 * MAX_RUNS + _CRC.size

_FIRST_BITS, _COUNT_BITS, _BLOCK_BITS = 40, 12, 12
#: pages of a run at most
_MAX_RUN = 1 << _COUNT_BITS

Runs = NDArray[np.uint64]


def identity(page_size: int, blocks: Iterable[tuple[str, int]], devices: bytes) -> bytes:
    """Return 32 octets that tell one guest at one moment from any other.

    blocks:  idstr and used_length of the block list
    devices: its device state, as it is sent

    They are the same wherever the file of the guest is, and whatever its format.
    """
    digest = hashlib.sha256(struct.pack(">I", page_size))
    for idstr, used_length in blocks:
        digest.update(struct.pack(">IQ", len(idstr), used_length) + idstr.encode())
    digest.update(devices)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class FaultOrder:
    """Pages of a guest, those that were wanted first first, each of them once.

    page_size: bytes
    guest:     its `identity`
    runs:      as in a file: block, pages less one, first page
    """

    page_size: int
    guest: bytes
    runs: Runs

    def encode(self) -> bytes:
        """Return the octets of a file."""
        head = _HEAD.pack(MAGIC, VERSION, self.page_size, self.guest, len(self.runs))
        data = head + self.runs.astype(">u8").tobytes()
        return data + _CRC.pack(zlib.crc32(data))

    @classmethod
    def decode(cls, data: bytes) -> FaultOrder:
        """Read the octets of a file; StreamError when they are none."""
        if len(data) < _HEAD.size + _CRC.size:
            raise TruncatedError(f"a fault order of {len(data)} bytes", offset=len(data))
        magic, version, page_size, guest, nruns = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise StreamError(f"a fault order that begins with {magic!r}", offset=0)
        if version != VERSION:
            raise UnsupportedError(f"a fault order of version {version}", offset=len(MAGIC))
        if nruns > MAX_RUNS:
            raise StreamError(f"a fault order of {nruns} runs", offset=_HEAD.size - 8)
        wanted = _HEAD.size + 8 * nruns + _CRC.size
        if len(data) != wanted:
            error = TruncatedError if len(data) < wanted else StreamError
            raise error(
                f"a fault order of {nruns} runs has {len(data)} bytes, not {wanted}",
                offset=min(len(data), wanted),
            )
        at = len(data) - _CRC.size
        if _CRC.unpack_from(data, at)[0] != zlib.crc32(memoryview(data)[:at]):
            raise StreamError("a fault order with a wrong checksum", offset=at)
        runs = np.frombuffer(data, dtype=">u8", count=nruns, offset=_HEAD.size)
        return cls(page_size, guest, runs.astype(np.uint64))

    def check(self, page_size: int, guest: bytes, npages: Sequence[int]) -> None:
        """MismatchError unless it is of this guest, and every page of it exists.

        npages: pages of each block of the block list
        """
        if guest != self.guest or page_size != self.page_size:
            raise MismatchError("the fault order is of another guest")
        block, first, count = split(self.runs)
        if np.any(block >= len(npages)):
            raise MismatchError(f"the fault order has a block {int(block.max())}")
        ends = np.asarray(npages, dtype=np.uint64)
        wrong = np.flatnonzero(first + count > ends[block])
        if len(wrong):
            raise MismatchError(
                f"the fault order has a page {int((first + count)[wrong[0]]) - 1} of "
                f"{npages[int(block[wrong[0]])]} of block {int(block[wrong[0]])}"
            )
        if int(count.sum()) > sum(npages):
            raise MismatchError("the fault order has pages more than once")

    def merged(self, logs: Iterable[FaultLog]) -> FaultOrder:
        """Return what is better next time: with what was asked for although it was followed.

        A page that was asked for when the order had been followed up to some run goes before that
        run, unless it is in front of it already.
        """
        noted = [log.noted() for log in logs]
        runs = np.concatenate([self.runs, *(found for found, _ in noted)])
        # a run's place is behind what was asked for before it was reached
        places = [2 * np.arange(len(self.runs), dtype=np.uint64) + 1]
        places += [2 * at for _, at in noted]
        moments = [np.zeros(len(self.runs), dtype=np.uint64)]
        moments += [np.arange(len(at), dtype=np.uint64) for _, at in noted]
        ranked = np.lexsort((np.concatenate(moments), np.concatenate(places)))
        return FaultOrder(self.page_size, self.guest, _runs_of(_pages_of(runs[ranked])))


def split(runs: Runs) -> tuple[NDArray[np.intp], Runs, Runs]:
    """Return number of the block, first page and number of pages of each run."""
    block = (runs >> np.uint64(_FIRST_BITS + _COUNT_BITS)).astype(np.intp)
    first = runs & np.uint64((1 << _FIRST_BITS) - 1)
    count = (runs >> np.uint64(_FIRST_BITS) & np.uint64(_MAX_RUN - 1)) + np.uint64(1)
    return block, first, count


def _pages_of(runs: Runs) -> Runs:
    """Return every page of the runs where it comes first: block << 40 | page."""
    block, first, count = split(runs)
    starts = (block.astype(np.uint64) << np.uint64(_FIRST_BITS)) | first
    before = np.cumsum(count) - count
    pages = np.repeat(starts - before, count.astype(np.intp))
    pages += np.arange(len(pages), dtype=np.uint64)
    _, where = np.unique(pages, return_index=True)
    return pages[np.sort(where)]


def _runs_of(pages: Runs) -> Runs:
    """Undo _pages_of(), as few runs as may be."""
    if not len(pages):
        return pages
    begins = np.flatnonzero(np.diff(pages) != 1) + 1
    begins = np.concatenate([[0], begins])
    ends = np.concatenate([begins[1:], [len(pages)]])
    # what is too long for one run makes several
    pieces = -(-(ends - begins) // _MAX_RUN)
    inner = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = np.repeat(begins, pieces) + inner * _MAX_RUN
    count = np.minimum(np.repeat(ends, pieces) - begins, _MAX_RUN)
    first = pages[begins]
    block = first >> np.uint64(_FIRST_BITS)
    page = first & np.uint64((1 << _FIRST_BITS) - 1)
    shifted = block << np.uint64(_FIRST_BITS + _COUNT_BITS)
    runs: Runs = shifted | (count - 1).astype(np.uint64) << np.uint64(_FIRST_BITS) | page
    return runs[:MAX_RUNS]


class FaultLog:
    """What one migration's destination asks for, and what of the order had been sent by then.

    order:  what the migration follows, None: nothing is known
    record: whether requests are noted
    """

    def __init__(self, order: FaultOrder | None, *, record: bool) -> None:
        self.order = order
        self._record = record
        self._runs = array("Q")
        self._places = array("Q")

    def note(self, block: int, first: int, npages: int, place: int) -> None:
        """Note a request; one thread.

        block: its number in the block list
        place: how many runs of the order have been sent
        """
        if not self._record or block >> _BLOCK_BITS or (first + npages) >> _FIRST_BITS:
            return
        for at in range(first, first + npages, _MAX_RUN):
            if len(self._runs) >= MAX_NOTED:
                return
            count = min(_MAX_RUN, first + npages - at) - 1
            self._runs.append((block << _COUNT_BITS | count) << _FIRST_BITS | at)
            self._places.append(place)

    def noted(self) -> tuple[Runs, Runs]:
        """Return what was noted up to now: runs, and places in the order. Any thread."""
        # copies first: an array cannot be appended to while numpy looks at it
        places, runs = self._places[:], self._runs[:]
        return np.array(runs, dtype=np.uint64)[: len(places)], np.array(places, dtype=np.uint64)
