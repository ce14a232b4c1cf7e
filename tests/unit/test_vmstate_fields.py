"""VMState: what each kind of field puts on the wire, takes from it, and refuses."""

from __future__ import annotations

import array
import json
import math
import struct
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mig import vmstate
from mig.errors import DeviceStateError, MismatchError, StreamError, TruncatedError
from mig.savevm.vmstate import Description, Field

POINT = Description("point", fields=[vmstate.Int16("x"), vmstate.Int16("y")])


def of(*fields: Field, **options: Any) -> Description:
    return Description("dev", fields=fields, **options)


def save(description: Description, state: Any) -> bytes:
    return description.save(state)[0]


def described(description: Description, state: Any, **options: Any) -> list[dict[str, Any]]:
    """What is said of the fields, without their names."""
    fields = json.loads(description.save(state, **options)[1].text())["fields"]
    return [{key: value for key, value in f.items() if key != "name"} for f in fields]


def refused(description: Description, state: Any) -> DeviceStateError:
    with pytest.raises(DeviceStateError) as caught:
        description.save(state)
    return caught.value


def rejected(description: Description, payload: bytes, state: Any = None) -> StreamError:
    with pytest.raises(StreamError) as caught:
        description.load(payload, state)
    return caught.value


# ---- numbers ---------------------------------------------------------------------------------

INTEGERS = [
    (vmstate.Int8, "b", "int8"),
    (vmstate.Int16, "h", "int16"),
    (vmstate.Int32, "i", "int32"),
    (vmstate.Int64, "q", "int64"),
    (vmstate.UInt8, "B", "uint8"),
    (vmstate.UInt16, "H", "uint16"),
    (vmstate.UInt32, "I", "uint32"),
    (vmstate.UInt64, "Q", "uint64"),
]


@pytest.mark.parametrize(("kind", "code", "name"), INTEGERS)
def test_an_integer_is_big_endian_and_has_its_width(kind, code, name):
    bits = 8 * struct.calcsize(">" + code)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if code.islower() else (0, 2**bits - 1)
    description = of(kind("n"))
    for value in (low, 0, 1, high):
        payload = save(description, {"n": value})
        assert payload == struct.pack(">" + code, value)
        assert description.load(payload) == {"n": value}
    for value in (low - 1, high + 1):
        error = refused(description, {"n": value})
        assert error.field == "dev.n"
        assert str(error) == f"dev.n: {value} is no {name}, which is {low} to {high}"
    assert described(description, {"n": 0}) == [{"type": name, "size": bits // 8}]
    assert save(description, {"n": np.int64(1)}) == save(description, {"n": 1})


@pytest.mark.parametrize("value", [None, 1.0, "1", b"1", [1]])
def test_what_is_no_integer_is_refused(value):
    assert refused(of(vmstate.UInt8("n")), {"n": value}).field == "dev.n"


def test_what_is_refused_is_shown_however_large_it_is():
    # Python refuses to show an int of more than 4300 digits
    description = of(vmstate.UInt8("n"), vmstate.Bitmap("b", "n"))
    assert "an int of 40001 bits" in str(refused(description, {"n": 1 << 40000}))
    assert "an int of 40001 bits" in str(refused(description, {"n": 1, "b": 1 << 40000}))
    assert len(str(refused(description, {"n": "x" * 10000}))) < 100


def test_a_state_that_lacks_a_field_is_refused():
    assert "the state has no 'n'" in str(refused(of(vmstate.UInt8("n")), SimpleNamespace()))


def test_truth_is_one_byte():
    description = of(vmstate.Bool("b"))
    for value in (True, 1, np.True_):
        assert save(description, {"b": value}) == b"\x01"
    assert description.load(b"\x00") == {"b": False}
    # QEMU takes any byte but 0 for true
    assert description.load(b"\x80") == {"b": True}
    assert refused(description, {"b": 2}).field == "dev.b"
    assert described(description, {"b": True}) == [{"type": "bool", "size": 1}]


@pytest.mark.parametrize(
    ("kind", "name"), [(vmstate.Float64, "float64"), (vmstate.CpuDouble, "CPU_Double_U")]
)
@given(bits=st.integers(0, 2**64 - 1))
def test_a_float_is_its_bits(kind, name, bits):
    description, payload = of(kind("f")), bits.to_bytes(8, "big")
    state = description.load(payload)
    assert save(description, state) == payload
    assert described(description, state) == [{"type": name, "size": 8}]


def test_what_is_no_float_is_refused():
    assert refused(of(vmstate.Float64("f")), {"f": "x"}).field == "dev.f"
    assert math.isinf(of(vmstate.Float64("f")).load(b"\x7f\xf0" + bytes(6))["f"])


def test_a_timer_runs_or_does_not():
    description = of(vmstate.Timer("t"))
    assert save(description, {"t": None}) == b"\xff" * 8
    assert save(description, {"t": 5}) == bytes(7) + b"\x05"
    assert description.load(b"\xff" * 8) == {"t": None}
    assert description.load(bytes(7) + b"\x05") == {"t": 5}
    assert refused(description, {"t": 2**64 - 1}).field == "dev.t"
    assert described(description, {"t": None}) == [{"type": "timer", "size": 8}]


# ---- equal, at most --------------------------------------------------------------------------

EQUAL = [
    (vmstate.UInt8, "uint8 equal"),
    (vmstate.UInt16, "uint16 equal"),
    (vmstate.Int32, "int32 equal"),
    (vmstate.UInt32, "uint32 equal"),
    (vmstate.UInt64, "int64 equal"),
]


@pytest.mark.parametrize(("kind", "name"), EQUAL)
def test_a_number_that_must_be_equal_is_compared(kind, name):
    description = of(kind("n", equal=True, hint="same size on both sides"))
    payload, body = description.save({"n": 17})
    assert json.loads(body.text())["fields"][0]["type"] == name
    description.load(payload, {"n": 17})
    error = rejected(description, payload, {"n": 18})
    assert error.message == "dev.n: 12 != 11; same size on both sides"
    assert (error.offset, error.section) == (0, "dev")
    assert "nothing != 11" in str(rejected(description, payload))


def test_negative_numbers_are_compared_as_qemu_shows_them():
    description = of(vmstate.Int32("n", equal=True))
    assert "ffffffff != 1" in str(rejected(description, b"\0\0\0\x01", {"n": -1}))


def test_a_number_may_be_bounded_by_what_is_there():
    description = of(vmstate.Int32("n", at_most=True))
    assert description.load(b"\0\0\0\x02", {"n": 2}) == {"n": 2}
    for payload in (b"\0\0\0\x03", b"\xff" * 4):
        assert "expecting positive value <= 2" in str(rejected(description, payload, {"n": 2}))
    assert rejected(description, b"\0\0\0\x02")
    assert described(description, {"n": 2}) == [{"type": "int32 le", "size": 4}]


# ---- buffers, bitmaps, padding ---------------------------------------------------------------


def test_a_buffer_has_its_length():
    description = of(vmstate.Buffer("b", 3))
    for value in (b"abc", bytearray(b"abc"), memoryview(b"abc"), np.frombuffer(b"abc", "u1")):
        assert save(description, {"b": value}) == b"abc"
    assert description.load(b"abc") == {"b": b"abc"}
    for value in (b"ab", b"abcd", "abc", None):
        assert refused(description, {"b": value}).field == "dev.b"
    assert described(description, {"b": b"abc"}) == [{"type": "buffer", "size": 3}]


@pytest.mark.parametrize("kind", ["bytearray", "numpy", "memoryview"])
def test_a_buffer_is_filled_where_it_is(kind):
    mine = {"bytearray": bytearray(3), "numpy": np.zeros(3, "u1")}.get(
        kind, memoryview(bytearray(3))
    )
    state = of(vmstate.Buffer("b", 3)).load(b"abc", {"b": mine})
    assert state["b"] is mine
    assert bytes(mine) == b"abc"


def test_a_buffer_that_has_no_room_is_a_mismatch():
    error = rejected(of(vmstate.Buffer("b", 3)), b"abc", {"b": bytearray(2)})
    assert isinstance(error, MismatchError)
    assert "room for 2, not 3" in error.message


def test_a_buffer_may_be_as_long_as_another_field_says():
    description = of(vmstate.UInt32("n"), vmstate.Buffer("b", "n", times=2, maximum=8))
    payload = save(description, {"n": 2, "b": b"abcd"})
    assert payload == b"\0\0\0\x02abcd"
    assert description.load(payload) == {"n": 2, "b": b"abcd"}
    # one with room to spare keeps it
    mine = bytearray(b"......")
    assert save(description, {"n": 1, "b": mine}) == b"\0\0\0\x01.."
    assert description.load(payload, {"b": mine})["b"] == b"abcd.."
    for state in ({"n": 2, "b": b"abc"}, {"n": 5, "b": bytes(10)}):
        assert refused(description, state).field == "dev.b"
    assert "0 to 4 can be" in rejected(description, b"\0\0\0\x05" + bytes(10)).message


def test_a_part_of_a_buffer_leaves_the_rest():
    description = of(vmstate.Buffer("b", 2, start=3))
    mine = bytearray(b"0123456")
    assert save(description, {"b": mine}) == b"34"
    assert description.load(b"ab", {"b": mine})["b"] == b"012ab56"
    assert refused(description, {"b": b"0123"})
    assert rejected(description, b"ab")


@given(value=st.integers(0, 2**130 - 1))
def test_a_bitmap_is_words_of_64_bits_the_first_bits_first(value):
    description = of(vmstate.Bitmap("b", 130))
    payload = save(description, {"b": value})
    words = [value >> 64 * i & (2**64 - 1) for i in range(3)]
    assert payload == struct.pack(">3Q", *words)
    assert description.load(payload) == {"b": value}


def test_a_bitmap_has_no_other_bits():
    description = of(vmstate.UInt8("n"), vmstate.Bitmap("b", "n"))
    for value in (1 << 5, -1, None, b""):
        assert refused(description, {"n": 5, "b": value}).field == "dev.b"
    assert description.load(b"\x05" + b"\xff" * 8)["b"] == 0b11111
    assert described(description, {"n": 5, "b": 0})[1] == {"type": "bitmap", "size": 8}
    assert save(description, {"n": 0, "b": 0}) == b"\0"


def test_padding_is_zero_and_ignored():
    description = of(vmstate.Unused(3), vmstate.UInt8("n"), vmstate.Unused(2, count="n"))
    payload, body = description.save({"n": 2})
    assert payload == bytes(3) + b"\x02" + bytes(4)
    assert description.load(b"xyz\x01ab") == {"n": 1}
    fields = json.loads(body.text())["fields"]
    assert fields[0] == {"name": "unused[0]", "type": "unused_buffer", "size": 3}
    assert fields[2] == {
        "name": "unused[1]",
        "array_len": 2,
        "type": "unused_buffer",
        "size": 2,
    }
    assert rejected(description, b"xyz\x01a")
    assert rejected(of(vmstate.Unused(1, count="n")), b"")
    assert refused(of(vmstate.Unused(1, count="n")), {})


# ---- arrays ----------------------------------------------------------------------------------


def test_an_array_has_its_length_and_names_the_element_that_is_wrong():
    description = of(vmstate.Array("a", vmstate.UInt16, 3))
    payload = save(description, {"a": (1, 2, 3)})
    assert payload == b"\0\x01\0\x02\0\x03"
    assert description.load(payload) == {"a": [1, 2, 3]}
    assert refused(description, {"a": [1, 2]}).field == "dev.a"
    assert refused(description, {"a": [1, 2, 3, 4]}).field == "dev.a"
    assert refused(description, {"a": None}).field == "dev.a"
    error = refused(description, {"a": [1, 2, 65536]})
    assert error.field == "dev.a[2]"
    assert described(description, {"a": [1, 2, 3]}) == [
        {"array_len": 3, "type": "uint16", "size": 2}
    ]


@pytest.mark.parametrize(
    "mine",
    [
        [0, 0, 0],
        [],
        bytearray(3),
        array.array("B", [0, 0, 0]),
        np.zeros(3, "u1"),
        deque([9]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_array_is_loaded_into_what_is_there(mine):
    state = of(vmstate.Array("a", vmstate.UInt8, 3)).load(b"\x01\x02\x03", {"a": mine})
    assert state["a"] is mine
    assert list(mine) == [1, 2, 3]


@pytest.mark.parametrize("mine", [None, 0, "", 1.5])
def test_what_is_no_sequence_is_replaced(mine):
    fields = [vmstate.Array("a", vmstate.UInt8, 1), vmstate.Array("m", vmstate.UInt8, (1, 1))]
    description = of(*fields, vmstate.Array("p", POINT, 1), vmstate.Buffer("b", 1))
    loaded = description.load(b"\x01\x02\0\x03\0\x04x", dict.fromkeys("ampb", mine))
    assert loaded == {"a": [1], "m": [[2]], "p": [{"x": 3, "y": 4}], "b": b"x"}


@pytest.mark.parametrize("mine", [b"xyz", (7, 8, 9)])
def test_what_cannot_change_is_replaced_by_its_like(mine):
    state = of(vmstate.Array("a", vmstate.UInt8, 3)).load(b"\x01\x02\x03", {"a": mine})
    assert state["a"] == type(mine)([1, 2, 3])


def test_elements_that_do_not_fit_what_is_there_are_a_mismatch():
    description = of(vmstate.Array("a", vmstate.UInt16, 2))
    for mine in (bytearray(2), np.zeros(2, "u1"), bytearray(1)):
        assert "does not take it" in rejected(description, b"\xff\xff\xff\xff", {"a": mine}).message


def test_an_array_of_rows():
    description = of(vmstate.Array("m", vmstate.UInt8, (2, 3)))
    payload = bytes(range(6))
    assert description.load(payload) == {"m": [[0, 1, 2], [3, 4, 5]]}
    assert save(description, {"m": [[0, 1, 2], [3, 4, 5]]}) == payload
    assert described(description, {"m": [[0] * 3] * 2}) == [
        {"array_len": 6, "type": "uint8", "size": 1}
    ]
    mine = np.zeros((2, 3), "u1")
    assert description.load(payload, {"m": mine})["m"] is mine
    assert mine.tolist() == [[0, 1, 2], [3, 4, 5]]
    for value in ([[0] * 3], [[0] * 2] * 2, [0, 1]):
        assert refused(description, {"m": value}).field == "dev.m"


def test_a_part_of_an_array_leaves_the_rest():
    description = of(vmstate.Array("a", vmstate.UInt8, 2, start=1))
    assert save(description, {"a": [0, 1, 2, 3]}) == b"\x01\x02"
    assert description.load(b"\x08\x09", {"a": [0, 1, 2, 3]}) == {"a": [0, 8, 9, 3]}
    assert refused(description, {"a": [0, 1]})
    assert rejected(description, b"\x08\x09")
    with pytest.raises(ValueError, match="one dimension"):
        vmstate.Array("a", vmstate.UInt8, (2, 2), start=1)


@pytest.mark.parametrize("width", [vmstate.UInt8, vmstate.UInt16, vmstate.Int32, vmstate.UInt32])
def test_a_variable_array_has_as_many_elements_as_another_field_says(width):
    description = of(width("n"), vmstate.Array("a", vmstate.UInt16, "n", maximum=3))
    state = {"n": 2, "a": [5, 6]}
    payload = save(description, state)
    assert payload.endswith(b"\0\x05\0\x06")
    assert description.load(payload) == state
    assert save(description, {"n": 0, "a": []}) == bytes(len(payload) - 4)
    assert refused(description, {"n": 1, "a": [5, 6]}).field == "dev.a"
    assert refused(description, {"n": 4, "a": [0] * 4}).field == "dev.a"
    count = len(payload) - 4
    error = rejected(description, (4).to_bytes(count, "big") + bytes(8))
    assert error.message == "dev.a: 4 of 'n': 0 to 3 can be"
    # what is there may have room for more
    mine = array.array("H", [9, 9, 9])
    assert list(description.load(payload, {"a": mine})["a"]) == [5, 6, 9]
    assert save(description, {"n": 2, "a": mine}) == payload


def test_a_negative_count_is_a_mismatch():
    description = of(vmstate.Int32("n"), vmstate.Array("a", vmstate.UInt8, "n"))
    assert "0 to" in rejected(description, b"\xff" * 4).message
    assert "no number" in str(rejected(of(vmstate.Array("a", vmstate.UInt8, "n")), b""))


def test_a_variable_array_may_count_groups():
    description = of(vmstate.UInt8("n"), vmstate.Array("a", vmstate.UInt8, "n", times=2))
    assert save(description, {"n": 1, "a": [1, 2]}) == b"\x01\x01\x02"
    assert description.load(b"\x02\x01\x02\x03\x04") == {"n": 2, "a": [1, 2, 3, 4]}


def test_an_array_of_truths_and_timers():
    description = of(vmstate.Array("b", vmstate.Bool, 2), vmstate.Array("t", vmstate.Timer, 2))
    state = {"b": [True, False], "t": [None, 1]}
    assert description.load(save(description, state)) == state


# ---- structs ---------------------------------------------------------------------------------


def test_a_struct_is_loaded_into_the_object_that_is_there():
    description, mine = of(vmstate.Struct("p", POINT)), SimpleNamespace(x=0, y=0)
    payload = save(description, {"p": {"x": 1, "y": -1}})
    assert payload == b"\0\x01\xff\xff"
    assert description.load(payload, SimpleNamespace(p=mine)).p is mine
    assert (mine.x, mine.y) == (1, -1)
    assert described(description, {"p": mine}) == [
        {
            "type": "struct",
            "struct": {
                "vmsd_name": "point",
                "version": 1,
                "fields": [
                    {"name": "x", "type": "int16", "size": 2},
                    {"name": "y", "type": "int16", "size": 2},
                ],
            },
            "size": 4,
        }
    ]


def test_a_struct_that_is_not_there_is_made():
    class Point:
        pass

    made = Description("point", fields=POINT.fields, make=Point)
    assert isinstance(of(vmstate.Struct("p", made)).load(bytes(4))["p"], Point)
    assert of(vmstate.Struct("p", POINT)).load(bytes(4)) == {"p": {"x": 0, "y": 0}}
    state = of(vmstate.Struct("p", POINT)).load(bytes(4), SimpleNamespace(p=None))
    assert state.p == SimpleNamespace(x=0, y=0)


def test_a_struct_names_the_field_in_it():
    description = of(vmstate.Struct("p", POINT), vmstate.Array("ps", POINT, 2))
    good = {"x": 0, "y": 0}
    error = refused(description, {"p": good, "ps": [good, {"x": 0, "y": 1 << 15}]})
    assert error.field == "dev.ps[1].y"
    assert refused(description, {"p": None, "ps": []}).field == "dev.p"
    error = rejected(description, bytes(11))
    assert isinstance(error, TruncatedError)
    assert str(error) == (
        "dev.ps[1].y: 2 bytes are missing, there are 1 (at offset 0xa, section 'dev')"
    )


def test_a_struct_of_an_older_version_is_described_in_its_place():
    inner = Description(
        "in",
        version=3,
        minimum_version=1,
        fields=[vmstate.UInt8("a"), vmstate.UInt8("b", since=3)],
    )
    description = of(vmstate.Struct("s", inner, version=2))
    state = {"s": {"a": 1, "b": 2}}
    assert save(description, state) == b"\x01"
    assert described(description, state) == [
        {
            "type": "vstruct",
            "vmsd_name": "in",
            "version": 2,
            "fields": [{"name": "a", "type": "uint8", "size": 1}],
            "size": 1,
        }
    ]
    assert description.load(b"\x07") == {"s": {"a": 7}}


@pytest.mark.parametrize(
    ("kind", "name"), [(vmstate.TailQueue, "qtailq"), (vmstate.LinkedList, "qlist")]
)
@pytest.mark.parametrize("make", [list, deque])
def test_a_queue_is_elements_and_an_end(kind, name, make):
    description = of(kind("q", POINT, maximum=2))
    points = [{"x": 1, "y": 2}, {"x": 3, "y": 4}]
    payload = save(description, {"q": make(points)})
    assert payload == b"\x01\0\x01\0\x02\x01\0\x03\0\x04\0"
    mine = make([{"x": 9, "y": 9}])
    assert description.load(payload, {"q": mine})["q"] is mine
    assert list(mine) == points
    assert description.load(b"\0") == {"q": []}
    text = description.save({"q": points})[1].text()
    # both elements, one after the other in one object, as QEMU says it
    assert text.count('"vmsd_name": "point"') == 2
    assert f'"type": "{name}", "vmsd_name": "point"' in text
    assert text.endswith('"size": 11}]}')
    for value in (points * 2, None, 0):
        assert refused(description, {"q": value}).field == "dev.q"
    assert "more than 2" in rejected(description, b"\x01\0\0\0\0" * 3 + b"\0").message
    assert rejected(description, payload[:-1])


def test_a_tree_is_counted_and_ends():
    description = of(vmstate.Tree("t", POINT, maximum=2))
    state = {"t": {7: {"x": 1, "y": 2}, 3: {"x": 0, "y": 0}}}
    payload = save(description, state)
    entry3 = b"\x01" + bytes(7) + b"\x03" + bytes(4)
    assert payload == b"\0\0\0\x02" + entry3 + b"\x01" + bytes(7) + b"\x07\0\x01\0\x02" + b"\0"
    assert description.load(payload) == state
    assert refused(description, {"t": {-1: {"x": 0, "y": 0}}}).field == "dev.t[-1]"
    for value in (dict.fromkeys(range(3)), None, [], {"a": 1, 2: 3}):
        assert refused(description, {"t": value}).field == "dev.t"
    for wrong in (
        b"\0\0\0\x03",
        b"\0\0\0\0" + entry3 + b"\0",
        b"\0\0\0\x02" + entry3 + b"\0",
        b"\0\0\0\x01" + entry3,
    ):
        assert rejected(description, wrong)


def test_what_exists_only_for_the_stream():
    class Tmp:
        def __init__(self, parent: dict[str, int]) -> None:
            self.parent = parent

        def split(self) -> None:
            self.high, self.low = divmod(self.parent["n"], 256)

        def join(self, version_id: int) -> None:
            self.parent["n"] = self.high * 256 + self.low

    inner = Description(
        "tmp",
        fields=[vmstate.UInt8("high"), vmstate.UInt8("low")],
        pre_save=Tmp.split,
        post_load=Tmp.join,
    )
    description = of(vmstate.Temporary(inner, Tmp))
    payload, body = description.save({"n": 0x1234})
    assert payload == b"\x12\x34"
    assert description.load(payload) == {"n": 0x1234}
    # as QEMU says it of the x87 registers: not in an object of its own
    assert body.text() == (
        '{"vmsd_name": "dev", "version": 1, "fields": [{"name": "tmp", "type": "tmp", '
        '"vmsd_name": "tmp", "version": 1, "fields": ['
        '{"name": "high", "type": "uint8", "size": 1}, '
        '{"name": "low", "type": "uint8", "size": 1}], "size": 2}]}'
    )


# ---- pointers --------------------------------------------------------------------------------


def test_pointers_that_are_none_are_marked_as_qemu_does():
    description = of(vmstate.PointerArray("p", POINT, 3))
    state = {"p": [None, {"x": 1, "y": 2}, None]}
    payload = save(description, state)
    assert payload == b"0\0\x01\0\x020"
    assert description.load(payload, {"p": [None, {}, None]}) == state
    found = described(description, state)
    assert [f["type"] for f in found] == ["nullptr", "struct", "nullptr"]
    assert [f["size"] for f in found] == [1, 4, 1]
    assert "VMS_NULLPTR_MARKER" in rejected(description, payload, {"p": [None] * 3}).message
    assert "which of 3" in rejected(description, payload, {"p": []}).message
    assert "which of 3" in rejected(description, payload).message


def test_runs_of_pointers_are_described_with_their_lengths():
    description = of(vmstate.PointerArray("p", POINT, 5))
    there = {"x": 0, "y": 0}
    found = described(description, {"p": [there, there, None, None, None]})
    assert [(f["type"], f["array_len"]) for f in found] == [("struct", 2), ("nullptr", 3)]
    assert sum(f["size"] * f["array_len"] for f in found) == 11


def test_pointers_may_say_themselves_whether_they_are_none():
    description = of(vmstate.UInt8("n"), vmstate.PointerArray("p", POINT, "n", marked=True))
    state = {"n": 3, "p": [None, {"x": 1, "y": 2}, None]}
    payload = save(description, state)
    assert payload == b"\x03" + b"0" + b"1\0\x01\0\x02" + b"0"
    assert description.load(payload) == state
    types = [f["type"] for f in described(description, state)[1:]]
    assert types == ["ptr-marker", "ptr-marker", "struct", "ptr-marker"]
    assert "0x32" in rejected(description, b"\x012").message


def test_pointers_to_numbers():
    description = of(vmstate.PointerArray("p", vmstate.UInt16, 2))
    assert save(description, {"p": [None, 5]}) == b"0\0\x05"
    assert description.load(b"0\0\x05", {"p": [None, 0]}) == {"p": [None, 5]}


# ---- one's own -------------------------------------------------------------------------------


class Fixed16(vmstate.Element):
    """A fraction of 16 bits."""

    type_name = "fixed16"

    def put(self, out, value, body):
        if not 0 <= value < 1:
            raise out.error(f"{value} is no fraction")
        out.put(round(value * 65536).to_bytes(2, "big"))

    def get(self, source, old, parent):
        return int.from_bytes(source.read(2), "big") / 65536


def test_an_element_of_one_s_own_alone_and_in_an_array():
    description = of(vmstate.Single("f", Fixed16()), vmstate.Array("a", Fixed16(), 2))
    state = {"f": 0.5, "a": [0.25, 0.0]}
    payload = save(description, state)
    assert payload == b"\x80\0\x40\0\0\0"
    assert description.load(payload) == state
    assert refused(description, {"f": 0.5, "a": [0, 2]}).field == "dev.a[1]"
    assert described(description, state) == [
        {"type": "fixed16", "size": 2},
        {"array_len": 2, "type": "fixed16", "size": 2},
    ]


def test_a_field_of_one_s_own():
    def load(state, reader):
        length = reader.u8("a length")
        if length > 3:
            raise ValueError("too long")
        state["s"] = reader.read(length, "a string").decode()

    description = of(
        vmstate.Custom(
            "s", "string", save=lambda s: bytes([len(s["s"])]) + s["s"].encode(), load=load
        )
    )
    assert save(description, {"s": "ab"}) == b"\x02ab"
    assert description.load(b"\x02ab") == {"s": "ab"}
    assert described(description, {"s": "ab"}) == [{"type": "string", "size": 3}]
    assert rejected(description, b"\x04abcd").message == "dev.s: too long"
    assert isinstance(rejected(description, b"\x02a"), TruncatedError)


# ---- the state -------------------------------------------------------------------------------


def test_a_field_may_be_called_otherwise_in_the_state():
    description = of(
        vmstate.UInt8("regs[0]", attribute="first"), vmstate.UInt8("deep", attribute="bus.address")
    )
    state = SimpleNamespace(first=1, bus=SimpleNamespace(address=2))
    assert save(description, state) == b"\x01\x02"
    description.load(b"\x05\x06", state)
    assert (state.first, state.bus.address) == (5, 6)
    nested = {"first": 1, "bus": {"address": 2}}
    assert description.load(b"\x07\x08", nested) == {"first": 7, "bus": {"address": 8}}
    assert "there is no bus" in rejected(description, b"\x05\x06").message


def test_what_is_filled_in_place_need_not_be_settable():
    class Device:
        def __init__(self) -> None:
            self._memory, self._words = bytearray(2), [0, 0]

        memory = property(lambda self: self._memory)
        words = property(lambda self: self._words)

    device = Device()
    of(vmstate.Buffer("memory", 2), vmstate.Array("words", vmstate.UInt8, 2)).load(
        b"ab\x01\x02", device
    )
    assert (device.memory, device.words) == (b"ab", [1, 2])


def test_a_state_may_refuse_a_value():
    class Even:
        @property
        def n(self) -> int:
            return 0

        @n.setter
        def n(self, value: int) -> None:
            if value % 2:
                raise ValueError("odd")

    description = of(vmstate.UInt8("n"))
    description.load(b"\x02", Even())
    assert rejected(description, b"\x03", Even()).message == (
        "dev.n: the state does not take 3: odd"
    )
    assert rejected(description, b"\x03", object())
