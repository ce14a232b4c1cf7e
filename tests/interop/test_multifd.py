"""multifd with QEMU at the other end, in both directions."""

from __future__ import annotations

import pytest

import mig

#: source's and destination's QEMU, and the machine type both have
PAIRS = [("7.2", "7.2", "pc"), ("10.0", "10.0", "q35")]
COMPRESSIONS = ["none", "zlib", "zstd"]
#: each source and each destination of PAIRS has had them all: here it is who meets whom
CASES = [(*pair, compression) for pair in PAIRS for compression in COMPRESSIONS]
CASES += [("7.2", "10.0", "pc-i440fx-7.2", "none"), ("10.0", "7.2", "pc-q35-7.2", "zstd")]


def options(parameters, return_path=True):
    """Options of ``mig`` for a migration by multifd."""
    capabilities = ["multifd", *(["return-path"] if return_path else [])]
    named = [word for name in capabilities for word in ("-c", name)]
    return [*named, *(word for k, v in parameters.items() for word in ("-p", f"{k}={v}"))]


def received(lab, source, file, uri, parameters, *, return_path=True):
    """Have QEMU migrate into ``mig receive``; returns what that prints."""
    given = [word for k, v in parameters.items() for word in ("-p", f"{k}={v}")]
    command = lab.mig("receive", uri, file, "--json", "-c", "multifd", *given)
    source.set_capabilities({"multifd": True, "return-path": return_path})
    source.set_parameters({"max-bandwidth": 0, **parameters})
    source.migrate(command.wait_listening())
    result = command.result()
    assert source.wait_migration()["status"] == "completed"
    return result


def sent(lab, version, spec, file, uri, parameters, *mine):
    """Have ``mig send`` migrate into a QEMU; returns the QEMU."""
    destination = lab.incoming(version, spec)
    destination.set_capabilities({"multifd": True})
    destination.set_parameters(parameters)
    destination.migrate_incoming(uri)
    command = lab.mig("send", file, uri, "--json", *options(parameters), *mine)
    assert command.result()["status"] == "completed"
    return destination


@pytest.mark.parametrize(("source", "destination", "machine", "compression"), CASES)
def test_there_and_back(lab, assert_goes_on, source, destination, machine, compression):
    # QEMU 7.2 under TCG loses pages of a guest that writes
    spec = lab.spec(machine, "idle" if source == "7.2" else "dirty")
    first = lab.boot(source, spec)
    parameters = {"multifd-channels": 3, "multifd-compression": compression}
    file = lab.path("vm.mig")
    received(lab, first, file, f"unix:{lab.path('in')}", parameters)
    second = sent(lab, destination, spec, file, f"unix:{lab.path('out')}", parameters)
    assert_goes_on(first, second)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
@pytest.mark.parametrize("channels", [1, 16])
def test_as_few_and_as_many_channels(lab, assert_goes_on, version, channels):
    spec = lab.spec("pc")
    first = lab.boot(version, spec)
    parameters = {"multifd-channels": channels}
    file = lab.path("vm.mig")
    received(lab, first, file, "tcp:127.0.0.1:0", parameters, return_path=False)
    second = sent(lab, version, spec, file, f"unix:{lab.path('out')}", parameters)
    assert_goes_on(first, second)


@pytest.mark.parametrize("detection", ["none", "legacy", "multifd"])
def test_whoever_looks_for_zero_pages(lab, assert_goes_on, detection):
    spec = lab.spec("pc", "dirty")
    first = lab.boot("10.0", spec)
    parameters = {"zero-page-detection": detection, "multifd-channels": 2}
    file = lab.path("vm.mig")
    received(lab, first, file, f"unix:{lab.path('in')}", parameters)
    with mig.open_image(file) as image:
        assert all(block.missing == 0 for block in image.blocks)
    second = sent(lab, "10.0", spec, file, f"unix:{lab.path('out')}", parameters)
    assert_goes_on(first, second)


def test_levels_are_the_library_s(lab, assert_goes_on):
    spec = lab.spec("pc")
    first = lab.boot("10.0", spec)
    parameters = {"multifd-compression": "zstd", "multifd-zstd-level": 4}
    file = lab.path("vm.mig")
    received(lab, first, file, f"unix:{lab.path('in')}", parameters)
    parameters = {"multifd-compression": "zlib", "multifd-zlib-level": 3}
    second = sent(lab, "10.0", spec, file, f"unix:{lab.path('out')}", parameters)
    assert_goes_on(first, second)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_qemu_with_more_channels_than_expected_keeps_its_guest(lab, version):
    source = lab.boot(version, lab.spec("pc"))
    file = lab.path("vm.mig")
    command = lab.mig(
        "receive", f"unix:{lab.path('in')}", file, "-c", "multifd", "-p", "multifd-channels=2"
    )
    source.set_capabilities({"multifd": True, "return-path": True})
    source.set_parameters({"max-bandwidth": 0, "multifd-channels": 4})
    source.migrate(command.wait_listening())
    assert command.finish() == 1
    assert "more multifd channels than 2" in command.stderr
    assert source.wait_migration()["status"] == "failed"
    source.wait_ticks(3)
    assert source.bad_pages() == 0


def test_qemu_with_fewer_channels_than_expected_keeps_its_guest(lab):
    source = lab.boot("10.0", lab.spec("pc"))
    file = lab.path("vm.mig")
    few = ("-p", "multifd-channels=5", "-p", "idle-timeout=3")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "-c", "multifd", *few)
    source.set_capabilities({"multifd": True, "return-path": True})
    source.set_parameters({"max-bandwidth": 0, "multifd-channels": 2})
    source.migrate(command.wait_listening())
    assert command.finish() == 1
    assert "3 of 5 multifd channels did not come" in command.stderr
    assert source.wait_migration()["status"] == "failed"
    source.wait_ticks(3)
    assert source.bad_pages() == 0


@pytest.mark.parametrize(
    ("version", "with_multifd"), [("7.2", True), ("10.0", True), ("10.0", False)]
)
def test_qemu_is_not_sent_what_only_mig_knows(lab, assert_goes_on, version, with_multifd):
    """It is asked, no channel comes, and the same file goes to the next QEMU."""
    spec = lab.spec("pc")
    first = lab.boot(version, spec)
    file = lab.path("vm.mig")
    received(lab, first, file, f"unix:{lab.path('in')}", {"multifd-channels": 2})
    refusing = lab.incoming(version, spec)
    refusing.set_capabilities({"multifd": with_multifd})
    uri = f"unix:{lab.path('refused')}"
    refusing.migrate_incoming(uri)
    parameters = {"multifd-compression": "adaptive", "idle-timeout": 1}
    command = lab.mig("send", file, uri, "--json", *options(parameters))
    assert command.finish() == 1
    assert "does not take multifd-compression adaptive" in command.stderr
    second = sent(lab, version, spec, file, f"unix:{lab.path('out')}", {"multifd-channels": 2})
    assert_goes_on(first, second)
