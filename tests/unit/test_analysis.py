"""mig.analyze: everything in a stream is found, and what is wrong with it is named."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import analysis as oracle
from reference import postcopy, ram, stream, xbzrle
from reference.devicevalues import Made
from reference.ram import Delta, Packed, Record
from reference.stream import Device

import mig
from mig import Analysis, analyze
from mig.analysis import Severity
from mig.analysis import report as report_module
from mig.cli import main
from mig.errors import ChannelError, MigError
from mig.mapped import MappedRamHeader
from mig.records import BlockInfo, BlockList, Configuration, FileHeader
from mig.savevm.load import StreamLoader
from mig.stream.reader import StreamReader

PAGE = 1024
CONFIG = stream.configuration("box", 10)
BLOCKS = {"pc.ram": 4 * PAGE, "rom": PAGE}
BURSTS = [
    [Record(b"pc.ram", 0, b"\1" * PAGE), Record(b"pc.ram", 1, 0), Record(b"rom", 0, b"\2" * PAGE)],
    [Record(b"pc.ram", 0, b"\3" * PAGE), Record(b"pc.ram", 2, b"\4" * PAGE)],
    [Record(b"pc.ram", 2, 0)],
]
UART = Made("uart").add("rbr", "uint8", b"\x07", 7).add("lcr", "uint32", b"\0\0\1\0", 256)
UART.subsection(Made("uart/fifo").add("n", "int16", b"\xff\xff", -1))


def described(*devices: tuple[Device, Made], page_size: int = PAGE) -> bytes:
    """The tail of a stream whose devices have fields."""
    out = b"".join(device.encode() for device, _ in devices) + b"\0"
    entries = [
        {"name": d.idstr, "instance_id": d.instance_id, **made.described()} for d, made in devices
    ]
    return out + stream.described({"page_size": page_size, "devices": entries})


TAIL = described((Device("0/uart", UART.payload, 5), UART))
OPAQUE = len(stream.device_state([]))


def with_tail(tail: bytes = TAIL, **more) -> bytes:
    """A small stream of everything."""
    data = stream.whole(
        BLOCKS, BURSTS, [], page_size=PAGE, config=CONFIG, before_end=stream.command(11), **more
    )
    return data[: len(data) - len(stream.device_state([]))] + tail


STREAM = with_tail()


@pytest.fixture
def look(tmp_path: Path):
    def analyzed(data: bytes, *, start: int = 0) -> Analysis:
        path = tmp_path / "f"
        path.write_bytes(bytes(start) + data)
        found = analyze(f"file:{path},offset={start}" if start else path)
        json.dumps(found.to_json(), allow_nan=False)
        return found

    return analyzed


def errors(found: Analysis) -> list[tuple[int | None, str]]:
    return [(f.offset, f.message) for f in found.findings if f.severity == Severity.ERROR]


# ---- what is right ---------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 5000])
def test_everything_is_found(look, start):
    found = look(STREAM, start=start)
    assert found.ok
    assert found.complete
    assert not found.findings
    assert (found.machine, found.page_size, found.start) == ("box", PAGE, start)
    assert found.nbytes == len(STREAM)
    names = [(s.idstr, s.kind, s.section_id, s.parts) for s in found.sections]
    assert names == [("ram", "start", 2, 4), ("0/uart", "full", 5, 1)]
    assert found.device("0/uart")["lcr"] == 256
    assert found.device("0/uart")["uart/fifo.n"] == -1
    with pytest.raises(KeyError):
        found.device("0/uart", 1)
    assert [(c.name, c.arguments) for c in found.commands] == [("SWITCHOVER_START", {})]
    first, second = found.ram.blocks
    assert (first.data_pages, first.zero_pages, first.missing_pages) == (1, 2, 1)
    assert (first.normal, first.zero, first.repeated) == (3, 2, 2)
    assert (second.data_pages, second.record_nbytes) == (1, 8 + 1 + 3 + PAGE)
    assert (found.ram.total, found.ram.parts, found.ram.records) == (5 * PAGE, 4, 6)
    # sections stand behind each other without a gap
    assert found.sections[1].offset + found.sections[1].nbytes == STREAM.index(b"\0\6\0\0")


def test_the_json_has_it_all(look):
    data = look(STREAM).to_json()
    assert data["ok"] is True
    uart = data["sections"][1]
    assert uart["state"]["fields"][1] == {
        "name": "lcr",
        "type": "uint32",
        "offset": 1,
        "nbytes": 4,
        "value": 256,
    }
    assert uart["state"]["subsections"][0]["fields"][0]["value"] == -1
    assert data["ram"]["blocks"][0]["records"]["repeated"] == 2


@pytest.mark.parametrize("footers", [True, False])
def test_streams_without_footers_are_cut_by_the_description(look, footers):
    devices = [Device("a", b"xyz", 5), Device("b", b"\x7e\0\0\0\5", 6)]
    found = look(
        stream.whole(BLOCKS, BURSTS, devices, page_size=PAGE, config=CONFIG, footers=footers)
    )
    assert found.ok
    assert [d.section.payload for d in found.devices] == [b"xyz", b"\x7e\0\0\0\5"]


def test_streams_without_description_are_cut_by_footers(look):
    devices = [Device("a", b"\x7e\0\0\0\5", 5), Device("b", b"", 6)]
    found = look(
        stream.whole(BLOCKS, BURSTS, devices, page_size=PAGE, config=CONFIG, with_description=False)
    )
    assert found.ok
    assert [d.section.payload for d in found.devices] == [b"\x7e\0\0\0\5", b""]
    assert found.devices[0].state is None
    assert found.to_json()["sections"][1]["payload"] == "7e00000005"


def test_a_device_before_ram_is_cut_by_the_description_at_the_end(look):
    early = Device("early", b"\x7e\0\0\0\5\2\0\0\0\5", 5)
    data = stream.whole(BLOCKS, BURSTS, [], page_size=PAGE, config=CONFIG)
    tail = len(stream.device_state([]))
    at = len(stream.header() + CONFIG)
    data = data[:at] + early.encode() + data[at:-tail] + b"\0" + stream.description([early])
    found = look(data)
    assert found.ok
    assert [s.idstr for s in found.sections] == ["early", "ram"]
    assert found.devices[0].section.payload == early.payload


def postcopy_stream() -> bytes:
    out = stream.header() + stream.configuration()
    out += stream.command(postcopy.OPEN_RETURN_PATH) + postcopy.ping(1) + postcopy.advise()
    blocks = {"pc.ram": 4 * 4096}
    out += postcopy.start(blocks, {"pc.ram": 8192})
    out += postcopy.pages([Record(b"pc.ram", 0, b"\1" * 4096)])
    out += postcopy.discard("pc.ram", (0, 4096)) + postcopy.ping(2)
    out += postcopy.package([Device("a", b"xyz", 5), Device("b", b"12", 6)]) + postcopy.ping(4)
    out += postcopy.pages([Record(b"pc.ram", 0, b"\2" * 4096), Record(b"pc.ram", 1, 0)])
    return out + postcopy.pages([], 3) + b"\0"


def test_a_postcopy_with_its_package(look):
    found = look(postcopy_stream())
    assert found.ok, found.findings
    assert [(c.name, c.packaged) for c in found.commands] == [
        ("OPEN_RETURN_PATH", False),
        ("PING", False),
        ("POSTCOPY_ADVISE", False),
        ("POSTCOPY_RAM_DISCARD", False),
        ("PING", False),
        ("PACKAGED", False),
        ("POSTCOPY_LISTEN", True),
        ("PING", True),
        ("POSTCOPY_RUN", True),
        ("PING", False),
    ]
    assert found.commands[3].arguments == {"block": "pc.ram", "ranges": [[0, 4096]]}
    assert [d.section.payload for d in found.devices] == [b"xyz", b"12"]
    assert all(s.packaged for s in found.sections[1:])
    (block,) = found.ram.blocks
    assert (block.host_page_size, block.repeated, block.missing_pages) == (8192, 1, 2)


def test_a_mapped_ram_file(tmp_path):
    capture = mig.MappedCapture(tmp_path / "vm")
    data = stream.whole(
        {"pc.ram": 70 * 4096, "rom": 4096},
        [[Record(b"pc.ram", 69, b"\1" * 4096), Record(b"rom", 0, b"\2" * 4096)]],
        [Device("a", b"xyz", 5)],
    )
    StreamLoader(StreamReader(data=data), capture, on_command=lambda command: None).run()
    capture.commit()
    found = analyze(tmp_path / "vm")
    assert found.ok, found.findings
    assert found.format == "mapped-ram"
    pages = [(b.data_pages, b.zero_pages, b.missing_pages) for b in found.ram.blocks]
    assert pages == [(1, 69, 0), (1, 0, 0)]
    assert found.devices[0].section.payload == b"xyz"
    # a bit behind the last page
    raw = bytearray((tmp_path / "vm").read_bytes())
    at = raw.index(b"pc.ram") + 6 + 8
    (bitmap,) = struct.unpack_from(">Q", raw, at + 12)
    raw[bitmap + 15] |= 0x80
    (tmp_path / "vm").write_bytes(raw)
    found = analyze(tmp_path / "vm")
    assert [f.message for f in found.findings] == [
        "the bitmap has 1 pages behind the end of the block"
    ]
    assert found.ram.blocks[0].data_pages == 1


@pytest.mark.parametrize("offset", [0, 5000])
def test_a_mapped_ram_file_that_leaves_memory_out(tmp_path, offset):
    """Nothing of it is taken for a bitmap."""
    block = BlockInfo("pc.ram", 640 * 4096, address=0, mapped=MappedRamHeader(4096, 0, 0))
    configuration = Configuration("box", capabilities=("x-ignore-shared", "mapped-ram"))
    data = b"\xff" * offset + FileHeader().encode() + configuration.encode()
    data += stream.section(1, 2, "ram", 0, 4) + BlockList((block,)).encode()
    data += ram.eos() + stream.footer(2) + b"\x03\0\0\0\2" + ram.eos() + stream.footer(2)
    data += b"\0"
    (tmp_path / "vm").write_bytes(data)
    found = analyze(f"file:{tmp_path / 'vm'},offset={offset}")
    assert found.ok, found.findings
    (counts,) = found.ram.blocks
    assert (counts.data_pages, counts.zero_pages, counts.missing_pages) == (0, 0, 640)
    with mig.open_image(f"file:{tmp_path / 'vm'},offset={offset}") as image:
        assert image.blocks[0].missing == 640


# ---- RAM against the oracle ------------------------------------------------------------------

NPAGES = {b"a": 5, b"bb": 70}


@st.composite
def records(draw: st.DrawFn) -> Record:
    block = draw(st.sampled_from(sorted(NPAGES)))
    page = draw(st.integers(0, NPAGES[block] - 1))
    old, new = bytes(PAGE), bytes([7] * 9) + bytes(PAGE - 9)
    contents = draw(
        st.sampled_from(
            [
                0,
                0,
                b"\1" * PAGE,
                5,
                Packed(zlib.compress(new)),
                Delta(xbzrle.encode(old, new, PAGE)),
            ]
        )
    )
    return Record(block, page, contents)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(records(), max_size=12), min_size=1, max_size=5))
def test_records_are_counted_as_the_oracle_does(tmp_path_factory, bursts):
    blocks = {name.decode(): n * PAGE for name, n in NPAGES.items()}
    payloads, current = [], None
    for burst in bursts:
        payloads.append(ram.encode(burst, PAGE, current) + ram.eos())
        current = burst[-1].block if burst else current
    path = tmp_path_factory.mktemp("s") / "f"
    path.write_bytes(stream.whole(blocks, bursts, [], page_size=PAGE, config=CONFIG))
    found = analyze(path)
    assert found.ok, found.findings
    expected = oracle.count_records(payloads, PAGE)
    for block in found.ram.blocks:
        mine = expected.get(block.idstr.encode(), {})
        for key in ("normal", "zero", "xbzrle", "compressed", "repeated", "filled"):
            assert getattr(block, key) == mine.get(key, 0), key
        for key in ("data_pages", "zero_pages", "record_nbytes"):
            assert getattr(block, key) == mine.get(key, 0), key


# ---- what is wrong ---------------------------------------------------------------------------


def cut(burst: list[Record], replaced: bytes, by: bytes) -> tuple[bytes, int]:
    """STREAM with something in it replaced, and where."""
    at = STREAM.index(replaced)
    return STREAM[:at] + by + STREAM[at + len(replaced) :], at


def test_it_goes_on_behind_a_wrong_record(look):
    second = STREAM.index(b"\2\0\0\0\2", STREAM.index(b"\2\0\0\0\2") + 1) + 5
    data = bytearray(STREAM)
    data[second + 7] |= 0x80
    found = look(bytes(data))
    assert errors(found) == [(second, "unknown RAM record: flags 0x88")]
    assert found.complete
    assert not found.ok
    assert found.findings[1].severity == Severity.WARNING
    # the rest of the section is lost, what is behind it is not
    assert found.findings[2].message == "1 records could not be ascribed to a block"
    assert found.device("0/uart")["rbr"] == 7


@pytest.mark.parametrize(
    ("offset", "message"),
    [(4 * PAGE, "page lies outside its block"), (1 << 40, "page lies outside its block")],
)
def test_a_page_that_is_not_in_its_block(look, offset, message):
    bad = ram.be64(offset + ram.PAGE) + b"\6pc.ram" + b"\1" * PAGE
    data = STREAM.replace(ram.encode([BURSTS[1][0]], PAGE), bad)
    found = look(data)
    ((at, text),) = errors(found)
    assert (text, data[at : at + len(bad)]) == (message, bad)
    assert found.findings[0].block == "pc.ram"
    assert found.complete


def test_contents_that_are_wrong_are_passed_over(look):
    bad = [
        Record(b"pc.ram", 0, Packed(b"no zlib")),
        Record(b"pc.ram", 1, Delta(b"\0")),
        Record(b"pc.ram", 2, Delta(b"\xff\xff\xff")),
        Record(b"pc.ram", 3, 0),
    ]
    data = stream.whole(BLOCKS, [bad], [], page_size=PAGE, config=CONFIG)
    found = look(data)
    payload = ram.encode(bad, PAGE)
    first = data.index(payload)
    starts = {len(ram.encode(bad[:i], PAGE)) for i in range(3)}
    assert {offset - first for offset, _ in errors(found)} == starts
    assert {message.partition(":")[0] for _, message in errors(found)} == {
        "XBZRLE page",
        "compressed page is corrupt, or not of a page's length",
    }
    assert found.complete
    assert found.ram.blocks[0].zero == 1


def test_more_faults_than_are_kept(look, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_FINDINGS", 3)
    bad = [Record(b"pc.ram", 0, Delta(b"\0"))] * 40
    found = look(stream.whole(BLOCKS, [bad], [], page_size=PAGE, config=CONFIG))
    assert (len(found.findings), found.nfindings) == (3, 33)
    assert found.ram.blocks[0].xbzrle == 40


def test_a_device_that_is_not_as_described_does_not_hide_the_next(look):
    wrong = Made("w").add("x", "bool", b"\7", None)
    tail = described(
        (Device("w", wrong.payload, 4), wrong), (Device("0/uart", UART.payload, 5), UART)
    )
    found = look(with_tail(tail))
    ((offset, message),) = errors(found)
    assert message == "'x': 7 is no bool"
    assert with_tail(tail)[offset] == 7
    assert found.device("0/uart")["rbr"] == 7
    assert found.device("w").state is None


def test_a_description_that_lies_about_a_size(look):
    lie = Made("uart", fields=[{"name": "rbr", "type": "uint8", "size": 2}])
    found = look(with_tail(described((Device("0/uart", b"\7", 5), lie))))
    assert [message.partition(" after")[0] for _, message in errors(found)] == [
        "footer of section 5 is missing",
        "payload ends inside 'rbr', which is of 2 bytes",
    ]
    assert found.devices[0].section.payload == b"\7"
    assert found.complete


def test_a_section_that_nothing_describes(look):
    tail = described((Device("0/uart", UART.payload, 5), UART))
    data = with_tail(Device("new", b"what", 9).encode() + tail)
    found = look(data)
    assert found.ok
    assert [f.message for f in found.findings] == ["device is not in the description"]
    assert found.device("new").section.payload == b"what"


def test_all_the_ram_that_there_may_be(look):
    """Noting its pages takes no memory before there are some."""
    start = stream.header() + CONFIG + stream.ram_start(2, {"a": 1 << 44}) + stream.footer(2)
    last = ram.encode([Record(b"a", (1 << 34) - 1, 0)], PAGE)
    end = stream.ram_more(3, 2, last) + stream.footer(2) + stream.device_state([])
    found = look(start + end)
    # or the host refuses even that
    if found.ram is not None:
        assert found.ok
        assert (found.ram.blocks[0].zero_pages, found.ram.total) == (1, 1 << 44)


def test_things_behind_the_end(look):
    found = look(STREAM + b"more")
    assert found.ok
    assert found.findings[0].message == "more bytes follow the end of the stream"
    assert found.findings[0].offset == len(STREAM)


def test_sections_in_the_wrong_place(look):
    start = STREAM.index(b"\1\0\0\0\2\3ram")
    for junk, message in [
        (b"\x55", "section type 0x55 is unknown"),
        (b"\x7e\0\0\0\2", "section type 0x7e is FOOTER in the wrong place"),
        (b"\2\0\0\0\7", "section 7 was never started"),
        (stream.command(99), "unknown command 99"),
    ]:
        found = look(STREAM[:start] + junk + STREAM[start:])
        assert (errors(found)[0][1], found.complete) == (message, True)
        assert found.ram.records == 6


@pytest.mark.parametrize(
    "data",
    [b"", b"QEVM", b"#!/bin/sh\n", b"QEVM\0\0\0\2", b"\x11\x22\x33\x44\0\0\0\1", bytes(5000)],
    ids=range(6),
)
def test_what_is_no_stream(look, data):
    found = look(data)
    assert not found.ok
    assert len(errors(found)) == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ChannelError):
        analyze(tmp_path / "none")
    with pytest.raises(ChannelError):
        analyze(tmp_path)


# ---- every cut, every byte -------------------------------------------------------------------

SMALL_CONFIG = stream.configuration("b", 10)
SMALL = (
    stream.whole(
        {"r": 3 * PAGE},
        [[Record(b"r", 0, 0), Record(b"r", 1, Delta(b"\1\1x"))], [Record(b"r", 2, 0)]],
        [],
        page_size=PAGE,
        config=SMALL_CONFIG,
        before_end=postcopy.ping(7),
    )[: -len(stream.device_state([]))]
    + TAIL
)


def test_a_stream_cut_at_every_byte(tmp_path):
    path = tmp_path / "f"
    for nbytes in range(len(SMALL)):
        path.write_bytes(SMALL[:nbytes])
        found = analyze(path)
        # without the description it is still a whole stream
        if found.ok:
            assert SMALL[nbytes - 1 : nbytes + 1] == b"\0\6"
        else:
            assert errors(found)
            assert all(offset is not None and offset <= nbytes for offset, _ in errors(found))
    path.write_bytes(SMALL)
    assert analyze(path).ok


@pytest.mark.parametrize("change", [0xFF, 0x01])
def test_a_stream_with_every_byte_changed(tmp_path, change):
    path = tmp_path / "f"
    for at in range(len(SMALL)):
        data = bytearray(SMALL)
        data[at] ^= change
        path.write_bytes(data)
        found = analyze(path)
        json.dumps(found.to_json(), allow_nan=False)
        for finding in found.findings:
            assert finding.offset is None or 0 <= finding.offset <= len(SMALL)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_streams_with_pieces_exchanged(tmp_path_factory, data):
    raw = bytearray(data.draw(st.sampled_from([SMALL, postcopy_stream(), STREAM])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        piece = data.draw(
            st.binary(max_size=12)
            | st.sampled_from(
                [
                    b"\x7e\0\0\0\2",
                    b"\0\6\0\0\0\2{}",
                    stream.section(4, 9, "x", 0, 1),
                    stream.section(1, 8, "dirty-bitmap", 0, 1),
                    stream.command(7, b"\0\0\0\x40"),
                    ram.be64(ram.MEM_SIZE),
                ]
            )
        )
        raw[at : at + data.draw(st.integers(0, 20))] = piece
    path = tmp_path_factory.mktemp("s") / "f"
    path.write_bytes(raw)
    try:
        json.dumps(analyze(path).to_json(), allow_nan=False)
    except MigError as error:
        pytest.fail(f"no error is to come out: {error}")


def test_headers_without_end_do_not_take_for_ever(look):
    """Every header wants the whole file looked through for its footer."""
    headers = b"".join(stream.section(4, i, "d", i, 1) + b"\x7e\0\0\0\2" for i in range(1000, 9000))
    found = look(with_tail(headers, with_description=False) + bytes(1 << 20))
    assert not found.ok


# ---- the command -----------------------------------------------------------------------------


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["analyze", *args])
    return result.exit_code, result.output


def test_the_command_prints_json(tmp_path):
    path = tmp_path / "vm"
    path.write_bytes(STREAM)
    status, output = run(str(path), "--json")
    assert status == 0
    assert json.loads(output.splitlines()[-1]) == analyze(path).to_json()


def test_the_command_for_people(tmp_path):
    path = tmp_path / "vm"
    path.write_bytes(STREAM)
    status, output = run(str(path))
    assert status == 0
    assert "machine  box" in output
    assert "verdict  nothing is wrong" in output
    assert "lcr" not in output
    for option in (["--fields"], ["-d", "uart"]):
        assert "lcr (uint32): 256 (0x100)" in run(str(path), *option)[1]


def test_the_command_says_what_is_wrong(tmp_path):
    path = tmp_path / "vm"
    path.write_bytes(STREAM[:-20])
    status, output = run(str(path))
    assert status == 1
    assert "verdict  something is wrong" in output
    assert "error: stream ends after" in output
    status, output = run(str(tmp_path / "none"))
    assert (status, output) == (1, f"mig: {tmp_path}/none: No such file or directory\n")
