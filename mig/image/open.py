"""open_image(): any captured VM, recognised by what the file holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mig.channel.uri import FileUri, parse_uri
from mig.errors import ChannelError, MigError, OptionError, UnsupportedError
from mig.image.base import Image
from mig.image.libvirt import HEADER_SIZE, MAX_DATA, is_libvirt_save, parse_save
from mig.image.mapped import MappedImage
from mig.image.stream import StreamImage
from mig.image.unpack import packing_of
from mig.options import Capability
from mig.records import Configuration, FileHeader
from mig.stream.reader import StreamReader
from mig.wire import SectionType

#: bytes in which a configuration section ends, whatever is in it
_START = 1 << 17


@dataclass(frozen=True, slots=True)
class FoundStream:
    """Where in a file a stream is.

    offset:  byte where it starts, behind the header and XML of a save file of libvirt
    packing: how it is compressed: see `mig.image.unpack`; None when it is not
    start:   its first bytes, or those of what they are compressed to
    """

    path: str | os.PathLike[str]
    offset: int
    packing: str | None
    start: bytes

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


def open_image(name: str | os.PathLike[str]) -> Image:
    """Open a captured VM: a path, or ``file:PATH[,offset=N]`` as in a migration URI.

    A stream, a mapped-ram file, or a save file of libvirt that holds one of them, recognised by
    content. UnsupportedError for one that is compressed: convert() unpacks it.
    """
    found = find_stream(name)
    if found.packing is not None:
        raise UnsupportedError(
            f"{os.fspath(found.path)} is compressed by {found.packing}: no page of it can be found "
            "without unpacking all before; convert it",
            offset=found.offset,
        )
    if Capability.MAPPED_RAM in found.capabilities:
        return MappedImage(found.path, offset=found.offset)
    return StreamImage(found.path, offset=found.offset)


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
            start = os.pread(file.fileno(), _START, offset)
            if is_libvirt_save(start):
                head = os.pread(file.fileno(), HEADER_SIZE + MAX_DATA, offset)
                offset += parse_save(head).stream_offset
                start = os.pread(file.fileno(), _START, offset)
    except OSError as error:
        raise ChannelError(f"{os.fspath(path)}: {error.strerror or error}") from error
    return FoundStream(path, offset, packing_of(start), start)
