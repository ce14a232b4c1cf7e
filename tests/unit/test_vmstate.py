"""VMState: versions, conditions, subsections, hooks, and how it is all described."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mig import vmstate
from mig.errors import DeviceStateError, MismatchError, StreamError, TruncatedError
from mig.savevm.vmstate import Description


def u8(*names: str, **options: Any) -> list[vmstate.Field]:
    return [vmstate.UInt8(name, **options) for name in names]


def rejected(description: Description, payload: bytes, version: int | None = None) -> StreamError:
    with pytest.raises(StreamError) as caught:
        description.load(payload, version_id=version)
    return caught.value


def fields_of(description: Description, state: Any, **options: Any) -> list[dict[str, Any]]:
    fields = json.loads(description.save(state, **options)[1].text())["fields"]
    assert isinstance(fields, list)
    return fields


# ---- versions --------------------------------------------------------------------------------

V3 = Description(
    "dev",
    version=3,
    minimum_version=1,
    fields=[*u8("a"), *u8("b", since=2), vmstate.Unused(1, since=3), *u8("c", since=3)],
)


def test_an_older_version_lacks_what_is_newer():
    state = {"a": 1, "b": 2, "c": 3}
    payload, body = V3.save(state)
    assert payload == b"\x01\x02\0\x03"
    assert json.loads(body.text())["version"] == 3
    assert V3.load(payload) == state
    assert V3.load(b"\x01\x02", {"b": 9, "c": 9}, 2) == {"a": 1, "b": 2, "c": 9}
    assert V3.load(b"\x01", version_id=1) == {"a": 1}


def test_what_is_too_new_or_too_old_is_refused_in_qemu_s_words():
    error = rejected(V3, b"\x01\x02\0\x03", 4)
    assert isinstance(error, MismatchError)
    assert error.message == "dev: incoming version_id 4 is too new for local version_id 3"
    assert rejected(V3, b"", 0).message == (
        "dev: incoming version_id 0 is too old for local minimum version_id 1"
    )
    only = Description("dev", version=3, fields=u8("a"))
    assert "minimum version_id 3" in rejected(only, b"\x01", 2).message


def test_versions_below_the_minimum_may_have_a_loader_of_their_own():
    def load_old(state, reader, version_id):
        if version_id == 1:
            raise ValueError("version 1 was broken")
        state["a"] = reader.u16("the old a") >> 8

    description = Description(
        "dev",
        version=5,
        minimum_version=4,
        fields=u8("a"),
        minimum_version_old=1,
        load_old=load_old,
    )
    assert description.load(b"\x05\xff", version_id=3) == {"a": 5}
    assert description.load(b"\x05", version_id=4) == {"a": 5}
    assert rejected(description, b"", 1).message == "dev: load_old failed: version 1 was broken"
    assert "minimum version_id 1" in rejected(description, b"", 0).message
    assert isinstance(rejected(description, b"\x05", 3), TruncatedError)
    assert "1 bytes too many" in rejected(description, b"\x05\xff\xff", 3).message
    with pytest.raises(ValueError, match="goes with"):
        Description("dev", minimum_version_old=1)


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "ä"},
        {"name": "x" * 256},
        {"version": 1, "minimum_version": 2},
        {"version": -1},
        {"version": 1 << 32},
        {"subsections": [Description("other/sub")]},
        {"subsections": [Description("dev/sub"), Description("dev/sub")]},
    ],
)
def test_a_description_that_cannot_be(options):
    with pytest.raises(ValueError, match=r"name|version"):
        Description(**{"name": "dev", **options})


# ---- conditions ------------------------------------------------------------------------------


def test_a_predicate_alone_decides():
    description = Description(
        "dev",
        version=2,
        minimum_version=0,
        fields=[
            *u8("kind"),
            *u8("extra", when=lambda state, version: state["kind"] == 7),
            *u8("old", when=lambda state, version: version < 2),
        ],
    )
    assert description.save({"kind": 7, "extra": 1})[0] == b"\x07\x01"
    assert description.save({"kind": 6})[0] == b"\x06"
    # the state is what was loaded so far
    assert description.load(b"\x07\x01") == {"kind": 7, "extra": 1}
    assert description.load(b"\x07\x01\x02", version_id=1) == {"kind": 7, "extra": 1, "old": 2}
    with pytest.raises(ValueError, match="alone decides"):
        vmstate.UInt8("x", since=2, when=lambda *_: True)


def test_validation_is_of_what_is_there_so_far():
    description = Description(
        "dev",
        fields=[
            *u8("n"),
            vmstate.Validate("n is small", lambda state, version: state["n"] < 4),
            vmstate.Array("a", vmstate.UInt8, "n"),
        ],
    )
    assert description.load(b"\x01\x05") == {"n": 1, "a": [5]}
    assert rejected(description, b"\x04").message == (
        "dev: Input validation failed: dev/n is small"
    )
    with pytest.raises(DeviceStateError, match="Output state validation failed: dev/n is small"):
        description.save({"n": 4, "a": [0] * 4})
    assert [f["name"] for f in fields_of(description, {"n": 0, "a": []})] == ["n"]


# ---- subsections -----------------------------------------------------------------------------

EXTRA = Description(
    "dev/extra",
    version=2,
    minimum_version=1,
    needed=lambda state: state.get("extra") is not None,
    fields=[*u8("extra"), *u8("more", since=2)],
    subsections=[
        Description("dev/extra/deep", needed=lambda state: "deep" in state, fields=u8("deep"))
    ],
)
OTHER = Description("dev/other", needed=lambda state: "other" in state, fields=u8("other"))
WITH_SUBSECTIONS = Description("dev", fields=u8("a"), subsections=[EXTRA, OTHER])
_EXTRA = b"\x05\x09dev/extra\0\0\0\x02\x07\x08"
_DEEP = b"\x05\x0edev/extra/deep\0\0\0\x01\x01"
_OTHER = b"\x05\x09dev/other\0\0\0\x01\x03"


@pytest.mark.parametrize(
    ("state", "payload"),
    [
        ({"a": 1}, b"\x01"),
        ({"a": 1, "extra": 7, "more": 8}, b"\x01" + _EXTRA),
        ({"a": 1, "other": 3}, b"\x01" + _OTHER),
        ({"a": 1, "extra": 7, "more": 8, "other": 3}, b"\x01" + _EXTRA + _OTHER),
        ({"a": 1, "extra": 7, "more": 8, "deep": 1}, b"\x01" + _EXTRA + _DEEP),
    ],
)
def test_subsections_are_sent_where_they_are_needed(state, payload):
    assert WITH_SUBSECTIONS.save(state)[0] == payload
    assert WITH_SUBSECTIONS.load(payload) == state


def test_subsections_are_described_where_there_are_any():
    text = WITH_SUBSECTIONS.save({"a": 1})[1].text()
    assert "subsections" not in text
    said = json.loads(WITH_SUBSECTIONS.save({"a": 1, "other": 3})[1].text())
    assert said["subsections"] == [
        {
            "vmsd_name": "dev/other",
            "version": 1,
            "fields": [{"name": "other", "type": "uint8", "size": 1}],
        }
    ]


def test_subsections_may_come_in_any_order():
    assert WITH_SUBSECTIONS.load(b"\x01" + _OTHER + _EXTRA)["other"] == 3


def test_an_older_subsection_is_loaded_and_a_newer_one_refused():
    assert WITH_SUBSECTIONS.load(b"\x01\x05\x09dev/extra\0\0\0\x01\x07") == {"a": 1, "extra": 7}
    error = rejected(WITH_SUBSECTIONS, b"\x01\x05\x09dev/extra\0\0\0\x03\x07\x08")
    assert error.message == "dev/extra: incoming version_id 3 is too new for local version_id 2"


def test_a_subsection_that_nobody_knows_is_refused():
    error = rejected(WITH_SUBSECTIONS, b"\x01\x05\x07dev/new\0\0\0\x01\x07")
    assert error.message == "dev: VM subsection 'dev/new' in 'dev' does not exist"
    assert error.offset == 1
    assert "too many" in rejected(WITH_SUBSECTIONS, b"\x01\x05\x07abc/new\0\0\0\x01\x07").message
    # bytes that are none of the printable
    binary = b"\x01\x05\x06dev/\xff\0\0\0\0\x01"
    assert "does not exist" in rejected(WITH_SUBSECTIONS, binary).message


def test_a_struct_leaves_the_subsections_of_its_owner():
    inner = Description("inner", fields=u8("i"))
    description = Description("dev", fields=[vmstate.Struct("s", inner)], subsections=[OTHER])
    state = {"s": {"i": 1}, "other": 3}
    assert description.load(description.save(state)[0]) == state


def test_a_struct_has_subsections_of_its_own():
    description = Description("dev", fields=[vmstate.Array("s", WITH_SUBSECTIONS, 2)])
    state = {"s": [{"a": 1, "other": 3}, {"a": 2}]}
    payload, body = description.save(state)
    assert payload == b"\x01" + _OTHER + b"\x02"
    assert description.load(payload) == state
    # QEMU does not take such elements for alike
    assert "array_len" not in body.text()


def test_errors_name_the_field_of_a_subsection():
    with pytest.raises(DeviceStateError) as caught:
        WITH_SUBSECTIONS.save({"a": 1, "extra": 7, "more": 8, "deep": 256})
    assert caught.value.field == "dev/extra/deep.deep"
    error = rejected(WITH_SUBSECTIONS, b"\x01" + _EXTRA[:-1])
    assert error.message.startswith("dev/extra.more:")


# ---- hooks -----------------------------------------------------------------------------------


class Traced:
    """A state that notes what is done to it."""

    def __init__(self) -> None:
        self.a = 1
        self.calls: list[str] = []

    def note(self, name: str) -> Any:
        return lambda *_: self.calls.append(name)


def hooked(name: str, state: Traced, **options: Any) -> Description:
    return Description(
        name,
        pre_save=state.note(f"{name} pre_save"),
        post_save=state.note(f"{name} post_save"),
        pre_load=state.note(f"{name} pre_load"),
        post_load=lambda s, version: s.calls.append(f"{name} post_load {version}"),
        **options,
    )


def test_hooks_are_called_around_fields_and_subsections():
    state = Traced()
    sub = hooked("dev/sub", state)
    description = hooked("dev", state, fields=u8("a"), subsections=[sub], version=2)
    payload = description.save(state)[0]
    assert state.calls == ["dev pre_save", "dev/sub pre_save", "dev/sub post_save", "dev post_save"]
    state.calls.clear()
    description.load(payload, state)
    assert state.calls == [
        "dev pre_load",
        "dev/sub pre_load",
        "dev/sub post_load 1",
        "dev post_load 2",
    ]


def test_post_save_is_called_also_when_a_field_cannot_be_saved():
    state = Traced()
    description = hooked("dev", state, fields=u8("a"))
    state.a = -1
    with pytest.raises(DeviceStateError):
        description.save(state)
    assert state.calls == ["dev pre_save", "dev post_save"]


def test_a_hook_may_refuse():
    def refuse(*_: object) -> None:
        raise ValueError("not now")

    def mismatch(*_: object) -> None:
        raise MismatchError("not this one")

    with pytest.raises(DeviceStateError, match="dev: pre_save failed: not now"):
        Description("dev", pre_save=refuse).save({})
    error = rejected(Description("dev", fields=u8("a"), post_load=refuse), b"\x01")
    assert error.message == "dev: post_load failed: not now"
    assert (error.offset, error.section) == (1, "dev")
    error = rejected(Description("dev", pre_load=mismatch), b"")
    assert error.message == "dev: pre_load failed: not this one"
    assert error.offset == 0


def test_a_mistake_in_a_hook_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        Description("dev", post_load=lambda state, version: 1 / 0).load(b"")


# ---- the description -------------------------------------------------------------------------


def test_a_name_that_comes_again_is_numbered():
    fields = [*u8("x"), vmstate.Unused(1), vmstate.Unused(2), *u8("x", when=lambda *_: False)]
    names = [f["name"] for f in fields_of(Description("dev", fields=fields), {"x": 1})]
    assert names == ["x[0]", "unused[0]", "unused[1]"]


def test_an_array_of_one_is_described_as_one():
    description = Description("dev", fields=[vmstate.Array("a", vmstate.UInt8, 1)])
    assert fields_of(description, {"a": [1]}) == [{"name": "a", "type": "uint8", "size": 1}]


def test_an_empty_array_is_not_described():
    description = Description("dev", fields=[*u8("n"), vmstate.Array("a", vmstate.UInt8, "n")])
    assert len(fields_of(description, {"n": 0, "a": []})) == 1
    assert description.save({"n": 0, "a": []})[0] == b"\0"


@pytest.mark.parametrize(("dialect", "numbers"), [((7, 2), [0, 1, 2]), ((10, 0), [0, 1, None])])
def test_elements_that_may_differ_are_described_one_by_one(dialect, numbers):
    element = Description("e", fields=u8("v", when=lambda state, version: state["v"]))
    description = Description("dev", fields=[vmstate.Array("a", element, 3)])
    state = {"a": [{"v": 1}, {"v": 0}, {"v": 2}]}
    found = fields_of(description, state, dialect=dialect)
    assert [f.get("index") for f in found] == numbers
    assert [f["size"] for f in found] == [1, 0, 1]


def test_a_conditional_array_is_described_one_by_one():
    field = vmstate.Array("a", vmstate.UInt8, 2, when=lambda *_: True)
    found = fields_of(Description("dev", fields=[field]), {"a": [1, 2]}, dialect=(7, 2))
    assert [(f["index"], f["size"]) for f in found] == [(0, 1), (1, 1)]


def test_alike_elements_of_other_lengths_are_described_one_by_one():
    element = Description("e", fields=[*u8("n"), vmstate.Array("v", vmstate.UInt8, "n")])
    description = Description("dev", fields=[vmstate.Array("a", element, 3)])
    state = {"a": [{"n": 1, "v": [0]}, {"n": 2, "v": [0, 0]}, {"n": 0, "v": []}]}
    payload, _ = description.save(state)
    assert sum(f["size"] for f in fields_of(description, state)) == len(payload)
    assert description.load(payload) == state


def test_a_name_with_quotes_is_json():
    text = Description("dev", fields=u8('"\\')).save({'"\\': 1})[1].text()
    assert json.loads(text)["fields"][0]["name"] == '"\\'


# ---- whatever comes --------------------------------------------------------------------------

POINT = Description("point", fields=[vmstate.Int16("x"), vmstate.Timer("t")])
EVERYTHING = Description(
    "dev",
    version=3,
    minimum_version=1,
    fields=[
        *u8("n"),
        vmstate.Array("words", vmstate.UInt32, "n", maximum=40),
        vmstate.Buffer("data", "n", times=3, maximum=200),
        vmstate.Bitmap("bits", "n"),
        vmstate.Bool("b", since=2),
        vmstate.Float64("f", when=lambda state, version: state["n"] > 2),
        vmstate.Struct("p", POINT),
        vmstate.Array("ps", POINT, "n"),
        vmstate.TailQueue("queue", POINT, maximum=5),
        vmstate.Tree("tree", POINT, maximum=5),
        vmstate.PointerArray("pointers", POINT, "n", marked=True),
        vmstate.Unused(2),
        vmstate.Array("rows", vmstate.Int8, (2, 2)),
    ],
    subsections=[
        Description("dev/sub", needed=lambda state: "s" in state, fields=[vmstate.UInt64("s")])
    ],
)
POINTS = st.fixed_dictionaries(
    {"x": st.integers(-(2**15), 2**15 - 1), "t": st.none() | st.integers(0, 2**64 - 2)}
)


@st.composite
def states(draw):
    n = draw(st.integers(0, 5))
    exactly = {"min_size": n, "max_size": n}
    state = {
        "n": n,
        "words": draw(st.lists(st.integers(0, 2**32 - 1), **exactly)),
        "data": draw(st.binary(min_size=3 * n, max_size=3 * n)),
        "bits": draw(st.integers(0, 2**n - 1)),
        "b": draw(st.booleans()),
        "p": draw(POINTS),
        "ps": draw(st.lists(POINTS, **exactly)),
        "queue": draw(st.lists(POINTS, max_size=4)),
        "tree": draw(st.dictionaries(st.integers(0, 2**64 - 1), POINTS, max_size=4)),
        "pointers": draw(st.lists(st.none() | POINTS, **exactly)),
        "rows": [draw(st.lists(st.integers(-128, 127), min_size=2, max_size=2)) for _ in "12"],
    }
    if n > 2:
        state["f"] = draw(st.floats(allow_nan=False))
    if draw(st.booleans()):
        state["s"] = draw(st.integers(0, 2**64 - 1))
    return state


def wire_bytes(said: dict[str, Any]) -> int:
    total = sum(f["size"] * f.get("array_len", 1) for f in said["fields"])
    return total + sum(
        6 + len(sub["vmsd_name"]) + wire_bytes(sub) for sub in said.get("subsections", ())
    )


def attempt(description: Description, payload: bytes) -> tuple[Any, StreamError | None]:
    try:
        return description.load(payload), None
    except StreamError as error:
        return None, error


QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(states())
def test_any_state_comes_back_and_its_description_adds_up(state):
    payload, body = EVERYTHING.save(state)
    assert EVERYTHING.load(payload) == state
    assert wire_bytes(json.loads(body.text())) == len(payload)


@QUICK
@given(states(), st.data())
def test_what_was_damaged_is_loaded_or_refused(state, data):
    payload = bytearray(EVERYTHING.save(state)[0])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    loaded, error = attempt(EVERYTHING, bytes(payload))
    if error is None:
        EVERYTHING.save(loaded)
        return
    assert error.section == "dev"
    assert error.offset is not None
    assert 0 <= error.offset <= len(payload)
    assert error.message.startswith("dev")


@QUICK
@given(states(), st.data())
def test_what_was_cut_off_is_refused(state, data):
    payload = EVERYTHING.save(state)[0]
    end = data.draw(st.integers(0, len(payload) - 1))
    loaded, error = attempt(EVERYTHING, payload[:end])
    if error is None:
        # the subsection may as well not be there
        assert payload[end:].startswith(b"\x05\x07dev/sub")
        assert "s" not in loaded


@pytest.mark.parametrize(
    ("field", "payload"),
    [
        (vmstate.Array("a", vmstate.UInt64, "n"), b"\xff\xff\xff\xff"),
        (vmstate.Array("a", POINT, "n"), b"\x00\x0f\xff\xff"),
        (vmstate.Array("a", Description("nothing"), "n"), b"\x7f\xff\xff\xff"),
        (vmstate.Buffer("a", "n"), b"\x0f\xff\xff\xff"),
        (vmstate.Buffer("a", "n", times=1 << 20), b"\x00\x00\xff\xff"),
        (vmstate.Bitmap("a", "n"), b"\xff\xff\xff\xff"),
        (vmstate.Unused(1000, count="n"), b"\xff\xff\xff\xff"),
        (vmstate.Tree("a", POINT), b"\0\0\0\0\xff\xff\xff\xff"),
        (vmstate.PointerArray("a", POINT, "n", marked=True), b"\xff\xff\xff\xff"),
    ],
)
def test_a_length_that_lies_allocates_nothing(field, payload):
    description = Description("dev", fields=[vmstate.UInt32("n"), field])
    tracemalloc.start()
    try:
        assert rejected(description, payload + bytes(64))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
