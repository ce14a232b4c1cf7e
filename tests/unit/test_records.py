"""Records: what is written is read again; what cannot be is refused, with its place."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram, stream

from mig import wire
from mig.errors import StreamError, TruncatedError
from mig.records import (
    BlockInfo,
    BlockList,
    Command,
    Configuration,
    FileHeader,
    ReturnMessage,
    SectionHeader,
    counted,
    encode_continuation,
    encode_footer,
)
from mig.stream.reader import StreamReader
from mig.wire import COMMAND_LENGTH, RETURN_LENGTH, CommandType, ReturnType, SectionType

QUICK = settings(max_examples=100, deadline=None)
NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255)
U32 = st.integers(0, 2**32 - 1)


def reader_of(data: bytes) -> StreamReader:
    return StreamReader(data=data)


def refused(read, data: bytes, match: str, offset: int | None) -> StreamError:
    with pytest.raises(StreamError, match=match) as caught:
        read(reader_of(data))
    assert caught.value.offset == offset
    return caught.value


def assert_every_truncation_is_noticed(read, data: bytes) -> None:
    for cut in range(len(data)):
        with pytest.raises(TruncatedError):
            read(reader_of(data[:cut]))


# ---- counted ---------------------------------------------------------------------------------


def test_counted_puts_the_length_before_the_bytes():
    assert counted("pc.ram") == b"\x06pc.ram"
    assert counted(b"\xff\0") == b"\x02\xff\0"
    assert counted("") == b"\0"
    assert counted("x" * 255) == b"\xff" + b"x" * 255


def test_counted_refuses_256_bytes():
    with pytest.raises(ValueError, match="256"):
        counted(b"x" * 256)


def test_counted_refuses_text_that_is_not_ascii():
    with pytest.raises(ValueError, match="ascii"):
        counted("é")


# ---- header ----------------------------------------------------------------------------------


def test_the_file_header_is_eight_bytes():
    assert FileHeader().encode() == b"QEVM\0\0\0\x03" == stream.header()
    reader = reader_of(stream.header() + b"x")
    assert FileHeader.read(reader) == FileHeader(3)
    assert reader.offset == 8


@pytest.mark.parametrize(
    ("data", "match", "offset"),
    [
        (b"\x1f\x8b\x08\0\0\0\0\0", "not a migration stream: magic 0x1f8b0800", 0),
        (b"\x11\x22\x33\x44\0\0\0\x01", "multifd channel", 0),
        (stream.header(2), "version 2", 4),
        (stream.header(1), "unknown stream version 1", 4),
        (stream.header(4), "unknown stream version 4", 4),
        (stream.header(0x03000000), "unknown stream version", 4),
    ],
)
def test_a_wrong_file_header_is_refused(data, match, offset):
    refused(FileHeader.read, data, match, offset)


def test_a_truncated_file_header_is_noticed():
    assert_every_truncation_is_noticed(FileHeader.read, FileHeader().encode())


# ---- configuration ---------------------------------------------------------------------------

CONFIGURATIONS = st.builds(
    Configuration,
    machine=NAMES,
    page_bits=st.none() | st.integers(wire.MIN_PAGE_BITS, wire.MAX_PAGE_BITS),
    capabilities=st.none() | st.lists(NAMES, max_size=4).map(tuple),
    uuid=st.none() | st.uuids(),
)


def read_configuration(reader: StreamReader) -> Configuration:
    assert reader.u8("type") == SectionType.CONFIGURATION
    return Configuration.read(reader)


@QUICK
@given(configuration=CONFIGURATIONS, following=st.sampled_from([b"", b"\x01", b"\x08"]))
def test_configurations_round_trip(configuration, following):
    data = configuration.encode()
    reader = reader_of(data + following)
    assert read_configuration(reader) == configuration
    assert reader.offset == len(data)
    assert reader.section is None


def test_the_octets_of_a_configuration():
    assert Configuration("box", 12).encode() == stream.configuration("box", 12)
    assert Configuration("box").encode() == b"\x07\0\0\0\x03box"
    uuid = UUID(bytes=bytes(range(16)))
    assert Configuration("b", None, ("x-ignore-shared",), uuid).encode() == (
        b"\x07\0\0\0\x01b"
        b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared"
        b"\x05\x12configuration/uuid\0\0\0\x01" + bytes(range(16))
    )


def test_the_page_size_follows_the_page_bits():
    assert Configuration("box").page_size == 4096
    assert Configuration("box", 16).page_size == 65536


def configuration_with(name: bytes, body: bytes, version: int = 1) -> bytes:
    head = b"\0\0\0\x03box\x05" + bytes([len(name)]) + name
    return head + struct.pack(">I", version) + body


PAGE_BITS = b"configuration/target-page-bits"
CAPABILITIES = b"configuration/capabilities"


@pytest.mark.parametrize(
    ("data", "match", "offset"),
    [
        (b"\0\0\0\0", "name of 0 bytes", 0),
        (b"\0\0\x01\0" + b"x" * 256, "name of 256 bytes", 0),
        (b"\xff\xff\xff\xff", "name of 4294967295 bytes", 0),
        (b"\0\0\0\x02\xff\xff", "machine type is not a name", 4),
        (configuration_with(PAGE_BITS, b"\0\0\0\x09"), r"2\^9", 7),
        (configuration_with(PAGE_BITS, b"\0\0\0\x15"), r"2\^21", 7),
        (configuration_with(PAGE_BITS, b"\0\0\0\x0c", version=2), "version 2", 7),
        (configuration_with(b"configuration/new", b""), "unknown subsection", 7),
        (configuration_with(b"", b""), "is not a name", 8),
        (configuration_with(CAPABILITIES, b"\0\0\x01\x01"), "257 capabilities", 39),
        (configuration_with(CAPABILITIES, b"\0\0\0\x01\0"), "capability is not a name", 43),
    ],
)
def test_a_wrong_configuration_is_refused(data, match, offset):
    error = refused(Configuration.read, data, match, offset)
    assert error.section == "configuration"


@pytest.mark.parametrize("bits", [wire.MIN_PAGE_BITS, wire.MAX_PAGE_BITS])
def test_page_bits_at_the_limits_are_read(bits):
    data = configuration_with(PAGE_BITS, struct.pack(">I", bits))
    assert Configuration.read(reader_of(data)).page_bits == bits


def test_names_and_capabilities_at_the_limits_are_read():
    name = "m" * wire.MAX_MACHINE_NAME
    many = Configuration(name, None, ("c",) * wire.MAX_CAPABILITIES)
    assert read_configuration(reader_of(many.encode())) == many


def test_a_configuration_cut_anywhere_inside_is_noticed():
    whole = Configuration("box", 12, ("a",), UUID(int=5)).encode()
    # where a subsection could follow or not, the shorter one is complete
    whole_ones = {len(Configuration("box").encode()), len(Configuration("box", 12).encode())}
    whole_ones.add(len(Configuration("box", 12, ("a",)).encode()))
    for cut in range(len(whole)):
        if cut in whole_ones:
            read_configuration(reader_of(whole[:cut]))
        else:
            with pytest.raises(TruncatedError):
                read_configuration(reader_of(whole[:cut]))


# ---- sections --------------------------------------------------------------------------------


@QUICK
@given(header=st.builds(SectionHeader, U32, NAMES, U32, U32))
def test_section_headers_round_trip(header):
    for kind in (SectionType.START, SectionType.FULL):
        data = header.encode(kind)
        assert data == stream.section(
            kind, header.section_id, header.idstr, header.instance_id, header.version_id
        )
        reader = reader_of(data)
        assert reader.u8("type") == kind
        assert SectionHeader.read(reader) == header
        assert reader.section == header.idstr
        assert reader.offset == len(data)


def test_a_section_needs_a_name():
    refused(SectionHeader.read, b"\0\0\0\x01\0" + bytes(8), "is not a name", 4)
    refused(SectionHeader.read, b"\0\0\0\x01\x01\x80" + bytes(8), "is not a name", 4)


def test_a_truncated_section_header_is_noticed():
    data = SectionHeader(1, "ram", 0, 4).encode(SectionType.START)[1:]
    assert_every_truncation_is_noticed(SectionHeader.read, data)


def test_continuations_and_footers_are_a_type_and_an_id():
    assert encode_continuation(SectionType.PART, 7) == b"\x02\0\0\0\x07"
    assert encode_continuation(SectionType.END, 7) == b"\x03\0\0\0\x07"
    assert encode_footer(0x01020304) == b"\x7e\x01\x02\x03\x04" == stream.footer(0x01020304)


# ---- commands and messages -------------------------------------------------------------------


def read_command(reader: StreamReader) -> Command:
    assert reader.u8("type") == SectionType.COMMAND
    return Command.read(reader)


@pytest.mark.parametrize("kind", list(CommandType))
def test_commands_round_trip(kind):
    length = COMMAND_LENGTH[kind]
    for n in [length] if length is not None else [0, 1, 16, 300, 65535]:
        command = Command(kind, bytes(range(256)) * (n // 256) + bytes(range(n % 256)))
        assert command.encode() == stream.command(kind, command.data)
        reader = reader_of(command.encode() + b"x")
        assert read_command(reader) == command
        assert reader.available == 1


@pytest.mark.parametrize("kind", [k for k, n in COMMAND_LENGTH.items() if n is not None])
def test_commands_of_a_wrong_length_are_refused(kind):
    right = COMMAND_LENGTH[kind]
    for wrong in {0, right - 1, right + 1, 65535} - {right, -1}:
        data = struct.pack(">HH", kind, wrong) + bytes(wrong)
        refused(Command.read, data, f"{kind.name} of {wrong} bytes, not {right}", 0)


@pytest.mark.parametrize("number", [0, 12, 255, 65535])
def test_unknown_commands_are_refused(number):
    refused(Command.read, struct.pack(">HH", number, 0), f"unknown command {number}", 0)


def test_a_truncated_command_is_noticed():
    assert_every_truncation_is_noticed(read_command, Command.ping(1).encode())


def test_ping_carries_its_value():
    assert Command.ping(0xDEADBEEF).encode() == b"\x08\0\x02\0\x04\xde\xad\xbe\xef"
    assert Command.ping(0xDEADBEEF).value == 0xDEADBEEF


@pytest.mark.parametrize("kind", list(ReturnType))
def test_return_messages_round_trip(kind):
    length = RETURN_LENGTH[kind]
    for n in [length] if length is not None else [0, 13, wire.MAX_RETURN_MESSAGE]:
        message = ReturnMessage(kind, bytes(n))
        assert message.encode() == struct.pack(">HH", kind, n) + bytes(n)
        assert ReturnMessage.read(reader_of(message.encode())) == message


@pytest.mark.parametrize("kind", list(ReturnType))
def test_return_messages_of_a_wrong_length_are_refused(kind):
    right = RETURN_LENGTH[kind]
    wrongs = {wire.MAX_RETURN_MESSAGE + 1, 65535}
    if right is not None:
        wrongs |= {right + 1, 0, 500} - {right}
    for wrong in wrongs:
        data = struct.pack(">HH", kind, wrong) + bytes(wrong)
        refused(ReturnMessage.read, data, f"{kind.name} of {wrong} bytes", 0)


@pytest.mark.parametrize("number", [0, 8, 65535])
def test_unknown_return_messages_are_refused(number):
    refused(ReturnMessage.read, struct.pack(">HH", number, 0), "unknown return-path", 0)


def test_a_truncated_return_message_is_noticed():
    assert_every_truncation_is_noticed(ReturnMessage.read, ReturnMessage.shut(1).encode())


def test_shut_and_pong_carry_their_value():
    assert ReturnMessage.shut(0).encode() == b"\0\x01\0\x04\0\0\0\0"
    assert ReturnMessage.pong(3).encode() == b"\0\x02\0\x04\0\0\0\x03"
    assert ReturnMessage.shut(5).value == 5


# ---- block list ------------------------------------------------------------------------------

PAGE = 4096


def read_blocks(reader: StreamReader) -> BlockList:
    word = reader.u64("word")
    assert word % PAGE == wire.RamFlag.MEM_SIZE
    return BlockList.read(reader, word - word % PAGE, PAGE)


@QUICK
@given(
    blocks=st.dictionaries(NAMES, st.integers(1, 1 << 20).map(lambda n: n * PAGE), max_size=10)
)
def test_block_lists_round_trip(blocks):
    listed = BlockList(tuple(BlockInfo(name, nbytes) for name, nbytes in blocks.items()))
    data = listed.encode()
    assert data == ram.block_list(blocks)
    assert listed.total == sum(blocks.values())
    reader = reader_of(data + b"more")
    assert read_blocks(reader) == listed
    assert reader.available == 4


ADDRESSES = {"a": 0, "bc": 2**64 - 1, "d": 0xFD000000}


def test_the_octets_of_a_block_list_with_addresses():
    blocks = BlockList((BlockInfo("pc.ram", 0x4000000, 0), BlockInfo("vga", PAGE, 0xFD000000)))
    data = blocks.encode()
    assert data == (
        b"\0\0\0\0\x04\0\x10\x04"
        b"\x06pc.ram\0\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0"
        b"\x03vga\0\0\0\0\0\0\x10\0\0\0\0\0\xfd\0\0\0"
    )
    reader = reader_of(data[8:] + b"more")
    assert BlockList.read(reader, blocks.total, PAGE, addresses=True) == blocks
    assert reader.available == 4


def test_a_truncated_block_list_with_addresses_is_noticed():
    data = ram.block_list(dict.fromkeys(ADDRESSES, PAGE), ADDRESSES)

    def read(reader: StreamReader) -> BlockList:
        return BlockList.read(reader, reader.u64("word") - 4, PAGE, addresses=True)

    assert_every_truncation_is_noticed(read, data)
    assert {b.idstr: b.address for b in read(reader_of(data)).blocks} == ADDRESSES


@pytest.mark.parametrize("data", [b"\x01a", b"\0"])
def test_a_block_list_read_with_addresses_it_does_not_have_is_refused(data):
    """The next entry is taken for an address: what follows is no name, or not there at all."""
    entries = entry(b"a", PAGE) + entry(b"b" * 7 + data[:1], PAGE) + data
    with pytest.raises(StreamError):
        BlockList.read(reader_of(entries), 2 * PAGE, PAGE, addresses=True)


def entry(name: bytes, nbytes: int) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">Q", nbytes)


@pytest.mark.parametrize(
    ("total", "entries", "match", "offset"),
    [
        (2 * PAGE, [(b"a", PAGE), (b"a", PAGE)], "listed twice", 10),
        (PAGE, [(b"a", 2 * PAGE)], "8192 bytes", 0),
        (2 * PAGE, [(b"a", PAGE), (b"b", 2 * PAGE)], "4096 bytes of the total left", 10),
        (2 * PAGE, [(b"a", PAGE + 1)], "4097 bytes", 0),
        (PAGE, [(b"a", 2**64 - PAGE)], "of 18446744073709547520 bytes", 0),
        (PAGE, [(b"", PAGE)], "is not a name", 0),
        (wire.MAX_RAM_BYTES + PAGE, [], "past the limit", 0),
    ],
)
def test_a_wrong_block_list_is_refused(total, entries, match, offset):
    data = b"".join(entry(*e) for e in entries)
    refused(lambda reader: BlockList.read(reader, total, PAGE), data, match, offset)


def test_the_limit_of_ram_bytes_is_itself_allowed():
    data = entry(b"a", wire.MAX_RAM_BYTES)
    blocks = BlockList.read(reader_of(data), wire.MAX_RAM_BYTES, PAGE)
    assert blocks.total == wire.MAX_RAM_BYTES


def test_the_limit_of_blocks_is_itself_allowed_and_one_more_is_refused():
    entries = b"".join(entry(b"%d" % i, PAGE) for i in range(wire.MAX_RAM_BLOCKS + 1))
    total = wire.MAX_RAM_BLOCKS * PAGE
    assert len(BlockList.read(reader_of(entries), total, PAGE).blocks) == wire.MAX_RAM_BLOCKS
    with pytest.raises(StreamError, match="too many RAM blocks"):
        BlockList.read(reader_of(entries), total + PAGE, PAGE)


def test_blocks_without_length_end_at_the_limit_too():
    entries = b"".join(entry(b"%d" % i, 0) for i in range(wire.MAX_RAM_BLOCKS + 1))
    with pytest.raises(StreamError, match="too many RAM blocks"):
        BlockList.read(reader_of(entries), PAGE, PAGE)


def test_a_truncated_block_list_is_noticed():
    assert_every_truncation_is_noticed(read_blocks, ram.block_list({"a": PAGE, "bc": 2 * PAGE}))


def test_an_empty_block_list_is_one_word():
    assert BlockList().encode() == ram.be64(ram.MEM_SIZE)
    assert read_blocks(reader_of(BlockList().encode())) == BlockList()


def test_a_block_knows_its_number_of_pages():
    assert BlockInfo("a", 3 * PAGE).npages(PAGE) == 3
