"""Streams in compressed files, unpacked while they are read: gzip, bzip2, xz, zstd, lzop."""

from __future__ import annotations

import bz2
import lzma
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable
from typing import BinaryIO, Final, Protocol, cast

import zstandard

from mig.errors import ChannelError, StreamError

#: first bytes of what each format starts with
_MAGICS: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x89LZO\0\r\n\x1a\n": "lzop",
}
#: bytes read from the file at a time
_CHUNK: Final = 1 << 18
#: most memory that a decompressor may take for its window; `xz -9` and `zstd --ultra` need half
_MAX_WINDOW: Final = 128 << 20


def packing_of(start: bytes) -> str | None:
    """Return how a file that starts so is compressed, None when it is not."""
    return next((name for magic, name in _MAGICS.items() if start.startswith(magic)), None)


class _Engine(Protocol):
    """One member of a compressed file, which may have more of them; bz2 and lzma have such ones."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Take more of the file, give ``max_length`` bytes at most."""

    @property
    def needs_input(self) -> bool:
        """Whether it gives nothing more unless it gets more."""


class _Gzip:
    """zlib's, which leaves it to its caller to keep what it has not used yet."""

    def __init__(self) -> None:
        # 31: with the header of gzip
        self._it = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._it.eof

    @property
    def unused_data(self) -> bytes:
        return self._it.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._it.unconsumed_tail

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._it.decompress(self._it.unconsumed_tail + data, max_length)


_ENGINES: Final[dict[str, Callable[[], _Engine]]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MAX_WINDOW),
}


class _Members:
    """A readable over members of gzip, bzip2 or xz."""

    def __init__(self, file: BinaryIO, packing: str) -> None:
        self._file = file
        self._new = _ENGINES[packing]
        self._engine = self._new()
        self._begun = False

    def read(self, limit: int) -> bytes:
        """Return up to ``limit`` bytes, none at the end."""
        while True:
            if self._engine.eof:
                rest = self._engine.unused_data or self._file.read(_CHUNK)
                if not rest.strip(b"\0"):
                    # padding may follow, as behind a tape's last block
                    return b""
                self._engine, data = self._new(), rest
            elif self._engine.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("the compressed data end too early")
            else:
                data = b""
            out = self._engine.decompress(data, limit)
            if out:
                return out


class _Zstd:
    """A readable over frames of zstd."""

    def __init__(self, file: BinaryIO) -> None:
        unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self._it = unpacker.stream_reader(file, read_size=_CHUNK, read_across_frames=True)

    def read(self, limit: int) -> bytes:
        return self._it.read(limit)


class _Lzop:
    """The lzop program: there is no kept library for its format."""

    def __init__(self, file: BinaryIO) -> None:
        program = shutil.which("lzop")
        if program is None:
            raise ChannelError("the file is compressed with lzop: install the program lzop")
        # it reads from where the descriptor stands, not from where Python's buffer does
        os.lseek(file.fileno(), file.tell(), os.SEEK_SET)
        self._process = subprocess.Popen(
            [program, "-dc", "--ignore-warn"],
            stdin=file.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._out = cast(BinaryIO, self._process.stdout)

    def read(self, limit: int) -> bytes:
        data = self._out.read(limit)
        if not data and self._process.wait() not in (0, 2):
            raise EOFError("lzop failed")
        return data

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()


class _Readable(Protocol):
    def read(self, limit: int) -> bytes: ...


class UnpackingSource:
    """A `Source` of the bytes that a compressed file becomes; nothing is kept of them.

    file:    stands where the compressed data start
    packing: as `packing_of` says
    """

    def __init__(self, file: BinaryIO, packing: str) -> None:
        self.timeout: float | None = None
        self._packing = packing
        self._offset = 0
        self._it: _Readable
        if packing == "zstd":
            self._it = _Zstd(file)
        elif packing == "lzop":
            self._it = _Lzop(file)
        else:
            self._it = _Members(file, packing)

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        """Fill data[start:] with at least ``at_least`` bytes; fewer are the end of the stream.

        StreamError when the compressed data are wrong.
        """
        got = 0
        while got < at_least:
            try:
                piece = self._it.read(len(data) - start - got)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                raise StreamError(f"{self._packing}: {error}", offset=self._offset) from error
            if not piece:
                break
            data[start + got : start + got + len(piece)] = piece
            got += len(piece)
            self._offset += len(piece)
        return got

    def close(self) -> None:
        """End what unpacks."""
        if isinstance(self._it, _Lzop):
            self._it.close()
