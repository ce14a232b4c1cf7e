"""Wire numbers stand in mig/wire.py; what csrc says must be the same."""

from __future__ import annotations

from mig import _core, wire
from mig.wire import CommandType, RamFlag, ReturnType, SectionType


def test_the_c_constants_are_those_of_wire():
    assert _core.RAM_FLAGS
    for name, value in _core.RAM_FLAGS.items():
        assert value == RamFlag[name].value


def test_ram_flags_are_qemu_s():
    assert {flag.name: flag.value for flag in RamFlag} == {
        "ZERO": 0x02,
        "MEM_SIZE": 0x04,
        "PAGE": 0x08,
        "EOS": 0x10,
        "CONTINUE": 0x20,
        "XBZRLE": 0x40,
        "HOOK": 0x80,
        "COMPRESS_PAGE": 0x100,
        "MULTIFD_FLUSH": 0x200,
    }


def test_magics_and_versions_are_qemu_s():
    assert wire.FILE_MAGIC.to_bytes(4, "big") == b"QEVM"
    assert (wire.FILE_VERSION, wire.FILE_VERSION_COMPAT) == (3, 2)
    assert wire.MULTIFD_MAGIC == 0x11223344
    assert (wire.RAM_IDSTR, wire.RAM_VERSION) == ("ram", 4)


def test_section_types_are_qemu_s():
    assert [kind.value for kind in SectionType] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x7E]


def test_commands_and_return_messages_are_numbered_without_gaps():
    assert [c.value for c in CommandType] == list(range(1, 12))
    assert [r.value for r in ReturnType] == list(range(1, 8))


def test_every_command_and_message_has_its_length():
    assert set(wire.COMMAND_LENGTH) == set(CommandType)
    assert set(wire.RETURN_LENGTH) == set(ReturnType)
    assert wire.COMMAND_LENGTH[CommandType.PING] == wire.COMMAND_LENGTH[CommandType.PACKAGED] == 4
    assert wire.RETURN_LENGTH[ReturnType.REQ_PAGES] == 12


def test_every_flag_fits_below_the_smallest_page():
    assert max(RamFlag) < 1 << wire.MIN_PAGE_BITS


def test_the_numbers_of_postcopy_in_c_are_these():
    for kind, numbers in _core.POSTCOPY_NUMBERS.items():
        for name, value in numbers.items():
            assert getattr(wire, kind)[name] == value
