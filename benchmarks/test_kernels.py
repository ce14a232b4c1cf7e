# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C kernels, every family that this CPU runs, beside memcpy and beside the scalar family.

Hot data fits a core's L2 cache and is worked on many times in a round; cold data is 256 MiB of
memory, read once in a round.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mig import _core
from mig.errors import KernelError

PAGE = 4096
HOT_PAGES = 256
#: guest pages that the bitmaps stand for: 64 GiB of memory
BITMAP_BITS = 1 << 24
#: pages of a batch and bytes of a receive buffer, as the engine has them
BATCH = 1024
BURST = 1 << 20


def _families() -> list[str]:
    usable = []
    for name in _core.kernel_names():
        try:
            _core.kernels(name)
        except KernelError:
            continue
        usable.append(name)
    return usable


FAMILIES = _families()


@dataclass(frozen=True)
class Sizes:
    """How much work a round is."""

    cold_pages: int
    hot_repeats: int
    bitmap_bits: int
    rounds: int


@pytest.fixture(scope="module")
def sizes(smoke: bool) -> Sizes:
    if smoke:
        return Sizes(cold_pages=2048, hot_repeats=4, bitmap_bits=1 << 18, rounds=2)
    return Sizes(cold_pages=65536, hot_repeats=200, bitmap_bits=BITMAP_BITS, rounds=15)


def _random(nbytes: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(1, 256, nbytes, dtype=np.uint8)


def _memcpy(dst: np.ndarray[Any, Any], src: np.ndarray[Any, Any]) -> Callable[[], None]:
    """Copying `src`; holds both arrays, of which memmove knows the addresses only."""
    to, of = dst.ctypes.data, src.ctypes.data

    def copy(_hold: object = (dst, src)) -> None:
        ctypes.memmove(to, of, src.nbytes)

    return copy


def _repeat(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


# ---- zero pages ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cold(sizes: Sizes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two buffers of the cold size, touched."""
    nbytes = sizes.cold_pages * PAGE
    return np.ones(nbytes, dtype=np.uint8), np.ones(nbytes, dtype=np.uint8)


def _fill(buffer: np.ndarray[Any, Any], contents: str) -> None:
    pages = buffer.reshape(-1, PAGE)
    if contents == "random":
        pages[:] = _random(PAGE)
    else:
        pages[:] = 0
        if contents == "half":
            # what the three sampled bytes do not tell: the page has to be read up to here
            pages[::2, PAGE // 2 + 8] = 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("contents", ["zero", "random", "half"])
@pytest.mark.parametrize("place", ["hot", "cold"])
def test_zero_pages(
    compare: Any, cold: Any, sizes: Sizes, place: str, contents: str, family: str
) -> None:
    buffer, other = cold
    npages, times = sizes.cold_pages, 1
    if place == "hot":
        npages, times = HOT_PAGES, sizes.hot_repeats
    buffer, other = buffer[: npages * PAGE], other[: npages * PAGE]
    _fill(buffer, contents)
    index = np.arange(npages, dtype=np.uint64)
    pages = _core.Pages(buffer, PAGE)
    mine, scalar = _core.kernels(family), _core.kernels("scalar")
    compare(
        _repeat(lambda: mine.zero_pages(pages, index), times),
        {
            "memcpy": _repeat(_memcpy(other, buffer), times),
            "scalar": _repeat(lambda: scalar.zero_pages(pages, index), times),
        },
        rounds=sizes.rounds,
        nbytes=npages * PAGE * times,
    )


# ---- bitmaps ---------------------------------------------------------------------------------


def _bitmap(nbits: int, density: float, seed: int = 2) -> _core.Bitmap:
    bitmap = _core.Bitmap(nbits)
    bits = np.random.default_rng(seed).random(nbits) < density
    np.asarray(bitmap).view(np.uint8)[:] = np.packbits(bits, bitorder="little")
    return bitmap


@pytest.mark.parametrize("family", FAMILIES)
def test_popcount(compare: Any, sizes: Sizes, family: str) -> None:
    bitmap = _bitmap(sizes.bitmap_bits, 0.5)
    words = np.asarray(bitmap)
    mine, scalar = _core.kernels(family), _core.kernels("scalar")
    compare(
        _repeat(lambda: bitmap.popcount(mine), 10),
        {
            "memcpy": _repeat(_memcpy(np.empty_like(words), words), 10),
            "scalar": _repeat(lambda: bitmap.popcount(scalar), 10),
        },
        rounds=sizes.rounds,
        nbytes=words.nbytes * 10,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_merge(compare: Any, sizes: Sizes, family: str) -> None:
    dst, src = _bitmap(sizes.bitmap_bits, 0.01), _bitmap(sizes.bitmap_bits, 0.01, seed=3)
    words = np.asarray(src)
    mine, scalar = _core.kernels(family), _core.kernels("scalar")
    compare(
        _repeat(lambda: dst.merge(src, kernels=mine), 10),
        {
            "memcpy": _repeat(_memcpy(np.empty_like(words), words), 10),
            "scalar": _repeat(lambda: dst.merge(src, kernels=scalar), 10),
        },
        rounds=sizes.rounds,
        nbytes=words.nbytes * 10,
    )


@pytest.mark.parametrize("density", [0.0001, 0.01, 0.5, 1.0])
def test_take(compare: Any, sizes: Sizes, density: float) -> None:
    """Set bits to page indexes, in the engine's batches; beside numpy, which does not clear."""
    kept = np.asarray(_bitmap(sizes.bitmap_bits, density)).copy()
    bitmap = _core.Bitmap(sizes.bitmap_bits)
    words = np.asarray(bitmap)
    out = np.empty(BATCH, dtype=np.uint64)

    def take() -> None:
        start = 0
        while n := bitmap.take(start, out):
            start = int(out[n - 1]) + 1

    def restore(_: str) -> None:
        words[:] = kept

    compare(
        take,
        {
            "memcpy": _memcpy(np.empty_like(kept), kept),
            "numpy": lambda: np.flatnonzero(np.unpackbits(kept.view(np.uint8), bitorder="little")),
        },
        rounds=sizes.rounds,
        prepare=restore,
        nbytes=words.nbytes,
    )


# ---- RAM records -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(sizes: Sizes) -> np.ndarray[Any, Any]:
    """PAGE records of one block, as they are on the wire: 8 bytes and a page each."""
    stream = np.empty((sizes.cold_pages, 8 + PAGE), dtype=np.uint8)
    words = np.arange(sizes.cold_pages, dtype=np.uint64) * PAGE | 0x28
    stream[:, :8] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    stream[:, 8:] = _random(PAGE)
    return stream.reshape(-1)


def _parser(npages: int) -> _core.RamParser:
    """A parser that is in the block, so that every record may say CONTINUE."""
    parser = _core.RamParser([(b"pc.ram", npages)], PAGE)
    first = (0x02).to_bytes(8, "big") + b"\x06pc.ram\0"
    parser.parse(first, 0, len(first))
    return parser


def _bursts(
    parser: _core.RamParser, data: memoryview, take: Callable[[int], object]
) -> Callable[[], None]:
    """Parse all of `data`, a receive buffer at a time, and hand each burst over."""

    def run() -> None:
        start = 0
        while start < len(data):
            parser.parse(data, start, min(start + BURST, len(data)))
            take(start)
            start += parser.consumed

    return run


def test_encode(compare: Any, cold: Any, sizes: Sizes) -> None:
    """Pages into a queue: only headers are written, pages stay where they are."""
    buffer, other = cold
    pages = _core.Pages(buffer, PAGE)
    index = np.arange(sizes.cold_pages, dtype=np.uint64)
    batches = [index[i : i + BATCH] for i in range(0, len(index), BATCH)]
    out = _core.OutQueue(max_iov=4096, arena_size=1 << 17)

    def encode() -> None:
        for batch in batches:
            out.encode(pages, None, batch)
            out.clear()

    compare(encode, {"memcpy": _memcpy(other, buffer)}, rounds=sizes.rounds, nbytes=buffer.nbytes)
    pages.release()


@pytest.mark.parametrize("place", ["hot", "cold"])
def test_parse(compare: Any, records: np.ndarray[Any, Any], sizes: Sizes, place: str) -> None:
    data = records if place == "cold" else records[: HOT_PAGES * (8 + PAGE)]
    times = 1 if place == "cold" else sizes.hot_repeats
    parse = _bursts(_parser(sizes.cold_pages), memoryview(data), lambda _: None)
    compare(
        _repeat(parse, times),
        {"memcpy": _repeat(_memcpy(np.ones_like(data), data), times)},
        rounds=sizes.rounds,
        nbytes=data.nbytes * times,
    )


def test_parse_and_place(
    compare: Any, cold: Any, records: np.ndarray[Any, Any], sizes: Sizes
) -> None:
    """Records into guest memory that has been touched before."""
    memory, _ = cold
    pages = _core.Pages(memory, PAGE, writable=True)
    received = _core.Bitmap(sizes.cold_pages)
    parser = _parser(sizes.cold_pages)
    data = memoryview(records)
    compare(
        _bursts(parser, data, lambda at: parser.place(data, at, pages, received, False)),
        {"memcpy": _memcpy(memory, records[: memory.nbytes])},
        rounds=sizes.rounds,
        nbytes=memory.nbytes,
    )
    pages.release()


@pytest.mark.parametrize("file", ["new", "rewritten"])
def test_page_log(
    compare: Any, fast_folder: Path, records: np.ndarray[Any, Any], sizes: Sizes, file: str
) -> None:
    """Records into a capture file, beside pwrite() of the same bytes in the same pieces."""
    data = memoryview(records)
    parser = _parser(sizes.cold_pages)
    fd = os.open(fast_folder / "log", os.O_RDWR | os.O_CREAT, 0o600)
    logs = [_core.PageLog(fd, parser)]

    def put(at: int) -> None:
        logs[0].put(data, at)

    def renew(_: str) -> None:
        if file == "new":
            os.ftruncate(fd, 0)
            logs[0] = _core.PageLog(fd, parser)

    def pwrite() -> None:
        for at in range(0, len(data), BURST):
            os.pwrite(fd, data[at : at + BURST], 64 + at)

    write = _bursts(parser, data, put)
    write()
    try:
        compare(
            write,
            {"memcpy": _memcpy(np.ones_like(records), records), "pwrite": pwrite},
            rounds=max(2, sizes.rounds // 2),
            prepare=renew,
            nbytes=records.nbytes,
        )
    finally:
        os.close(fd)
