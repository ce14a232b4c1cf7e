# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done with captured files, beside QEMU's script, and a loop in Python with no more.

QEMU's scripts/analyze-migration.py is in no package: MIG_QEMU_ANALYZE names one. It runs in this
process, so that its interpreter's start is not counted. It has no `diff`, which it is beside with
both files, one after the other; beside `convert` to raw memory it extracts (-x). The programs `cmp`
and `cp` say what it takes to read or copy the same files; their start is counted.

What a file costs depends on how the kernel holds it: one that was written in large pieces to xfs,
or to ext4 since Linux 6.16, is mapped in large pieces; one that was read in again, or is in tmpfs,
page by page. MIG_BENCH_DIR chooses.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mig
from mig import _core
from mig.analysis.check import check
from mig.analysis.diff import diff
from mig.wire import RamFlag

from .pages import PAGE

_SCRIPT = "QEMU's script"
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
    """Twice the larger stream: a copy of it, or what becomes of it."""
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
    """A whole stream of one block, each page once. A section goes out by one write."""
    with path.open("wb", buffering=0) as file:
        config = b"\7" + len(b"box").to_bytes(4, "big") + b"box"
        start = b"\1" + _ID + b"\3ram" + bytes(4) + b"\0\0\0\4"
        start += (npages * PAGE | RamFlag.MEM_SIZE).to_bytes(8, "big")
        start += bytes([len(_NAME)]) + _NAME + (npages * PAGE).to_bytes(8, "big") + _EOS + _FOOTER
        # a zero page names the block
        named = int(RamFlag.ZERO).to_bytes(8, "big") + bytes([len(_NAME)]) + _NAME + b"\0"
        file.write(b"QEVM\0\0\0\3" + config + start + b"\2" + _ID + named + _EOS + _FOOTER)
        for i, (first, count) in enumerate(_parts(npages)):
            flag = RamFlag.PAGE if kind == "pages" or (kind == "mixed" and i % 2) else RamFlag.ZERO
            file.write(b"\2" + _ID + _records(first, count, flag) + _EOS + _FOOTER)
        text = b'{"devices": [], "page_size": 4096}'
        length = len(text).to_bytes(4, "big")
        file.write(b"\3" + _ID + _EOS + _FOOTER + b"\0\6" + length + text)


def _parts(npages: int) -> list[tuple[int, int]]:
    """First page and number of pages of each section after the block is named."""
    return [(first, min(_PART, npages - first)) for first in range(1, npages, _PART)]


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


def _script(*arguments: str | Path) -> Callable[[], None] | None:
    """QEMU's script with these arguments."""
    name = os.environ.get("MIG_QEMU_ANALYZE")
    if not name:
        return None

    def run() -> None:
        before, sys.argv = sys.argv, [name, *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(name)
        finally:
            sys.argv = before

    return run


def _program(*command: str | Path) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True)


Peers = dict[str, Callable[[], object] | None]
Going = Callable[..., None]


@pytest.fixture
def going(compare: Any, fast_folder_type: str, npages: int, smoke: bool) -> Going:
    """Measures what goes over a file of `holds`; a peer that is None is not there."""

    def measure(
        command: str, target: Callable[[], object], peers: Peers, holds: str, **more: Any
    ) -> None:
        compare(
            target,
            {name: peer for name, peer in peers.items() if peer is not None},
            rounds=2 if smoke else 7,
            warmup=1,
            nbytes=npages * PAGE,
            count=npages,
            unit="page",
            **more,
        )
        compare.info.update(command=command, holds=holds)
        compare.info["file system"] = fast_folder_type

    return measure


@pytest.fixture
def vm(fast_folder: Path, npages: int, kind: str) -> Iterator[Path]:
    """A file of one block."""
    path = fast_folder / "vm"
    _write(path, npages, kind)
    yield path
    path.unlink()


_with_kinds = pytest.mark.parametrize("kind", ["pages", "zeros", "mixed"])
_with_pages = pytest.mark.parametrize("kind", ["pages"])


@_with_kinds
def test_analyze(going: Going, vm: Path, npages: int, kind: str) -> None:
    """All of `mig.analyze`."""
    found = mig.analyze(vm)
    assert found.ok, found.findings
    assert found.ram is not None
    assert found.ram.records == npages
    peers: Peers = {"Python": lambda: _python(vm), _SCRIPT: _script("-f", vm)}
    going("analyze", lambda: mig.analyze(vm), peers, kind)


@_with_pages
def test_walk_in_memory(going: Going, vm: Path, npages: int, kind: str) -> None:
    """The loop in C by itself: what is left when the file costs nothing."""
    data = np.fromfile(vm, np.uint8)
    starts = _starts(data.tobytes(), npages)

    def walk() -> None:
        walker = _core.RamWalker([(_NAME, npages)], PAGE)
        for at in starts:
            assert walker.walk(data, at, len(data)) == _core.STOP_EOS
        assert walker.counts(0)["normal"] == npages - 1

    going("walk", walk, {"Python": lambda: _python(vm)}, kind)


def _starts(data: bytes, npages: int) -> list[int]:
    """Where the payloads of the parts begin."""
    at = data.index(b"\2" + _ID) + 5
    starts = [at]
    at = data.index(b"\2" + _ID, at) + 5
    for _, count in _parts(npages):
        starts.append(at)
        at += count * (8 + PAGE) + 8 + 5 + 5
    return starts


@_with_pages
def test_check(going: Going, vm: Path, tmp_path: Path, kind: str) -> None:
    """Against what -dump-vmstate writes for a machine without devices: what the file costs."""
    dump = tmp_path / "vmstate.json"
    dump.write_text('{"vmschkmachine": {"Name": "box"}}')
    assert check(vm, str(dump)).loads
    peers: Peers = {"Python": lambda: _python(vm), _SCRIPT: _script("-f", vm)}
    going("check", lambda: check(vm, str(dump)), peers, kind)


@_with_pages
def test_diff(going: Going, vm: Path, fast_folder: Path, kind: str) -> None:
    """Two files that are the same: all of both is read."""
    other = fast_folder / "other"
    shutil.copyfile(vm, other)
    scripts = [_script("-f", path) for path in (vm, other)]

    def run_scripts() -> None:
        for script in scripts:
            if script is not None:
                script()

    found = diff(vm, other)
    assert found.equal
    assert found.uncompared is None
    peers: Peers = {
        "cmp": _program("cmp", vm, other),
        _SCRIPT: run_scripts if all(scripts) else None,
    }
    going("diff", lambda: diff(vm, other), peers, kind)
    other.unlink()


@pytest.mark.parametrize("form", ["mapped-ram", "raw"])
@_with_pages
def test_convert(going: Going, vm: Path, fast_folder: Path, form: str, kind: str) -> None:
    """To new files, which are gone before the next."""
    folder = fast_folder / "out"
    out = folder / "out"
    script = _script("-x", "-f", vm)

    def extract() -> None:
        # what it extracts goes into the folder that it runs in
        with contextlib.chdir(folder):
            assert script is not None
            script()

    def prepare(_: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    peers: Peers = {
        "cp": _program("cp", vm, out),
        _SCRIPT: extract if form == "raw" and script else None,
    }
    going(
        f"convert --format {form}",
        lambda: mig.convert(vm, out, form),
        peers,
        kind,
        prepare=prepare,
    )
    shutil.rmtree(folder)
