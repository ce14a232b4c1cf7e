"""Device state as values: every type, every nesting, and what is not as described."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.devicevalues import Made

from mig.errors import StreamError, TruncatedError
from mig.savevm import fields as fields_module
from mig.savevm.devices import DeviceSection
from mig.savevm.fields import Device, State, Value, decode_device
from mig.savevm.layout import MAX_NESTING, DeviceLayout, MachineLayout
from mig.savevm.vmdesc import DescriptionError

BASE = 1000


def section(payload: bytes, *, version: int = 1, idstr: str = "d") -> DeviceSection:
    return DeviceSection(7, idstr, 0, version, payload, 50)


def layout(text: str | dict[str, object]) -> MachineLayout:
    if not isinstance(text, str):
        text = json.dumps({"devices": [{"name": "d", "instance_id": 0, **text}]})
    return MachineLayout.parse(text.encode())


def decode(made: Made) -> Device:
    return decode_device(section(made.payload), layout(made.described()), base=BASE)


def plain(value: Value) -> object:
    """Values as those of `Made`."""
    if isinstance(value, State):
        out = {item.name: plain(item.value) for item in value.fields}
        return out | {sub.vmsd_name: plain(sub) for sub in value.subsections}
    return tuple(plain(v) for v in value) if isinstance(value, tuple) else value


LEAVES = [
    ("bool", b"\x01", True),
    ("bool", b"\x00", False),
    ("int8", b"\x80", -128),
    ("int16", b"\xff\xfe", -2),
    ("int32", b"\x80\0\0\0", -(1 << 31)),
    ("int32 equal", b"\xff\xff\xff\xff", -1),
    ("int32 le", b"\0\0\0\x05", 5),
    ("int64", b"\xff" * 8, -1),
    ("uint8", b"\xff", 255),
    ("uint8 equal", b"\x80", 128),
    ("uint16", b"\x12\x34", 0x1234),
    ("uint16 equal", b"\xff\xff", 0xFFFF),
    ("uint32", b"\xff" * 4, 0xFFFFFFFF),
    ("uint32 equal", b"\xff" * 4, 0xFFFFFFFF),
    ("uint64", b"\xff" * 8, (1 << 64) - 1),
    ("int64 equal", b"\xff" * 8, (1 << 64) - 1),
    ("float64", struct.pack(">d", -1.5), -1.5),
    ("CPU_Double_U", struct.pack(">d", 2.0**-1074), 2.0**-1074),
    ("timer", struct.pack(">Q", 12), 12),
    ("timer", b"\xff" * 8, None),
    ("nullptr", b"0", None),
    ("fd", b"\xff" * 4, -1),
    ("capability", b"\x03abc", "abc"),
    ("buffer", b"\x01\x02\x03", b"\x01\x02\x03"),
    ("buffer", b"", b""),
    ("unused_buffer", b"\0" * 5, b"\0" * 5),
    ("pci config", b"\x86\x80", b"\x86\x80"),
    ("bitmap", b"\0" * 7 + b"\x01" + b"\x80" + b"\0" * 7, (1, 1 << 63)),
    ("pci irq state", b"\0\0\0\x01" * 4, (1, 1, 1, 1)),
    ("fpreg", struct.pack(">QH", 1 << 63, 0x3FFF), 0x3FFF8000000000000000),
    ("something of its own", b"xyz", b"xyz"),
]


@pytest.mark.parametrize(("kind", "raw", "value"), LEAVES, ids=range(len(LEAVES)))
def test_every_type(kind, raw, value):
    device = decode(Made().add("x", kind, raw, value))
    assert device["x"] == value
    assert type(device["x"]) is type(value)
    assert device.state is not None
    (item,) = device.state.fields
    assert (item.name, item.type, item.offset, item.nbytes) == ("x", kind, 0, len(raw))


def test_a_double_may_be_no_number():
    value = decode(Made().add("x", "float64", struct.pack(">d", float("nan")), None))["x"]
    assert value != value


@pytest.mark.parametrize(("kind", "raw", "value"), LEAVES, ids=range(len(LEAVES)))
@pytest.mark.parametrize("count", [1, 3])
def test_arrays(kind, raw, value, count):
    made = Made().add("x", kind, raw * count, (value,) * count, array_len=count)
    if raw:
        assert decode(made)["x"] == (value,) * count
        assert decode(made)[f"x[{count - 1}]"] == value


def test_arrays_of_nothing():
    made = Made()
    made.fields.append({"name": "x", "type": "uint32", "array_len": 0, "size": 4})
    assert decode(made)["x"] == ()
    # however many there are of what has no bytes
    assert decode(Made().add("x", "buffer", b"", (), array_len=1 << 31))["x"] == ()


def test_elements_that_are_described_one_by_one_are_one_array():
    made = Made()
    for i in range(3):
        made.add("x", "uint8", bytes([i]), None, index=i)
    device = decode(made)
    assert device["x"] == (0, 1, 2)
    assert device.state is not None
    assert [(f.offset, f.nbytes) for f in device.state.fields] == [(0, 3)]


def test_pointers_of_which_some_are_null():
    made = Made()
    made.add("p", "nullptr", b"0", None, index=0)
    made.add("p", "uint16", b"\0\1", None, index=1)
    made.add("p", "nullptr", b"00", None, array_len=2)
    device = decode(made)
    assert device["p"] == (None, 1, None, None)
    assert device.state is not None
    assert device.state.fields[0].type == "uint16"


def test_structs_nest_and_paths_lead_into_them():
    inner = Made("inner").add("y.z", "uint8", b"\x07", 7).add("w[0]", "uint8", b"\x08", 8)
    made = Made().add("a", "uint8", b"\x01", 1).struct("a.s", inner)
    made.subsection(Made("d/sub").struct("t", inner))
    device = decode(made)
    assert plain(device.state) == made.values
    assert device["a.s.y.z"] == device["d/sub.t.y.z"] == 7
    assert device["a.s.w[0]"] == 8
    assert device.get("a.s.none", 5) == 5
    for path in ("", "b", "a.", "a[0]", "a.s.w[1]", "a.s[0]", "a.s.w[0]x", "d/sub.", "d/sub.u"):
        with pytest.raises(KeyError):
            device[path]


def test_an_array_of_structs():
    inner = Made("inner").add("y", "uint16", b"\x01\x02", 0x102)
    made = Made().add(
        "s", "struct", inner.payload * 2, None, array_len=2, struct=inner.described()
    )
    assert plain(decode(made)["s"]) == ({"y": 0x102},) * 2
    assert decode(made)["s[1].y"] == 0x102


@pytest.mark.parametrize("kind", ["tmp", "vstruct"])
def test_states_that_stand_in_the_entry_itself(kind):
    inner = Made("inner").add("y", "uint8", b"\x05", 5)
    made = Made().add("t", kind, inner.payload, None, **inner.described())
    assert decode(made)["t.y"] == 5


def repeated(entry: str, states: list[str]) -> MachineLayout:
    """A field whose state was written once for each element, as QEMU's JSON has it."""
    body = ", ".join(states)
    field = f'{{{entry}{", " if states else ""}{body}}}'
    return layout(
        f'{{"devices": [{{"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, '
        f'"fields": [{field}]}}]}}'
    )


ELEMENT = '"vmsd_name": "e", "version": 1, "fields": [{"name": "v", "type": "uint8", "size": 1}]'
KEY = '"vmsd_name": "k", "version": 1, "fields": [{"name": "n", "type": "uint8", "size": 1}]'


@pytest.mark.parametrize("kind", ["qtailq", "qlist"])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_lists(kind, count):
    payload = b"".join(b"\x01" + bytes([i]) for i in range(count)) + b"\0"
    entry = f'"name": "q", "type": "{kind}", "size": {len(payload)}'
    device = decode_device(section(payload), repeated(entry, [ELEMENT] * count))
    if count:
        assert plain(device["q"]) == tuple({"v": i} for i in range(count))
    else:
        # nothing says what would be in it
        assert device["q"] == b"\0"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("direct", [True, False])
def test_trees(count, direct):
    payload = struct.pack(">I", count)
    for i in range(count):
        payload += b"\x01" + (struct.pack(">Q", i) if direct else bytes([i])) + bytes([100 + i])
    payload += b"\0"
    entry = f'"name": "t", "type": "gtree", "size": {len(payload)}'
    states = [ELEMENT] * count if direct else [KEY, ELEMENT] * count
    device = decode_device(section(payload), repeated(entry, states))
    assert plain(device["t"]) == tuple(
        (i if direct else {"n": i}, {"v": 100 + i}) for i in range(count)
    )


def test_an_old_style_device_is_one_buffer_of_any_version():
    old = {"size": 3, "fields": [{"name": "data", "size": 3, "type": "buffer"}]}
    described = layout(old)
    assert decode_device(section(b"abc", version=9), described)["data"] == b"abc"
    device = described.device("d", 0)
    assert isinstance(device, DeviceLayout)
    assert device.old_style


def test_a_device_that_is_not_described_has_no_values():
    device = decode_device(section(b"abc"), MachineLayout(()))
    assert device.state is None
    assert device.get("x") is None
    with pytest.raises(KeyError):
        device["x"]


def test_a_configuration_is_described_too():
    found = MachineLayout.parse(
        b'{"devices": [], "page_size": 4096, "configuration": {"vmsd_name": "configuration",'
        b' "version": 1, "fields": [{"name": "len", "type": "uint32", "size": 4}]}}'
    )
    assert found.page_size == 4096
    assert found.configuration is not None
    state = fields_module.decode_state(found.configuration, b"\0\0\0\2pc", section="configuration")
    assert state["len"] == 2


# ---- not as described ------------------------------------------------------------------------


def wrong(made: Made, payload: bytes, offset: int, match: str = "") -> None:
    with pytest.raises(StreamError, match=match) as info:
        decode_device(section(payload), layout(made.described()), base=BASE)
    start = BASE + 50 + 1 + 4 + 1 + 1 + 8
    assert info.value.offset == start + offset
    assert info.value.section == "d"


def test_errors_name_the_place():
    two = Made().add("a", "uint8", b"\1", 1).add("b", "uint32", b"\0\0\0\1", 1)
    wrong(two, b"\1\0\0", 1, "ends inside 'b'")
    wrong(two, two.payload + b"xy", 5, "2 bytes that nothing describes")
    wrong(Made().add("a", "bool", b"\1", True), b"\2", 0, "no bool")
    wrong(Made().add("a", "nullptr", b"0", None), b"\0", 0, "null pointer")
    wrong(Made().add("a", "capability", b"\1a", "a"), b"\2a", 0, "counted")
    sub = Made().subsection(Made("d/s").add("a", "uint8", b"\1", 1))
    wrong(sub, b"\x06" + sub.payload[1:], 0, "subsection 'd/s' is described, but is not here")
    wrong(sub, sub.payload.replace(b"d/s", b"d/t"), 0, "subsection 'd/s'")
    wrong(sub, sub.payload.replace(b"\0\0\0\1", b"\0\0\0\2"), 0, "of version 2")
    wrong(sub, sub.payload[:6], 5, "ends inside subsection")


def test_a_size_that_the_type_does_not_have():
    wrong(Made().add("a", "uint32", b"\0\0", 0), b"\0\0", 0, "uint32 has 2 bytes")
    inner = Made("i").add("x", "uint8", b"\1", 1)
    made = Made().add("s", "struct", b"\1\2", None, struct=inner.described())
    wrong(made, b"\1\2", 0, "'s' has 1 bytes, where the description says 2")


def test_a_version_that_is_not_the_described_one():
    with pytest.raises(StreamError, match="version 2, where the description says 1"):
        decode_device(section(b"", version=2), layout(Made().described()))


def test_values_are_limited(monkeypatch):
    monkeypatch.setattr(fields_module, "MAX_VALUES", 100)
    assert len(decode(Made().add("x", "uint8", bytes(100), None, array_len=100))["x"]) == 100
    for kind, nbytes in (("uint8", 101), ("bool", 101), ("bitmap", 800)):
        more = {} if kind == "bitmap" else {"array_len": nbytes}
        wrong_made = Made().add("x", kind, bytes(nbytes), None, **more)
        with pytest.raises(StreamError, match="more than 100 values"):
            decode(wrong_made)
    # many structs of nothing
    inner = Made("i").add("y", "buffer", b"", b"")
    made = Made().add("s", "struct", b"", None, array_len=1 << 31, struct=inner.described())
    assert decode(made)["s"] == ()


def test_a_field_that_is_longer_than_any_payload_is_not_allocated():
    device = {"vmsd_name": "d", "version": 1}
    for size in ({"size": 1 << 32}, {"size": 8, "array_len": 1 << 32}):
        fields = [{"name": "x", "type": "uint64" if "array_len" in size else "buffer", **size}]
        with pytest.raises(TruncatedError):
            decode_device(section(b"abc"), layout({**device, "fields": fields}))


def nested(depth: int) -> dict[str, object]:
    state: dict[str, object] = {"vmsd_name": "s", "version": 1, "fields": []}
    for _ in range(depth):
        field = {"name": "s", "type": "struct", "size": 0, "struct": state}
        state = {"vmsd_name": "s", "version": 1, "fields": [field]}
    return state


def test_nesting_is_limited():
    assert decode_device(section(b""), layout(nested(MAX_NESTING))).state is not None
    for depth in (MAX_NESTING + 1, 200):
        with pytest.raises(DescriptionError, match="nested"):
            layout(nested(depth))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"devices": 1}',
        '{"devices": [1]}',
        '{"devices": [{"name": 1, "instance_id": 0}]}',
        '{"devices": [{"name": "d", "instance_id": "0"}]}',
        '{"devices": [{"name": "d", "instance_id": true}]}',
        '{"devices": [{"name": "d", "instance_id": 1e3}]}',
        '{"devices": [{"name": "d", "instance_id": 0, "fields": 1}]}',
        '{"devices": [{"name": "d", "instance_id": 0, "fields": {"a": 1}}]}',
        '{"devices": [{"name": "d", "instance_id": 0, "fields": [{"name": "x"}]}]}',
        '{"devices": [{"name": "d", "instance_id": 0, "fields": [{"name": "x", "size": -1}]}]}',
        '{"devices": [{"name": "d", "instance_id": 0, "fields": [{"name": "x", "size": 4294967297}]'
        "}]}",
        '{"devices": [{"name": "d", "instance_id": 0, "fields": [{"name": "x", "size": 1, '
        '"struct": 1}]}]}',
        '{"devices": [], "page_size": "1"}',
        '{"devices": [], "configuration": 1}',
        '{"devices": ' + "[" * 100_000,
        '{"devices": ' * 50_000,
    ],
    ids=range(21),
)
def test_what_is_no_description_is_refused(text):
    with pytest.raises(DescriptionError):
        MachineLayout.parse(text.encode())


STATE_KEYS = ["devices", "name", "instance_id", "vmsd_name", "version", "fields"]
STATE_KEYS += ["subsections", "size", "type", "array_len", "index", "struct"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(STATE_KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
KINDS = sorted({kind for kind, _, _ in LEAVES} | {"struct", "tmp", "qtailq", "gtree"})


@st.composite
def states(draw: st.DrawFn, depth: int = 2) -> dict[str, object]:
    entries = []
    for _ in range(draw(st.integers(0, 3))):
        entry: dict[str, object] = {"name": draw(st.sampled_from("abc"))}
        entry["type"] = draw(st.sampled_from(KINDS))
        entry["size"] = draw(st.integers(0, 9))
        if draw(st.booleans()):
            entry["array_len"] = draw(st.integers(0, 4))
        if depth and draw(st.booleans()):
            entry["struct"] = draw(states(depth - 1))
        entries.append(entry)
    out: dict[str, object] = {"vmsd_name": "d", "version": 1, "fields": entries}
    if depth and draw(st.booleans()):
        out["subsections"] = [draw(states(depth - 1))]
    return out


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_json_is_a_description_or_refused(value):
    with contextlib.suppress(DescriptionError):
        MachineLayout.parse(json.dumps(value).encode())


@settings(max_examples=300, deadline=None)
@given(states(), st.binary(max_size=40))
def test_any_payload_is_decoded_or_refused(state, payload):
    with contextlib.suppress(StreamError):
        decode_device(section(payload), layout(state))


@st.composite
def made_states(draw: st.DrawFn, depth: int = 2) -> Made:
    made = Made(draw(st.sampled_from(["d", "d/e"])), draw(st.integers(0, 9)))
    for i in range(draw(st.integers(0, 4))):
        kind, raw, value = draw(st.sampled_from(LEAVES))
        if depth and draw(st.booleans()):
            made.struct(f"f{i}", draw(made_states(depth - 1)))
        elif raw and draw(st.booleans()):
            n = draw(st.integers(1, 3))
            made.add(f"f{i}", kind, raw * n, (value,) * n, array_len=n)
        else:
            made.add(f"f{i}", kind, raw, value)
    if depth and draw(st.booleans()):
        made.subsection(draw(made_states(depth - 1)))
    return made


@settings(max_examples=200, deadline=None)
@given(made_states())
def test_what_is_made_is_decoded(made):
    found = decode_device(
        section(made.payload, version=made.version), layout(made.described())
    ).state
    assert plain(found) == made.values
