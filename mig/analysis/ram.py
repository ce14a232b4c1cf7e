"""The `ram` sections of a file: records walked over in C and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mig import _core
from mig.analysis.report import BlockCounts, Finding, RamSummary, Severity
from mig.errors import StreamError
from mig.mapped import MappedFile, MappedRamHeader
from mig.ram.blocklist import read_block_list
from mig.records import BlockInfo
from mig.stream.reader import StreamReader
from mig.wire import RAM_IDSTR, RamFlag

#: bytes of a bitmap looked at at a time
_BITMAP_STEP: Final = 1 << 20


class RamWalk:
    """Walks over the payloads of `ram` sections.

    mapped:    the reader's bytes are those of a mapped file
    addresses, host_pages: what the block list may have (see `BlockList.read`)
    mapped_ram: the file, where it is one with mapped-ram
    """

    def __init__(
        self,
        reader: StreamReader,
        page_size: int,
        found: Callable[[Finding], None],
        *,
        mapped: bool,
        addresses: bool,
        host_pages: bool,
        mapped_ram: MappedFile | None,
    ) -> None:
        self._reader = reader
        self._page_size = page_size
        self._found = found
        self._mapped = mapped
        self._addresses = addresses
        self._host_pages = host_pages
        self._mapped_ram = mapped_ram
        self._walker: _core.RamWalker | None = None
        self._blocks: tuple[BlockInfo, ...] = ()
        self._in_file: list[int] = []
        self._total = 0
        self._flushes = 0
        self.parts = 0

    def move_to(self, reader: StreamReader, *, mapped: bool) -> None:
        """Go on with another reader."""
        self._reader, self._mapped = reader, mapped

    def walk_payload(self) -> None:
        """Go over one section's payload up to and including its EOS; StreamError."""
        reader = self._reader
        reader.section = RAM_IDSTR
        if self._walker is None:
            self._walk_to_block_list()
        if self._walker is not None:
            self._walk_records(self._walker)

    def _walk_to_block_list(self) -> None:
        reader = self._reader
        listed = read_block_list(
            reader,
            self._page_size,
            addresses=self._addresses,
            host_pages=self._host_pages,
            mapped=self._mapped_ram,
        )
        if listed is None:
            return
        self._blocks, self._total = listed.blocks, listed.total
        self._in_file = [self._pages_in_file(block) for block in listed.blocks]
        try:
            self._walker = _core.RamWalker(
                [(b.idstr.encode(), b.npages(self._page_size)) for b in listed.blocks],
                self._page_size,
                mapped=self._mapped,
            )
        except MemoryError as error:
            text = f"no memory to note the pages of {self._total} bytes of RAM"
            raise reader.error(text) from error

    # ---- records ----------------------------------------------------------------------------

    def _walk_records(self, walker: _core.RamWalker) -> None:
        reader = self._reader
        stop = _core.STOP_MORE
        while stop != _core.STOP_EOS:
            start, end = reader.window
            try:
                stop = walker.walk(reader.buffer, start, end)
            except _core.RamRecordError as error:
                self._note_faults(walker)
                reader.advance(walker.consumed)
                block = self._name(walker.wrong_block)
                raise StreamError(
                    str(error), offset=reader.offset, section=RAM_IDSTR, block=block
                ) from error
            except MemoryError as error:
                raise reader.error("no memory to unpack pages") from error
            self._note_faults(walker)
            reader.advance(walker.consumed)
            if stop == _core.STOP_MORE:
                reader.need(walker.need, "a RAM record")
            elif stop == _core.STOP_OTHER:
                self._other_record(walker)

    def lose_block(self) -> None:
        """Something of the stream is left out."""
        if self._walker is not None:
            self._walker.lose_block()

    def _name(self, number: int) -> str | None:
        return self._blocks[number].idstr if 0 <= number < len(self._blocks) else None

    def _note_faults(self, walker: _core.RamWalker) -> None:
        """Records that were gone over, but whose contents are wrong."""
        count, faults = walker.faults()
        for offset, number, text in faults:
            at = self._reader.offset + offset
            self._found(Finding(Severity.ERROR, text, at, RAM_IDSTR, self._name(number)))
        if count > len(faults):
            text = f"{count - len(faults)} more records whose contents are wrong"
            self._found(Finding(Severity.ERROR, text, None, RAM_IDSTR))

    def _other_record(self, walker: _core.RamWalker) -> None:
        reader = self._reader
        flags = walker.word & (self._page_size - 1)
        if flags != RamFlag.MULTIFD_FLUSH:
            known = {RamFlag.MEM_SIZE: "a second block list", RamFlag.HOOK: "a record of RDMA"}
            what = known.get(RamFlag(flags), f"unknown RAM record: flags {flags:#x}")
            block = self._name(walker.current)
            raise StreamError(what, offset=reader.offset, section=RAM_IDSTR, block=block)
        reader.u64("a RAM record")
        self._flushes += 1

    # ---- mapped-ram -------------------------------------------------------------------------

    def _pages_in_file(self, block: BlockInfo) -> int:
        """How many pages a mapped-ram file has of a block, by its bitmap."""
        if block.mapped is None or self._mapped_ram is None or block.mapped.is_left_out:
            return 0
        reader, npages = self._reader, block.npages(self._page_size)
        start = block.mapped.bitmap_offset - self._mapped_ram.start
        nbytes = MappedRamHeader.bitmap_nbytes(npages)
        count = 0
        for at in range(0, nbytes, _BITMAP_STEP):
            piece = bytes(reader.buffer[start + at : start + min(at + _BITMAP_STEP, nbytes)])
            count += _core.Bitmap.from_wire(8 * len(piece), piece).count()
            extra = 8 * (at + len(piece)) - npages
            if extra > 0:
                count -= self._past_the_end(block, piece, extra, start + at + len(piece))
        return count

    def _past_the_end(self, block: BlockInfo, piece: bytes, extra: int, end: int) -> int:
        """Bits of pages that the block does not have: how many of them are set."""
        wrong = (int.from_bytes(piece, "little") >> (8 * len(piece) - extra)).bit_count()
        if wrong:
            text = f"the bitmap has {wrong} pages behind the end of the block"
            self._found(Finding(Severity.ERROR, text, end - 8, RAM_IDSTR, block.idstr))
        return wrong

    # ---- results ----------------------------------------------------------------------------

    def summary(self) -> RamSummary | None:
        """Return what was found; None when there was no block list."""
        if self._walker is None:
            return None
        blocks = tuple(self._counts(self._walker, i) for i in range(len(self._blocks)))
        if self._walker.lost:
            text = f"{self._walker.lost} records could not be ascribed to a block"
            self._found(Finding(Severity.WARNING, text, None, RAM_IDSTR))
        return RamSummary(self._total, blocks, self.parts, self._flushes)

    def _counts(self, walker: _core.RamWalker, number: int) -> BlockCounts:
        block, n = self._blocks[number], walker.counts(number)
        npages = block.npages(self._page_size)
        data, zero = n["npages"] - n["nzero"], n["nzero"]
        if block.mapped is not None and not block.mapped.is_left_out:
            # what has no bit is zero
            data, zero = self._in_file[number], npages - self._in_file[number]
        return BlockCounts(
            block.idstr,
            block.used_length,
            data,
            zero,
            npages - data - zero,
            n["normal"],
            n["fill"],
            n["xbzrle"],
            n["compressed"],
            n["repeated"],
            n["filled"],
            n["record_bytes"],
            n["xbzrle_bytes"],
            n["compressed_bytes"],
            block.address,
            block.host_page_size,
        )
