"""open_image(): any captured VM, recognised by what the file holds."""

from __future__ import annotations

import os

from mig.errors import UnsupportedError
from mig.image.base import Image
from mig.image.found import find_stream
from mig.image.mapped import MappedImage
from mig.image.stream import StreamImage
from mig.options import Capability


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
