"""mig diff: pages and fields of two captured VMs that differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import stream
from reference.devicevalues import Made
from reference.ram import Delta, Record
from reference.stream import Device

from mig import MappedCapture, _core
from mig.analysis import diff as diff_module
from mig.analysis.diff import MISSING, diff
from mig.cli import main
from mig.errors import ChannelError, MigError
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

PAGE = 4096
DEVICE = Device("0/uart", b"", 5)


def uart(rbr: int, lcr: tuple[int, ...] = (1, 2), fifo: bool = False) -> Made:
    made = Made("uart").add("rbr", "uint8", bytes([rbr]), rbr)
    raw = b"".join(n.to_bytes(2, "big") for n in lcr)
    made.add("lcr", "uint16", raw, lcr, array_len=len(lcr))
    if fifo:
        made.subsection(Made("uart/fifo").add("n", "buffer", b"xy", b"xy"))
    return made


def written(
    path: Path,
    pages: dict[int, bytes | int],
    made: Made,
    *,
    npages: int = 100,
    more: dict[str, int] | None = None,
    machine: str = "box",
) -> Path:
    records = [Record(b"pc.ram", page, contents) for page, contents in pages.items()]
    data = stream.whole(
        {"pc.ram": npages * PAGE, **(more or {})},
        [records],
        [],
        config=stream.configuration(machine),
    )
    device = Device(DEVICE.idstr, made.payload, DEVICE.section_id)
    entry = {"name": device.idstr, "instance_id": 0, **made.described()}
    tail = device.encode() + b"\0" + stream.described({"devices": [entry], "page_size": PAGE})
    path.write_bytes(data[: -len(stream.device_state([]))] + tail)
    return path


def test_a_file_equals_itself(tmp_path):
    a = written(tmp_path / "a", {1: 0, 2: b"\1" * PAGE}, uart(7))
    found = diff(a, a)
    assert found.equal
    assert found.blocks[0].same == 100
    result = CliRunner().invoke(main, ["diff", str(a), str(a)])
    assert (result.exit_code, result.output) == (0, "no difference\n")


def test_pages_that_differ(tmp_path):
    a = written(
        tmp_path / "a", {0: b"\1" * PAGE, 1: 0, 2: 0, 3: b"\0" * PAGE, 5: b"\2" * PAGE}, uart(7)
    )
    b = written(
        tmp_path / "b", {0: b"\1" * PAGE, 1: 0, 2: b"\1" * PAGE, 3: 0, 4: 0, 6: 0}, uart(7)
    )
    (block,) = diff(a, b).blocks
    assert (block.same, block.differ, block.only_a, block.only_b) == (3 + 93, 1, 1, 2)
    assert block.ranges == ((2, 1), (4, 3))
    (block,) = diff(b, a).blocks
    assert (block.same, block.differ, block.only_a, block.only_b) == (3 + 93, 1, 2, 1)


def test_a_mapped_ram_file_is_compared_with_a_stream(tmp_path):
    pages = {i: b"\1" * PAGE if i % 3 else 0 for i in range(100)}
    a = written(tmp_path / "a", pages, uart(7))
    capture = MappedCapture(tmp_path / "b")
    data = StreamReader(data=a.read_bytes())
    StreamLoader(data, capture, on_command=lambda command: None).run()
    capture.commit()
    found = diff(a, tmp_path / "b")
    assert found.equal, found
    assert found.blocks[0].same == 100
    c = written(tmp_path / "c", {**pages, 3: b"\1" * PAGE, 4: 0}, uart(7))
    (block,) = diff(c, tmp_path / "b").blocks
    assert (block.differ, block.ranges) == (2, ((3, 2),))


def test_fields_that_differ(tmp_path):
    a = written(tmp_path / "a", {}, uart(7))
    b = written(tmp_path / "b", {}, uart(8, (1, 3), fifo=True))
    found = diff(a, b)
    assert not found.equal
    assert [(f.path, f.a, f.b) for f in found.fields[:2]] == [("rbr", 7, 8), ("lcr[1]", 2, 3)]
    assert found.fields[2].path == "uart/fifo"
    assert found.fields[2].a is MISSING
    result = CliRunner().invoke(main, ["diff", str(a), str(b), "--json"])
    assert result.exit_code == 1
    data = json.loads(result.output.splitlines()[-1])
    assert data["fields"][0] == {
        "device": "0/uart",
        "instance-id": 0,
        "path": "rbr",
        "a": 7,
        "b": 8,
    }
    assert "a" not in data["fields"][2]
    text = CliRunner().invoke(main, ["diff", str(a), str(b)]).output
    assert text == (
        "0/uart 0 rbr: 7 | 8\n0/uart 0 lcr[1]: 2 | 3\n"
        "0/uart 0 uart/fifo: missing | uart/fifo of 1 fields\n"
    )


def test_arrays_of_other_lengths_are_one_difference(tmp_path):
    a = written(tmp_path / "a", {}, uart(7, (1, 2)))
    b = written(tmp_path / "b", {}, uart(7, (1, 2, 3)))
    assert [(f.path, f.a, f.b) for f in diff(a, b).fields] == [("lcr", (1, 2), (1, 2, 3))]


def test_fields_past_the_limit_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(diff_module, "MAX_FIELDS", 3)
    a = written(tmp_path / "a", {}, uart(7, tuple(range(10))))
    b = written(tmp_path / "b", {}, uart(7, tuple(range(1, 11))))
    found = diff(a, b)
    assert (len(found.fields), found.nfields) == (3, 10)


def test_blocks_devices_and_machines_that_only_one_has(tmp_path):
    a = written(tmp_path / "a", {0: 0}, uart(7), more={"rom": PAGE})
    b = written(tmp_path / "b", {0: 0}, uart(7), npages=50, machine="crate")
    found = diff(a, b)
    assert found.machines == ("box", "crate")
    lengths = [(x.idstr, x.length_a, x.length_b) for x in found.blocks]
    assert lengths == [("pc.ram", 100 * PAGE, 50 * PAGE), ("rom", PAGE, None)]
    assert not any(block.equal for block in found.blocks)
    text = CliRunner().invoke(main, ["diff", str(a), str(b)]).output
    assert "machine box | crate" in text
    assert "block rom: 4096 bytes | no such block" in text


def test_pages_that_are_coded_are_not_compared_but_fields_are(tmp_path):
    a = written(tmp_path / "a", {0: b"\1" * PAGE}, uart(7))
    data = a.read_bytes()
    coded = stream.whole(
        {"pc.ram": 100 * PAGE}, [[Record(b"pc.ram", 0, Delta(b"\0\1x"))]], []
    )
    tail = data[data.index(b"\4\0\0\0\5") :]
    b = tmp_path / "b"
    b.write_bytes(coded[: -len(stream.device_state([]))] + tail.replace(b"\7", b"\x09", 1))
    found = diff(a, b)
    assert found.uncompared is not None
    assert "xbzrle" in found.uncompared
    assert not found.equal
    assert [(f.path, f.a, f.b) for f in found.fields] == [("rbr", 7, 9)]


def test_files_that_are_none(tmp_path):
    a = written(tmp_path / "a", {0: 0}, uart(7))
    (tmp_path / "b").write_bytes(b"#!/bin/sh\n")
    with pytest.raises(MigError, match="not a migration stream"):
        diff(a, tmp_path / "b")
    with pytest.raises(ChannelError):
        diff(a, tmp_path / "none")


PAGES = 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kernel_agrees_with_the_obvious(data):
    kinds = st.lists(st.sampled_from([-2, -1, 0, 1, 2]), min_size=PAGES, max_size=PAGES)
    wants = [data.draw(kinds), data.draw(kinds)]
    memory = np.zeros((4, 64), np.uint8)
    memory[2], memory[3] = 1, 2
    # -2: not there, -1: zero without storage; else contents in memory, of which 0 are zeros, too
    where = [
        np.array([0 if k == -2 else -1 if k == -1 else 64 * (k + 1) for k in want], np.int64)
        for want in wants
    ]
    a, b = (_core.Pages(memory, 64, where=places) for places in where)
    differ = _core.Bitmap(PAGES)
    first = data.draw(st.integers(0, PAGES))
    counts = _core.diff_pages(a, b, first, PAGES, differ)
    expected, bits = [0, 0, 0, 0], []
    for i in range(first, PAGES):
        x, y = (max(want[i], 0) if want[i] != -2 else None for want in wants)
        kind = 0 if x == y else 1 if None not in (x, y) else 2 if y is None else 3
        expected[kind] += 1
        bits += [i] if kind else []
    assert list(counts) == expected
    assert [i for i in range(PAGES) if differ[i]] == bits
    a.release()
    b.release()


def test_the_kernel_checks_what_it_is_given():
    memory = np.zeros((4, 64), np.uint8)
    a, b = _core.Pages(memory, 64), _core.Pages(memory[:3], 64)
    wide = _core.Pages(memory, 128)
    with pytest.raises(ValueError, match="pages of 64 and of 128"):
        _core.diff_pages(a, wide, 0, 1, _core.Bitmap(4))
    for first, end, nbits in ((0, 4, 4), (2, 1, 4), (0, 3, 2)):
        with pytest.raises(IndexError):
            _core.diff_pages(a, b, first, end, _core.Bitmap(nbits))
