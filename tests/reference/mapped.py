"""mapped-ram files by hand, with every field as it is wanted."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from reference import ram, stream

MIB = 1 << 20


@dataclass
class Block:
    """One block; what is None is as QEMU has it.

    pages: contents by number; only these have their bit set
    """

    idstr: str
    used_length: int
    pages: dict[int, bytes] = field(default_factory=dict)
    version: int = 1
    page_size: int | None = None
    bitmap_offset: int | None = None
    pages_offset: int | None = None
    bitmap: bytes | None = None
    address: int | None = None


@dataclass
class Written:
    """Where things are in a file; offsets of the stream.

    headers: of the header of each block
    end:     of the first byte behind the last block's pages
    """

    headers: dict[str, int]
    end: int
    nbytes: int


def configuration(capabilities: tuple[str, ...] = ("mapped-ram",), machine: str = "box") -> bytes:
    name = b"configuration/capabilities"
    out = stream.configuration(machine)
    names = b"".join(bytes([len(c)]) + c.encode() for c in capabilities)
    out += b"\x05" + bytes([len(name)]) + name + struct.pack(">II", 1, len(capabilities))
    return out + names


def write(
    path: Path,
    blocks: list[Block],
    devices: list[stream.Device],
    *,
    start: int = 0,
    page_size: int = 4096,
    config: bytes | None = None,
    records: bytes = b"",
    snapshot: bool = False,
) -> Written:
    """Write a file whose stream begins at ``start``.

    records:  of RAM that stand between the block list and its end
    snapshot: without the end of RAM, as QEMU does in a background snapshot
    """
    headers = {}
    with path.open("wb") as file:
        file.seek(start)
        file.write(stream.header() + (configuration() if config is None else config))
        file.write(stream.section(1, 2, "ram", 0, 4))
        total = sum(b.used_length for b in blocks)
        file.write(struct.pack(">Q", total | 0x04))
        for block in blocks:
            name = block.idstr.encode()
            file.write(bytes([len(name)]) + name + struct.pack(">Q", block.used_length))
            if block.address is not None:
                file.write(struct.pack(">Q", block.address))
            headers[block.idstr] = file.tell() - start
            _write_block(file, block, page_size)
        end = file.tell() - start
        file.write(records + ram.eos() + stream.footer(2))
        file.write(stream.ram_more(2 if snapshot else 3, 2, b"") + stream.footer(2))
        file.write(stream.device_state(devices))
        nbytes = file.tell() - start
    return Written(headers, end, nbytes)


def _write_block(file, block: Block, page_size: int) -> None:
    npages = block.used_length // page_size
    nbytes = (npages + 63) // 64 * 8
    bitmap_at = file.tell() + 28
    pages_at = (bitmap_at + nbytes + MIB - 1) // MIB * MIB
    named = (
        page_size if block.page_size is None else block.page_size,
        bitmap_at if block.bitmap_offset is None else block.bitmap_offset,
        pages_at if block.pages_offset is None else block.pages_offset,
    )
    file.write(struct.pack(">IQQQ", block.version, *named))
    if block.bitmap is not None:
        file.write(block.bitmap)
    elif block.pages:
        bits = sum(1 << page for page in block.pages)
        file.write(bits.to_bytes(nbytes, "little"))
    for page, contents in block.pages.items():
        file.seek(pages_at + page * page_size)
        file.write(contents)
    file.flush()
    # a hole, up to the end of the pages
    os.ftruncate(file.fileno(), pages_at + block.used_length)
    file.seek(pages_at + block.used_length)
