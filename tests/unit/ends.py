"""Two ends of the `ram` section: blocks written between passes, and what becomes of them."""

from __future__ import annotations

import numpy as np
from reference import stream

from mig import SharedDirtyLog, _core
from mig.ram.delta import DeltaEncoder
from mig.ram.encode import PlainEncoder, RecordWriter, ZeroFinder
from mig.ram.load import RamLoader
from mig.ram.save import RamSaver
from mig.ram.search import MAX_BATCH, PageSearch, SourceBlock
from mig.stats import RamCounters
from mig.stream.reader import StreamReader
from mig.stream.writer import StreamWriter

SECTION = 7
NAMES = {"pc.ram": 9, "vga": 3}


def begin(page_size: int = 4096) -> bytes:
    blocks = {name: n * page_size for name, n in NAMES.items()}
    return stream.ram_start(SECTION, blocks) + stream.footer(SECTION)


class Collector:
    """Takes what is sent, at once or after the guest had time to write."""

    def __init__(self, before=lambda: None) -> None:
        self.sent = bytearray()
        self.sends = 0
        self._before = before

    def send(self, out: _core.OutQueue) -> int:
        self._before()
        data = out.tobytes()
        out.clear()
        self.sent += data
        self.sends += 1
        return len(data)


class Recorded(PageSearch):
    """Notes its batches."""

    def next_batch(self, max_pages: int = MAX_BATCH):
        batch = super().next_batch(max_pages)
        if batch is not None:
            self.batches = [*getattr(self, "batches", []), (batch.block.idstr, *batch.index)]
        return batch


class Source:
    """Blocks that are written between passes, and a sender of them."""

    def __init__(
        self,
        page_size: int,
        cache_size: int,
        names: dict[str, int] = NAMES,
        before_send=lambda: None,
    ) -> None:
        self.page_size, self.names, self.cache_size = page_size, names, cache_size
        self.memory = {name: np.zeros((n, page_size), np.uint8) for name, n in names.items()}
        self.log = SharedDirtyLog(names)
        self.log.start()
        self.pages = {name: _core.Pages(m, page_size) for name, m in self.memory.items()}
        blocks = [
            SourceBlock(name, n * page_size, self.pages[name], True, _core.Bitmap(n, fill=True))
            for name, n in names.items()
        ]
        self.sink = Collector(before_send)
        self.writer = StreamWriter(self.sink)
        self.search = Recorded(blocks, self.log)
        self.counters = RamCounters()
        self.last_stage = False
        records, zeros = RecordWriter(self.writer), ZeroFinder(lambda: True)
        self.encoder = DeltaEncoder(
            PlainEncoder(records, zeros, self.counters),
            records,
            zeros,
            self.search,
            self.counters,
            cache_size=lambda: self.cache_size,
            last_stage=lambda: self.last_stage,
        )
        self.saver = RamSaver(self.writer, self.search, self.encoder, SECTION, self.counters)

    def start(self) -> None:
        self.saver.start()
        self.saver.begin_pass()

    def write(self, name: str, page: int, offset: int, data: bytes) -> None:
        at = offset % self.page_size
        piece = np.frombuffer(data[: self.page_size - at], np.uint8)
        self.memory[name][page, at : at + len(piece)] = piece
        self.log.mark(name, page)

    def send_pass(self, batch: int = 1000) -> None:
        while found := self.search.next_batch(batch):
            self.saver.part(found)
            self.writer.flush()

    def sync(self) -> None:
        self.search.sync()
        self.saver.begin_pass()

    def end(self) -> None:
        self.last_stage = True
        self.sync()
        self.saver.end()
        self.writer.flush()

    def everything(self) -> dict[str, bytes]:
        return {name: memory.tobytes() for name, memory in self.memory.items()}


class Target:
    def __init__(self, page_size: int, names: dict[str, int] = NAMES) -> None:
        self.page_size = page_size
        self.memory = {name: bytearray(n * page_size) for name, n in names.items()}
        self.received = {name: _core.Bitmap(n) for name, n in names.items()}
        self.counters = RamCounters()

    def open_blocks(self, blocks, page_size) -> None:
        assert [b.idstr for b in blocks] == list(self.memory)

    def put(self, parser, data, start) -> None:
        if parser.npages:
            name = list(self.memory)[parser.current]
            pages = _core.Pages(self.memory[name], self.page_size, writable=True)
            parser.place(data, start, pages, self.received[name], True)

    def load(self, data: bytes) -> None:
        reader = StreamReader(data=data)
        loader = RamLoader(reader, self, self.page_size, self.counters)
        while (kind := reader.peek()) is not None:
            reader.u8("type")
            if kind == 1:
                reader.read(4 + 1 + 3 + 8, "header")
            else:
                assert reader.u32("id") == SECTION
            reader.section = "ram"
            loader.load_payload()
            assert reader.read(5, "footer") == stream.footer(SECTION)

    def everything(self) -> dict[str, bytes]:
        return {name: bytes(memory) for name, memory in self.memory.items()}
