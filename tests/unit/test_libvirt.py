"""Save files of libvirt, and compressed streams: recognised by content, unpacked bit by bit."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram, stream
from reference.ram import Record
from reference.stream import Device

import mig
from mig import analyze
from mig.errors import ChannelError, StreamError, TruncatedError
from mig.image import unpack
from mig.image.libvirt import HEADER_SIZE, SaveFormat, parse_save
from mig.image.unpack import UnpackingSource
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

PAGE = 4096
XML = """<domain type='kvm'><name>web</name><uuid>1b4e28ba-2fa1-11d2-883f-0016d3cca427</uuid>
<memory unit='KiB'>1048576</memory><vcpu placement='static'>2</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os></domain>"""
COOKIE = "<qemusave><cpu/></qemusave>"
STREAM = stream.whole(
    {"pc.ram": 300 * PAGE},
    [[Record(b"pc.ram", i, bytes([i % 251]) * PAGE) for i in range(300)]],
    [Device("uart", b"abc", 5)],
)

PACK = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
}


def save(
    format_: int,
    data: bytes,
    *,
    cookie: str | None = COOKIE,
    magic: bytes = b"LibvirtQemudSave",
    order: str = "<",
    **changes: int,
) -> bytes:
    """A save file; changes: fields of its header."""
    xml = XML.encode() + b"\0"
    text = xml + (cookie.encode() + b"\0" if cookie else b"") + bytes(64)
    fields = {
        "version": 2,
        "data_len": len(text),
        "was_running": 1,
        "format": format_,
        "cookie_offset": len(xml) if cookie else 0,
        **changes,
    }
    header = magic + struct.pack(f"{order}5I", *fields.values()) + bytes(56)
    return header + text + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "f"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("cookie", [COOKIE, None])
def test_the_header(order, cookie):
    data = save(0, b"", cookie=cookie, order=order)
    found = parse_save(data)
    assert (found.version, found.was_running, found.format) == (2, True, SaveFormat.RAW)
    assert (found.xml, found.cookie, found.stream_offset) == (XML, cookie, len(data))
    assert found.domain == {
        "name": "web",
        "uuid": "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
        "memory": "1048576",
        "vcpu": "2",
        "machine": "pc-q35-7.2",
    }


@pytest.mark.parametrize("packing", [None, *PACK])
@pytest.mark.parametrize("libvirt", [True, False])
def test_every_packing(path, packing, libvirt):
    data = PACK[packing](STREAM) if packing else STREAM
    number = SaveFormat[packing.upper()] if packing else SaveFormat.RAW
    path.write_bytes(save(number, data) if libvirt else data)
    found = analyze(path)
    assert found.ok, found.findings
    assert not found.findings
    assert found.packing == packing
    assert found.nbytes == len(STREAM)
    (block,) = found.ram.blocks
    assert (block.data_pages, block.zero_pages, block.normal) == (300, 0, 300)
    assert found.devices[0].section.payload == b"abc"
    assert found.to_json()["libvirt"] == (None if not libvirt else found.to_json()["libvirt"])
    if libvirt:
        assert found.to_json()["libvirt"]["domain"]["name"] == "web"


@pytest.mark.parametrize("packing", PACK)
def test_members_one_behind_the_other(path, packing):
    pack = PACK[packing]
    path.write_bytes(pack(STREAM[:5000]) + pack(STREAM[5000:]))
    assert analyze(path).ok


@pytest.mark.parametrize("packing", PACK)
def test_packed_data_that_are_cut_or_wrong(path, packing):
    packed = PACK[packing](STREAM)
    for nbytes in range(20, len(packed) - 1, max(1, len(packed) // 10)):
        path.write_bytes(packed[:nbytes])
        assert not analyze(path).ok
    for at in range(20, len(packed), max(1, len(packed) // 10)):
        data = bytearray(packed)
        data[at] ^= 0x55
        path.write_bytes(data)
        analyze(path)


def test_sparse_is_a_mapped_ram_file_behind_the_header(path):
    plain = path.with_name("plain")
    capture = mig.MappedCapture(plain)
    StreamLoader(StreamReader(data=STREAM), capture, on_command=lambda command: None).run()
    capture.commit()
    raw = bytearray(plain.read_bytes())
    # offsets are the file's: as if QEMU had been given offset=MiB
    head = save(SaveFormat.SPARSE, b"", data_len=(1 << 20) - HEADER_SIZE)
    at = raw.index(b"pc.ram") + 6 + 8 + 12
    bitmap, pages = struct.unpack_from(">QQ", raw, at)
    struct.pack_into(">QQ", raw, at, bitmap + (1 << 20), pages + (1 << 20))
    path.write_bytes(head + bytes((1 << 20) - len(head)) + raw)
    found = analyze(path)
    assert found.ok, found.findings
    assert (found.format, found.start) == ("mapped-ram", 1 << 20)
    assert found.ram.blocks[0].data_pages == 300


def test_a_header_that_lies_about_the_packing(path):
    path.write_bytes(save(SaveFormat.XZ, gzip.compress(STREAM)))
    found = analyze(path)
    assert [f.message for f in found.findings] == ["the header says xz, the stream is gzip"]
    assert found.complete


def test_lzop_without_the_program(path, monkeypatch):
    monkeypatch.setattr(unpack.shutil, "which", lambda name: None)
    path.write_bytes(save(SaveFormat.LZOP, b"\x89LZO\0\r\n\x1a\nxx"))
    with pytest.raises(ChannelError, match="install the program lzop"):
        analyze(path)


@pytest.mark.skipif(unpack.shutil.which("lzop") is None, reason="there is no lzop")
def test_lzop(path):
    packed = unpack.subprocess.run(["lzop", "-c"], input=STREAM, capture_output=True, check=True)
    path.write_bytes(save(SaveFormat.LZOP, packed.stdout))
    found = analyze(path)
    assert found.ok, found.findings


@pytest.mark.parametrize(
    ("changes", "offset"),
    [
        ({"version": 0}, 16),
        ({"version": 3}, 16),
        ({"data_len": 0}, 20),
        ({"data_len": 1 << 31}, 20),
        ({"format_": 7}, 28),
        ({"cookie_offset": 1 << 30}, 32),
        ({"data_len": 1 << 20}, HEADER_SIZE),
    ],
)
def test_headers_at_their_edges(path, changes, offset):
    data = save(changes.pop("format_", 0), STREAM[:100], **changes)
    with pytest.raises(StreamError) as caught:
        parse_save(data)
    assert caught.value.offset == offset
    path.write_bytes(data)
    assert [f.offset for f in analyze(path).findings] == [offset]


def test_a_file_that_libvirt_has_not_finished():
    with pytest.raises(StreamError, match="incomplete"):
        parse_save(save(0, STREAM, magic=b"LibvirtQemudPart"))
    with pytest.raises(TruncatedError):
        parse_save(save(0, b"")[:50])


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"<domain>",
        b'<!DOCTYPE d [<!ENTITY a "b">]><domain><name>&a;</name></domain>',
        b"<a>" * 200_000,
        b"\xff\xfe",
    ],
    ids=range(5),
)
def test_xml_is_not_trusted(path, xml):
    data = b"LibvirtQemudSave" + struct.pack("<5I", 2, len(xml) + 1, 1, 0, 0) + bytes(56)
    path.write_bytes(data + xml + b"\0" + STREAM)
    found = analyze(path)
    if found.libvirt is not None:
        assert found.libvirt.domain == {}
        assert found.ok


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_header_is_read_or_refused(data):
    try:
        parse_save(b"LibvirtQemudSave" + data)
    except StreamError as error:
        if error.offset is None:
            pytest.fail("an error without a place")


@pytest.mark.parametrize("packing", PACK)
def test_a_bomb_is_never_whole_in_memory(packing):
    """What is asked for is what is unpacked."""
    source = UnpackingSource(io.BytesIO(PACK[packing](bytes(16 << 20))), packing)
    data = bytearray(1 << 16)
    for _ in range(100):
        assert source.readinto(data, 0, len(data)) == len(data)
    assert not any(data)


_PEAK = """
import re, sys, mig
assert mig.analyze(sys.argv[1]).ok
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(
    "libasan" in Path("/proc/self/maps").read_text(), reason="AddressSanitizer keeps what is freed"
)
@pytest.mark.parametrize("packing", [None, "zstd"])
def test_memory_does_not_grow_with_the_file(path, packing):
    peaks = []
    for npages in (256, 12 << 10):
        records = ram.encode([Record(b"pc.ram", 0, bytes([7]) * PAGE)], PAGE)
        again = ram.encode([Record(b"pc.ram", 0, bytes([7]) * PAGE)], PAGE, b"pc.ram")
        data = stream.header() + stream.ram_start(2, {"pc.ram": PAGE}) + stream.footer(2)
        data += stream.ram_more(3, 2, records + again * (npages - 1)) + stream.footer(2)
        data += stream.device_state([])
        path.write_bytes(zstandard.compress(data) if packing else data)
        command = [sys.executable, "-P", "-c", _PEAK, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) << 10)
    # of 48 MiB
    assert peaks[1] - peaks[0] < 24 << 20


def test_a_deflate_stream_without_end():
    packed = zlib.compressobj(wbits=31)
    source = UnpackingSource(io.BytesIO(packed.compress(b"x" * 100)), "gzip")
    with pytest.raises(StreamError, match="end too early"):
        source.readinto(bytearray(1000), 0, 1000)
