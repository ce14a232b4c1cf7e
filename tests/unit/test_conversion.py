"""Conversion without a QEMU: what stands where in a core, page tables, what cannot be converted."""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from reference import ram, stream
from reference.ram import Record

import mig
from mig.conversion import x86
from mig.conversion.elf import core_of, memory_offset
from mig.conversion.x86 import (
    Cpu,
    Mapping,
    PageTables,
    Range,
    Segment,
    memory_ranges,
)
from mig.errors import (
    ChannelError,
    MismatchError,
    OptionError,
    StreamError,
    UnsupportedError,
)
from mig.savevm.devices import DeviceSection
from mig.savevm.fields import Device, Field, State

PAGE = 4096
BLOCKS = {"pc.ram": 40 * PAGE, "rom": 2 * PAGE}
DEVICES = [stream.Device("uart", b"abc", 5)]


def page_of(seed):
    return np.random.default_rng(seed).integers(1, 256, PAGE, dtype=np.uint8).tobytes()


RECORDS = [
    Record(b"pc.ram", 0, page_of(1)),
    Record(b"pc.ram", 1, 0),
    *(Record(b"pc.ram", i, page_of(i)) for i in range(5, 30)),
    Record(b"rom", 1, page_of(2)),
]


def write_stream(path, *bursts):
    path.write_bytes(stream.whole(BLOCKS, list(bursts), DEVICES))
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def image(tmp_path):
    return write_stream(tmp_path / "vm", RECORDS)


def contents(block, bursts=(RECORDS,)):
    out = bytearray(BLOCKS[block])
    for record in (r for burst in bursts for r in burst if r.block == block.encode()):
        at = record.page * PAGE
        out[at : at + PAGE] = record.expand(PAGE, bytes(out[at : at + PAGE]))
    return bytes(out)


def memory_of(path):
    with mig.open_image(path) as image:
        return {name: np.asarray(pages).tobytes() for name, pages in image.pages.items()}


@pytest.mark.parametrize("kinds", [["stream"], ["mapped-ram"], ["mapped-ram", "stream"]])
def test_whole_vms(image, tmp_path, kinds):
    at = image
    for number, kind in enumerate(kinds):
        out = tmp_path / str(number)
        mig.convert(at, out, kind)
        at = out
    assert memory_of(at) == {name: contents(name) for name in BLOCKS}
    with mig.open_image(at) as made, mig.open_image(image) as given:
        assert made.save_devices() == given.save_devices()
        assert made.format == kinds[-1]
        assert made.machine == given.machine


@pytest.mark.parametrize("kind", ["stream", "mapped-ram", "raw"])
def test_an_open_image_is_saved(image, tmp_path, kind):
    with mig.open_image(image) as opened:
        opened.save(tmp_path / "out", kind)
        assert opened.device("uart").section.payload == b"abc"
        with pytest.raises(KeyError):
            opened.device("uart", 1)
        with pytest.raises(OptionError):
            opened.save(tmp_path / "never", "vdi")
    if kind == "raw":
        assert (tmp_path / "out").read_bytes() == contents("pc.ram")
    else:
        assert memory_of(tmp_path / "out") == {name: contents(name) for name in BLOCKS}


@pytest.mark.parametrize("form", ["stream", "mapped-ram"])
@pytest.mark.parametrize("block", [None, "pc.ram", "rom"])
def test_raw_memory(image, tmp_path, form, block):
    mig.convert(image, tmp_path / "vm2", form)
    mig.convert(tmp_path / "vm2", tmp_path / "raw", "raw", block=block)
    assert (tmp_path / "raw").read_bytes() == contents(block or "pc.ram")


def test_zero_pages_are_holes(tmp_path):
    blocks = {"pc.ram": 4096 * PAGE}
    path = tmp_path / "vm"
    records = [Record(b"pc.ram", i, 0 if i else page_of(1)) for i in range(4096)]
    path.write_bytes(stream.whole(blocks, [records], DEVICES))
    mig.convert(path, tmp_path / "raw", "raw")
    stat = (tmp_path / "raw").stat()
    assert stat.st_size == 4096 * PAGE
    assert stat.st_blocks * 512 <= 64 << 10


def test_memory_from_elsewhere(image, tmp_path):
    other = bytes(range(256)) * (BLOCKS["pc.ram"] // 256)
    (tmp_path / "raw").write_bytes(other)
    for form in ("stream", "mapped-ram", "raw"):
        out = tmp_path / form
        mig.convert(image, out, form, memory={"pc.ram": tmp_path / "raw"})
        if form == "raw":
            assert out.read_bytes() == other
        else:
            assert memory_of(out) == {"pc.ram": other, "rom": contents("rom")}


def test_streams_with_what_no_image_has(tmp_path):
    """Pages that come again, as differences."""
    bursts = (
        RECORDS,
        [Record(b"pc.ram", 5, ram.Delta(b"\x05\x01A")), Record(b"pc.ram", 6, page_of(77))],
    )
    path = write_stream(tmp_path / "vm", *bursts)
    for form in ("mapped-ram", "stream"):
        mig.convert(path, tmp_path / form, form)
        assert memory_of(tmp_path / form)["pc.ram"] == contents("pc.ram", bursts)
    mig.convert(path, tmp_path / "raw", "raw")
    assert (tmp_path / "raw").read_bytes() == contents("pc.ram", bursts)
    assert names_in(tmp_path) == ["mapped-ram", "raw", "stream", "vm"]


def save_file(data, number, magic=b"LibvirtQemudSave"):
    """A save file of libvirt: version 2, running, no cookie."""
    xml = b"<domain type='kvm'><name>web</name></domain>\0"
    return magic + struct.pack("<5I", 2, len(xml), 1, number, 0) + bytes(56) + xml + data


PACKED = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "libvirt raw": lambda data: save_file(data, 0),
    "libvirt gzip": lambda data: save_file(gzip.compress(data), 1),
    "libvirt zstd": lambda data: save_file(zstandard.compress(data), 5),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", ["mapped-ram", "raw"])
def test_files_of_others(image, tmp_path, packed, kind):
    whole = image.read_bytes()
    image.write_bytes(PACKED[packed](whole))
    out = tmp_path / "out"
    mig.convert(image, out, kind)
    if kind == "raw":
        assert out.read_bytes() == contents("pc.ram")
    else:
        assert memory_of(out) == {name: contents(name) for name in BLOCKS}
    if packed == "libvirt raw":
        assert memory_of(image)["rom"] == contents("rom")
    else:
        with pytest.raises(UnsupportedError, match="convert"):
            mig.open_image(image)
    assert names_in(tmp_path) == ["out", "vm"]


@pytest.mark.parametrize(
    "data",
    [
        save_file(b"", 0)[:50],
        save_file(b"", 9),
        save_file(b"", 0, magic=b"LibvirtQemudPart"),
        gzip.compress(b"nothing", mtime=0),
        gzip.compress(b"QEVM", mtime=0)[:-4],
    ],
)
def test_files_of_others_that_are_broken(tmp_path, data):
    (tmp_path / "vm").write_bytes(data)
    with pytest.raises(mig.MigError):
        mig.convert(tmp_path / "vm", tmp_path / "out")
    assert names_in(tmp_path) == ["vm"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("vdi",), OptionError, "none of"),
        (("elf",), MismatchError, "PC|clock|vCPU|devices"),
        (("raw", "nowhere"), MismatchError, "no such block"),
        (("stream", "pc.ram"), OptionError, "raw"),
    ],
)
def test_what_cannot_be(image, tmp_path, arguments, error, match):
    kind, block = (*arguments, None)[:2]
    with pytest.raises(error, match=match):
        mig.convert(image, tmp_path / "out", kind, block=block)
    assert names_in(tmp_path) == ["vm"]


@pytest.mark.parametrize(
    ("memory", "error", "match"),
    [
        ({"nowhere": b""}, MismatchError, "no such block"),
        ({"pc.ram": bytes(PAGE)}, MismatchError, "4096 bytes"),
        ({"pc.ram": b"\x7fELF" + bytes(400)}, StreamError, "ELF"),
        ({"pc.ram": b"\x7fELF"}, StreamError, "ELF"),
        ({"pc.ram": None}, ChannelError, "No such file"),
    ],
)
def test_memory_that_cannot_be(image, tmp_path, memory, error, match):
    given = {}
    for name, data in memory.items():
        given[name] = tmp_path / "memory"
        if data is not None:
            given[name].write_bytes(data)
    with pytest.raises(error, match=match):
        mig.convert(image, tmp_path / "out", "stream", memory=given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 1, 40, 5000, -1])
@pytest.mark.parametrize("kind", ["mapped-ram", "stream", "raw"])
def test_a_source_that_is_cut(image, tmp_path, cut, kind):
    whole = image.read_bytes()
    image.write_bytes(whole[:cut])
    if cut == -1 and whole[-1:] == b"}":
        return
    with pytest.raises(mig.MigError):
        mig.convert(image, tmp_path / "out", kind)
    assert names_in(tmp_path) == ["vm"]


@pytest.mark.parametrize("kind", ["mapped-ram", "stream", "raw"])
def test_a_mapped_file_with_what_is_not_known(image, tmp_path, kind):
    """It is not opened again and again to be laid down anew."""
    mig.convert(image, tmp_path / "mapped")
    data = (tmp_path / "mapped").read_bytes()
    end = data.index(b"\x03\0\0\0", 1 << 20)
    section = b"\x01\0\0\0\x63\x05block" + struct.pack(">II", 0, 1)
    (tmp_path / "mapped").write_bytes(data[:end] + section + data[end:])
    with pytest.raises(UnsupportedError, match="block"):
        mig.convert(tmp_path / "mapped", tmp_path / "out", kind)
    assert names_in(tmp_path) == ["mapped", "vm"]


def test_no_folder_for_a_copy(tmp_path):
    path = tmp_path / "vm.gz"
    path.write_bytes(gzip.compress(stream.whole(BLOCKS, [RECORDS], DEVICES)))
    with pytest.raises(ChannelError, match="No such file"):
        mig.convert(path, tmp_path / "nowhere" / "out", "raw")


def test_no_source(tmp_path):
    with pytest.raises(ChannelError):
        mig.convert(tmp_path / "nothing", tmp_path / "out")


# ---- page tables --------------------------------------------------------------------------------


def cpu(cr3, *, levels=4, on=True):
    zero = Segment(0, 0, 0, 0)
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "eflags")
    registers = dict.fromkeys(names, 0)
    registers |= {f"r{i}": i for i in range(8, 16)}
    segments = dict.fromkeys(["es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr", "gdt", "idt"], zero)
    cr4 = 1 << 5 | (1 << 12 if levels == 5 else 0)
    return Cpu(registers, segments, (1 << 31 if on else 0, 0, 0, cr3, cr4), 1 << 10, 0)


class Tables:
    """Page tables as a kernel writes them."""

    def __init__(self, levels):
        self.levels, self.tables = levels, {0x1000: np.zeros(512, dtype="<u8")}

    def map(self, virtual, physical, level=1):
        at = 0x1000
        for step in range(self.levels, level, -1):
            index = virtual >> 12 + 9 * (step - 1) & 511
            if not self.tables[at][index]:
                new = 0x1000 * (len(self.tables) + 1)
                self.tables[new] = np.zeros(512, dtype="<u8")
                self.tables[at][index] = new | 3
            at = int(self.tables[at][index]) & ~0xFFF
        large = 0x80 if level > 1 else 0
        nx = 1 << 63
        self.tables[at][virtual >> 12 + 9 * (level - 1) & 511] = physical | 3 | large | nx

    def walk(self, **options):
        return PageTables(cpu(0x1000, levels=self.levels, **options), self.tables.get)


@pytest.mark.parametrize("levels", [4, 5])
def test_mappings(levels):
    tables = Tables(levels)
    tables.map(0xFFFFFFFF80000000, 0x200000, level=2)
    tables.map(0xFFFFFFFF80200000, 0x400000, level=2)
    tables.map(0xFFFFFFFF80400000, 0xA000)
    tables.map(0xFFFFFFFF80401000, 0xB000)
    tables.map(0xFFFFFFFF80403000, 0x9000)
    tables.map(0xFFFF888000000000, 0x40000000, level=3)
    tables.map(0x400000, 0x5000)  # of a program
    found = tables.walk().kernel_mappings()
    assert found == [
        Mapping(0xFFFF888000000000, 0x40000000, 1 << 30),
        Mapping(0xFFFFFFFF80000000, 0x200000, 4 << 20),
        Mapping(0xFFFFFFFF80400000, 0xA000, 0x2000),
        Mapping(0xFFFFFFFF80403000, 0x9000, 0x1000),
    ]
    assert tables.walk(on=False).kernel_mappings() == []


def test_tables_that_lead_in_circles_end():
    tables = Tables(4)
    tables.tables[0x1000][256:] = 0x1003
    assert tables.walk().left
    walk = PageTables(cpu(0x1000), tables.tables.get, 500)
    walk.kernel_mappings()
    assert walk.left == 0


def test_tables_of_many_vcpus_and_mappings_without_end_are_bounded(monkeypatch):
    tables = Tables(4)
    tables.tables[0x1000][256:] = 0x1003
    monkeypatch.setattr(x86, "_MAX_ALL_TABLES", 1000)
    monkeypatch.setattr(x86, "_MAX_MAPPINGS", 700)
    looked_at = []

    def read(address):
        found = tables.tables.get(address)
        looked_at.append(found is not None)
        return found

    assert len(x86.kernel_mappings([cpu(0x1000)] * 1000, read)) <= 700
    assert 0 < sum(looked_at) <= 1000


def test_vcpus_with_numbers_that_no_register_has():
    one = cpu(0)
    fields = [
        Field("env.regs", "uint64", 0, 0, tuple(one.registers[name] for name in x86.REGISTERS)),
        Field("env.eip", "uint64", 0, 0, 0),
        Field("env.eflags", "uint64", 0, 0, 0),
    ]
    segment = State(
        "segment",
        1,
        tuple(Field(name, "uint32", 0, 0, 0) for name in ("selector", "base", "limit", "flags")),
    )
    tables = ("ldt", "tr", "gdt", "idt")
    fields += [Field(f"env.{name}", "struct", 0, 0, segment) for name in tables]
    fields += [Field(f"env.cr[{i}]", "uint64", 0, 0, 0) for i in (0, 2, 3, 4)]

    def vcpu(**changes):
        given = {"env.segs": (segment,) * 6} | {f"env.{k}": v for k, v in changes.items()}
        mine = [f for f in fields if f.name not in given]
        mine += [Field(name, "x", 0, 0, value) for name, value in given.items()]
        state = State("cpu", 12, tuple(mine))
        return Device(DeviceSection(1, "cpu", 0, 12, b"", 0), state)

    assert len(x86.cpus_of([vcpu()])) == 1
    wide = State(
        "segment",
        1,
        tuple(
            Field(name, "uint64", 0, 0, 1 << 40) for name in ("selector", "base", "limit", "flags")
        ),
    )
    for wrong in ({"eip": -1}, {"eip": 1 << 64}, {"segs": (segment,) * 5}, {"tr": wide}):
        with pytest.raises(MismatchError, match="none of a PC"):
            x86.cpus_of([vcpu(**wrong)])


def test_the_kernel_s_tables_beside_a_program_s():
    tables = Tables(4)
    tables.map(0xFFFFFFFF80000000, 0x200000, level=2)
    tables.tables[0x2000], tables.tables[0x1000] = tables.tables[0x1000], tables.tables[0x2000]
    walk = PageTables(cpu(0x3000), {0x2000: tables.tables[0x2000], 0x3000: np.zeros(512)}.get)
    assert walk._roots == {0x3000, 0x2000}


# ---- where memory stands ------------------------------------------------------------------------


def clock(below_64k, above_64k):
    cmos = bytearray(128)
    cmos[0x34:0x36] = below_64k.to_bytes(2, "little")
    cmos[0x5B:0x5E] = above_64k.to_bytes(3, "little")
    state = State("mc146818rtc", 3, (Field("cmos_data", "buffer", 0, 128, bytes(cmos)),))
    return Device(DeviceSection(5, "mc146818rtc", 0, 3, b"", 0), state)


GIB_64K = (1 << 30) >> 16
SIXTEEN = (16 << 20) >> 16


def test_ranges():
    assert memory_ranges([clock(7 * 256, 0)], 128 << 20) == (Range(0, 128 << 20, 0),)
    low = 3 * GIB_64K - SIXTEEN
    assert memory_ranges([clock(low, 2 * GIB_64K)], 5 << 30) == (
        Range(0, 3 << 30, 0),
        Range(4 << 30, 2 << 30, 3 << 30),
    )
    # the clock does not know of what is less than 64 KiB
    assert memory_ranges([clock(low, GIB_64K)], (4 << 30) + 8192)[1].nbytes == (1 << 30) + 8192
    for devices in ([], [clock(low, 9 * GIB_64K)], [clock(0, GIB_64K)]):
        with pytest.raises(MismatchError):
            memory_ranges(devices, 5 << 30)


# ---- cores --------------------------------------------------------------------------------------


def headers_of(core):
    fields = struct.unpack_from("<16sHHIQQQIHHHHHH", core)
    count = fields[10]
    if count == 0xFFFF:
        count = struct.unpack_from("<I", core, fields[6] + 44)[0]
    return [struct.unpack_from("<IIQQQQQQ", core, fields[5] + 56 * i) for i in range(count)]


@pytest.mark.parametrize("count", [1, 70_000])
def test_segments(count, tmp_path):
    """More of them than fit into the header's field, too."""
    ranges = (Range(0, 3 << 30, 0), Range(4 << 30, 1 << 30, 3 << 30))
    mappings = [Mapping((0xFFFF8880 << 32) + i * 8192, i * PAGE, PAGE) for i in range(count)]
    # part of it is in the hole, part behind all memory
    mappings.append(Mapping(0xFFFFC900 << 32, (3 << 30) - PAGE, 3 << 30))
    core = core_of([cpu(0)], ranges, mappings)
    note, *loads = headers_of(core.head)
    assert note[0] == 4
    at = core.memory_offset
    assert at % PAGE == 0
    assert [load[2:6] for load in loads[:2]] == [
        (at, 0, 0, 3 << 30),
        (at + (3 << 30), 4 << 30, 4 << 30, 1 << 30),
    ]
    assert len(loads) == 2 + count + 2
    last = (0xFFFFC900 << 32) + (1 << 30) + PAGE
    assert [load[2:6] for load in loads[-2:]] == [
        (at + (3 << 30) - PAGE, 0xFFFFC900 << 32, (3 << 30) - PAGE, PAGE),
        (at + (3 << 30), last, 4 << 30, 1 << 30),
    ]
    path = Path(tmp_path / "core")
    path.write_bytes(core.head)
    assert memory_offset(path) == at


def test_notes():
    core = core_of([cpu(0), cpu(7)], (Range(0, PAGE, 0),), [])
    _, _, offset, _, _, nbytes, *_ = headers_of(core.head)[0]
    notes, found = core.head[offset : offset + nbytes], []
    while notes:
        name, size, kind = struct.unpack_from("<III", notes)
        at = 12 + -(-name // 4) * 4
        found.append((notes[12 : 12 + name], kind, notes[at : at + size]))
        notes = notes[at + -(-size // 4) * 4 :]
    assert [(n[0], n[1], len(n[2])) for n in found] == [
        *[(b"CORE\0", 1, 336)] * 2,
        *[(b"QEMU\0", 0, 440)] * 2,
    ]
    assert [struct.unpack_from("<I", n[2], 32)[0] for n in found[:2]] == [1, 2]
    # r15 is the first register of prstatus, r8 the ninth of QEMU's
    assert struct.unpack_from("<Q", found[0][2], 112)[0] == 15
    assert struct.unpack_from("<IIQ", found[2][2])[:2] == (1, 440)
    assert struct.unpack_from("<Q", found[2][2], 8 + 8 * 8)[0] == 8
    assert struct.unpack_from("<5Q", found[3][2], 440 - 48)[3] == 7
