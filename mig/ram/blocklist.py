"""The record that the first `ram` section of a stream starts with."""

from __future__ import annotations

from mig.mapped import MappedFile
from mig.records import BlockList
from mig.stream.reader import StreamReader
from mig.wire import RamFlag


def read_block_list(
    reader: StreamReader,
    page_size: int,
    *,
    addresses: bool,
    host_pages: bool,
    mapped: MappedFile | None,
) -> BlockList | None:
    """Read it, word and list; None where the section ends without one.

    addresses, host_pages, mapped: as of BlockList.read()

    StreamError for any other record.
    """
    at = reader.offset
    word = reader.u64("a RAM record")
    flags = RamFlag(word & (page_size - 1))
    if flags == RamFlag.EOS:
        return None
    if flags != RamFlag.MEM_SIZE:
        raise reader.error(f"RAM record {flags!r} before the block list", offset=at)
    return BlockList.read(
        reader,
        word - flags,
        page_size,
        addresses=addresses,
        host_pages=host_pages,
        mapped=mapped,
    )
