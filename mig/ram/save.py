"""Saving the `ram` section: block list, then batches of pages."""

from __future__ import annotations

import struct

from mig.pages import HOST_PAGE_SIZE
from mig.ram.encode import PageEncoder
from mig.ram.search import PageBatch, PageSearch
from mig.records import BlockInfo, BlockList, SectionHeader, encode_continuation, encode_footer
from mig.stats import MigrationInfo, RamCounters
from mig.stream.writer import StreamWriter
from mig.wire import RAM_IDSTR, RAM_VERSION, RamFlag, SectionType

_EOS = struct.pack(">Q", RamFlag.EOS)


class RamSaver:
    """Writes the sections of `ram` into one stream; matches ram_save_setup/iterate/complete()."""

    def __init__(
        self,
        writer: StreamWriter,
        search: PageSearch,
        encoder: PageEncoder,
        section_id: int,
        counters: RamCounters,
    ) -> None:
        self._writer = writer
        self._search = search
        self._encoder = encoder
        self._section_id = section_id
        self._counters = counters
        #: whether sections end with footers
        self.footers = True
        #: whether the block list has page sizes other than the host's (capability postcopy-ram)
        self.names_host_pages = False

    def start(self) -> None:
        """SECTION_START with the block list, which also has the blocks that are not sent."""
        search = self._search
        header = SectionHeader(self._section_id, RAM_IDSTR, 0, RAM_VERSION)
        listed = BlockList(
            tuple(
                BlockInfo(
                    b.idstr,
                    b.used_length,
                    b.address if search.ignore_shared else None,
                    b.host_page_size
                    if self.names_host_pages and b.host_page_size != HOST_PAGE_SIZE
                    else None,
                )
                for b in search.listed
            )
        )
        self._counters.total = sum(b.used_length for b in search.blocks)
        self._writer.put(header.encode(SectionType.START))
        self._encoder.put_block_list(self._writer, listed)
        self._end_section(SectionType.START)

    def part(self, batch: PageBatch) -> None:
        """SECTION_PART with one batch."""
        self._writer.put(encode_continuation(SectionType.PART, self._section_id))
        self._encoder.encode(batch)
        self._end_section(SectionType.PART)

    @property
    def around_part(self) -> tuple[bytes, bytes]:
        """What somebody else has to write before and behind the records of a SECTION_PART."""
        return encode_continuation(SectionType.PART, self._section_id), self._tail

    def end(self) -> None:
        """SECTION_END with every page that is still dirty."""
        self._writer.put(encode_continuation(SectionType.END, self._section_id))
        while batch := self._search.next_batch():
            self._encoder.encode(batch)
        self._end_section(SectionType.END)

    @property
    def nbytes(self) -> int:
        """Bytes so far, on the main stream and beside it."""
        return self._writer.offset + self._encoder.nbytes_beside

    @property
    def nbytes_beside(self) -> int:
        """Of them, bytes beside the main stream."""
        return self._encoder.nbytes_beside

    @property
    def npages(self) -> int:
        """Page records so far."""
        return self._counters.records

    def begin_pass(self) -> None:
        """The dirty log was synced."""
        self._encoder.begin_pass()

    def end_period(self) -> None:
        """A second or so is over."""
        self._encoder.end_period()

    def report(self, info: MigrationInfo) -> MigrationInfo:
        """Add statistics of the encoding. Any thread."""
        return self._encoder.report(info)

    def settle(self) -> None:
        """Wait until what was given to send is counted in `nbytes`."""
        self._encoder.settle()

    @property
    def _tail(self) -> bytes:
        """What ends a section."""
        return _EOS + (encode_footer(self._section_id) if self.footers else b"")

    def _end_section(self, kind: SectionType) -> None:
        self._encoder.end_section(kind)
        self._writer.put(self._tail)
        # channels beside the stream may wait for what was said here
        self._writer.flush()
