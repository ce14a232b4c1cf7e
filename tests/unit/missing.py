"""A guest whose memory is filled by a postcopy made by hand, while threads touch it."""

from __future__ import annotations

import os
import threading

import numpy as np
from reference import postcopy, ram, stream
from reference.postcopy import PAGE, Source
from unit.boxes import FOREVER

import mig

NPAGES = 256
RAM, BIG = b"pc.ram", b"big"
UNIT = 16 * PAGE
#: pages of precopy; of these the odd ones are discarded
EARLY = 64


def page(number: int, block: bytes = RAM) -> bytes:
    """What a page holds in the end; every eighth is zero."""
    if number % 8 == 0:
        return bytes(PAGE)
    return bytes([number % 251 + 1, len(block)]) * (PAGE // 2)


def record(number: int, block: bytes = RAM) -> ram.Record:
    contents = page(number, block)
    return ram.Record(block, number, contents if any(contents) else 0)


class Box:
    """A guest whose vCPU is a thread that reads its memory without Python's lock."""

    guest_type = mig.MemoryGuest

    def __init__(self, made, folder, *, capabilities=("postcopy-ram",), shared=False, big=False):
        self.memory = mig.GuestMemory()
        fd = self.memfd = os.memfd_create("ram") if shared else None
        mine = False if shared else None
        self.memory.add("pc.ram", NPAGES * PAGE, fd=fd, shared=mine)
        self.blocks = {"pc.ram": NPAGES * PAGE}
        if big:
            fd = self.bigfd = os.memfd_create("big") if shared else None
            self.memory.add("big", 4 * UNIT, fd=fd, shared=mine, host_page_size=UNIT)
            self.blocks["big"] = 4 * UNIT
        self.big = big
        for block in self.memory:
            # what was there before must not be seen
            np.frombuffer(block.view, dtype=np.uint8)[:] = 0xEE
        self.loaded: list[bytes] = []
        devices = mig.DeviceRegistry()
        devices.register("cpu", save=lambda: b"", load=self._load)
        self.resumed = threading.Event()
        self.guest = self.guest_type("box", self.memory, devices, on_resume=self.resumed.set)
        self.on_load = lambda: None
        self.changed = threading.Condition()
        self.incoming = made.incoming(
            self.guest, capabilities=capabilities, on_event=lambda event: self._note()
        )
        self.incoming.listen(f"unix:{folder / 'in'}")
        self.source = Source.connect(self.incoming.uri)

    def _load(self, payload: bytes, version_id: int) -> None:
        self.loaded.append(payload)
        self.on_load()

    def _note(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def reach(self, status) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.incoming.status == status, FOREVER)

    def begin(self) -> None:
        summary = PAGE | (UNIT if self.big else 0)
        host_pages = {"big": UNIT} if self.big else None
        head = postcopy.head(self.blocks, host_pages=host_pages, advised={"summary": summary})
        self.source.send(head)
        self.source.send(postcopy.pages([record(i) for i in range(EARLY)]))
        for first in range(1, EARLY, 24):
            odd = [(i * PAGE, PAGE) for i in range(first, min(first + 24, EARLY), 2)]
            self.source.send(postcopy.discard("pc.ram", *odd))
        self.source.send(postcopy.discard("pc.ram", (EARLY * PAGE, (NPAGES - EARLY) * PAGE)))
        if self.big:
            self.source.send(postcopy.discard("big", (0, 4 * UNIT)))

    def switch(self) -> None:
        self.begin()
        cpu = [stream.Device("cpu", b"registers", 7)]
        self.source.send(postcopy.ping(2) + postcopy.package(cpu) + postcopy.ping(4))
        self.source.expect(postcopy.PONG, 1)
        self.source.expect(postcopy.PONG, 2)

    def runs(self) -> None:
        """Pass over what is said until the guest runs."""
        values = sorted(self.source.hear()[1] for _ in range(3))
        assert values == [bytes([0, 0, 0, value]) for value in (3, 4, 0x42)]
        assert self.resumed.wait(FOREVER)

    def rest(self) -> list[ram.Record]:
        late = [i for i in range(NPAGES) if i >= EARLY or i % 2]
        big = range(4 * UNIT // PAGE) if self.big else ()
        return [record(i) for i in late] + [record(i, BIG) for i in big]

    def finish(self, source: Source | None = None) -> None:
        source = source or self.source
        source.send(postcopy.pages(self.rest(), 3) + b"\0")
        while source.hear() != (postcopy.SHUT, bytes(4)):
            pass
        self.check()

    def check(self) -> None:
        assert self.incoming.wait(FOREVER)
        for block in self.memory:
            held = bytes(block.view)
            for i in range(block.pages.npages):
                assert held[i * PAGE : (i + 1) * PAGE] == page(i, block.idstr.encode()), i
        assert self.loaded == [b"registers"]
        assert self.guest.running

    def touch(self, number: int, idstr: str = "pc.ram") -> Touch:
        return Touch(self.memory[idstr], number)


class Touch:
    """A thread that reads a page without Python's lock: write(2) from it."""

    def __init__(self, block: mig.RamBlock, number: int) -> None:
        self.read, self._write = os.pipe()
        self._page = block.view[number * PAGE : (number + 1) * PAGE]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        os.write(self._write, self._page)
        self._page.release()
        os.close(self._write)

    def value(self) -> bytes:
        self.thread.join(FOREVER)
        assert not self.thread.is_alive()
        out = b""
        while data := os.read(self.read, PAGE):
            out += data
        os.close(self.read)
        return out
