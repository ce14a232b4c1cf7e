# SPDX-License-Identifier: LGPL-2.1-or-later
"""Going over the RAM records of a stream, beside QEMU's script, and a loop in Python with no more.

QEMU's scripts/analyze-migration.py is in no package: MIG_QEMU_ANALYZE names one. It runs in this
process, so that its interpreter's start is not counted.

What a file costs depends on how the kernel holds it: one that was written in large pieces to xfs,
or to ext4 since Linux 6.16, is mapped in large pieces; one that was read in again, or is in tmpfs,
page by page. MIG_BENCH_DIR chooses.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mig
from mig import _core
from mig.wire import RamFlag

from .pages import PAGE

_MIB = 1024
_SMOKE_MIB = 16
#: pages of one section, as QEMU sends them in 50 ms
_PART = 1 << 14
_NAME = b"pc.ram"
_ID = b"\0\0\0\2"
_EOS = int(RamFlag.EOS).to_bytes(8, "big")
_FOOTER = b"\x7e" + _ID


@pytest.fixture(scope="module")
def npages(smoke: bool) -> int:
    return (_SMOKE_MIB if smoke else _MIB) * (1 << 20) // PAGE


@pytest.fixture(scope="module")
def need_mib(npages: int) -> int:
    """Twice the larger stream."""
    return npages * PAGE // (1 << 20) * 2 + 64


def _records(first: int, count: int, flag: int) -> bytes:
    """Records of pages that follow each other, in a block that is named already."""
    size = PAGE if flag == RamFlag.PAGE else 1
    rows = np.zeros((count, 8 + size), np.uint8)
    words = np.arange(first, first + count, dtype=np.uint64) * PAGE + (flag | RamFlag.CONTINUE)
    rows[:, :8] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    if size == PAGE:
        rows[:, 8::64] = 0xA5
    return rows.tobytes()


def _write(path: Path, npages: int, kind: str) -> None:
    """A whole stream of one block. A section goes out by one write."""
    with path.open("wb", buffering=0) as file:
        config = b"\7" + len(b"box").to_bytes(4, "big") + b"box"
        start = b"\1" + _ID + b"\3ram" + bytes(4) + b"\0\0\0\4"
        start += (npages * PAGE | RamFlag.MEM_SIZE).to_bytes(8, "big")
        start += bytes([len(_NAME)]) + _NAME + (npages * PAGE).to_bytes(8, "big") + _EOS + _FOOTER
        # the block is named by a zero page, which is sent again later
        named = int(RamFlag.ZERO).to_bytes(8, "big") + bytes([len(_NAME)]) + _NAME + b"\0"
        file.write(b"QEVM\0\0\0\3" + config + start + b"\2" + _ID + named + _EOS + _FOOTER)
        for i, first in enumerate(range(0, npages, _PART)):
            count = min(_PART, npages - first)
            flag = RamFlag.PAGE if kind == "pages" or (kind == "mixed" and i % 2) else RamFlag.ZERO
            file.write(b"\2" + _ID + _records(first, count, flag) + _EOS + _FOOTER)
        text = b'{"devices": [], "page_size": 4096}'
        length = len(text).to_bytes(4, "big")
        file.write(b"\3" + _ID + _EOS + _FOOTER + b"\0\6" + length + text)


def _python(path: Path) -> None:
    """The least that a loop has to do for each record."""
    with path.open("rb") as file:
        file.seek(8)
        while kind := file.read(1)[0]:
            if kind == 7:
                file.seek(int.from_bytes(file.read(4), "big"), 1)
            elif kind == 1:
                file.seek(4 + 4 + 8 + 8 + 1 + len(_NAME) + 8 + 8, 1)
            elif kind in (2, 3):
                file.seek(4, 1)
                _python_records(file)
            if kind != 7:
                file.seek(5, 1)


def _python_records(file: Any) -> None:
    while True:
        flags = int.from_bytes(file.read(8), "big") & (PAGE - 1)
        if flags == RamFlag.EOS:
            return
        if not flags & RamFlag.CONTINUE:
            file.read(file.read(1)[0])
        if flags & RamFlag.PAGE:
            file.seek(PAGE, 1)
        else:
            file.read(1)


def _script(path: Path) -> Callable[[], None] | None:
    """QEMU's script on a file."""
    name = os.environ.get("MIG_QEMU_ANALYZE")
    if not name:
        return None

    def run() -> None:
        arguments, sys.argv = sys.argv, [name, "-f", str(path)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(name)
        finally:
            sys.argv = arguments

    return run


@pytest.mark.benchmark(group="Going over RAM records")
@pytest.mark.parametrize("kind", ["pages", "zeros", "mixed"])
def test_analyze(compare: Any, fast_folder: Path, npages: int, smoke: bool, kind: str) -> None:
    """All of `mig.analyze` on a file of one block, in the page cache."""
    path = fast_folder / "vm"
    _write(path, npages, kind)
    found = mig.analyze(path)
    assert found.ok, found.findings
    assert found.ram is not None
    assert found.ram.records == npages + 1
    peers: dict[str, Callable[[], object]] = {"Python": lambda: _python(path)}
    script = _script(path)
    if script is not None:
        peers["QEMU's script"] = script
    compare(
        lambda: mig.analyze(path),
        peers,
        rounds=2 if smoke else 7,
        warmup=1,
        nbytes=npages * PAGE,
        count=npages,
        unit="page",
    )
    path.unlink()


@pytest.mark.benchmark(group="Going over RAM records")
def test_walk_in_memory(compare: Any, fast_folder: Path, npages: int, smoke: bool) -> None:
    """The loop in C by itself: what is left when the file costs nothing."""
    path = fast_folder / "vm"
    _write(path, npages, "pages")
    data = np.fromfile(path, np.uint8)
    starts = [int(at) for at in _starts(data.tobytes(), npages)]

    def walk() -> None:
        walker = _core.RamWalker([(_NAME, npages)], PAGE)
        for at in starts:
            assert walker.walk(data, at, len(data)) == _core.STOP_EOS
        assert walker.counts(0)["normal"] == npages

    compare(
        walk,
        {"Python": lambda: _python(path)},
        rounds=2 if smoke else 7,
        warmup=1,
        nbytes=npages * PAGE,
        count=npages,
        unit="page",
    )
    path.unlink()


def _starts(data: bytes, npages: int) -> list[int]:
    """Where the payloads of the parts begin."""
    at = data.index(b"\2" + _ID) + 5
    starts = [at]
    at = data.index(b"\2" + _ID, at) + 5
    for first in range(0, npages, _PART):
        starts.append(at)
        at += min(_PART, npages - first) * (8 + PAGE) + 8 + 5 + 5
    return starts
