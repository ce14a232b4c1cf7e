"""A QEMU migrates into a mapped-ram file of mig's, from which another QEMU goes on."""

from __future__ import annotations

import pytest

FORMS = {
    "plain": ({}, {}),
    "xbzrle": ({"xbzrle": True}, {}),
    "multifd": ({"multifd": True}, {"multifd-channels": 3}),
    "zlib": ({"multifd": True}, {"multifd-compression": "zlib"}),
    "zstd": ({"multifd": True}, {"multifd-compression": "zstd"}),
}


def received(lab, source, file, capabilities, parameters, *more):
    """Have QEMU migrate into a mapped-ram file."""
    given = [word for name in capabilities for word in ("-c", name)]
    given += [word for k, v in parameters.items() for word in ("-p", f"{k}={v}")]
    command = lab.mig(
        "receive", f"unix:{lab.path('in')}", file, "--json", *given, *more
    )
    source.set_capabilities({"return-path": True, **capabilities})
    source.set_parameters({"max-bandwidth": 0, **parameters})
    source.migrate(command.wait_listening())
    result = command.result()
    assert source.wait_migration()["status"] == "completed"
    return result


def resumed(lab, spec, file):
    """Return a QEMU that goes on from the file."""
    qemu = lab.incoming("10.0", spec)
    qemu.set_capabilities({"mapped-ram": True})
    qemu.migrate_incoming(f"file:{file}")
    return qemu


@pytest.mark.parametrize(
    ("form", "direct"), [*((form, "on") for form in FORMS), ("plain", "off"), ("multifd", "off")]
)
def test_a_guest_that_writes_is_kept(lab, assert_goes_on, form, direct):
    spec = lab.spec("q35", "dirty")
    first = lab.boot("10.0", spec)
    file = lab.path("vm.mig")
    received(lab, first, file, *FORMS[form], "-p", f"direct-io={direct}")
    assert_goes_on(first, resumed(lab, spec, file))
