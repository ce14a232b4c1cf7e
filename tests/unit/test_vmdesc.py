"""The machine description: sizes of devices in wire bytes."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import stream

from mig.savevm.vmdesc import (
    Description,
    DescriptionError,
    DeviceDescription,
    encode_description,
)


def parse(devices: list[object], **more: object) -> Description:
    return Description.parse(json.dumps({"devices": devices, **more}).encode())


def device(**more: object) -> dict[str, object]:
    return {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, **more}


def size_of(**more: object) -> int:
    return parse([device(**more)]).devices[0].nbytes


def test_fields_add_up():
    fields = [{"name": "a", "type": "uint32", "size": 4}, {"name": "b", "type": "bool", "size": 1}]
    assert size_of(fields=fields) == 5


def test_an_array_is_described_once():
    assert size_of(fields=[{"name": "a", "array_len": 7, "type": "uint16", "size": 2}]) == 14
    assert size_of(fields=[{"name": "a", "array_len": 0, "type": "uint16", "size": 2}]) == 0


def test_elements_with_an_index_are_described_one_by_one():
    fields = [{"name": "a", "index": i, "type": "uint16", "size": 2} for i in range(3)]
    assert size_of(fields=fields) == 6


def test_the_size_of_a_struct_is_that_of_its_field_not_of_what_is_in_it():
    inner = {"vmsd_name": "s", "version": 1, "fields": [{"name": "x", "type": "u8", "size": 1}]}
    fields = [{"name": "s", "type": "struct", "struct": inner, "size": 1, "array_len": 3}]
    assert size_of(fields=fields) == 3


def test_subsections_have_a_head_of_their_own_and_nest():
    innermost = {"vmsd_name": "d/a/b", "version": 1, "fields": [{"name": "x", "size": 8}]}
    inner = {
        "vmsd_name": "d/a",
        "version": 1,
        "fields": [{"name": "x", "size": 2}],
        "subsections": [innermost],
    }
    fields = [{"name": "x", "size": 1}]
    head = 1 + 1 + 4
    expected = 1 + (head + 3 + 2 + (head + 5 + 8))
    assert size_of(fields=fields, subsections=[inner]) == expected
    assert size_of(fields=fields, subsections=[inner, inner]) == 2 * expected - 1


def test_an_old_style_device_has_one_buffer():
    old = {"name": "d", "instance_id": 3, "size": 10}
    old["fields"] = [{"name": "data", "size": 10, "type": "buffer"}]
    assert parse([old]).devices == (DeviceDescription("d", 3, 0, 10),)


def test_a_device_without_fields_is_empty():
    assert size_of() == size_of(fields=[]) == 0


def test_devices_keep_their_order_and_names():
    found = parse([device(name="b", instance_id=2, version=9), device(name="a")], page_size=4096)
    assert found.page_size == 4096
    assert found.devices == (DeviceDescription("b", 2, 9, 0), DeviceDescription("a", 0, 1, 0))
    assert parse([]).page_size is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"devices"',
        b"{}",
        b'{"devices": 1}',
        b'{"devices": null}',
        b'{"devices": [1]}',
        b'{"devices": [{}]}',
        b'{"devices": [{"name": "d"}]}',
        b'{"devices": [{"name": "d", "instance_id": "x"}]}',
        b'{"devices": [{"name": "d", "instance_id": null}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": 1}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [1]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [{}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": "4"}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": -1}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": 1.5}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": NaN}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "fields": [{"size": 1, "array_len": -1}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "subsections": [{"fields": []}]}]}',
        b'{"devices": [{"name": "d", "instance_id": 0, "subsections": [{"vmsd_name": 1}]}]}',
        b'{"devices": [], "page_size": "4096"}',
        b'{"devices": [], "page_size": [1]}',
        b'\xff{"devices": []}',
        b'{"devices": []} x',
        b'{"devices": [{"name": "d", "instance_id": ' + b"1" * 5000 + b"}]}",
        b'{"devices": ' + b"[" * 200_000,
    ],
    ids=range(30),
)
def test_what_is_no_description_is_refused(text):
    with pytest.raises(DescriptionError):
        Description.parse(text)


@pytest.mark.parametrize("key", ["instance_id", "version"])
@pytest.mark.parametrize("value", ["1e999", "Infinity", "-Infinity", "NaN"])
def test_numbers_that_are_not_finite_are_refused(key, value):
    text = json.dumps({"devices": [device()]}).replace(
        f'"{key}": {device()[key]}', f'"{key}": {value}'
    )
    assert value in text
    with pytest.raises(DescriptionError):
        Description.parse(text.encode())


@pytest.mark.parametrize("depth", [10, 100_000])
def test_subsections_as_deep_as_they_like_are_added_up_or_refused(depth):
    open_, close = '{"vmsd_name": "s", "fields": [], "subsections": [', "]}"
    inner = open_ * depth + close * depth
    text = '{"devices": [{"name": "d", "instance_id": 0, "subsections": [' + inner + "]}]}"
    if depth == 10:
        assert Description.parse(text.encode()).devices[0].nbytes == 10 * 7
    else:
        with pytest.raises(DescriptionError):
            Description.parse(text.encode())


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    devices=st.lists(
        st.builds(
            DeviceDescription,
            NAMES,
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**31),
            st.integers(0, 2**30),
        ),
        max_size=8,
    ),
    page_size=st.sampled_from([1024, 4096, 65536]),
)
def test_descriptions_round_trip(devices, page_size):
    data = encode_description(devices, page_size)
    kind, length = struct.unpack_from(">BI", data)
    assert (kind, length) == (6, len(data) - 5)
    assert Description.parse(data[5:]) == Description(page_size, tuple(devices))
    assert b"\0" not in data[5:]
    assert b"\6" not in data[5:]


def test_the_oracle_s_description_is_read():
    made = [stream.Device("d", b"12345", 7, instance_id=2, version_id=3)]
    data = stream.description(made)
    assert Description.parse(data[5:]).devices == (DeviceDescription("d", 2, 3, 5),)
