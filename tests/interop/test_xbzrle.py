"""XBZRLE with QEMU at the other end: its records into a file, and mig's into a QEMU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import mig
from mig import _core
from mig.ram.search import SourceBlock

FOREVER = 120.0
ENOUGH = 3000
RAM = "pc.ram"


def backed(spec, path: str):
    """The machine with its RAM in a file that can be read from outside."""
    memory = f"memory-backend-file,id={RAM},mem-path={path},size={spec.memory_bytes},share=on"
    return replace(spec, extra=("-object", memory, "-machine", f"memory-backend={RAM}"))


def wait_for(source, name: str, number: int) -> None:
    deadline = time.monotonic() + FOREVER
    while (said := source.query_migrate())["xbzrle-cache"][name] < number:
        assert time.monotonic() < deadline, said
        assert said["status"] == "active", said
        time.sleep(0.02)


def test_a_qemu_whose_guest_writes_words(lab, assert_goes_on):
    """Thousands of differences become plain pages of a file, equal byte for byte."""
    spec = lab.spec("pc", "dirty", pattern="delta", fill_mib=32, dirty_kib=65536)
    source = lab.boot("10.0", backed(spec, lab.path("ram")), fresh=True)
    source.set_capabilities({"xbzrle": True, "return-path": True})
    source.set_parameters(
        {"xbzrle-cache-size": 64 << 20, "max-bandwidth": 30 << 20, "downtime-limit": 1}
    )
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "--json")
    source.migrate(command.wait_listening())
    source.wait_migration(until=["active"])
    # one round of whole pages, one that fills the cache, and then ever more differences
    wait_for(source, "cache-miss", 6000)
    source.set_parameters({"max-bandwidth": 1 << 20})
    wait_for(source, "pages", ENOUGH)
    source.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})
    assert command.result()["status"] == "completed"
    said = source.wait_migration()
    assert said["status"] == "completed"
    assert said["xbzrle-cache"]["pages"] >= ENOUGH
    sent = np.fromfile(lab.path("ram"), np.uint8).reshape(-1, 4096)
    with mig.open_image(file) as image:
        for i, page in enumerate(sent):
            assert image.page(RAM, i) == page.tobytes(), i
        # each page once, none as a difference
        assert image.records == sum(b.data + b.zero for b in image.blocks)

    destination = lab.incoming("10.0", backed(spec, lab.path("ram2")))
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    assert lab.mig("send", file, uri, "--json").result()["status"] == "completed"
    assert_goes_on(source, destination)
    assert destination.bad_pages() == 0


class Restless:
    """A captured machine whose memory changes while it is sent, and is as it was in the end.

    Satisfies SourceGuest; also the log of its own writes.
    """

    chunk_pages = 0
    PASSES = 5

    def __init__(self, image: mig.StreamImage) -> None:
        self._image = image
        self._passes = 0
        self._blocks: list[SourceBlock] = []
        for block in image.blocks:
            page_size = image.page_size
            memory = np.zeros((block.used_length // page_size, page_size), np.uint8)
            for i in range(len(memory)):
                contents = image.page(block.idstr, i)
                if contents is not None:
                    memory[i] = np.frombuffer(contents, np.uint8)
            if block.idstr == RAM:
                self.memory = memory
            dirty = _core.Bitmap(len(memory), fill=True)
            pages = _core.Pages(memory, page_size)
            self._blocks.append(SourceBlock(block.idstr, block.used_length, pages, True, dirty))
        #: zero pages, too: those of the first 4096
        self.restless = np.arange(4096)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image, name)

    def source_blocks(self) -> Sequence[SourceBlock]:
        return self._blocks

    def dirty_log(self):
        return self

    def start(self) -> None:
        pass

    def clear(self, idstr: str, first_page: int, npages: int) -> None:
        pass

    def sync(self, idstr: str, dirty) -> int:
        """Each pass writes a word of each page, the last but one all of it; the last undoes it."""
        if idstr != RAM or self._passes == self.PASSES:
            return 0
        self._passes += 1
        if self._passes == 1:
            self._before = self.memory[self.restless].copy()
        if self._passes == self.PASSES:
            self.memory[self.restless] = self._before
        elif self._passes == self.PASSES - 1:
            self.memory[self.restless[::3]] ^= 0xFF
        else:
            self.memory[self.restless, 64 * self._passes : 64 * self._passes + 8] ^= 0x5A
        fresh = 0
        for page in self.restless:
            fresh += not dirty[int(page)]
            dirty.set(int(page))
        return fresh


def test_a_qemu_takes_differences_from_mig(lab, assert_goes_on):
    spec = lab.spec("pc")
    source = lab.boot("10.0", spec)
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    for version, size in (("10.0", 64 << 20), ("10.0", 1 << 20)):
        destination = lab.incoming(version, spec)
        uri = f"unix:{lab.path('out')}{size}"
        destination.migrate_incoming(uri)
        with mig.open_image(file) as image:
            outgoing = mig.OutgoingMigration(
                Restless(image),
                capabilities={"xbzrle", "return-path"},
                parameters={
                    "xbzrle-cache-size": size,
                    "max-bandwidth": 0,
                    "downtime-limit": 0,
                },
            )
            outgoing.start(uri)
            outgoing.wait(FOREVER)
        info = outgoing.query()
        assert info.xbzrle_cache is not None
        assert info.xbzrle_cache.npages > 200
        assert json.dumps(info.to_qmp()["xbzrle-cache"])
        assert_goes_on(source, destination)
        assert destination.bad_pages() == 0
        destination.close()


def test_statistics_are_named_as_qemu_names_them(lab, tmp_path):
    """The same keys and types, while it runs and at the end."""
    spec = lab.spec("pc", extra=("-S",))
    qemu = lab.start("10.0", spec)
    qemu.set_capabilities({"xbzrle": True})
    qemu.migrate("exec:cat > /dev/null")
    theirs = qemu.wait_migration()["xbzrle-cache"]
    memory = mig.GuestMemory()
    memory.add(RAM, 1 << 20)
    outgoing = mig.OutgoingMigration(mig.MemoryGuest("pc", memory), capabilities={"xbzrle"})
    outgoing.start(f"file:{Path(tmp_path) / 'vm'}")
    outgoing.wait(FOREVER)
    mine = json.loads(json.dumps(outgoing.query().to_qmp()["xbzrle-cache"]))
    assert mine.keys() == theirs.keys()
    assert mine["cache-size"] == theirs["cache-size"]
    assert mine == theirs
