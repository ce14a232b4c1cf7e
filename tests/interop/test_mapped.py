"""mapped-ram with a real QEMU: files it wrote are opened and sent on, those of mig it resumes."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mig
from mig.wire import MAPPED_RAM_ALIGNMENT

#: capabilities besides, parameters, and where in the file the stream starts
WRITTEN = [
    pytest.param((), {}, 0, id="plain"),
    pytest.param(("multifd",), {"multifd-channels": 2}, 0, id="multifd"),
    pytest.param(("multifd",), {"multifd-channels": 2, "direct-io": True}, 0, id="direct"),
    pytest.param((), {}, 5000, id="offset"),
    pytest.param(
        ("multifd",), {"multifd-channels": 3, "zero-page-detection": "legacy"}, 4096, id="all"
    ),
]


def uri_of(path: str, offset: int = 0) -> str:
    return f"file:{path}" + (f",offset={offset}" if offset else "")


def written(source, uri, capabilities=(), parameters=None):
    """Have a QEMU migrate its running guest into a mapped-ram file."""
    source.set_capabilities(dict.fromkeys(("mapped-ram", *capabilities), True))
    source.set_parameters({"max-bandwidth": 0, **(parameters or {})})
    source.migrate(uri)
    assert source.wait_migration()["status"] == "completed"


def resumed(lab, spec, uri, capabilities=(), parameters=None):
    """Have a QEMU load a mapped-ram file; returns it."""
    destination = lab.incoming("10.0", spec)
    destination.set_capabilities(dict.fromkeys(("mapped-ram", *capabilities), True))
    destination.set_parameters(parameters or {})
    destination.migrate_incoming(uri)
    return destination


def options(capabilities, parameters):
    named = [word for name in ("mapped-ram", *capabilities) for word in ("-c", name)]
    values = {k: ("on" if v is True else v) for k, v in parameters.items()}
    return [*named, *(word for k, v in values.items() for word in ("-p", f"{k}={v}"))]


def converted(lab, file, uri, capabilities=(), parameters=None):
    """Have ``mig send`` write a mapped-ram file."""
    command = lab.mig("send", file, uri, "--json", *options(capabilities, parameters or {}))
    assert command.result()["status"] == "completed"


@pytest.mark.parametrize(("capabilities", "parameters", "offset"), WRITTEN)
def test_a_file_of_qemu_s_is_opened_and_sent_on(
    lab, assert_goes_on, capabilities, parameters, offset
):
    spec = lab.spec("q35", "dirty")
    first = lab.boot("10.0", spec)
    uri = uri_of(lab.path("vm"), offset)
    written(first, uri, capabilities, parameters)
    with mig.open_image(uri) as image:
        assert isinstance(image, mig.MappedImage)
        assert image.machine.startswith("pc-q35-")
        blocks = {b.idstr: b for b in image.blocks}
        assert blocks["pc.ram"].used_length == spec.memory_bytes
        # what the guest has filled is there, and much is not
        assert blocks["pc.ram"].data > spec.fill_mib * 256
        assert blocks["pc.ram"].zero > 1000
        assert "timer" in {device.idstr for device in image.devices}
    second = lab.incoming("10.0", spec)
    out = f"unix:{lab.path('out')}"
    second.migrate_incoming(out)
    assert lab.mig("send", uri, out, "--json").result()["status"] == "completed"
    assert_goes_on(first, second)


def test_a_file_of_qemu_s_runs_at_once(lab, assert_goes_on):
    spec = lab.spec("q35", "dirty")
    first = lab.boot("10.0", spec)
    file = lab.path("vm")
    written(first, f"file:{file}")
    second = lab.incoming("10.0", spec)
    second.set_capabilities({"postcopy-ram": True})
    out = f"unix:{lab.path('out')}"
    second.migrate_incoming(out)
    command = lab.mig("send", file, out, "--postcopy", "--json")
    assert command.result()["status"] == "completed"
    assert_goes_on(first, second)


@pytest.fixture(scope="module")
def captured(module_lab):
    """A guest that was stopped and its stream."""
    spec = module_lab.spec("q35", "dirty")
    source = module_lab.boot("10.0", spec)
    stream = module_lab.path("stream")
    module_lab.receive(source, stream, f"unix:{module_lab.path('in')}", return_path=True)
    return source, spec, stream


@pytest.mark.parametrize(("capabilities", "parameters", "offset"), WRITTEN)
def test_a_file_of_mig_s_is_resumed_by_qemu(
    lab, captured, assert_goes_on, capabilities, parameters, offset
):
    """A stream becomes a mapped-ram file."""
    source, spec, stream = captured
    uri = uri_of(lab.path("vm"), offset)
    converted(lab, stream, uri, capabilities, parameters)
    assert_same_pages(stream, uri)
    loaded = {k: v for k, v in parameters.items() if k != "zero-page-detection"}
    second = resumed(lab, spec, uri, capabilities, loaded)
    assert_goes_on(source, second)


def assert_same_pages(file: str, other_file: str) -> None:
    with mig.open_image(file) as one, mig.open_image(other_file) as other:
        for idstr, pages in one.pages.items():
            theirs = other.pages[idstr]
            assert pages.shape == theirs.shape
            for first in range(0, len(pages), 1024):
                part = slice(first, first + 1024)
                assert np.array_equal(pages[part], theirs[part])
            del pages, theirs


def test_a_file_of_qemu_s_is_copied_as_qemu_would_write_it(lab, assert_goes_on):
    """Of the same guest mig makes a file of the same layout, and QEMU goes on from it."""
    spec = lab.spec("pc", "dirty")
    first = lab.boot("10.0", spec)
    theirs, mine = lab.path("theirs"), lab.path("mine")
    written(first, f"file:{theirs}")
    converted(lab, theirs, f"file:{mine}", ("multifd",))
    with mig.open_image(theirs) as one, mig.open_image(mine) as other:
        assert one._contents.blocks == other._contents.blocks
        assert all(b.mapped.pages_offset % MAPPED_RAM_ALIGNMENT == 0 for b in one._contents.blocks)
        assert one.blocks == other.blocks
        assert one.device_state.raw == other.device_state.raw
    second = resumed(lab, spec, f"file:{mine}")
    assert_goes_on(first, second)


def test_what_mig_info_says_of_a_file_of_qemu_s(lab):
    first = lab.boot("10.0", lab.spec("pc"))
    file = lab.path("vm")
    written(first, f"file:{file}")
    command = lab.mig("info", file, "--json")
    assert command.finish() == 0
    said = json.loads(command.stdout.splitlines()[-1])
    assert (said["format"], said["page-size"]) == ("mapped-ram", 4096)
    assert {b["name"] for b in said["blocks"]} >= {"pc.ram", "pc.bios"}
    assert all(b["missing-pages"] == 0 for b in said["blocks"])


@pytest.mark.parametrize("capability", ["xbzrle", "postcopy-ram"])
def test_qemu_refuses_what_the_rules_refuse(lab, capability):
    qemu = lab.start("10.0", lab.spec("pc"))
    with pytest.raises(Exception, match="Mapped-ram migration is incompatible with"):
        qemu.set_capabilities({"mapped-ram": True, capability: True})
    with pytest.raises(mig.errors.OptionError, match="Mapped-ram migration is incompatible with"):
        mig.OutgoingMigration(None, capabilities={"mapped-ram", capability})


def test_qemu_wants_a_file_too(lab):
    qemu = lab.boot("10.0", lab.spec("pc"))
    qemu.set_capabilities({"mapped-ram": True})
    with pytest.raises(Exception, match="requires seekable transport"):
        qemu.migrate(f"unix:{lab.path('none')}")
