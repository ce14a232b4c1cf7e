"""Loading the `ram` section: block list, then bursts of page records until EOS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from mig import _core
from mig.errors import MismatchError, StreamError, UnsupportedError
from mig.mapped import MappedFile
from mig.ram.blocklist import read_block_list
from mig.records import BlockInfo
from mig.stats import RamCounters
from mig.stream.reader import StreamReader
from mig.wire import RamFlag

#: records of features that this loader leaves out, and the capability that makes a source send them
_CAPABILITY_OF = {
    RamFlag.MULTIFD_FLUSH: "multifd",
}


#: bytes of a record before its page, when it continues a block
_WORD = 8


class PageSink(Protocol):
    """Where loaded pages go."""

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """Take the block list; MismatchError when these blocks cannot be loaded."""

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Take the parser's last burst, parsed from ``data`` at ``start``."""


@runtime_checkable
class LandingSink(PageSink, Protocol):
    """A PageSink that can have pages read straight to where they belong."""

    def land(
        self, parser: _core.RamParser, fd: _core.Descriptor, data: bytearray, held: int
    ) -> tuple[int, int, bool] | None:
        """Read more pages of the parser's block; as land_in_memory() of `mig._core`."""


class PageLanes(Protocol):
    """Channels beside the main stream that bring pages, too (multifd)."""

    def open(self, parser: _core.RamParser, section_id: int) -> None:
        """The blocks are known: pages can come."""

    def sync(self) -> None:
        """Wait until every channel has come to this place."""

    def finish(self) -> None:
        """The section has ended: from now on they bring nothing."""


class MappedPages(Protocol):
    """Pages that have their places in the file that the stream is in (mapped-ram)."""

    @property
    def file(self) -> MappedFile:
        """The file."""

    def load(self, blocks: Sequence[BlockInfo], page_size: int) -> tuple[int, int]:
        """Load all pages; returns how many there were, and how many of them are zero."""


class RamLoader:
    """Reads payloads of the `ram` section of one stream.

    decompress_threads: how many inflate compressed pages, once there are some
    addresses: whether the block list has them (capability x-ignore-shared)
    host_pages: whether it may have sizes of host pages (capability postcopy-ram)

    The current block is remembered over sections: the first record of a section may say CONTINUE.
    Matches ram_load() and ram_load_precopy() of QEMU.

    section_id: of `ram`
    lanes:      None: pages come on the main stream only
    sync_every_section: whether the lanes are synchronised where a section ends
    mapped:     loads the pages of a stream with mapped-ram, which has none itself
    """

    def __init__(
        self,
        reader: StreamReader,
        sink: PageSink,
        page_size: int,
        counters: RamCounters,
        *,
        decompress_threads: int = 2,
        section_id: int = 0,
        lanes: PageLanes | None = None,
        sync_every_section: bool = False,
        addresses: bool = False,
        host_pages: bool = False,
        mapped: MappedPages | None = None,
    ) -> None:
        self._mapped = mapped
        self._section_id = section_id
        self._lanes = lanes
        self._sync_every_section = sync_every_section
        self._reader = reader
        self._sink = sink
        self._page_size = page_size
        self._counters = counters
        self._decompress_threads = decompress_threads
        self._addresses = addresses
        self._host_pages = host_pages
        self._parser: _core.RamParser | None = None
        self.blocks: tuple[BlockInfo, ...] = ()

    @property
    def parser(self) -> _core.RamParser | None:
        """What parses its records, None before the block list."""
        return self._parser

    def move_to(self, reader: StreamReader) -> None:
        """Go on with another connection (recovery of a postcopy)."""
        self._reader = reader

    def beside(self, reader: StreamReader) -> RamLoader:
        """Return the loader of another connection that brings pages of these blocks."""
        other = RamLoader(reader, self._sink, self._page_size, self._counters)
        other.blocks = self.blocks
        other._parser = self._new_parser()
        return other

    def _new_parser(self) -> _core.RamParser:
        return _core.RamParser(
            [(b.idstr.encode(), b.npages(self._page_size)) for b in self.blocks],
            self._page_size,
            threads=self._decompress_threads,
        )

    def load_payload(self) -> None:
        """Read one section's payload up to and including its EOS."""
        if self._parser is None:
            self._load_before_block_list()
        if self._parser is not None:
            self._load_pages(self._parser)

    def _load_before_block_list(self) -> None:
        reader = self._reader
        at = reader.offset
        listed = read_block_list(
            reader,
            self._page_size,
            addresses=self._addresses,
            host_pages=self._host_pages,
            mapped=None if self._mapped is None else self._mapped.file,
        )
        if listed is None:
            return
        self.blocks = listed.blocks
        try:
            self._sink.open_blocks(self.blocks, self._page_size)
        except MismatchError as error:
            raise MismatchError(
                error.message, offset=at, section=reader.section, block=error.block
            ) from error
        except MemoryError as error:
            raise reader.error(f"no memory for {listed.total} bytes of RAM", offset=at) from error
        self._counters.total = listed.total
        self._parser = self._new_parser()
        if self._lanes is not None:
            self._lanes.open(self._parser, self._section_id)
        if self._mapped is not None:
            npages, nzero = self._mapped.load(self.blocks, self._page_size)
            self._counters.add(npages, nzero)

    def _load_pages(self, parser: _core.RamParser) -> None:
        """The hot loop: every turn parses and places one burst, a buffer full if it is there."""
        reader, sink, counters = self._reader, self._sink, self._counters
        stop = _core.STOP_FULL
        while stop != _core.STOP_EOS:
            start, end = reader.window
            try:
                stop = parser.parse(reader.buffer, start, end)
            except _core.RamRecordError as error:
                raise self._wrong_record(parser, str(error)) from error
            if parser.npages and self._mapped is not None:
                raise reader.error("RAM record of a page in a stream with mapped-ram")
            try:
                sink.put(parser, reader.buffer, start)
            except MemoryError as error:
                raise reader.error("no memory for what becomes of pages") from error
            except _core.RamRecordError as error:
                raise self._refused_record(parser, start, error) from error
            counters.add(parser.npages, parser.nfill, parser.nxbzrle, parser.npacked)
            reader.advance(parser.consumed)
            if stop == _core.STOP_MORE and not self._land(parser):
                reader.need(parser.need, "a RAM record")
            elif stop == _core.STOP_OTHER:
                self._other_record(parser)
        if self._lanes is not None and self._sync_every_section:
            self._lanes.sync()

    def _land(self, parser: _core.RamParser) -> bool:
        """The buffer has a part of a record at most: read on past it where that is worth it."""
        sink = self._sink
        if not isinstance(sink, LandingSink):
            return False
        npages = self._reader.land(_WORD + self._page_size, partial(sink.land, parser))
        self._counters.add(npages, 0, 0, 0)
        return npages > 0

    def _other_record(self, parser: _core.RamParser) -> None:
        """The next record is no page."""
        if parser.word != RamFlag.MULTIFD_FLUSH or self._lanes is None:
            raise self._unknown_record(parser)
        self._reader.u64("a RAM record")
        self._lanes.sync()

    def _block_name(self, parser: _core.RamParser) -> str | None:
        return self.blocks[parser.current].idstr if parser.current >= 0 else None

    def _wrong_record(self, parser: _core.RamParser, message: str) -> StreamError:
        """The record at the end of the last burst is wrong."""
        reader = self._reader
        at = reader.offset + parser.consumed
        block = self._block_name(parser)
        return StreamError(message, offset=at, section=reader.section, block=block)

    def _refused_record(
        self, parser: _core.RamParser, start: int, error: _core.RamRecordError
    ) -> StreamError:
        """A record of the last burst, parsed at ``start`` of the buffer, could not be taken."""
        reader = self._reader
        at = reader.offset + parser.wrong_offset(reader.buffer, start)
        block = self._block_name(parser)
        if error.capability is not None:
            return UnsupportedError(
                str(error),
                capability=error.capability,
                offset=at,
                section=reader.section,
                block=block,
            )
        return StreamError(str(error), offset=at, section=reader.section, block=block)

    def _unknown_record(self, parser: _core.RamParser) -> StreamError:
        """The next record is no page: name the feature it belongs to."""
        reader = self._reader
        flags = parser.word & (self._page_size - 1) & ~int(RamFlag.CONTINUE)
        for flag, capability in _CAPABILITY_OF.items():
            if flags == flag:
                return UnsupportedError(
                    f"RAM record {flag.name} is not supported",
                    capability=capability,
                    offset=reader.offset,
                    section=reader.section,
                    block=self._block_name(parser),
                )
        if flags == RamFlag.HOOK:
            return UnsupportedError(
                "the source migrates by RDMA: give it another URI",
                offset=reader.offset,
                section=reader.section,
            )
        if flags == RamFlag.MEM_SIZE:
            return reader.error("a second block list")
        return reader.error(f"unknown RAM record: flags {flags:#x}")
