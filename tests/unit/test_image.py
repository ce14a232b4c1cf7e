"""Captured VMs: written whole or not at all, and looked into."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from reference import stream
from reference.ram import Record
from reference.stream import Device

from mig import StreamCapture, StreamImage, _core, open_image
from mig.errors import ChannelError, MigError, OptionError, StreamError, TruncatedError
from mig.image import BlockSummary
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

PAGE = 4096
BLOCKS = {"pc.ram": 4 * PAGE, "rom": PAGE}


def page(value: int) -> bytes:
    return bytes([value]) * PAGE


BURSTS = [
    [Record(b"pc.ram", 0, page(1)), Record(b"pc.ram", 1, 0), Record(b"rom", 0, page(2))],
    [Record(b"pc.ram", 0, page(3)), Record(b"pc.ram", 2, page(4)), Record(b"pc.ram", 2, 0)],
]
DEVICES = [Device("uart", b"abc\x00\x06", 5)]
STREAM = stream.whole(BLOCKS, BURSTS, DEVICES)
CONTENTS = {
    ("pc.ram", 0): page(3),
    ("pc.ram", 1): page(0),
    ("pc.ram", 2): page(0),
    ("pc.ram", 3): None,
    ("rom", 0): page(2),
}


@pytest.fixture(params=["nameless", "named"])
def way(request, monkeypatch):
    """The two ways to keep an unfinished file out of sight."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE")
    return request.param


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def receive(capture: StreamCapture, data: bytes = STREAM) -> StreamCapture:
    StreamLoader(StreamReader(data=data), capture, on_command=lambda command: None).run()
    return capture


def contents(image: StreamImage) -> dict[tuple[str, int], bytes | None]:
    return {
        (b.idstr, i): image.page(b.idstr, i)
        for b in image.blocks
        for i in range(b.used_length // image.page_size)
    }


def capture_to(path: Path, data: bytes = STREAM) -> None:
    receive(StreamCapture(path), data).commit()


# ---- capture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fsync", [False, True])
def test_a_capture_appears_complete_in_commit(way, tmp_path, fsync):
    path = tmp_path / "vm.mig"
    capture = receive(StreamCapture(path, fsync=fsync))
    assert not path.exists()
    capture.commit()
    assert names(tmp_path) == ["vm.mig"]
    with StreamImage(path) as image:
        assert contents(image) == CONTENTS


def test_a_captured_page_stands_in_the_file_once(tmp_path):
    capture_to(tmp_path / "vm.mig")
    with StreamImage(tmp_path / "vm.mig") as image:
        assert image.records == 4


@pytest.mark.parametrize("footers", [False, True])
@pytest.mark.parametrize("with_description", [False, True])
def test_a_capture_keeps_what_the_stream_was_like(tmp_path, footers, with_description):
    data = stream.whole(
        BLOCKS,
        BURSTS,
        DEVICES,
        section_id=9,
        footers=footers,
        config=stream.configuration("pc-1", 12),
        before_end=stream.command(11),
        with_description=with_description,
    )
    capture_to(tmp_path / "vm.mig", data)
    with StreamImage(tmp_path / "vm.mig") as image:
        assert (image.machine, image.ram_section_id, image.footers) == ("pc-1", 9, footers)
        assert image.switchover_start
        assert contents(image) == CONTENTS
        tail = stream.device_state(DEVICES, footers=footers, with_description=with_description)
        assert image.device_state.raw == tail


def test_a_capture_of_no_pages_is_a_stream(tmp_path):
    capture_to(tmp_path / "vm.mig", stream.whole({}, [], []))
    with StreamImage(tmp_path / "vm.mig") as image:
        assert image.blocks == ()


def test_abort_leaves_nothing(way, tmp_path):
    for received in (False, True):
        capture = StreamCapture(tmp_path / "vm.mig")
        if received:
            receive(capture)
        capture.abort()
        assert names(tmp_path) == []


def test_abort_keeps_the_older_file(way, tmp_path):
    path = tmp_path / "vm.mig"
    path.write_bytes(b"older")
    receive(StreamCapture(path)).abort()
    assert path.read_bytes() == b"older"
    assert names(tmp_path) == ["vm.mig"]


def test_commit_replaces_the_older_file(way, tmp_path):
    path = tmp_path / "vm.mig"
    path.write_bytes(b"older")
    capture = receive(StreamCapture(path))
    assert path.read_bytes() == b"older"
    capture.commit()
    assert names(tmp_path) == ["vm.mig"]
    with StreamImage(path) as image:
        assert contents(image) == CONTENTS


def test_a_commit_that_fails_is_a_channel_error_and_abort_cleans_up(way, tmp_path):
    path = tmp_path / "vm.mig"
    capture = receive(StreamCapture(path))
    path.mkdir()
    with pytest.raises(ChannelError):
        capture.commit()
    capture.abort()
    assert names(tmp_path) == ["vm.mig"]
    assert path.is_dir()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_a_capture_refuses_what_is_no_regular_file(tmp_path, make):
    path = tmp_path / "vm.mig"
    make(path)
    with pytest.raises(ChannelError, match="not a regular file"):
        StreamCapture(path)
    assert names(tmp_path) == ["vm.mig"]


def test_a_capture_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ChannelError, match="No such file"):
        StreamCapture(tmp_path / "none" / "vm.mig")


def test_a_capture_takes_the_umask_into_account(way, tmp_path):
    old = os.umask(0o027)
    try:
        capture_to(tmp_path / "vm.mig")
    finally:
        os.umask(old)
    assert (tmp_path / "vm.mig").stat().st_mode & 0o777 == 0o640


def test_a_page_filled_with_another_byte_cannot_be_captured(tmp_path):
    capture = StreamCapture(tmp_path / "vm.mig")
    data = stream.whole(BLOCKS, [[Record(b"rom", 0, 7)]], DEVICES)
    with pytest.raises(StreamError, match=r"older than QEMU 2\.0"):
        receive(capture, data)
    capture.abort()


# ---- image -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "vm.mig"
    path.write_bytes(STREAM)
    return path


def test_an_image_tells_what_is_in_it(path):
    with StreamImage(path) as image:
        assert (image.machine, image.page_size, image.nbytes) == ("box", PAGE, len(STREAM))
        assert image.blocks == (
            BlockSummary("pc.ram", 4 * PAGE, 1, 2, 1),
            BlockSummary("rom", PAGE, 1, 0, 0),
        )
        assert image.records == 6
        assert [(d.idstr, d.payload) for d in image.devices] == [("uart", b"abc\x00\x06")]
        assert contents(image) == CONTENTS


def test_pages_that_are_not_there_are_refused(path):
    with StreamImage(path) as image:
        for index in (-1, 4, 2**40):
            with pytest.raises(IndexError):
                image.page("pc.ram", index)
        with pytest.raises(KeyError):
            image.page("none", 0)


def test_an_image_without_configuration_or_description(tmp_path):
    data = stream.whole(BLOCKS, BURSTS, DEVICES, config=b"", with_description=False)
    (tmp_path / "f").write_bytes(data)
    with StreamImage(tmp_path / "f") as image:
        assert (image.machine, image.devices) == (None, None)
        assert contents(image) == CONTENTS


@pytest.mark.parametrize("offset", [1, 100, 4096])
def test_a_stream_may_start_at_an_offset(tmp_path, offset):
    path = tmp_path / "f"
    path.write_bytes(b"\xaa" * offset + STREAM)
    with StreamImage(path, offset=offset) as image:
        assert contents(image) == CONTENTS
        assert image.nbytes == len(STREAM)
    with open_image(f"file:{path},offset={offset}") as image:
        assert contents(image) == CONTENTS


def test_open_image_takes_paths_and_uris(path):
    for name in (path, str(path), f"file:{path}"):
        with open_image(name) as image:
            assert image.machine == "box"
    with pytest.raises(OptionError):
        open_image("file:")


@pytest.mark.parametrize("offset", [0, 10])
def test_an_empty_file_is_a_truncation(tmp_path, offset):
    (tmp_path / "f").write_bytes(bytes(offset))
    with pytest.raises(TruncatedError, match="no stream starts"):
        StreamImage(tmp_path / "f", offset=offset)


@pytest.mark.parametrize("data", [b"#!/bin/sh\n", b"QEVN\0\0\0\3", bytes(5000), STREAM[1:]])
def test_a_file_that_is_no_stream_is_a_stream_error(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(StreamError, match="not a migration stream"):
        StreamImage(tmp_path / "f")


def test_files_that_cannot_be_opened_are_channel_errors(tmp_path):
    with pytest.raises(ChannelError, match="No such file"):
        StreamImage(tmp_path / "none")
    with pytest.raises(ChannelError, match="Is a directory"):
        StreamImage(tmp_path)


def test_a_truncated_file_is_a_truncation(tmp_path):
    (tmp_path / "f").write_bytes(STREAM[: len(STREAM) // 2])
    with pytest.raises(TruncatedError):
        StreamImage(tmp_path / "f")


def test_a_stream_that_claims_all_the_ram_it_may_is_a_mig_error(tmp_path):
    """Within the limit of the wire, yet more than this host could even note the places of."""
    config = stream.configuration("box", 10)
    data = stream.header() + config + stream.ram_start(2, {"a": 1 << 44}) + stream.footer(2)
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(MigError):
        StreamImage(tmp_path / "f")


def test_an_image_is_a_source_of_exactly_the_pages_it_has(path):
    with StreamImage(path) as image:
        blocks = image.source_blocks()
        assert [(b.idstr, b.used_length, b.detect_zero) for b in blocks] == [
            ("pc.ram", 4 * PAGE, False),
            ("rom", PAGE, False),
        ]
        assert [list(b.dirty) for b in blocks] == [[True, True, True, False], [True]]
        assert image.dirty_log() is None
        assert image.save_devices() == stream.device_state(DEVICES)


def test_closing_while_pages_are_on_their_way_raises_and_works_later(path):
    image = StreamImage(path)
    (block, _) = image.source_blocks()
    out = _core.OutQueue()
    out.encode(block.pages, b"pc.ram", np.array([0], dtype=np.uint64))
    with pytest.raises(BufferError):
        image.close()
    assert image.page("pc.ram", 0) == page(3)
    out.clear()
    image.close()
