"""Memory that both sides map: x-ignore-shared, from one engine to another and into files."""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from reference import ram, stream
from reference.ram import Record
from unit.boxes import FOREVER, NPAGES, PAGE, ended, error_of

from mig import (
    DeviceRegistry,
    GuestMemory,
    MemoryGuest,
    SharedDirtyLog,
    StreamCapture,
    StreamImage,
)
from mig.cli import main
from mig.errors import MismatchError, OptionError, StreamError
from mig.ram.search import PageSearch
from mig.records import BlockInfo, BlockList, Configuration, FileHeader
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

CAPABILITY = "x-ignore-shared"
#: of the shared block and of the other one
ADDRESS, OTHER_ADDRESS = 0x100000000, 0xFD000000


@pytest.fixture
def fd():
    fd = os.memfd_create("pc.ram", os.MFD_CLOEXEC)
    yield fd
    os.close(fd)


class Shared:
    """A guest whose pc.ram is a file that others may map too; vga.vram is its own."""

    def __init__(self, fd: int, seed: int | None = None, *, address: int = ADDRESS) -> None:
        self.memory = GuestMemory()
        self.ram = self.memory.add("pc.ram", NPAGES * PAGE, fd=fd, address=address)
        self.vga = self.memory.add("vga.vram", 16 * PAGE, address=OTHER_ADDRESS)
        self.state = b""
        self.log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
        if seed is not None:
            self.state = b"state"
            rng = np.random.default_rng(seed)
            for block in self.memory:
                block.view[:] = rng.bytes(block.used_length)
        devices = DeviceRegistry()
        devices.register("core", save=lambda: self.state, load=self._load)
        self.guest = MemoryGuest("box", self.memory, devices, dirty=self.log)

    def _load(self, payload: bytes, version_id: int) -> None:
        self.state = payload


def migrate(made, source, target, mine=(CAPABILITY,), theirs=(CAPABILITY,)):
    incoming = made.incoming(target.guest, capabilities=theirs)
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(source.guest, capabilities={*mine, "return-path"})
    outgoing.start(incoming.uri)
    return outgoing, incoming


# ---- both ends in one process ----------------------------------------------------------------


def test_shared_memory_is_there_without_being_sent(made, fd):
    source, target = Shared(fd, 1), Shared(fd)
    outgoing, incoming = migrate(made, source, target)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.ram.view == source.ram.view
    assert target.vga.view == source.vga.view
    assert target.state == b"state"
    # as by QEMU: the total is what is sent, not what is listed
    sent = outgoing.query().ram
    assert (sent.total, sent.normal, sent.duplicate) == (16 * PAGE, 16, 0)
    assert sent.transferred < 17 * PAGE
    assert sent.page_size == PAGE
    assert incoming.query().ram.normal == 16


def test_shared_memory_is_never_asked_about(made, fd):
    asked = []

    class Watched(Shared):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            sync = self.log.sync

            def watched(idstr, dirty):
                asked.append(idstr)
                # more to send at the first look
                if len(asked) == 1:
                    self.log.mark("vga.vram", 3)
                return sync(idstr, dirty)

            self.log.sync = watched

    source, target = Watched(fd, 2), Shared(fd)
    outgoing, _ = migrate(made, source, target)
    assert outgoing.wait(FOREVER)
    assert set(asked) == {"vga.vram"}
    assert outgoing.query().ram.normal == 17


def test_a_guest_of_nothing_but_shared_memory_arrives(made, fd):
    ends = []
    for _ in range(2):
        memory = GuestMemory()
        memory.add("pc.ram", NPAGES * PAGE, fd=fd, address=ADDRESS)
        ends.append(MemoryGuest("box", memory))
    ends[0].memory["pc.ram"].view[:3] = b"abc"
    incoming = made.incoming(ends[1], capabilities={CAPABILITY})
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(ends[0], capabilities={CAPABILITY})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert bytes(ends[1].memory["pc.ram"].view[:3]) == b"abc"
    assert outgoing.query().ram.total == 0


def test_without_the_capability_shared_memory_is_sent_like_any_other(made, fd):
    source = Shared(fd, 3)
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    target = Shared(other, address=0)  # who is sent everything need not agree about addresses
    os.close(other)
    outgoing, incoming = migrate(made, source, target, mine=(), theirs=())
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert target.ram.view == source.ram.view
    assert outgoing.query().ram.total == (NPAGES + 16) * PAGE


def test_a_caller_s_buffer_may_be_shared(made):
    buffer = bytearray(b"\x05" * PAGE)
    ends = []
    for _ in range(2):
        memory = GuestMemory()
        memory.add("a", PAGE, buffer, shared=True)
        ends.append(MemoryGuest("box", memory))
    incoming = made.incoming(ends[1], capabilities={CAPABILITY})
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(ends[0], capabilities={CAPABILITY})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert outgoing.query().ram.normal == 0


def test_a_destination_may_have_a_private_copy_of_what_the_source_shares(made, fd):
    """QEMU allows it too: a destination with share=off keeps what its own mapping holds."""
    source, target = Shared(fd, 4), Shared(fd, address=1)
    target.ram.shared = False
    outgoing, incoming = migrate(made, source, target)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)


def test_hints_about_shared_memory_are_without_effect(fd):
    search = PageSearch(Shared(fd, 5).guest.source_blocks(), ignore_shared=True)
    assert search["pc.ram"].pages.npages == NPAGES
    search.forget("pc.ram", 0, NPAGES)
    assert search.remaining == 16 * PAGE
    with pytest.raises(KeyError):
        search["ram"]


# ---- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), [("on", "off"), ("off", "on")])
def test_a_capability_that_one_side_lacks_is_a_mismatch(made, fd, mine, theirs):
    source, target = Shared(fd, 6), Shared(fd)
    states = {"on": {CAPABILITY}, "off": set()}
    outgoing, incoming = migrate(made, source, target, states[theirs], states[mine])
    error = error_of(incoming)
    assert isinstance(error, MismatchError)
    words = f"Capability x-ignore-shared is {mine}, but received capability is {theirs}"
    assert error.message == words
    ended(outgoing)
    assert source.guest.running


def test_shared_memory_at_another_address_is_a_mismatch(made, fd):
    source, target = Shared(fd, 7), Shared(fd, address=0)
    outgoing, incoming = migrate(made, source, target)
    error = error_of(incoming)
    assert isinstance(error, MismatchError)
    assert error.message == f"Mismatched GPAs for block pc.ram {ADDRESS}!= 0"
    assert (error.section, error.block) == ("ram", "pc.ram")
    ended(outgoing)
    target.memory.close()


@pytest.mark.parametrize("address", [0, 2**64 - 1])
def test_addresses_of_memory_that_is_sent_are_not_looked_at(made, fd, address):
    source, target = Shared(fd, 8), Shared(fd)
    target.vga.address = address
    outgoing, _ = migrate(made, source, target)
    assert outgoing.wait(FOREVER)


def hand_made(blocks: dict[str, int], addresses: dict[str, int], records: list[Record]) -> bytes:
    config = Configuration("box", None, (CAPABILITY,)).encode()
    data = stream.whole(blocks, [records], [Device], config=config)
    return data.replace(ram.block_list(blocks), ram.block_list(blocks, addresses))


Device = stream.Device("core", b"", 5)
SIZES = {"pc.ram": NPAGES * PAGE, "vga.vram": 16 * PAGE}
ADDRESSES = {"pc.ram": ADDRESS, "vga.vram": OTHER_ADDRESS}


@pytest.mark.parametrize("contents", [0, b"\x07" * PAGE])
def test_a_page_of_shared_memory_is_refused(fd, contents):
    target = Shared(fd)
    target.ram.view[:] = b"\x01" * (NPAGES * PAGE)
    records = [Record(b"vga.vram", 0, 0), Record(b"pc.ram", 1, contents)]
    data = hand_made(SIZES, ADDRESSES, records)
    loader = StreamLoader(
        StreamReader(data=data), target.guest, on_command=print, capabilities={CAPABILITY}
    )
    with pytest.raises(StreamError, match=r"block pc\.ram should not be migrated") as caught:
        loader.run()
    assert caught.value.section == "ram"
    target.guest.abort()
    assert bytes(target.ram.view) == b"\x01" * (NPAGES * PAGE)
    # nothing of it stays: the next stream may send the block
    plain = stream.whole(SIZES, [[Record(b"pc.ram", 1, b"\x07" * PAGE)]], [Device])
    StreamLoader(StreamReader(data=plain), target.guest, on_command=print).run()
    target.guest.commit()
    assert target.ram.view[PAGE] == 7


def multifd_packet(block: str, page: int, contents: bytes) -> bytes:
    """A packet of one page; without contents: of one zero page."""
    nnormal = 1 if contents else 0
    head = struct.pack(
        ">IIIIIIQI28x256s", 0x11223344, 1, 0, 128, nnormal, len(contents), 0, 1 - nnormal,
        block.encode()
    )  # fmt: skip
    return head + struct.pack(">128Q", page * PAGE, *[0] * 127) + contents


@pytest.mark.parametrize("contents", [b"", b"\x07" * PAGE])
@pytest.mark.parametrize(("block", "refused"), [("pc.ram", True), ("vga.vram", False)])
def test_a_page_of_shared_memory_is_refused_on_a_channel(made, fd, block, contents, refused):
    target = Shared(fd)
    for each in target.memory:
        each.view[:] = b"\x01" * each.used_length
    incoming = made.incoming(
        target.guest, capabilities={CAPABILITY, "multifd"}, parameters={"multifd-channels": 1}
    )
    incoming.listen("tcp:127.0.0.1:0")
    _, host, port = incoming.uri.split(":")
    main_stream = hand_made(SIZES, ADDRESSES, [])
    with (
        socket.create_connection((host, int(port))) as main,
        socket.create_connection((host, int(port))) as lane,
    ):
        # not to its end
        main.sendall(main_stream[: main_stream.index(ram.eos()) + len(ram.eos())])
        lane.sendall(struct.pack(">II16sB39x", 0x11223344, 1, bytes(16), 0))
        lane.sendall(multifd_packet(block, 1, contents))
        if not refused:
            lane.shutdown(socket.SHUT_WR)
            lane.recv(1)
            main.shutdown(socket.SHUT_WR)
        error = error_of(incoming)
    if refused:
        assert isinstance(error, StreamError)
        assert error.message == "block pc.ram should not be migrated"
        assert error.section == "multifd channel 0"
    found = bytes(target.memory[block].view)
    assert (found == b"\x01" * len(found)) is refused


@pytest.mark.parametrize(
    ("addresses", "match"),
    [
        (
            {"pc.ram": 2**64 - 1, "vga.vram": 0},
            "Mismatched GPAs for block pc.ram 18446744073709551615!=",
        ),
        ({"pc.ram": ADDRESS ^ 1, "vga.vram": 0}, "Mismatched GPAs"),
    ],
)
def test_addresses_are_compared_in_all_their_bits(fd, addresses, match):
    data = hand_made(SIZES, addresses, [])
    target = Shared(fd)
    loader = StreamLoader(
        StreamReader(data=data), target.guest, on_command=print, capabilities={CAPABILITY}
    )
    with pytest.raises(MismatchError, match=match):
        loader.run()
    target.guest.abort()


# ---- the octets ------------------------------------------------------------------------------


def test_the_octets_of_a_stream_without_shared_memory(made, fd, tmp_path):
    source = Shared(fd, 9)
    outgoing = made.outgoing(source.guest, capabilities={CAPABILITY})
    outgoing.start(f"file:{tmp_path / 'vm.mig'}")
    assert outgoing.wait(FOREVER)
    data = (tmp_path / "vm.mig").read_bytes()
    config = b"\x07\0\0\0\x03box\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0f"
    start = b"QEVM\0\0\0\x03" + config + b"x-ignore-shared" + stream.section(1, 1, "ram", 0, 4)
    assert data.startswith(start + ram.block_list(SIZES, ADDRESSES) + ram.eos())
    assert data.count(b"pc.ram") == 1


def test_a_stream_without_the_capability_has_no_addresses(made, fd, tmp_path):
    outgoing = made.outgoing(Shared(fd, 10).guest)
    outgoing.start(f"file:{tmp_path / 'vm.mig'}")
    assert outgoing.wait(FOREVER)
    data = (tmp_path / "vm.mig").read_bytes()
    head = FileHeader().encode() + Configuration("box").encode()
    assert data.startswith(head + stream.section(1, 1, "ram", 0, 4) + ram.block_list(SIZES))


def test_a_guest_that_does_not_know_its_addresses_cannot_be_sent_so(made, fd):
    source, target = Shared(fd, 11), Shared(fd)
    blocks = source.guest.source_blocks
    source.guest.source_blocks = lambda: [replace(b, address=None) for b in blocks()]
    outgoing, _ = migrate(made, source, target)
    error = error_of(outgoing)
    assert isinstance(error, OptionError)
    assert "address of block 'pc.ram'" in str(error)
    assert source.guest.running
    source.memory.close()


# ---- files -----------------------------------------------------------------------------------


@pytest.fixture
def captured(made, fd, tmp_path):
    """A guest's file, received with the capability."""
    path = tmp_path / "captured.mig"
    incoming = made.incoming(StreamCapture(path), capabilities={CAPABILITY})
    incoming.listen("tcp:127.0.0.1:0")
    outgoing = made.outgoing(Shared(fd, 12).guest, capabilities={CAPABILITY})
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    return path


def test_a_captured_guest_is_kept_without_its_shared_memory_and_goes_on(made, fd, captured):
    assert captured.stat().st_size < 17 * PAGE
    target = Shared(fd)
    with StreamImage(captured) as image:
        assert image.ignores_shared
        assert [(b.idstr, b.address, b.ignored, b.missing) for b in image.blocks] == [
            ("pc.ram", ADDRESS, True, NPAGES),
            ("vga.vram", OTHER_ADDRESS, False, 0),
        ]
        incoming = made.incoming(target.guest, capabilities={CAPABILITY})
        incoming.listen("tcp:127.0.0.1:0")
        outgoing = made.outgoing(image, capabilities={CAPABILITY})
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    source = np.random.default_rng(12)
    assert target.ram.view == source.bytes(NPAGES * PAGE)
    assert target.vga.view == source.bytes(16 * PAGE)
    assert outgoing.query().ram.total == 16 * PAGE


def test_a_captured_guest_is_not_sent_without_the_capability(made, captured):
    with StreamImage(captured) as image:
        outgoing = made.outgoing(image)
        with pytest.raises(OptionError, match="capability 'x-ignore-shared' must be on"):
            outgoing.start("tcp:127.0.0.1:1")


def test_a_file_without_addresses_cannot_be_sent_with_the_capability(made, fd, tmp_path):
    path = tmp_path / "plain.mig"
    path.write_bytes(stream.whole(SIZES, [[Record(b"pc.ram", 0, 0)]], [Device]))
    target = Shared(fd)
    incoming = made.incoming(target.guest, capabilities={CAPABILITY})
    incoming.listen("tcp:127.0.0.1:0")
    with StreamImage(path) as image:
        assert not image.ignores_shared
        assert [b.ignored for b in image.blocks] == [False, False]
        outgoing = made.outgoing(image, capabilities={CAPABILITY})
        outgoing.start(incoming.uri)
        assert isinstance(error_of(outgoing), OptionError)
        ended(incoming)


def test_mig_send_needs_no_word_for_a_file_received_so(made, fd, captured):
    target = Shared(fd)
    incoming = made.incoming(target.guest, capabilities={CAPABILITY})
    incoming.listen("tcp:127.0.0.1:0")
    result = CliRunner().invoke(main, ["send", str(captured), incoming.uri, "--json"])
    assert result.exit_code == 0, result.output
    assert incoming.wait(FOREVER)
    assert json.loads(result.stdout.splitlines()[-1])["ram"]["total"] == 16 * PAGE
    refused = CliRunner().invoke(
        main, ["send", str(captured), "tcp:127.0.0.1:1", "-c", f"{CAPABILITY}=off"]
    )
    assert refused.exit_code != 0


def test_mig_info_says_which_memory_is_not_in_the_file(captured):
    result = CliRunner().invoke(main, ["info", str(captured), "--json"])
    blocks = json.loads(result.stdout)["blocks"]
    assert [(b["name"], b["address"], b["ignored"]) for b in blocks] == [
        ("pc.ram", ADDRESS, True),
        ("vga.vram", OTHER_ADDRESS, False),
    ]
    shown = CliRunner().invoke(main, ["info", str(captured)]).stdout
    assert "not here pc.ram: shared memory, at 0x100000000" in shown
    assert "vga.vram:" not in shown


def test_block_infos_tell_whether_there_are_addresses():
    assert BlockInfo("a", PAGE).address is None
    assert BlockList((BlockInfo("a", PAGE, 0),)).encode() == ram.block_list({"a": PAGE}, {"a": 0})


# ---- memory of a file ------------------------------------------------------------------------


def test_a_file_is_mapped_shared_and_made_as_long_as_the_block(fd, tmp_path):
    memory = GuestMemory()
    a = memory.add("a", 2 * PAGE, fd=fd)
    assert os.fstat(fd).st_size == 2 * PAGE
    a.view[PAGE] = 9
    assert os.pread(fd, 1, PAGE) == b"\x09"
    assert a.shared
    assert not a.take_fresh()
    b = memory.add("b", PAGE, path=tmp_path / "ram", shared=False, address=5)
    b.view[0] = 3
    assert (b.shared, b.address) == (False, 5)
    a.populate()
    memory.close()
    assert (tmp_path / "ram").read_bytes() == b"\x03" + bytes(PAGE - 1)


def test_a_longer_file_is_never_cut_short(fd):
    os.pwrite(fd, b"\x01" * 4 * PAGE, 0)
    memory = GuestMemory()
    block = memory.add("a", 2 * PAGE, fd=fd)
    holder = np.frombuffer(block.view, dtype=np.uint8)
    with pytest.raises(BufferError):
        memory.close()
    block.view[0] = 2
    del holder
    memory.close()
    assert os.fstat(fd).st_size == 4 * PAGE
    assert os.pread(fd, 2, 0) == b"\x02\x01"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"buffer": bytearray(2 * PAGE)}, "either the caller's buffer or a file"),
        ({"path": "/nowhere/ram"}, "either fd or path"),
        ({"address": -1}, "not a number of 64 bits"),
        ({"address": 1 << 64}, "not a number of 64 bits"),
    ],
)
def test_memory_that_cannot_be_is_refused(fd, options, match):
    with pytest.raises(ValueError, match=match):
        GuestMemory().add("a", 2 * PAGE, fd=fd, **options)


def test_a_file_that_is_too_short_is_refused_and_left_alone(fd, tmp_path):
    os.pwrite(fd, b"x" * PAGE, 0)
    with pytest.raises(ValueError, match="of 8192 bytes, but its file has 4096"):
        GuestMemory().add("a", 2 * PAGE, fd=fd)
    assert os.fstat(fd).st_size == PAGE
    with pytest.raises(FileNotFoundError):
        GuestMemory().add("a", PAGE, path=tmp_path / "nowhere" / "ram")


def test_descriptors_are_not_left_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    memory = GuestMemory()
    memory.add("a", PAGE, path=tmp_path / "ram")
    with pytest.raises(ValueError, match="but its file has"):
        memory.add("b", 2 * PAGE, path=tmp_path / "ram")
    memory.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_shared_block_is_pinned_while_it_is_migrated(fd):
    target = Shared(fd)
    target.guest.open_blocks([BlockInfo(n, SIZES[n], ADDRESSES[n]) for n in SIZES], PAGE)
    with pytest.raises(BufferError):
        target.memory.close()
    target.guest.abort()
    target.memory.close()
