"""open_image(): any captured VM, recognised by what the file holds."""

from __future__ import annotations

import os

from mig.channel.uri import FileUri, parse_uri
from mig.errors import ChannelError, MigError, OptionError
from mig.image.base import Image
from mig.image.mapped import MappedImage
from mig.image.stream import StreamImage
from mig.options import Capability
from mig.records import Configuration, FileHeader
from mig.stream.reader import StreamReader
from mig.wire import SectionType

#: bytes in which a configuration section ends, whatever is in it
_START = 1 << 17


def open_image(name: str | os.PathLike[str]) -> Image:
    """Open a captured VM: a path, or ``file:PATH[,offset=N]`` as in a migration URI.

    A stream or a mapped-ram file, recognised by content.
    """
    path, offset = split_name(name)
    if Capability.MAPPED_RAM in stream_capabilities(name):
        return MappedImage(path, offset=offset)
    return StreamImage(path, offset=offset)


def split_name(name: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], int]:
    """Return the path and the offset that a name of open_image() stands for."""
    if not (isinstance(name, str) and name.startswith("file:")):
        return name, 0
    uri = parse_uri(name)
    if not isinstance(uri, FileUri):
        raise OptionError(f"'{name}' is not a file")
    return uri.path, uri.offset


def stream_capabilities(name: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the capabilities that a file's stream names; none where it is no stream.

    name: as of open_image(). ChannelError when it cannot be read.
    """
    path, offset = split_name(name)
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            start = os.pread(file.fileno(), _START, offset)
    except OSError as error:
        raise ChannelError(f"{os.fspath(path)}: {error.strerror or error}") from error
    reader = StreamReader(data=start)
    try:
        FileHeader.read(reader)
        if reader.u8("the configuration section") != SectionType.CONFIGURATION:
            return ()
        return Configuration.read(reader).capabilities or ()
    except MigError:
        return ()
