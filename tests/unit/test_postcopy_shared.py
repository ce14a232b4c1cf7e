"""Another process maps a guest's memory and waits for its pages while they come in postcopy."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import postcopy, stream
from reference.postcopy import PAGE, Source
from unit import sharer
from unit.boxes import FOREVER, error_of
from unit.missing import BIG, EARLY, NPAGES, UNIT, Box, page, record

import mig
from mig.errors import MismatchError
from mig.guest import SharedMapping


class Sharer:
    """The other process, from this one's side."""

    def __init__(self, folder: Path, memfd: int, nbytes: int, offset: int = 0) -> None:
        path = str(folder / "sharer")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            self.process = subprocess.Popen([sys.executable, "-P", sharer.__file__, path])
            listener.settimeout(FOREVER)
            self.line, _ = listener.accept()
        os.unlink(path)  # noqa: PTH108
        self.line.settimeout(FOREVER)
        socket.send_fds(self.line, [sharer.WHERE.pack(offset, nbytes, 0)], [memfd])
        data, (self.uffd,), _, _ = socket.recv_fds(self.line, sharer.WHERE.size, 1)
        self.offset, self.nbytes, self.address = sharer.WHERE.unpack(data)

    def join(self, guest, idstr="pc.ram"):
        """Be a client of the guest."""
        mapping = SharedMapping(idstr, self.address, self.offset, self.nbytes)
        client = guest.postcopy_register_shared_ufd(self.uffd, [mapping])
        os.close(self.uffd)
        return client

    def touch(self, number: int) -> None:
        """Have it read a page of its mapping."""
        self.line.sendall(number.to_bytes(8, "little"))

    def value(self) -> bytes:
        return self.line.recv(PAGE, socket.MSG_WAITALL)

    def read(self, number: int) -> bytes:
        self.touch(number)
        return self.value()

    def waits(self) -> bool:
        self.line.settimeout(0.05)
        try:
            self.line.recv(1)
        except TimeoutError:
            return True
        finally:
            self.line.settimeout(FOREVER)
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.line.close()


class Shared(Box):
    """A box whose memory is in a memfd, and the processes that map it."""

    def __init__(self, made, folder, **options):
        self.folder, self.sharers = folder, []
        super().__init__(made, folder, shared=True, **options)

    def sharer(self, **options) -> Sharer:
        nbytes = options.pop("nbytes", NPAGES * PAGE)
        self.sharers.append(Sharer(self.folder, self.memfd, nbytes, **options))
        return self.sharers[-1]


@pytest.fixture
def box(made, tmp_path):
    box = Shared(made, tmp_path)
    yield box
    for other in box.sharers:
        other.close()


@pytest.mark.parametrize("early", [True, False], ids=["before", "while it runs"])
def test_pages_that_another_process_touches_are_asked_for_and_come(box, early):
    other = box.sharer()
    if early:
        other.join(box.guest)
    box.switch()
    box.runs()
    if not early:
        other.join(box.guest)
    for number in (100, 101, 3):
        other.touch(number)
        assert box.source.request() == ("pc.ram", number * PAGE, PAGE)
        assert other.waits()
        box.source.send(postcopy.pages([record(number)]))
        assert other.value() == page(number)
    # what came in precopy is there, and zeros that were never written: nobody is asked
    assert other.read(2) == page(2)
    assert other.read(8) == bytes(PAGE)
    # it is no vCPU
    times = box.guest.postcopy_times()
    assert (times.requests, times.faults) == (3, 0)
    box.finish()
    for number in range(NPAGES):
        assert other.read(number) == page(number)


def test_a_page_is_asked_for_once_whoever_waits(box):
    others = [box.sharer() for _ in range(2)]
    for other in others:
        other.join(box.guest)
    box.switch()
    box.runs()
    others[0].touch(77)
    assert box.source.request() == ("pc.ram", 77 * PAGE, PAGE)
    mine = box.touch(77)
    others[1].touch(77)
    others_page = box.touch(90)
    # the next message is not about 77 again
    assert box.source.request() == ("pc.ram", 90 * PAGE, PAGE)
    box.source.send(postcopy.pages([record(77), record(90)]))
    assert mine.value() == others[0].value() == others[1].value() == page(77)
    assert others_page.value() == page(90)
    # and what one brought here, or the background, is there for the others
    box.source.send(postcopy.pages([record(120)]))
    assert box.touch(121).thread.is_alive()
    assert box.source.request() == ("pc.ram", 121 * PAGE, PAGE)
    assert others[1].read(120) == page(120)
    box.finish()


def test_a_part_of_a_block_in_large_pages(made, tmp_path):
    box = Shared(made, tmp_path, big=True)
    other = Sharer(tmp_path, box.bigfd, 2 * UNIT, offset=UNIT)
    with contextlib.closing(other):
        other.join(box.guest, "big")
        box.switch()
        box.runs()
        npages = UNIT // PAGE
        other.touch(npages + 5)
        assert box.source.request() == ("big", 2 * UNIT, UNIT)
        first = 2 * npages
        box.source.send(postcopy.pages([record(i, BIG) for i in range(first, first + npages - 1)]))
        assert other.waits()
        box.source.send(postcopy.pages([record(first + npages - 1, BIG)]))
        assert other.value() == page(first + 5, BIG)
        box.finish()
        assert other.read(0) == page(npages, BIG)


def test_what_another_process_waits_for_is_asked_for_again_after_a_break(box, tmp_path):
    other = box.sharer()
    other.join(box.guest)
    box.switch()
    box.runs()
    other.touch(100)
    box.source.request()
    box.source.close()
    box.reach("postcopy-paused")
    box.incoming.recover(f"unix:{tmp_path / 'again'}")
    source = Source.connect(box.incoming.uri)
    source.bitmap("pc.ram")
    source.send(stream.command(postcopy.RESUME))
    source.expect(postcopy.RESUME_ACK, 1)
    assert source.request() == ("pc.ram", 100 * PAGE, PAGE)
    source.send(postcopy.pages([record(100)]))
    assert other.value() == page(100)
    box.finish(source)


@pytest.mark.parametrize("registered", [True, False])
def test_a_process_that_ends_while_it_waits_disturbs_nobody(box, registered):
    gone, stays = box.sharer(), box.sharer()
    client = gone.join(box.guest)
    stays.join(box.guest)
    box.switch()
    box.runs()
    gone.touch(100)
    assert box.source.request() == ("pc.ram", 100 * PAGE, PAGE)
    gone.process.kill()
    gone.process.wait()
    if not registered:
        box.guest.postcopy_unregister_shared_ufd(client)
        box.guest.postcopy_unregister_shared_ufd(client)
    stays.touch(101)
    assert box.source.request() == ("pc.ram", 101 * PAGE, PAGE)
    box.source.send(postcopy.pages([record(100), record(101)]))
    assert stays.value() == page(101)
    box.finish()


def test_who_is_unregistered_waits_no_more(box):
    other = box.sharer()
    client = other.join(box.guest)
    box.switch()
    box.runs()
    other.touch(100)
    assert box.source.request() == ("pc.ram", 100 * PAGE, PAGE)
    assert other.waits()
    box.guest.postcopy_unregister_shared_ufd(client)
    # it has the memory as it is, and here the page is missing no more
    assert other.value() == bytes(PAGE)
    assert other.read(150) == bytes(PAGE)


@pytest.mark.parametrize("how", ["given up", "a device fails", "no postcopy"])
def test_nobody_waits_for_ever_whichever_way_it_ends(box, how):
    other = box.sharer()
    other.join(box.guest)
    if how == "no postcopy":
        box.source.send(postcopy.head(box.blocks))
        box.source.send(postcopy.pages([record(2)], 3))
        box.source.send(stream.device_state([stream.Device("cpu", b"registers", 7)]))
        assert box.incoming.wait(FOREVER)
        assert other.read(2) == page(2)
        assert other.read(3) == bytes(PAGE)
        return
    if how == "a device fails":

        def fail():
            other.touch(200)
            raise MismatchError("no")

        box.on_load = fail
        box.switch()
    else:
        box.switch()
        box.runs()
        other.touch(200)
        box.source.request()
        box.incoming.abandon()
    error_of(box.incoming)
    assert other.value() == bytes(PAGE)
    box.memory.close()


def test_the_next_postcopy_is_another_one(box, made, tmp_path):
    other = box.sharer()
    client = other.join(box.guest)
    box.switch()
    box.runs()
    box.finish()
    box.guest.postcopy_unregister_shared_ufd(client)
    assert other.read(EARLY) == page(EARLY)


def test_what_cannot_be_shared(box):
    other = box.sharer()
    register = box.guest.postcopy_register_shared_ufd
    with open(os.devnull) as file, pytest.raises(ValueError, match="no userfaultfd"):  # noqa: PTH123
        register(file.fileno(), [SharedMapping("pc.ram", other.address)])
    wrong = [
        (SharedMapping("none", other.address), "no block"),
        (SharedMapping("pc.ram", other.address, PAGE, NPAGES * PAGE), "bytes at"),
        (SharedMapping("pc.ram", other.address, NPAGES * PAGE), "bytes at"),
        (SharedMapping("pc.ram", other.address, -PAGE), "bytes at"),
        (SharedMapping("pc.ram", 0), "bytes at"),
        (SharedMapping("pc.ram", other.address + 1), "made of pages"),
        (SharedMapping("pc.ram", other.address, 0, PAGE + 1), "made of pages"),
    ]
    for mapping, why in wrong:
        with pytest.raises(ValueError, match=why):
            register(other.uffd, [mapping])
    memory = mig.GuestMemory()
    memory.add("ram", PAGE)
    with pytest.raises(ValueError, match="this process alone"):
        mig.MemoryGuest("box", memory).postcopy_register_shared_ufd(
            other.uffd, [SharedMapping("ram", other.address)]
        )
    box.switch()
    box.runs()
    mapping = SharedMapping("pc.ram", other.address)
    for _ in range(62):
        register(other.uffd, [mapping])
    with pytest.raises(OSError, match="space"):
        register(other.uffd, [mapping])
    box.finish()


def test_a_live_postcopy_between_two_migs_with_a_third_process(made, tmp_path):
    nbytes = 8 << 20
    mine, other = mig.GuestMemory(), mig.GuestMemory()
    memfd = os.memfd_create("ram")
    other.add("ram", nbytes, fd=memfd, shared=False)
    block = mine.add("ram", nbytes)
    rng = np.random.default_rng(7)
    pages = np.frombuffer(block.view, dtype=np.uint8).reshape(-1, PAGE)
    pages[::3] = rng.integers(0, 256, pages[::3].shape, dtype=np.uint8)
    guest = mig.MemoryGuest("box", other)
    third = Sharer(tmp_path, memfd, nbytes)
    os.close(memfd)
    with contextlib.closing(third):
        third.join(guest, "ram")
        incoming = made.incoming(guest, capabilities={"postcopy-ram"})
        incoming.listen(f"unix:{tmp_path / 'in'}")
        outgoing = made.outgoing(mig.MemoryGuest("box", mine), capabilities={"postcopy-ram"})
        outgoing.background = False
        outgoing.start_postcopy()
        outgoing.start(incoming.uri)
        numbers = [int(number) for number in rng.permutation(len(pages))[:300]]
        for number in numbers:
            assert third.read(number) == pages[number].tobytes(), (number, incoming.query())
        assert incoming.status == "postcopy-active"
        assert guest.postcopy_times().requests >= 300
        outgoing.background = True
        for number in range(len(pages)):
            assert third.read(number) == pages[number].tobytes(), number
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    assert bytes(other["ram"].view) == bytes(block.view)
