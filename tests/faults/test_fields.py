"""Every length and number of a stream, set to what it must not be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import streams
from faults.streams import (
    CAPABILITY_LIMIT,
    CONTINUE,
    DESCRIPTION_LIMIT,
    EOS,
    MACHINE_LIMIT,
    MEM_SIZE,
    PAGE,
    PAGE_FLAG,
    RAM_LIMIT,
    ZERO,
    Guest,
    Pieces,
    be16,
    be32,
    be64,
    command,
    counted,
    footer,
    part,
)

import mig
from mig.errors import (
    MigError,
    MismatchError,
    StreamError,
    TruncatedError,
    UnsupportedError,
)

TOTAL = sum(len(fills) for fills in streams.RAM.values()) * PAGE
NAME = len(streams.MACHINE)
TEXT = len(streams.sample()["description text"])


def capabilities(count: int, *names: str) -> bytes:
    body = be32(count) + b"".join(counted(name) for name in names)
    return b"\x05" + counted("configuration/capabilities") + be32(1) + body


def check(error: MigError | None, *, text: str, at: int, section: str | None) -> None:
    """A StreamError that says ``text`` and where: the offset, and the section inside one."""
    assert isinstance(error, StreamError), repr(error)
    assert text in error.message
    assert error.offset == at, f"{error.offset} is not {at}: {error}"
    assert error.section == section
    assert f"offset {at:#x}" in str(error)


@dataclass(frozen=True)
class Wrong:
    """A field with a value that cannot be: what the error says, and at which field."""

    field: str
    data: bytes
    text: str
    at: str
    section: str | None = None
    kind: type[StreamError] = StreamError

    def __str__(self) -> str:
        return f"{self.field} = {self.data.hex()}"


CONF, RAMS = "configuration", "ram"
WRONG = [
    # the header
    Wrong("magic", b"QEVN", "not a migration stream", "magic"),
    Wrong("version", be32(0), "unknown stream version 0", "version"),
    Wrong("version", be32(2), "version 2", "version"),
    Wrong("version", be32(4), "unknown stream version 4", "version"),
    Wrong("version", be32(0xFFFFFFFF), "unknown stream version", "version"),
    # the configuration
    Wrong("machine length", be32(0), "machine type name of 0 bytes", "machine length", CONF),
    Wrong("machine length", be32(NAME - 1), "section type 0x78", "subsection", None),
    Wrong("machine length", be32(NAME + 1), "not a name", "machine", CONF),
    Wrong("machine length", be32(MACHINE_LIMIT), "not a name", "machine", CONF),
    Wrong("machine length", be32(MACHINE_LIMIT + 1), "256 bytes", "machine length", CONF),
    Wrong("machine length", be32(0xFFFFFFFF), "4294967295 bytes", "machine length", CONF),
    Wrong("machine", b"fault\nbox", "not a name", "machine", CONF),
    Wrong("subsection name length", b"\0", "not a name", "subsection name length", CONF),
    Wrong("subsection name length", bytes([29]), "version", "subsection", CONF),
    Wrong("subsection name length", bytes([31]), "not a name", "subsection name length", CONF),
    Wrong("subsection name length", b"\xff", "not a name", "subsection name length", CONF),
    Wrong("subsection name", b"configuration/target-page-bitz", "unknown", "subsection", CONF),
    Wrong("subsection version", be32(0), "of version 0", "subsection", CONF),
    Wrong("subsection version", be32(2), "of version 2", "subsection", CONF),
    Wrong("page bits", be32(0), "2^0 bytes", "subsection", CONF),
    Wrong("page bits", be32(9), "2^9 bytes", "subsection", CONF),
    Wrong("page bits", be32(21), "2^21 bytes", "subsection", CONF),
    Wrong("page bits", be32(0xFFFFFFFF), "2^4294967295", "subsection", CONF),
    # the start of RAM
    Wrong("start", b"\x09", "section type 0x09", "start"),
    Wrong("start", b"\xff", "section type 0xff", "start"),
    Wrong("start name length", b"\0", "not a name", "start name length"),
    Wrong("start name length", b"\x02", "section 'ra' is not known", "start", "ra"),
    Wrong("start name length", b"\x04", "not a name", "start name length"),
    Wrong("start name length", b"\xff", "not a name", "start name length"),
    Wrong("start version", be32(3), "RAM of version 3", "start", RAMS),
    Wrong("start version", be32(5), "RAM of version 5", "start", RAMS),
    # the name of a block that is none then looks like a compressed page
    Wrong("total", be64(MEM_SIZE), "block list does not have", "pc.ram name length", RAMS),
    Wrong("total", be64(TOTAL - PAGE | MEM_SIZE), "'vga.vram'", "vga.vram name length", RAMS),
    Wrong("total", be64(TOTAL + PAGE | MEM_SIZE), "not a name", "list eos", RAMS),
    Wrong("total", be64(RAM_LIMIT | MEM_SIZE), "not a name", "list eos", RAMS),
    Wrong("total", be64(RAM_LIMIT + PAGE | MEM_SIZE), "past the limit", "pc.ram name length", RAMS),
    Wrong("total", be64((1 << 64) - PAGE | MEM_SIZE), "limit", "pc.ram name length", RAMS),
    Wrong("pc.ram name length", b"\0", "not a name", "pc.ram name length", RAMS),
    Wrong("pc.ram name length", b"\x05", "'pc.ra'", "pc.ram name length", RAMS),
    Wrong("pc.ram name length", b"\x07", "not a name", "pc.ram name length", RAMS),
    Wrong("pc.ram name length", b"\xff", "not a name", "pc.ram name length", RAMS),
    Wrong("pc.ram length", be64(0), "not a name", "list eos", RAMS),
    Wrong("pc.ram length", be64(4 * PAGE - 1), "4095 bytes", "pc.ram name length", RAMS),
    Wrong("pc.ram length", be64(4 * PAGE + 1), "4097 bytes", "pc.ram name length", RAMS),
    Wrong("pc.ram length", be64(3 * PAGE), "not a name", "list eos", RAMS),
    Wrong("pc.ram length", be64(TOTAL), "unknown RAM record", "vga.vram name length", RAMS),
    Wrong("pc.ram length", be64(TOTAL + PAGE), "'pc.ram'", "pc.ram name length", RAMS),
    Wrong("pc.ram length", be64((1 << 64) - PAGE), "'pc.ram'", "pc.ram name length", RAMS),
    Wrong("vga.vram name length", b"\x06", "'vga.vr'", "vga.vram name length", RAMS),
    Wrong("vga.vram name", b"pc.ram\0\0", "not a name", "vga.vram name length", RAMS),
    # section ids and footers
    Wrong("start footer", b"\x7f", "section type 0x7f", "start footer"),
    Wrong("start footer id", be32(0), "footer of section 0", "start footer", RAMS),
    Wrong("start footer id", be32(0xFFFFFFFF), "footer of section", "start footer", RAMS),
    Wrong("pc.ram part id", be32(0), "section 0 was never started", "pc.ram part"),
    Wrong("pc.ram part id", be32(2), "section 2 was never started", "pc.ram part"),
    Wrong("pc.ram part id", be32(0xFFFFFFFF), "was never started", "pc.ram part"),
    Wrong("pc.ram footer", b"", "footer of section 1 is missing", "pc.ram footer", RAMS),
    Wrong("pc.ram footer", b"\x02", "footer of section 1 is missing", "pc.ram footer", RAMS),
    Wrong("pc.ram footer id", be32(2), "footer of section 2", "pc.ram footer", RAMS),
    Wrong("end id", be32(2), "section 2 was never started", "end"),
    Wrong("end footer id", be32(7), "footer of section 7", "end footer", RAMS),
    # records
    Wrong("pc.ram 0 word", be64(4 * PAGE | PAGE_FLAG), "outside its block", "pc.ram 0 word", RAMS),
    Wrong("pc.ram 0 word", be64((1 << 64) - PAGE | 8), "outside its block", "pc.ram 0 word", RAMS),
    Wrong("vga.vram 1 word", be64(2 * PAGE | 0x28), "outside", "vga.vram 1 word", RAMS),
    Wrong("pc.ram record name length", b"\0", "not have", "pc.ram 0 word", RAMS),
    Wrong("pc.ram record name length", b"\x05", "not have", "pc.ram 0 word", RAMS),
    Wrong("pc.ram record name length", b"\x07", "not have", "pc.ram 0 word", RAMS),
    Wrong("pc.ram record name length", b"\xff", "not have", "pc.ram 0 word", RAMS),
    Wrong("pc.ram record name", b"PC.RAM", "does not have", "pc.ram 0 word", RAMS),
    Wrong("pc.ram 0 word", be64(PAGE_FLAG | CONTINUE), "before any block", "pc.ram 0 word", RAMS),
    Wrong("pc.ram eos", be64(0), "flags 0x0", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(1), "flags 0x1", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(EOS | ZERO), "flags 0x12", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(PAGE_FLAG | ZERO), "flags 0xa", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(PAGE_FLAG | 0x40), "flags 0x48", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(EOS | 0x200), "flags 0x210", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(PAGE - 1), "unknown RAM record", "pc.ram eos", RAMS),
    Wrong("pc.ram eos", be64(TOTAL | MEM_SIZE), "", "pc.ram eos", RAMS),
    # the end
    Wrong("end", b"\x00", "ends before the end of RAM", "end"),
    Wrong("end", b"\x06", "section type 0x06", "end"),
    Wrong("end", b"\x07", "section type 0x07", "end"),
    Wrong("end", b"\x7e", "section type 0x7e", "end"),
    Wrong("timer section", b"\x01", "", "timer section", None),
    Wrong("timer name length", b"\0", "", "timer section", None),
    Wrong("timer footer id", be32(1), "missing", "timer footer", "timer"),
    Wrong("eof", b"\x09", "", "nothing section", "nothing"),
    Wrong("eof", b"", "", "nothing section", "nothing"),
    Wrong("description length", be32(0), "inside the description", "description", None),
    Wrong("description length", be32(TEXT - 1), "inside the description", "description"),
    Wrong("description length", be32(TEXT + 1), "inside the description", "description"),
    Wrong("description length", be32(DESCRIPTION_LIMIT), "description", "description"),
    Wrong("description length", be32(DESCRIPTION_LIMIT + 1), "description", "description"),
    Wrong("description length", be32(0xFFFFFFFF), "description", "description"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_field(stream: Pieces, wrong: Wrong, tmp_path: Path) -> None:
    pieces = stream.put(wrong.field, wrong.data)
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    at = pieces.offset(wrong.at)
    if wrong.field == "machine length" and wrong.at == "subsection":
        at -= 1  # the last letter of the name is taken for the next item
    check(error, text=wrong.text, at=at, section=wrong.section)


@pytest.mark.parametrize("wrong", WRONG[::4], ids=str)
def test_wrong_field_over_a_socket(stream: Pieces, wrong: Wrong, folder: Path) -> None:
    """The same error as from the file, and no capture."""
    data = stream.put(wrong.field, wrong.data).encode()
    path = folder.parent / "vm.mig"
    path.write_bytes(data)
    error = streams.receive(data, folder / "vm.mig")
    assert (type(error), str(error)) == (
        type(streams.image_error(path)),
        str(streams.image_error(path)),
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("label", "data"),
    [
        ("start instance", be32(7)),
        ("timer id", be32(2)),
        ("timer version", be32(0xFFFFFFFF)),
        ("nothing instance", be32(0)),
    ],
)
def test_harmless_fields(stream: Pieces, label: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.put(label, data).encode())
    assert streams.image_error(path) is None


# ---- capabilities in the configuration ----------------------------------------------------------


def test_no_capability(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", capabilities(0)).encode())
    with mig.open_image(path) as image:
        assert image.configuration is not None
        assert image.configuration.capabilities == ()


def test_capability_that_is_needed(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", capabilities(1, "mapped-ram")).encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert error.capability == "mapped-ram"
    check(error, text="mapped-ram", at=stream.offset("configuration"), section="configuration")


def test_addresses_that_are_not_there(stream: Pieces, tmp_path: Path) -> None:
    """With the capability each length is followed by an address: the next name is taken for it."""
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", capabilities(1, "x-ignore-shared")).encode())
    error = streams.image_error(path)
    assert isinstance(error, StreamError)
    assert error.section == "ram"


@pytest.mark.parametrize(
    ("count", "names", "text"),
    [
        (2, ["mapped-ram"], "not a name"),
        (0, ["mapped-ram"], "section type 0x0a"),
        (CAPABILITY_LIMIT, ["mapped-ram"], "not a name"),
        (CAPABILITY_LIMIT + 1, ["mapped-ram"], "257 capabilities"),
        (0xFFFFFFFF, ["mapped-ram"], "4294967295 capabilities"),
        (1, [""], "not a name"),
    ],
)
def test_capability_count(
    stream: Pieces, count: int, names: list[str], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", capabilities(count, *names)).encode())
    error = streams.image_error(path)
    assert isinstance(error, StreamError)
    assert text in error.message
    assert error.offset is not None
    assert error.offset >= stream.offset("start")


# ---- sections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idstr", "capability"),
    [("dirty-bitmap", "dirty-bitmaps"), ("block", "block"), ("spapr/htab", None), ("RAM", None)],
)
def test_unknown_section(
    stream: Pieces, idstr: str, capability: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "vm.mig"
    section = b"\x01" + be32(9) + counted(idstr) + be32(0) + be32(1)
    path.write_bytes(stream.before("start", section).encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert error.capability == capability
    check(error, text=idstr, at=stream.offset("start"), section=idstr)
    if capability:
        assert f"'{capability}'" in str(error)


def test_device_before_ram(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    section = b"\x04" + be32(9) + counted("early") + be32(0) + be32(1) + b"state" + footer(9)
    path.write_bytes(stream.before("start", section).encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert error.capability is None
    check(error, text="early", at=stream.offset("start"), section="early")


def test_ram_started_twice(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    again = stream.encode()[stream.offset("start") : stream.offset("pc.ram part")]
    path.write_bytes(stream.before("end", again).encode())
    check(
        streams.image_error(path),
        text="started twice",
        at=stream.offset("end"),
        section="ram",
    )


def test_part_before_start(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", part(b"")).encode())
    error = streams.image_error(path)
    check(error, text="never started", at=stream.offset("start"), section=None)


def test_block_listed_twice(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    pieces = stream.put("vga.vram name length", b"\x06").put("vga.vram name", b"pc.ram")
    path.write_bytes(pieces.encode())
    check(
        streams.image_error(path),
        text="listed twice",
        at=pieces.offset("vga.vram name length"),
        section="ram",
    )


def test_no_block_list(stream: Pieces, tmp_path: Path) -> None:
    """QEMU, too, finds nothing wrong with RAM of no blocks, as long as no page comes."""
    data = stream.encode()
    head = data[: stream.offset("total")] + data[stream.offset("list eos") :]
    path = tmp_path / "vm.mig"
    path.write_bytes(head)
    error = streams.image_error(path)
    gone = stream.offset("list eos") - stream.offset("total")
    check(
        error,
        text="before the block list",
        at=stream.offset("pc.ram 0 word") - gone,
        section="ram",
    )


@pytest.mark.parametrize(
    "record", [be64(PAGE_FLAG) + counted("pc.ram") + bytes(PAGE), be64(0x80), be64(0x200)]
)
def test_record_before_block_list(stream: Pieces, record: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("total", record).encode())
    check(
        streams.image_error(path),
        text="before the block list",
        at=stream.offset("total"),
        section="ram",
    )


def test_more_blocks_than_the_limit(stream: Pieces, tmp_path: Path) -> None:
    blocks = b"".join(counted(f"b{i}") + be64(0) for i in range(65_537))
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("pc.ram name length", blocks).encode())
    error = streams.image_error(path)
    assert isinstance(error, StreamError)
    assert "too many RAM blocks" in error.message


# ---- records ------------------------------------------------------------------------------------


@pytest.mark.parametrize("continued", [0, CONTINUE])
@pytest.mark.parametrize(
    ("flag", "capability", "name"),
    [
        (0x200, "multifd", "MULTIFD_FLUSH"),
    ],
)
def test_unsupported_record(
    stream: Pieces, flag: int, capability: str, name: str, continued: int, tmp_path: Path
) -> None:
    pieces = stream.put("pc.ram 1 word", be64(PAGE | flag | continued))
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert error.capability == capability
    assert error.block == "pc.ram"
    check(error, text=name, at=pieces.offset("pc.ram 1 word"), section="ram")
    assert f"switch off capability '{capability}'" in str(error)


@pytest.mark.parametrize(
    ("flag", "rest", "capability", "name"),
    [
        (0x40, b"\x01\0\x03\0\x01A", "xbzrle", "XBZRLE"),
        (0x100, b"\0\0\0\x02xy", "compress", "COMPRESS_PAGE"),
    ],
)
def test_an_image_of_a_stream_with_coded_pages(
    stream: Pieces, flag: int, rest: bytes, capability: str, name: str, tmp_path: Path
) -> None:
    """They are nowhere in the file as they are; `mig receive` keeps such a stream plain."""
    pieces = stream.before("pc.ram 1 word", be64(PAGE | flag | CONTINUE) + rest)
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert (error.capability, error.block) == (capability, "pc.ram")
    check(error, text=name, at=stream.offset("pc.ram 1 word"), section="ram")


@pytest.mark.parametrize("continued", [0, CONTINUE])
def test_rdma_record(stream: Pieces, continued: int, tmp_path: Path) -> None:
    """No capability avoids it: the source must not use RDMA."""
    pieces = stream.put("pc.ram 1 word", be64(PAGE | 0x80 | continued))
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    check(error, text="RDMA", at=pieces.offset("pc.ram 1 word"), section="ram")


def test_multifd_flush_in_setup(stream: Pieces, tmp_path: Path) -> None:
    """Where a source with multifd sends its first one."""
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("list eos", be64(0x200)).encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert error.capability == "multifd"


def test_page_outside_names_its_block(stream: Pieces, tmp_path: Path) -> None:
    """The record names vga.vram, the one before was of pc.ram."""
    pieces = stream.put("vga.vram 0 word", be64(2 * PAGE | ZERO))
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    check(error, text="outside", at=pieces.offset("vga.vram 0 word"), section="ram")
    assert isinstance(error, StreamError)
    assert error.block == "vga.vram"


def test_unknown_block_is_not_taken_for_the_last_one(stream: Pieces, tmp_path: Path) -> None:
    pieces = stream.put("vga.vram record name", b"vga.VRAM")
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    check(error, text="does not have", at=pieces.offset("vga.vram 0 word"), section="ram")
    assert isinstance(error, StreamError)
    assert error.block != "pc.ram"


def test_continue_crosses_sections(stream: Pieces, tmp_path: Path) -> None:
    more = part(be64(PAGE | ZERO | CONTINUE) + b"\0")
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("end", more).encode())
    with mig.open_image(path) as image:
        assert image.page("vga.vram", 1) == bytes(PAGE)


@pytest.mark.parametrize("last", [False, True], ids=["alone", "in a burst"])
def test_fill_byte(stream: Pieces, last: bool, tmp_path: Path) -> None:
    """Only memory takes pages filled with another byte; the error is at the record's burst."""
    label = f"pc.ram {3 if last else 1} data"
    pieces = stream.put(label, b"\x55")
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    error = streams.image_error(path)
    assert isinstance(error, StreamError)
    assert "filled" in error.message
    assert error.section == "ram"
    assert error.offset is not None
    assert pieces.offset("pc.ram 0 word") <= error.offset <= pieces.offset(label) - 8


def test_fill_byte_into_memory(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.put("pc.ram 1 data", b"\x55").encode())
    with Guest(empty=True) as guest:
        migration = mig.IncomingMigration(guest.guest)
        migration.listen(f"file:{path}")
        assert streams.outcome(migration) is None
        assert guest.contents()["pc.ram"][PAGE : 2 * PAGE] == b"\x55" * PAGE
        assert guest.loaded == streams.DEVICES


@pytest.mark.parametrize("section_id", [1, 2])
def test_pages_in_the_setup_section(stream: Pieces, section_id: int, tmp_path: Path) -> None:
    """QEMU takes them there, whatever the section's number; a capture may say that it cannot."""
    page = be64(PAGE_FLAG) + counted("pc.ram") + b"\x77" * PAGE
    pieces = stream.before("list eos", page)
    for label in ("start id", "start footer id", "end id", "end footer id"):
        pieces = pieces.put(label, be32(section_id))
    for name in streams.RAM:
        pieces = pieces.put(f"{name} part id", be32(section_id))
        pieces = pieces.put(f"{name} footer id", be32(section_id))
    for number, name in enumerate(streams.DEVICES, 10):
        pieces = pieces.put(f"{name} id", be32(number)).put(f"{name} footer id", be32(number))
    error = streams.receive(pieces.encode(), tmp_path / "vm.mig")
    if error is not None:
        assert isinstance(error, MismatchError)
        assert "setup section" in error.message
        assert error.offset is not None
        return
    with mig.open_image(tmp_path / "vm.mig") as image:
        assert image.page("pc.ram", 0) == b"\x11" * PAGE
        assert image.ram_section_id == section_id


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "data", "capability", "name"),
    [
        (3, b"", "postcopy-ram", "POSTCOPY_ADVISE"),
        (3, bytes(16), "postcopy-ram", "POSTCOPY_ADVISE"),
        (4, b"", "postcopy-ram", "POSTCOPY_LISTEN"),
        (5, b"", "postcopy-ram", "POSTCOPY_RUN"),
        (6, b"\0\x06pc.ram\0" + bytes(16), "postcopy-ram", "POSTCOPY_RAM_DISCARD"),
        (7, be32(0xFFFFFFFF), "postcopy-ram", "PACKAGED"),
        (8, b"", "x-colo", "ENABLE_COLO"),
        (9, b"", "postcopy-ram", "POSTCOPY_RESUME"),
        (10, counted("pc.ram"), "postcopy-ram", "RECV_BITMAP"),
    ],
)
@pytest.mark.parametrize("before", ["start", "pc.ram part", "end"])
def test_unsupported_command(
    stream: Pieces,
    number: int,
    data: bytes,
    capability: str,
    name: str,
    before: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before(before, command(number, data)).encode())
    error = streams.image_error(path)
    assert isinstance(error, UnsupportedError)
    assert error.capability == capability
    check(error, text=name, at=stream.offset(before), section=None)
    assert f"switch off capability '{capability}'" in str(error)


@pytest.mark.parametrize(
    ("number", "length"),
    [
        *[(1, n) for n in (1, 4, 0xFFFF)],
        *[(2, n) for n in (0, 3, 5, 0xFFFF)],
        *[(4, 1), (5, 1), (7, 0), (7, 5), (8, 1), (9, 1), (11, 1), (11, 0xFFFF)],
    ],
)
def test_command_length(stream: Pieces, number: int, length: int, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    head = b"\x08" + be16(number) + be16(length)
    path.write_bytes(stream.before("start", head + bytes(min(length, 8))).encode())
    error = streams.image_error(path)
    check(error, text=f"of {length} bytes", at=stream.offset("start") + 1, section=None)


@pytest.mark.parametrize("number", [0, 12, 13, 0xFFFF])
def test_unknown_command(stream: Pieces, number: int, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", command(number)).encode())
    check(
        streams.image_error(path),
        text=f"unknown command {number}",
        at=stream.offset("start") + 1,
        section=None,
    )


def test_variable_command_past_the_end(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.before("start", b"\x08" + be16(10) + be16(0xFFFF)).encode())
    assert isinstance(streams.image_error(path), TruncatedError)


# ---- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [-1, 1, 1 << 40])
def test_description_with_a_wrong_size(stream: Pieces, change: int, tmp_path: Path) -> None:
    """QEMU does not look at the sizes: the footers still lead to the end, so it is one piece."""
    text = streams.described(streams.DEVICES)
    text["devices"][1]["fields"][0]["size"] += change  # type: ignore[index]
    whole = streams.description(text)
    data = stream.encode()[: stream.offset("description")] + whole
    path = tmp_path / "vm.mig"
    path.write_bytes(data)
    with mig.open_image(path) as image:
        assert image.devices is None
        assert image.device_state.raw == data[stream.offset("timer section") :]


@pytest.mark.parametrize("change", [-1, 1, 1 << 40])
def test_description_with_a_wrong_size_and_no_footers(
    stream: Pieces, change: int, tmp_path: Path
) -> None:
    """Nothing else delimits the devices, so they must agree."""
    pieces = stream
    for name in ("start", *streams.RAM, "end", *streams.DEVICES):
        pieces = pieces.put(f"{name} footer", b"").put(f"{name} footer id", b"")
    path = tmp_path / "vm.mig"
    path.write_bytes(pieces.encode())
    assert streams.image_error(path) is None
    text = streams.described(streams.DEVICES)
    text["devices"][1]["fields"][0]["size"] += change  # type: ignore[index]
    data = pieces.encode()[: pieces.offset("description")] + streams.description(text)
    path.write_bytes(data)
    error = streams.image_error(path)
    assert isinstance(error, StreamError)
    assert error.offset is not None
    assert pieces.offset("timer section") <= error.offset <= pieces.end("eof")


DEVICE = {"name": "timer", "instance_id": 0, "version": 1, "fields": [{"size": 4}]}


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"{}",
        b'{"devices": 5}',
        b'{"devices": [5]}',
        b'{"devices": [{}]}',
        b'{"devices": [{"name": "timer", "instance_id": "x"}]}',
        b'{"devices": [{"name": "timer", "instance_id": 1e999}]}',
        b'{"devices": [{"name": "timer", "instance_id": -1e999}]}',
        b'{"devices": [{"name": "timer", "instance_id": NaN}]}',
        b'{"devices": [{"name": "timer", "instance_id": 0, "version": Infinity}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "fields": [{"size": -1}]}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "fields": [{"size": 1.5}]}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "fields": [{"size": null}]}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "fields": {"size": 1}}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "fields": [[]]}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "subsections": [{}]}]}',
        b'{"devices": [{"name": "t", "instance_id": 0, "subsections": [{"vmsd_name": 1}]}]}',
        b'{"devices": [{"name":"t", "instance_id":0, "subsections":[{"vmsd_name":"\\ud800"}]}]}',
        b'{"devices": [' + b'{"subsections":[' * 100_000,
        b'{"devices": [{"name": "t", "instance_id": ' + b"9" * 5000 + b"}]}",
        b'{"devices": [{"name": "t", "instance_id": 0, "fields": [{"size": '
        + b"9" * 4000
        + b', "array_len": '
        + b"9" * 4000
        + b"}]}]}",
        b'{"devices": [], "page_size": "big"}',
        b'{"devices": [{"name": "\xff\xfe"}]}',
    ],
    ids=lambda text: text[:60].decode("latin-1"),
)
def test_description_that_is_none(stream: Pieces, text: bytes, tmp_path: Path) -> None:
    """A typed error, or one piece where the footers lead to the end."""
    path = tmp_path / "vm.mig"
    data = stream.encode()[: stream.offset("description")] + streams.description(text)
    path.write_bytes(data)
    error = streams.image_error(path)
    assert error is None or isinstance(error, StreamError)
    if error is not None:
        assert error.offset is not None


def test_payload_that_looks_like_the_end(tmp_path: Path) -> None:
    """Whatever a device's payload holds, even EOF and a whole description: it is payload."""
    fake = b"\x00" + streams.description({"devices": []})
    devices = {"timer": fake, "serial": b"\x7e" + be32(3) + fake, "disk": b"\x06{"}
    with Guest(devices=devices) as guest:
        data = streams.stream_of(guest, tmp_path / "sent.mig")
    with mig.open_image(tmp_path / "sent.mig") as image:
        assert image.devices is not None
        assert {d.idstr: d.payload for d in image.devices} == devices
    assert streams.receive(data, tmp_path / "vm.mig") is None
    with mig.open_image(tmp_path / "vm.mig") as image:
        assert image.devices is not None
        assert {d.idstr: d.payload for d in image.devices} == devices


def test_payload_that_holds_a_whole_stream(stream: Pieces, tmp_path: Path) -> None:
    """A device may keep a captured VM inside of itself."""
    with Guest(devices={"nested": stream.encode(), "timer": b"\x01"}) as guest:
        streams.stream_of(guest, tmp_path / "vm.mig")
    with mig.open_image(tmp_path / "vm.mig") as image:
        assert image.devices is not None
        assert [d.payload for d in image.devices] == [stream.encode(), b"\x01"]


# ---- guests that a stream does not fit ----------------------------------------------------------


def _load(guest: Guest, path: Path) -> MigError | None:
    migration = mig.IncomingMigration(guest.guest)
    migration.listen(f"file:{path}")
    return streams.outcome(migration)


def test_other_machine(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.put("machine", b"other-box").encode())
    with Guest(empty=True) as guest:
        error = _load(guest, path)
    assert isinstance(error, MismatchError)
    assert "other-box" in error.message
    assert error.offset == stream.offset("configuration")


@pytest.mark.parametrize(
    ("ram", "text"),
    [({"pc.ram": bytes(4)}, "no such block"), ({**streams.RAM, "vga.vram": bytes(3)}, "3072")],
)
def test_other_blocks(stream: Pieces, ram: dict[str, bytes], text: str, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.encode())
    with Guest(ram, empty=True) as guest:
        error = _load(guest, path)
        assert isinstance(error, MismatchError)
        assert error.block == "vga.vram"
        check(error, text=text, at=stream.offset("total"), section="ram")


@pytest.mark.parametrize(
    ("label", "data", "text"),
    [
        ("timer name", b"tamer", "section or instance 'tamer' 0"),
        ("timer instance", be32(5), "section or instance 'timer' 5"),
        ("timer version", be32(2), "version 2"),
    ],
)
def test_other_devices(stream: Pieces, label: str, data: bytes, text: str, tmp_path: Path) -> None:
    pieces = stream.put(label, data)
    whole = streams.described(streams.DEVICES)
    device = whole["devices"][0]  # type: ignore[index]
    device["name"], device["instance_id"] = (
        pieces["timer name"].decode(),
        pieces["timer instance"][3],
    )
    path = tmp_path / "vm.mig"
    head = pieces.encode()[: pieces.offset("description")]
    path.write_bytes(head + streams.description(whole))
    with Guest(empty=True) as guest:
        error = _load(guest, path)
    assert isinstance(error, MismatchError)
    assert text in error.message
    assert error.section == pieces["timer name"].decode()
    assert error.offset == pieces.offset("timer section")


def test_devices_in_one_piece(stream: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(stream.encode()[: stream.end("eof")])
    with Guest(empty=True) as guest:
        error = _load(guest, path)
        assert guest.loaded == {}
    assert isinstance(error, MismatchError)
    assert error.offset == stream.offset("timer section")
