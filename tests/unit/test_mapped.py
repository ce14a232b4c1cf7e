"""mapped-ram files: written by guests of one's own and by conversion, loaded, looked into, sent."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from reference import stream
from reference.ram import Record
from reference.stream import Device
from unit.boxes import FOREVER, NPAGES, PAGE, Box, ended, error_of

from mig import (
    Capability,
    GuestMemory,
    MappedImage,
    MemoryGuest,
    ProcessGuest,
    SharedDirtyLog,
    Status,
    StreamCapture,
    StreamImage,
    _core,
    open_image,
)
from mig.channel.open import Cancel, connect
from mig.errors import CancelledError, ChannelError, MigError, MismatchError, OptionError
from mig.events import PassStarted
from mig.wire import MAPPED_RAM_ALIGNMENT

MAPPED = Capability.MAPPED_RAM
#: capabilities besides, and parameters
WAYS = [
    pytest.param((), {"direct-io": False}, id="plain"),
    pytest.param((), {"direct-io": True}, id="direct"),
    pytest.param(("multifd",), {"multifd-channels": 3, "direct-io": False}, id="multifd"),
    pytest.param(("multifd",), {"multifd-channels": 2, "direct-io": True}, id="multifd, direct"),
]


def write(made, guest, uri, capabilities=(), parameters=None, **options):
    outgoing = made.outgoing(
        guest,
        capabilities={MAPPED, *capabilities},
        parameters={"max-bandwidth": 0, **(parameters or {})},
        **options,
    )
    outgoing.start(uri)
    assert outgoing.wait(FOREVER)
    return outgoing


def load(made, guest, uri, capabilities=(), parameters=None):
    incoming = made.incoming(guest, capabilities={MAPPED, *capabilities}, parameters=parameters)
    incoming.listen(uri)
    return incoming


def as_arrays(box: Box) -> dict[str, np.ndarray]:
    return {
        b.idstr: np.frombuffer(b.view, dtype=np.uint8).reshape(-1, PAGE).copy() for b in box.memory
    }


def assert_holds(image, box: Box) -> None:
    for idstr, pages in image.pages.items():
        assert np.array_equal(np.asarray(pages), as_arrays(box)[idstr])
    assert image.device_state.sections[0].payload == box.state


# ---- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize(("capabilities", "parameters"), WAYS)
def test_a_guest_is_kept_and_loaded(made, tmp_path, capabilities, parameters):
    source, target = Box(1), Box()
    uri = f"file:{tmp_path}/vm"
    outgoing = write(made, source.guest, uri, capabilities, parameters)
    incoming = load(made, target.guest, uri, capabilities, parameters)
    assert incoming.wait(FOREVER)
    assert target.same_as(source)
    stored = sum(pages.any(axis=1).sum() for pages in as_arrays(source).values())
    for migration in (outgoing, incoming):
        ram = migration.query().ram
        assert (ram.normal, ram.duplicate) == (stored, NPAGES + 16 - stored)
        assert stored * PAGE < ram.transferred < stored * PAGE + 20000


@pytest.mark.parametrize("offset", [1, 4096, MAPPED_RAM_ALIGNMENT + 7])
def test_a_file_may_begin_with_something_else(made, tmp_path, offset):
    source, target = Box(2), Box()
    path = tmp_path / "vm"
    path.write_bytes(b"\xaa" * offset + b"what was behind is gone" * 1000)
    uri = f"file:{path},offset={offset}"
    write(made, source.guest, uri)
    assert path.read_bytes()[:offset] == b"\xaa" * offset
    assert load(made, target.guest, uri).wait(FOREVER)
    assert target.same_as(source)
    with open_image(uri) as image:
        assert_holds(image, source)
        assert image.nbytes == path.stat().st_size - offset


def test_zero_pages_are_holes_and_pages_are_where_qemu_has_them(made, tmp_path):
    source, path = Box(3), tmp_path / "vm"
    write(made, source.guest, f"file:{path}")
    with open_image(path) as image:
        assert isinstance(image, MappedImage)
        for block in image._contents.blocks:
            at = block.mapped.pages_offset
            assert at % MAPPED_RAM_ALIGNMENT == 0
            data = path.read_bytes()[at : at + block.used_length]
            assert data == bytes(source.memory[block.idstr].view)
    stored = sum(pages.any(axis=1).sum() for pages in as_arrays(source).values())
    assert path.stat().st_blocks * 512 < stored * PAGE + (256 << 10)


def test_memory_that_is_not_fresh_gets_the_zeros_too(made, tmp_path):
    source, target = Box(4), Box(5)
    uri = f"file:{tmp_path}/vm"
    write(made, source.guest, uri)
    assert load(made, target.guest, uri, ("multifd",)).wait(FOREVER)
    assert target.same_as(source)


def test_zero_pages_take_no_memory(made, tmp_path):
    """A guest of which one page in a thousand is not zero is loaded into as much memory."""
    uri, sizes = f"file:{tmp_path}/vm", []
    memories = []
    for filled in (True, False):
        memory = GuestMemory()
        # the host is not to give huge pages here
        mapping = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        memory.add("ram", len(mapping), mapping)
        memories.append((memory, mapping))
        if filled:
            view = memoryview(mapping)
            for page in range(0, len(mapping) // PAGE, 1000):
                view[page * PAGE] = 1
            view.release()
        guest = MemoryGuest("box", memory)
        if filled:
            write(made, guest, uri)
        else:
            assert load(made, guest, uri).wait(FOREVER)
    for _, mapping in memories:
        sizes.append(resident(mapping))
    assert sizes[1] <= sizes[0]
    assert memories[0][1][:] == memories[1][1][:]


def resident(mapping: mmap.mmap) -> int:
    """Pages of a mapping that have memory of their own."""
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = np.frombuffer(pagemap.read(len(mapping) // PAGE * 8), dtype=np.uint64)
    # present, and exclusively mapped: not the kernel's page of zeros
    return int(np.count_nonzero((entries >> 63) & (entries >> 56) & 1))


def test_pages_that_change_while_they_are_written_are_rewritten(made, tmp_path):
    """Also those that become zero, of which the file keeps what they were."""
    log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
    source, path = Box(6, dirty=log), tmp_path / "vm"
    ram = np.frombuffer(source.memory["pc.ram"].view, dtype=np.uint8).reshape(-1, PAGE)
    passes: list[int] = []

    def change(event):
        if isinstance(event, PassStarted):
            passes.append(event.number)
            if event.number == 2:
                for page, value in ((0, 0), (1, 7), (3, 0), (4, 9)):
                    ram[page] = value
                    log.mark("pc.ram", page)

    # the guest is stopped only when nothing is dirty any more
    write(made, source.guest, f"file:{path}", ("multifd",), {"downtime-limit": 0}, on_event=change)
    assert max(passes) > 1
    with open_image(path) as image:
        at = image._contents.blocks[0].mapped.pages_offset
        assert path.read_bytes()[at : at + PAGE] != bytes(PAGE)
        assert image.page("pc.ram", 0) == image.page("pc.ram", 3) == bytes(PAGE)
        assert image.page("pc.ram", 4) == b"\x09" * PAGE
        assert_holds(image, source)
    target = Box(7)
    assert load(made, target.guest, f"file:{path}").wait(FOREVER)
    assert target.same_as(source)


def test_target_pages_of_other_sizes(made, tmp_path):
    for page_size in (1024, 65536):
        memories = [GuestMemory(page_size), GuestMemory(page_size)]
        for memory in memories:
            memory.add("ram", 1 << 20)
        memories[0]["ram"].view[5000:9000] = b"\x07" * 4000
        uri = f"file:{tmp_path}/vm{page_size}"
        write(made, MemoryGuest("box", memories[0]), uri)
        assert load(made, MemoryGuest("box", memories[1]), uri).wait(FOREVER)
        assert bytes(memories[0]["ram"].view) == bytes(memories[1]["ram"].view)
        with open_image(uri) as image:
            assert image.page_size == page_size
            assert image.pages["ram"].shape == ((1 << 20) // page_size, page_size)


def test_detection_of_zero_pages_can_be_off(made, tmp_path):
    source = Box(8)
    path = tmp_path / "vm"
    write(made, source.guest, f"file:{path}", (), {"zero-page-detection": "none"})
    with open_image(path) as image:
        assert all(block.zero == 0 for block in image.blocks)
        assert_holds(image, source)


# ---- images ----------------------------------------------------------------------------------


@pytest.fixture
def file(made, tmp_path) -> tuple[Box, Path]:
    source = Box(20)
    write(made, source.guest, f"file:{tmp_path}/vm")
    return source, tmp_path / "vm"


def test_an_image_tells_what_is_in_it(file):
    source, path = file
    with open_image(path) as image:
        assert (image.machine, image.format, image.page_size) == ("box", "mapped-ram", PAGE)
        assert not image.ignores_shared
        arrays = as_arrays(source)
        for block in image.blocks:
            data = int(arrays[block.idstr].any(axis=1).sum())
            npages = len(arrays[block.idstr])
            assert (block.data, block.zero, block.missing) == (data, npages - data, 0)
        assert image.nbytes == path.stat().st_size
        assert image.page("pc.ram", 3) == arrays["pc.ram"][3].tobytes()
        assert image.page("pc.ram", 1) == bytes(PAGE)
        for index in (-1, NPAGES):
            with pytest.raises(IndexError):
                image.page("pc.ram", index)
        with pytest.raises(KeyError):
            image.page("none", 0)


def test_pages_are_views_that_are_only_read_and_keep_the_file_open(file):
    _, path = file
    image = open_image(path)
    pages = image.pages["pc.ram"]
    assert isinstance(pages, np.ndarray)
    assert not pages.flags.writeable
    assert not pages.flags.owndata
    with pytest.raises(BufferError):
        image.close()
    assert image.page("pc.ram", 0) == bytes(pages[0])
    del pages
    image.close()


@pytest.mark.parametrize("capabilities", [(), ("multifd",), ("return-path",)])
def test_an_image_is_sent(made, file, capabilities):
    source, path = file
    target = Box()
    incoming = made.incoming(target.guest, capabilities=set(capabilities))
    incoming.listen("tcp:127.0.0.1:0")
    with open_image(path) as image:
        outgoing = made.outgoing(image, capabilities=set(capabilities))
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    assert target.same_as(source)


def test_an_image_runs_at_once_by_postcopy(made, file):
    source, path = file
    target = Box()
    incoming = made.incoming(target.guest, capabilities={"postcopy-ram"})
    incoming.listen("tcp:127.0.0.1:0")
    with open_image(path) as image:
        outgoing = made.outgoing(image, capabilities={"postcopy-ram"})
        outgoing.start_postcopy()
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    assert target.same_as(source)


# ---- conversion ------------------------------------------------------------------------------

BLOCKS = {"pc.ram": 8 * PAGE, "rom": PAGE}
BURST = [
    Record(b"pc.ram", 0, b"\x01" * PAGE),
    Record(b"pc.ram", 1, 0),
    Record(b"rom", 0, b"\x02" * PAGE),
    Record(b"pc.ram", 6, b"\x03" * PAGE),
    Record(b"pc.ram", 7, b"\x04" * PAGE),
]
STREAM = stream.whole(BLOCKS, [BURST], [Device("uart", b"abc", 5)], section_id=9)


@pytest.mark.parametrize(("capabilities", "parameters"), WAYS)
def test_a_stream_is_converted(made, tmp_path, capabilities, parameters):
    (tmp_path / "s").write_bytes(STREAM)
    with open_image(tmp_path / "s") as image:
        assert isinstance(image, StreamImage)
        write(made, image, f"file:{tmp_path}/m", capabilities, parameters)
    with open_image(tmp_path / "m") as image:
        assert isinstance(image, MappedImage)
        assert image.ram_section_id == 9
        rom, ram = image.pages["rom"], image.pages["pc.ram"]
        assert [int(page[0]) for page in ram] == [1, 0, 0, 0, 0, 0, 3, 4]
        assert rom.tobytes() == b"\x02" * PAGE
        assert image.save_devices() == stream.device_state([Device("uart", b"abc", 5)])
        del rom, ram


def test_and_back(made, file, tmp_path):
    source, path = file
    capture = StreamCapture(tmp_path / "s")
    incoming = made.incoming(capture)
    incoming.listen("tcp:127.0.0.1:0")
    with open_image(path) as image:
        made.outgoing(image).start(incoming.uri)
        assert incoming.wait(FOREVER)
        made.migrations[-1].wait(FOREVER)
    with open_image(tmp_path / "s") as image:
        assert image.format == "stream"
        assert "mapped-ram" not in (image.configuration.capabilities or ())
        assert_holds(image, source)


def test_a_mapped_file_becomes_another(made, file, tmp_path):
    source, path = file
    with open_image(path) as image:
        write(made, image, f"file:{tmp_path}/other", ("multifd",))
    with open_image(tmp_path / "other") as image:
        assert_holds(image, source)


# ---- pages of a stream, as an array ----------------------------------------------------------


def test_the_pages_of_a_stream_are_read_like_an_array(tmp_path):
    (tmp_path / "s").write_bytes(STREAM)
    image = open_image(tmp_path / "s")
    pages = image.pages["pc.ram"]
    assert (len(pages), pages.shape) == (8, (8, PAGE))
    assert pages[6][0] == pages[-2][0] == 3
    assert [page[0] for page in pages] == [1, 0, 0, 0, 0, 0, 3, 4]
    assert pages[5:][:, 0].tolist() == [0, 3, 4]
    assert pages[[7, 0]][:, 1].tolist() == [4, 1]
    assert pages[np.array([True] + [False] * 7)].shape == (1, PAGE)
    assert np.asarray(pages).shape == (8, PAGE)
    # one page is a view, which nobody may write
    for page in (pages[6], pages[1]):
        with pytest.raises(ValueError, match="read-only"):
            page[0] = 1
    with pytest.raises(IndexError):
        pages[8]
    with pytest.raises(BufferError):
        image.close()
    del pages, page
    image.close()


# ---- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:1", "unix:/nowhere", "exec:cat", "fd:1"])
def test_only_files_have_places(made, uri):
    box = Box()
    for migration, start in (
        (made.outgoing(box.guest, capabilities={MAPPED}), "start"),
        (made.incoming(box.guest, capabilities={MAPPED}), "listen"),
    ):
        with pytest.raises(OptionError, match="requires seekable transport"):
            getattr(migration, start)(uri)
        assert migration.status == Status.NONE


@pytest.mark.parametrize(
    "capabilities", [{"x-ignore-shared"}, {"zero-copy-send", "multifd"}, {"return-path"}]
)
def test_capabilities_that_do_not_go_with_it(made, tmp_path, capabilities):
    outgoing = made.outgoing(Box().guest, capabilities={MAPPED, *capabilities})
    with pytest.raises(OptionError, match="not possible"):
        outgoing.start(f"file:{tmp_path}/vm")
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_cannot_load_it_says_so(made, tmp_path):
    capture = StreamCapture(tmp_path / "vm")
    with pytest.raises(OptionError, match="mapped_blocks"):
        made.incoming(capture, capabilities={MAPPED}).listen(f"file:{tmp_path}/vm")
    capture.abort()


def test_both_sides_must_have_it(made, file, tmp_path):
    _, path = file
    incoming = made.incoming(Box().guest)
    incoming.listen(f"file:{path}")
    assert "mapped-ram" in str(error_of(incoming))
    (tmp_path / "s").write_bytes(STREAM)
    error = error_of(load(made, Box().guest, f"file:{tmp_path}/s"))
    assert isinstance(error, MismatchError)
    assert "Capability mapped-ram is on, but received capability is off" in str(error)


def test_another_guest_is_refused_before_anything_is_read(made, file):
    _, path = file
    target = Box(30, machine="other")
    before = as_arrays(target)
    assert isinstance(error_of(load(made, target.guest, f"file:{path}")), MismatchError)
    assert all(np.array_equal(before[k], v) for k, v in as_arrays(target).items())


# ---- incomplete files ------------------------------------------------------------------------


def test_a_file_that_is_not_finished_is_not_taken_for_one(made, tmp_path):
    """Cancelled in the middle, with the guest running on."""
    log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
    source, path = Box(9, dirty=log), tmp_path / "vm"
    outgoing = made.outgoing(
        source.guest, capabilities={MAPPED}, parameters={"max-bandwidth": 100 << 10}
    )
    outgoing.start(f"file:{path}")
    while not outgoing.query().ram.transferred:
        threading.Event().wait(0.01)
    outgoing.cancel()
    ended(outgoing)
    with pytest.raises(CancelledError):
        outgoing.wait()
    assert source.guest.running
    with pytest.raises(MigError):
        open_image(path)
    assert isinstance(error_of(load(made, Box().guest, f"file:{path}")), MigError)


def test_a_full_disk_is_a_channel_error_and_the_guest_runs_on(made):
    log = SharedDirtyLog({"pc.ram": NPAGES, "vga.vram": 16})
    source = Box(10, dirty=log)
    outgoing = made.outgoing(source.guest, capabilities={MAPPED})
    outgoing.start("file:/dev/full")
    assert isinstance(error_of(outgoing), ChannelError)
    assert source.guest.running


# ---- the file itself -------------------------------------------------------------------------


def test_a_channel_of_a_file_can_be_passed_over(tmp_path):
    with connect(f"file:{tmp_path}/f,offset=10", Cancel()) as channel:
        assert (channel.position, channel.nbytes) == (10, 10)
        channel.skip(90)
        assert channel.position == 100
        channel.page_file().put(b"abc", 50)
        assert channel.position == 100
        assert channel.nbytes == 53
    with connect("exec:cat > /dev/null", Cancel()) as channel, pytest.raises(ChannelError):
        channel.skip(1)


@pytest.fixture
def two(tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("nthreads", [1, 4])
def test_pages_written_from_pieces_of_memory(two, nthreads):
    """Pages of a table lie anywhere, and many of them go with one call."""
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, 1000 * PAGE, dtype=np.uint8)
    where = rng.permutation(1000).astype(np.int64) * PAGE
    where[where == 0] = _core.PAGE_ZERO
    where[7] = _core.PAGE_NONE
    pages = _core.Pages(data, PAGE, where=where)
    file, stored = _core.PageFile(two, nthreads=nthreads), _core.Bitmap(1000, fill=True)
    index = np.flatnonzero(rng.integers(0, 10, 1000)).astype(np.uint64)
    written = file.write(pages, index, None, stored, 4096)
    expected = [i for i in index.tolist() if where[i] > 0]
    assert written == len(expected) * PAGE
    for i in range(1000):
        assert stored[i] == (i in expected or i not in index)
    for i in expected:
        assert os.pread(two, PAGE, 4096 + i * PAGE) == bytes(data[where[i] : where[i] + PAGE])


def test_a_file_that_becomes_shorter_is_a_channel_error(two):
    os.ftruncate(two, 3 * PAGE)
    file, memory = _core.PageFile(two), bytearray(8 * PAGE)
    pages = _core.Pages(memory, PAGE, writable=True)
    with pytest.raises(ChannelError, match="shorter"):
        file.read(pages, _core.Bitmap(8, fill=True), 0, 8, 0)
    with pytest.raises(ChannelError, match="shorter"):
        file.read_bitmap(8 * 3 * PAGE + 1, 0)


def test_what_does_not_fit_each_other_is_refused(two):
    file, memory = _core.PageFile(two), bytearray(8 * PAGE)
    pages = _core.Pages(memory, PAGE, writable=True)
    index = np.arange(8, dtype=np.uint64)
    with pytest.raises(ValueError, match="7 bits"):
        file.write(pages, index, None, _core.Bitmap(7), 0)
    with pytest.raises(ValueError, match="fewer bits"):
        file.write(pages, index, _core.Bitmap(7), _core.Bitmap(8), 0)
    with pytest.raises(IndexError):
        file.write(pages, index + 1, None, _core.Bitmap(8), 0)
    with pytest.raises(ValueError, match="past what a file can have"):
        file.write(pages, index, None, _core.Bitmap(8), (1 << 63) - PAGE)
    with pytest.raises(IndexError):
        file.read(pages, _core.Bitmap(8), 0, 9, 0)
    with pytest.raises(ValueError, match="written"):
        file.read(_core.Pages(bytes(memory), PAGE), _core.Bitmap(8), 0, 8, 0)
    with pytest.raises(ValueError, match="each page"):
        _core.Pages(memory, PAGE, stored=_core.Bitmap(7))
    with pytest.raises(ValueError, match="threads"):
        _core.PageFile(two, nthreads=0)


def test_a_bitmap_s_padding_is_ignored(two):
    os.pwrite(two, b"\xff" * 16, 100)
    bitmap = _core.PageFile(two).read_bitmap(70, 100)
    assert bitmap.count() == 70
    assert np.asarray(bitmap).tolist() == [2**64 - 1, 0x3F]


# ---- a guest that writes all the time --------------------------------------------------------


@pytest.mark.parametrize(("capabilities", "parameters"), WAYS)
def test_a_guest_that_writes_all_the_time(made, tmp_path, capabilities, parameters):
    """It checks each page before it writes it, in the source and when it is loaded again."""
    uri = f"file:{tmp_path}/vm"
    with ProcessGuest(16 << 20, workers=2, rate=64 << 20) as source:
        source.start()
        outgoing = write(made, source, uri, capabilities, {**parameters, "downtime-limit": 5})
        assert outgoing.query().ram.dirty_sync_count > 1
        with ProcessGuest(16 << 20, workers=2) as target:
            assert load(made, target, uri, capabilities, parameters).wait(FOREVER)
            assert target.verify().ok
            target.resume()
            target.stop()
            assert target.verify().ok
