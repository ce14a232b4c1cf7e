# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of the RAM section: written, read, put into memory and into a file; beside memcpy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mig import _core

from .pages import BATCH, PAGE, Array, random_pages

pytestmark = pytest.mark.benchmark(group="RAM records")

_COLD = 65536
#: pages of records that fit the second level, and how often a round goes over them
_HOT = 256
_TIMES = 200
#: bytes of a receive buffer, as the engine has it
_BURST = 1 << 20


@pytest.fixture(scope="module")
def npages(smoke: bool) -> int:
    return 2048 if smoke else _COLD


@pytest.fixture(scope="module")
def cold(npages: int) -> tuple[Array, Array]:
    """Two buffers, touched."""
    return np.ones(npages * PAGE, dtype=np.uint8), np.ones(npages * PAGE, dtype=np.uint8)


def _memcpy(dst: Array, src: Array) -> Callable[[], None]:
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


@pytest.fixture(scope="module")
def records(npages: int) -> Array:
    """PAGE records of one block, as they are on the wire: 8 bytes and a page each."""
    stream = np.empty((npages, 8 + PAGE), dtype=np.uint8)
    words = np.arange(npages, dtype=np.uint64) * PAGE | 0x28
    stream[:, :8] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    stream[:, 8:] = random_pages(1)[0]
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
            parser.parse(data, start, min(start + _BURST, len(data)))
            take(start)
            start += parser.consumed

    return run


def test_encode(measure: Any, cold: Any, npages: int) -> None:
    """Pages into a queue: only headers are written, pages stay where they are."""
    buffer, other = cold
    pages = _core.Pages(buffer, PAGE)
    index = np.arange(npages, dtype=np.uint64)
    batches = [index[i : i + BATCH] for i in range(0, len(index), BATCH)]
    out = _core.OutQueue(max_iov=4096, arena_size=1 << 17)

    def encode() -> None:
        for batch in batches:
            out.encode(pages, None, batch)
            out.clear()

    measure(
        encode,
        {"memcpy": _memcpy(other, buffer)},
        nbytes=buffer.nbytes,
        count=npages,
        unit="page",
    )
    pages.release()


@pytest.mark.parametrize("place", ["hot", "cold"])
def test_parse(measure: Any, records: Array, npages: int, smoke: bool, place: str) -> None:
    data = records if place == "cold" else records[: _HOT * (8 + PAGE)]
    times = 1 if place == "cold" or smoke else _TIMES
    parse = _bursts(_parser(npages), memoryview(data), lambda _: None)
    measure(
        _repeat(parse, times),
        {"memcpy": _repeat(_memcpy(np.ones_like(data), data), times)},
        nbytes=data.nbytes * times,
        count=len(data) // (8 + PAGE) * times,
        unit="page",
    )


def test_parse_and_place(measure: Any, cold: Any, records: Array, npages: int) -> None:
    """Records into guest memory that has been touched before."""
    memory, _ = cold
    pages = _core.Pages(memory, PAGE, writable=True)
    received = _core.Bitmap(npages)
    parser = _parser(npages)
    data = memoryview(records)
    measure(
        _bursts(parser, data, lambda at: parser.place(data, at, pages, received, False)),
        {"memcpy": _memcpy(memory, records[: memory.nbytes])},
        nbytes=memory.nbytes,
        count=npages,
        unit="page",
    )
    pages.release()


@pytest.mark.parametrize("file", ["new", "rewritten"])
def test_page_log(
    measure: Any, fast_folder: Path, records: Array, npages: int, smoke: bool, file: str
) -> None:
    """Records into a capture file, beside pwrite() of the same bytes in the same pieces."""
    data = memoryview(records)
    parser = _parser(npages)
    fd = os.open(fast_folder / "log", os.O_RDWR | os.O_CREAT, 0o600)
    logs = [_core.PageLog(fd, parser)]

    def put(at: int) -> None:
        logs[0].put(data, at)

    def renew(_: str) -> None:
        if file == "new":
            os.ftruncate(fd, 0)
            logs[0] = _core.PageLog(fd, parser)

    def pwrite() -> None:
        for at in range(0, len(data), _BURST):
            os.pwrite(fd, data[at : at + _BURST], 64 + at)

    write = _bursts(parser, data, put)
    write()
    try:
        measure(
            write,
            {"memcpy": _memcpy(np.ones_like(records), records), "pwrite": pwrite},
            rounds=2 if smoke else 7,
            prepare=renew,
            nbytes=records.nbytes,
            count=npages,
            unit="page",
        )
    finally:
        os.close(fd)
