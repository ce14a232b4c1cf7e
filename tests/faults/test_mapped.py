"""mapped-ram files of hostile authors: headers, bitmaps, holes and ends that lie."""

from __future__ import annotations

import os
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from reference import mapped, ram
from reference.mapped import Block
from reference.stream import Device

import mig
from mig.errors import MigError, MismatchError, StreamError, TruncatedError, UnsupportedError

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
DEVICES = [Device("uart", b"abc", 5)]
#: places of the fields in a header
VERSION, PAGE_SIZE, BITMAP, PAGES = 0, 4, 12, 20
LIMIT = 10.0


def blocks() -> list[Block]:
    return [
        Block("pc.ram", 4 * MIB, {0: b"\x01" * PAGE, 7: b"\x02" * PAGE, 1023: b"\x03" * PAGE}),
        Block("rom", PAGE, {0: b"\x04" * PAGE}),
    ]


def loaded(path: Path, start: int = 0, **given: int) -> tuple[MigError | None, mig.GuestMemory]:
    """What becomes of a guest that loads the file."""
    memory = mig.GuestMemory()
    for name, nbytes in (given or {"pc.ram": 4 * MIB, "rom": PAGE}).items():
        memory.add(name.replace("_", "."), nbytes)
    devices = mig.DeviceRegistry()
    devices.register("uart", save=lambda: b"", load=lambda data, version: None)
    incoming = mig.IncomingMigration(
        mig.MemoryGuest("box", memory, devices), capabilities={"mapped-ram", "multifd"}
    )
    incoming.listen(f"file:{path},offset={start}")
    try:
        assert incoming.wait(LIMIT)
    except MigError as error:
        return error, memory
    return None, memory


def refused(path: Path, match: str, *, offset: int | None, block: str | None, start: int = 0):
    """By who looks into it, and by a guest, whose memory stays as it was."""
    with pytest.raises(StreamError, match=match) as caught:
        mig.open_image(f"file:{path},offset={start}")
    error, memory = loaded(path, start)
    assert isinstance(error, StreamError)
    for found in (caught.value, error):
        assert (found.offset, found.block) == (offset, block)
    assert not any(bytes(b.view).strip(b"\0") for b in memory)


# ---- the file as it should be ----------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 5000, MIB])
def test_a_file_by_hand_is_read(tmp_path, start):
    written = mapped.write(tmp_path / "f", blocks(), DEVICES, start=start)
    with mig.open_image(f"file:{tmp_path}/f,offset={start}") as image:
        assert image.format == "mapped-ram"
        assert image.nbytes == written.nbytes
        assert [(b.idstr, b.data, b.zero) for b in image.blocks] == [
            ("pc.ram", 3, 1021),
            ("rom", 1, 0),
        ]
        assert image.page("pc.ram", 7) == b"\x02" * PAGE
        assert image.page("pc.ram", 8) == bytes(PAGE)
    error, memory = loaded(tmp_path / "f", start)
    assert error is None
    for block in blocks():
        view = memory[block.idstr].view
        for page in range(block.used_length // PAGE):
            assert view[page * PAGE : page * PAGE + PAGE] == block.pages.get(page, bytes(PAGE))


# ---- headers ---------------------------------------------------------------------------------

U64 = (1 << 64) - 1


@pytest.mark.parametrize(
    ("field", "values", "match"),
    [
        ("version", [2, 1 << 31, (1 << 32) - 1], "mapped-ram of version"),
        ("page_size", [0, 1, 2048, 8192, 4097, 1 << 63, U64], "target pages have 4096"),
        ("pages_offset", [MIB + 1, MIB + 2048, U64], "no multiple of 4096"),
        ("pages_offset", [GIB, 1 << 62, 1 << 63, U64 - PAGE + 1], "in a file of"),
        ("pages_offset", [0], "before the header"),
        ("bitmap_offset", [GIB, 1 << 62, 1 << 63, U64, U64 - 63], "the bitmap from .* in a file"),
        ("bitmap_offset", [0, 40, 100], "overlaps"),
        ("bitmap_offset", [MIB, MIB + 8, 5 * MIB - 64, MIB - 1], "overlaps"),
    ],
)
def test_fields_at_their_edges(tmp_path, field, values, match):
    place = {"version": 0, "page_size": PAGE_SIZE, "bitmap_offset": BITMAP, "pages_offset": PAGES}
    for value in values:
        wrong = blocks()
        setattr(wrong[0], field, value)
        at = mapped.write(tmp_path / "f", wrong, DEVICES).headers["pc.ram"] + place[field]
        if match == "overlaps":
            with pytest.raises(StreamError, match=match):
                mig.open_image(tmp_path / "f")
            assert isinstance(loaded(tmp_path / "f")[0], StreamError)
        else:
            refused(tmp_path / "f", match, offset=at, block="pc.ram")


def test_an_older_version_is_taken_as_qemu_takes_it(tmp_path):
    older = blocks()
    older[0].version = 0
    mapped.write(tmp_path / "f", older, DEVICES)
    with mig.open_image(tmp_path / "f") as image:
        assert image.page("pc.ram", 0) == b"\x01" * PAGE
    assert loaded(tmp_path / "f")[0] is None


def test_the_second_block_in_the_first(tmp_path):
    """Its header is read where the stream goes on; its pages are the first block's."""
    wrong = blocks()
    wrong[1].pages_offset = 2 * MIB
    written = mapped.write(tmp_path / "f", wrong, DEVICES)
    at = written.headers["rom"] + PAGES
    refused(tmp_path / "f", "before the header", offset=at, block="rom")


@pytest.mark.parametrize("place", ["in the devices", "on the end of RAM", "behind everything"])
def test_a_bitmap_behind_ram(tmp_path, place):
    """May be where nothing else is."""
    wrong = blocks()
    written = mapped.write(tmp_path / "f", wrong, DEVICES)
    start = {"in the devices": written.nbytes - 20, "on the end of RAM": written.end - 4}
    wrong[1].bitmap_offset = start.get(place, written.nbytes)
    mapped.write(tmp_path / "f", wrong, DEVICES)
    with (tmp_path / "f").open("ab") as file:
        file.write(b"\x01" + bytes(63))
    if place == "behind everything":
        with mig.open_image(tmp_path / "f") as image:
            assert image.page("rom", 0) == b"\x04" * PAGE
        assert loaded(tmp_path / "f")[0] is None
    else:
        with pytest.raises(StreamError, match="overlaps"):
            mig.open_image(tmp_path / "f")


def test_blocks_that_do_not_end_with_a_page(tmp_path):
    mapped.write(tmp_path / "f", [Block("a", MIB + 512), Block("b", MIB - 512)], DEVICES)
    with pytest.raises(StreamError, match="1049088 bytes"):
        mig.open_image(tmp_path / "f")


def test_another_guest_s_file(tmp_path):
    mapped.write(tmp_path / "f", blocks(), DEVICES)
    error, memory = loaded(tmp_path / "f", pc_ram=8 * MIB, rom=PAGE)
    assert isinstance(error, MismatchError)
    assert not bytes(memory["pc.ram"].view).strip(b"\0")


def test_a_block_of_nothing(tmp_path):
    mapped.write(tmp_path / "f", [], DEVICES)
    with mig.open_image(tmp_path / "f") as image:
        assert image.blocks == ()
        assert dict(image.pages) == {}


@pytest.mark.parametrize(
    "record",
    [
        ram.encode([ram.Record(b"rom", 0, b"\x09" * PAGE)], PAGE),
        ram.encode([ram.Record(b"rom", 0, 0)], PAGE),
        struct.pack(">Q", 0x200),
        struct.pack(">Q", 0x80),
        struct.pack(">Q", 4096 | 0x04),
    ],
    ids=["page", "zero", "multifd", "hook", "list"],
)
def test_records_have_no_place_in_it(tmp_path, record):
    mapped.write(tmp_path / "f", blocks(), DEVICES, records=record)
    with pytest.raises(StreamError):
        mig.open_image(tmp_path / "f")
    assert isinstance(loaded(tmp_path / "f")[0], StreamError)


def test_a_background_snapshot_of_qemu_s_which_has_no_bitmaps(tmp_path):
    """QEMU 10.0 takes both capabilities, and loads such a file as a guest of zeros."""
    pages = [Block("pc.ram", 4 * MIB, {0: b"\x01" * PAGE}, bitmap=bytes(128))]
    written = mapped.write(tmp_path / "f", pages, DEVICES, snapshot=True)
    with pytest.raises(UnsupportedError, match="no bitmaps") as caught:
        mig.open_image(tmp_path / "f")
    assert caught.value.capability == "background-snapshot"
    # behind the end of the block list, and a section of type, id, EOS and footer
    assert caught.value.offset == written.end + 13 + 18
    assert isinstance(loaded(tmp_path / "f", pc_ram=4 * MIB)[0], UnsupportedError)


def test_a_header_where_the_capability_is_not_named(tmp_path):
    mapped.write(tmp_path / "f", blocks(), DEVICES, config=mapped.configuration(()))
    with pytest.raises(MigError):
        mig.open_image(tmp_path / "f")
    assert isinstance(loaded(tmp_path / "f")[0], MismatchError)


def test_shared_memory_that_is_not_in_the_file(tmp_path):
    """As QEMUs newer than 10.0 write it: a header of zeros, and no place for pages."""
    path, tail = tmp_path / "f", Block("rom", PAGE, {0: b"\x04" * PAGE}, address=0)
    config = mapped.configuration(("x-ignore-shared", "mapped-ram"))
    mapped.write(path, [tail], DEVICES, config=config)
    data = bytearray(path.read_bytes())
    # in front of it, a block of which there is only a header; the file stays aligned by chance
    # of nothing but 1 MiB of room behind the first header
    at = data.index(b"\x03rom")
    entry = b"\x06shared" + struct.pack(">QQ", 2 * PAGE, 1 << 32)
    entry += struct.pack(">IQQQ", 1, PAGE, 0, 0)
    total = struct.pack(">Q", 3 * PAGE | 0x04)
    header = bytearray(data[at : at + 4 + 16 + 28])
    moved = struct.unpack_from(">Q", header, 4 + 16 + 12)[0] + len(entry)
    struct.pack_into(">Q", header, 4 + 16 + 12, moved)
    bitmap = struct.pack("<Q", 1)
    data[at - 8 : at - 8 + len(total + entry + header + bitmap)] = total + entry + header + bitmap
    path.write_bytes(data)
    with mig.open_image(path) as image:
        assert image.ignores_shared
        shared, rom = image.blocks
        assert (shared.ignored, shared.missing, shared.address) == (True, 2, 1 << 32)
        assert (rom.data, rom.ignored) == (1, False)
        assert image.page("shared", 0) is None
        assert image.pages["shared"].shape == (0, PAGE)
        assert [b.shared for b in image.source_blocks()] == [True, False]


# ---- bitmaps ---------------------------------------------------------------------------------


def test_bits_past_the_end_are_ignored(tmp_path):
    wrong = blocks()
    wrong[1].bitmap = b"\xff" * 8
    mapped.write(tmp_path / "f", wrong, DEVICES)
    with mig.open_image(tmp_path / "f") as image:
        assert image.blocks[1].data == 1
    assert loaded(tmp_path / "f")[0] is None


def test_a_bitmap_that_has_pages_where_the_file_has_holes(tmp_path):
    wrong = blocks()
    wrong[0].bitmap = b"\xff" * 128
    mapped.write(tmp_path / "f", wrong, DEVICES)
    with mig.open_image(tmp_path / "f") as image:
        assert image.blocks[0].data == 1024
        assert image.page("pc.ram", 500) == bytes(PAGE)
    error, memory = loaded(tmp_path / "f")
    assert error is None
    assert memory["pc.ram"].view[7 * PAGE] == 2


def test_a_bitmap_without_pages_that_the_file_has(tmp_path):
    """They are zero, however one looks at them."""
    wrong = blocks()
    wrong[0].bitmap = bytes(128)
    mapped.write(tmp_path / "f", wrong, DEVICES)
    before = (tmp_path / "f").read_bytes()
    with mig.open_image(tmp_path / "f") as image:
        assert image.page("pc.ram", 7) == bytes(PAGE)
        assert not np.asarray(image.pages["pc.ram"]).any()
        assert image.pages["rom"][0][0] == 4
        (ram_block, _) = image.source_blocks()
        everything = np.arange(1024, dtype=np.uint64)
        assert ram_block.pages.count_stored(everything) == 0
    assert (tmp_path / "f").read_bytes() == before
    error, memory = loaded(tmp_path / "f")
    assert error is None
    assert not bytes(memory["pc.ram"].view).strip(b"\0")


def test_a_file_that_was_copied_without_its_holes(tmp_path):
    mapped.write(tmp_path / "sparse", blocks(), DEVICES)
    (tmp_path / "f").write_bytes((tmp_path / "sparse").read_bytes())
    with mig.open_image(tmp_path / "f") as image:
        pages = image.pages["pc.ram"]
        assert np.flatnonzero(pages.any(axis=1)).tolist() == [0, 7, 1023]
        # nothing had to be corrected
        assert image._corrected is None
        del pages


# ---- bombs -----------------------------------------------------------------------------------


def peak() -> int:
    """Most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_terabyte_of_holes(tmp_path):
    """It is neither read nor given memory, whoever looks at it."""
    last = TIB // PAGE - 1
    try:
        mapped.write(tmp_path / "f", [Block("pc.ram", TIB)], DEVICES)
    except OSError:
        pytest.skip("no file of this file system can have a terabyte")
    with mig.open_image(tmp_path / "f") as image:
        at = image._contents.blocks[0].mapped
    with (tmp_path / "f").open("r+b") as file:
        os.pwrite(file.fileno(), b"\x80", at.bitmap_offset + last // 8)
        os.pwrite(file.fileno(), b"\x05" * PAGE, at.pages_offset + last * PAGE)
    before, began = peak(), time.thread_time()
    with mig.open_image(tmp_path / "f") as image:
        assert [(b.data, b.zero) for b in image.blocks] == [(1, last)]
        assert image.page("pc.ram", last) == b"\x05" * PAGE
        pages = image.pages["pc.ram"]
        assert pages.shape == (last + 1, PAGE)
        assert pages[last][0] == 5
        del pages
    error, memory = loaded(tmp_path / "f", pc_ram=TIB)
    assert error is None
    assert memory["pc.ram"].view[last * PAGE] == 5
    memory.close()
    assert peak() - before < 400 << 20
    # seconds of this thread: reading so much would take minutes
    assert time.thread_time() - began < 20


def test_more_ram_than_can_be(tmp_path):
    path = tmp_path / "f"
    mapped.write(path, [Block("pc.ram", 4 * MIB)], DEVICES)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x06pc.ram")
    for total in (1 << 45, (1 << 64) - PAGE):
        struct.pack_into(">Q", data, at - 8, total | 0x04)
        struct.pack_into(">Q", data, at + 7, total)
        path.write_bytes(data)
        with pytest.raises(StreamError, match="past the limit"):
            mig.open_image(path)


def test_more_ram_than_the_file_has(tmp_path):
    path = tmp_path / "f"
    mapped.write(path, [Block("pc.ram", 4 * MIB)], DEVICES)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x06pc.ram")
    for total in (8 * MIB, GIB, 1 << 44):
        struct.pack_into(">Q", data, at - 8, total | 0x04)
        struct.pack_into(">Q", data, at + 7, total)
        path.write_bytes(data)
        with pytest.raises(StreamError, match="in a file of"):
            mig.open_image(path)
        assert isinstance(loaded(path)[0], StreamError)


# ---- ends ------------------------------------------------------------------------------------


def test_files_cut_anywhere(tmp_path):
    path = tmp_path / "f"
    written = mapped.write(path, blocks(), DEVICES)
    data = path.read_bytes()
    first, second = written.headers["pc.ram"], written.headers["rom"]
    cuts = {*range(first + 60), first + 28 + 64, first + 28 + 127, MIB, MIB + 1, 3 * MIB, 5 * MIB}
    cuts |= {*range(5 * MIB, second + 40), 6 * MIB, 6 * MIB + 1, written.end - 1}
    cuts |= set(range(written.end, written.nbytes, 3)) | {written.nbytes - 1}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(StreamError) as caught:
            mig.open_image(path)
        assert caught.value.offset is not None
    for cut in (first + 10, 3 * MIB, second + 10, written.end, written.nbytes - 5):
        path.write_bytes(data[:cut])
        error, _ = loaded(path)
        assert isinstance(error, StreamError)
        assert error.offset is not None
    path.write_bytes(data[: written.end])
    with pytest.raises(TruncatedError):
        mig.open_image(path)


def test_headers_with_bytes_changed(tmp_path):
    """Whatever is changed, it is read or refused as it should."""
    path = tmp_path / "f"
    written = mapped.write(path, blocks(), DEVICES)
    rng = np.random.default_rng(1)
    heads = [*range(8, written.headers["pc.ram"] + 28)]
    heads += range(written.headers["rom"] - 12, written.headers["rom"] + 36)
    heads += range(written.end, written.nbytes)
    with path.open("r+b") as file:
        for _ in range(400):
            places = rng.choice(heads, size=int(rng.integers(1, 4)))
            before = [os.pread(file.fileno(), 1, int(at)) for at in places]
            for at in places:
                os.pwrite(file.fileno(), rng.bytes(1), int(at))
            try:
                with mig.open_image(path) as image:
                    assert len(image.blocks) <= 2
                    _ = [np.asarray(pages).sum() for pages in image.pages.values()]
            except MigError:
                pass
            loaded(path)
            for at, byte in reversed(list(zip(places, before, strict=True))):
                os.pwrite(file.fileno(), byte, int(at))
