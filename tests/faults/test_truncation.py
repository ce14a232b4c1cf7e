"""A stream that ends at any of its bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import streams
from faults.streams import Guest, Pieces

import mig
from mig.errors import StreamError, TruncatedError


def test_pieces_are_what_mig_sends(stream: Pieces, tmp_path: Path) -> None:
    with Guest() as guest:
        assert streams.stream_of(guest, tmp_path / "vm.mig") == stream.encode()


def _is_whole(stream: Pieces, nbytes: int) -> bool:
    # QEMU takes a stream without its description
    return nbytes in (stream.end("eof"), len(stream.encode()))


def _check(error: object, nbytes: int, what: str) -> None:
    assert isinstance(error, StreamError), f"{what}, cut at {nbytes}: {error!r}"
    assert error.offset is not None, f"{what}, cut at {nbytes}: {error!r}"
    assert 0 <= error.offset <= nbytes
    assert f"{error.offset:#x}" in str(error)


def _check_truncated(stream: Pieces, error: object, nbytes: int) -> None:
    """Where a footer should begin the error is the footer's: test_cut_before_a_footer."""
    if nbytes not in [stream.offset(f"{what} footer") for what in (*streams.RAM, "end")]:
        assert isinstance(error, TruncatedError), f"cut at {nbytes}: {error!r}"


def _check_section(stream: Pieces, error: StreamError, nbytes: int) -> None:
    """Inside a section's payload the error says which."""
    if stream.end("start version") <= nbytes < stream.offset("start footer"):
        assert error.section == "ram", nbytes
    if stream.end("end id") <= nbytes < stream.offset("end footer"):
        assert error.section == "ram", nbytes
    for name in streams.DEVICES:
        if stream.end(f"{name} version") <= nbytes < stream.end(f"{name} footer id"):
            assert error.section == name, nbytes


def test_file_cut_at_every_byte(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    data = stream.encode()
    path.write_bytes(data)
    # from one byte on: the empty file is a test of its own
    for nbytes in range(len(data) - 1, 0, -1):
        os.truncate(path, nbytes)
        error = streams.image_error(path)
        if _is_whole(stream, nbytes):
            assert error is None
        else:
            _check(error, nbytes, "file")
            _check_truncated(stream, error, nbytes)
            assert isinstance(error, StreamError)
            _check_section(stream, error, nbytes)


@pytest.mark.parametrize("what", [*streams.RAM, "end"])
def test_cut_before_a_footer(stream: Pieces, what: str, tmp_path: Path) -> None:
    """The stream ends there: nothing says that the footer is missing."""
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.encode()[: stream.offset(f"{what} footer")])
    assert isinstance(streams.image_error(path), TruncatedError)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.touch()
    error = streams.image_error(path)
    assert isinstance(error, TruncatedError)
    _check(error, 0, "file")


def test_file_cut_behind_eof_is_one_piece(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.encode()[: stream.end("eof")])
    with mig.open_image(path) as image:
        assert image.devices is None
        assert image.device_state.raw == path.read_bytes()[stream.offset("timer section") :]
        assert image.device_state.description == b""
        assert image.page("vga.vram", 1) == b"\x33" * streams.PAGE


def _dense(stream: Pieces) -> list[int]:
    """Every byte but those in the middle of pages and of the description."""
    out = set[int]()
    for label, data in stream.fields:
        at = stream.offset(label)
        if len(data) < 100:
            out |= set(range(at, at + len(data)))
        else:
            out |= {at, at + 1, at + len(data) // 2, at + len(data) - 1}
    return sorted(out)


@pytest.mark.parametrize("return_path", [False, True], ids=["plain", "return-path"])
def test_connection_cut(stream: Pieces, folder: Path, return_path: bool) -> None:
    pieces = streams.with_return_path(stream) if return_path else stream
    data, path = pieces.encode(), folder / "vm.mig"
    points = _dense(pieces)[:: 3 if return_path else 1]
    for nbytes in points:
        error = streams.receive(data[:nbytes], path)
        if _is_whole(pieces, nbytes):
            assert error is None
            path.unlink()
        else:
            _check(error, nbytes, "socket")
            _check_truncated(pieces, error, nbytes)
        assert list(folder.iterdir()) == [], nbytes


def test_connection_cut_behind_eof_is_kept(stream: Pieces, folder: Path) -> None:
    assert streams.receive(stream.encode()[: stream.end("eof")], folder / "vm.mig") is None
    with mig.open_image(folder / "vm.mig") as image:
        assert image.devices is None


def test_a_failed_capture_spares_the_older_file(stream: Pieces, folder: Path) -> None:
    path = folder / "vm.mig"
    path.write_bytes(b"an older capture")
    assert streams.receive(stream.encode()[:2000], path) is not None
    assert path.read_bytes() == b"an older capture"
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("nbytes", [0, 1, 100, 1500, 3500])
def test_cut_into_memory(stream: Pieces, nbytes: int, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.encode()[:nbytes])
    with Guest(empty=True) as guest:
        migration = mig.IncomingMigration(guest.guest)
        migration.listen(f"file:{path}")
        _check(streams.outcome(migration), nbytes, "memory guest")
        assert guest.loaded == {}
