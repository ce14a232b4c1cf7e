"""What a file is, recognised by its content: where the stream in it starts, and how it is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from mig.channel.uri import FileUri, parse_uri
from mig.errors import ChannelError, MigError, OptionError
from mig.image.libvirt import HEADER_SIZE, MAX_DATA, LibvirtSave, is_libvirt_save, parse_save
from mig.image.unpack import packing_of
from mig.records import Configuration, FileHeader
from mig.stream.reader import StreamReader
from mig.wire import SectionType

#: bytes in which a configuration section ends, whatever is in it
_START: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class FoundStream:
    """Where in a file a stream is.

    offset:  byte where it starts, behind the header and XML of a save file of libvirt
    packing: how it is compressed: see `mig.image.unpack`; None when it is not
    start:   its first bytes, or those of what they are compressed to
    save:    what is in front of it in a save file of libvirt, None elsewhere
    """

    path: str | os.PathLike[str]
    offset: int
    packing: str | None
    start: bytes
    save: LibvirtSave | None

    @classmethod
    def in_file(cls, path: str | os.PathLike[str], fd: int, offset: int) -> FoundStream:
        """Look at an open file from ``offset`` on; StreamError for a broken save file, OSError."""
        save = None
        start = os.pread(fd, _START, offset)
        if is_libvirt_save(start):
            save = parse_save(os.pread(fd, HEADER_SIZE + MAX_DATA, offset))
            offset += save.stream_offset
            start = os.pread(fd, _START, offset)
        return cls(path, offset, packing_of(start), start, save)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Those that the stream names; none where it is no stream, as its reader will say."""
        reader = StreamReader(data=self.start)
        try:
            FileHeader.read(reader)
            if reader.u8("the configuration section") != SectionType.CONFIGURATION:
                return ()
            return Configuration.read(reader).capabilities or ()
        except MigError:
            return ()


def split_name(name: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], int]:
    """Return the path and the offset that a name of open_image() stands for."""
    if not (isinstance(name, str) and name.startswith("file:")):
        return name, 0
    uri = parse_uri(name)
    if not isinstance(uri, FileUri):
        raise OptionError(f"'{name}' is not a file")
    return uri.path, uri.offset


def find_stream(name: str | os.PathLike[str]) -> FoundStream:
    """Find the stream in a file; ChannelError, and StreamError for a broken save file of libvirt.

    name: as of open_image()
    """
    path, offset = split_name(name)
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return FoundStream.in_file(path, file.fileno(), offset)
    except OSError as error:
        raise ChannelError(f"{os.fspath(path)}: {error.strerror or error}") from error
