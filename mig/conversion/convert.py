"""convert(): a captured VM in another format, or its memory alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mig import _core
from mig.conversion.elf import core_of, memory_offset
from mig.conversion.rawmemory import OtherMemory, main_block, write_memory
from mig.conversion.x86 import MAIN_BLOCK, Range, cpus_of, kernel_mappings, memory_ranges
from mig.engine import IncomingMigration, OutgoingMigration
from mig.errors import ChannelError, MismatchError, OptionError, UnsupportedError
from mig.image import Image, MappedCapture, StreamCapture, open_image
from mig.image.capture import Capture
from mig.image.found import FoundStream, find_stream
from mig.image.newfile import NewFile
from mig.image.unpack import UnpackingSource
from mig.options import Capability
from mig.records import Command
from mig.savevm.fields import decode_devices
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader


class Format(StrEnum):
    """What a VM, or its memory, can be written as.

    mapped-ram: QEMU 9.0 and later start from it; a place for every page
    stream:     every QEMU starts from it
    raw:        the bytes of one block, zero pages are holes
    elf:        a core of a PC that gdb and crash read
    """

    MAPPED_RAM = "mapped-ram"
    STREAM = "stream"
    RAW = "raw"
    ELF = "elf"


def convert(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: Format | str = Format.MAPPED_RAM,  # noqa: A002
    *,
    block: str | None = None,
    memory: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Write the VM in ``source``, any image that open_image() takes, to ``path``.

    Streams with what a file does not keep (XBZRLE, compressed pages, pages that come again) are
    taken, too, and files that are compressed as a whole (gzip, bzip2, xz, zstd, lzop; save files of
    libvirt): what is written has each page once.

    format: see Format
    block:  the block that 'raw' writes; default: the longest, which is the machine's memory
    memory: files with other contents of whole blocks, by their names: raw, or an ELF core as this
            function makes it

    The file appears, complete, at the end, or not at all. MigError: StreamError for what is wrong
    with the source, MismatchError where there is no such block, or no PC for an ELF core.
    """
    kind = _format(format)
    if block is not None and kind != Format.RAW:
        raise OptionError("only raw memory is of one block")
    if kind in _CAPTURES and not memory and _receive(source, path, kind):
        return
    files = {name: Path(file) for name, file in (memory or {}).items()}
    places = {name: (file, memory_offset(file)) for name, file in files.items()}
    with _opened(source, Path(path).parent) as image:
        _write(image, places, path, kind, block)


def save_image(
    image: Image,
    path: str | os.PathLike[str],
    format: Format | str = Format.MAPPED_RAM,  # noqa: A002
) -> None:
    """Write the VM of an open image; see convert()."""
    _write(image, {}, path, _format(format), None)


def _format(name: Format | str) -> Format:
    try:
        return Format(name)
    except ValueError:
        raise OptionError(f"format '{name}' is none of {', '.join(Format)}") from None


def _write(
    image: Image,
    places: Mapping[str, tuple[Path, int]],
    path: str | os.PathLike[str],
    kind: Format,
    block: str | None,
) -> None:
    with closing(OtherMemory(image, places)) as guest:
        if kind in _CAPTURES:
            _send(guest, path, kind)
            return
        with _written(path) as fd:
            if kind == Format.RAW:
                _write_raw(guest, fd, block)
            else:
                _write_core(image, guest, fd)


_CAPTURES: dict[Format, Callable[..., MappedCapture | StreamCapture]] = {
    Format.MAPPED_RAM: MappedCapture,
    Format.STREAM: StreamCapture,
}

# ---- reading ------------------------------------------------------------------------------------


def _receive(source: str | os.PathLike[str], path: str | os.PathLike[str], kind: Format) -> bool:
    """Take a stream in, as from a source; False when it is a mapped-ram file."""
    found = find_stream(source)
    if found.packing is None and Capability.MAPPED_RAM in found.capabilities:
        return False
    capture = _CAPTURES[kind](path)
    try:
        if found.packing is None:
            _listen(found, capture)
        else:
            _unpack(found, found.packing, capture)
    except BaseException:
        capture.abort()
        raise
    return True


def _listen(found: FoundStream, capture: Capture) -> None:
    shared = {Capability.X_IGNORE_SHARED} & set(found.capabilities)
    incoming = IncomingMigration(capture, capabilities=shared)
    incoming.listen(f"file:{os.fspath(found.path)},offset={found.offset}")
    incoming.wait()


def _unpack(found: FoundStream, packing: str, capture: Capture) -> None:
    with open(found.path, "rb") as file:  # noqa: PTH123
        file.seek(found.offset)
        with closing(UnpackingSource(file, packing)) as unpacked:
            StreamLoader(
                StreamReader(unpacked), capture, on_command=_ignore, capabilities=None
            ).run()
    capture.commit()


def _ignore(command: Command) -> None:
    """Nobody is told anything."""


@contextmanager
def _opened(source: str | os.PathLike[str], folder: Path) -> Iterator[Image]:
    """Open an image; a stream with records that no image has is laid down anew first."""
    try:
        image = open_image(source)
    except UnsupportedError:
        found = find_stream(source)
        if found.packing is None and Capability.MAPPED_RAM in found.capabilities:
            # to lay it down anew, it would be opened again
            raise
        with _beside(folder) as copy:
            convert(source, copy)
            with open_image(copy) as image:
                yield image
        return
    with image:
        yield image


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A place for a copy, where there is room for what is made of it; gone at the end."""
    try:
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".mig-")
    except OSError as error:
        raise ChannelError(f"{folder}: {error.strerror}") from error
    with made as name:
        yield Path(name) / "vm"


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def _written(path: str | os.PathLike[str]) -> Iterator[int]:
    """A new file that appears when all is done."""
    file = NewFile(path)
    try:
        with file.naming():
            yield file.fd
        file.commit()
    except BaseException:
        file.abort()
        raise


def _send(guest: OtherMemory, path: str | os.PathLike[str], kind: Format) -> None:
    mapped = {Capability.MAPPED_RAM} if kind == Format.MAPPED_RAM else set()
    shared = {Capability.X_IGNORE_SHARED} if guest.ignores_shared else set()
    with _written(path) as fd:
        outgoing = OutgoingMigration(
            guest, capabilities=mapped | shared, parameters={"max-bandwidth": 0}
        )
        outgoing.start(f"file:/proc/self/fd/{fd}")
        outgoing.wait()


def _write_raw(guest: OtherMemory, fd: int, block: str | None) -> None:
    blocks = guest.source_blocks()
    found = [b for b in blocks if b.idstr == block] if block is not None else [main_block(blocks)]
    if not found:
        raise MismatchError("the image has no such block", block=block)
    write_memory(fd, found[0], 0)


def _write_core(image: Image, guest: OtherMemory, fd: int) -> None:
    if image.devices is None:
        raise MismatchError("the image does not describe its devices: no ELF core can be made")
    devices = decode_devices(image.device_state)
    memory = next((b for b in guest.source_blocks() if b.idstr == MAIN_BLOCK), None)
    if memory is None:
        raise MismatchError("the image is none of a PC", block=MAIN_BLOCK)
    cpus, ranges = cpus_of(devices), memory_ranges(devices, memory.used_length)

    def table(address: int) -> NDArray[np.uint64] | None:
        number, start = divmod(_offset_of(address, ranges), image.page_size)
        page = guest.page(MAIN_BLOCK, number)
        # the stream says how long its pages are, and a table has 4 KiB
        return None if page is None else np.frombuffer(page[start : start + 4096], dtype="<u8")

    core = core_of(cpus, ranges, kernel_mappings(cpus, table))
    _core.PageFile(fd).put(core.head, 0)
    write_memory(fd, memory, core.memory_offset)


def _offset_of(address: int, ranges: tuple[Range, ...]) -> int:
    """Return where a physical address is in the block; -1: it is no memory."""
    for r in ranges:
        if r.address <= address < r.address + r.nbytes:
            return r.offset + address - r.address
    return -1
