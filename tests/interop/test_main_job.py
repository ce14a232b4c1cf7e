"""A stock QEMU guest goes through mig and goes on in another QEMU, memory intact."""

from __future__ import annotations

import json

import pytest

# 7.2 loses pages of a guest that writes while it is migrated under TCG, so its guests are idle.
# Each QEMU, on each side, with each machine, each with a return path and without.
CASES = [
    pytest.param("7.2", "7.2", "pc", "idle", True, id="7.2-pc"),
    pytest.param("7.2", "7.2", "q35", "idle", False, id="7.2-q35-no-return-path"),
    pytest.param("10.0", "10.0", "pc", "dirty", False, id="10.0-pc-no-return-path"),
    pytest.param("10.0", "10.0", "q35", "dirty", True, id="10.0-q35"),
    pytest.param("7.2", "10.0", "pc-i440fx-7.2", "idle", True, id="7.2-to-10.0-pc"),
    pytest.param("7.2", "10.0", "pc-i440fx-7.2", "idle", False, id="7.2-to-10.0-pc-no-return-path"),
    pytest.param("10.0", "7.2", "pc-q35-7.2", "dirty", True, id="10.0-to-7.2-q35"),
    pytest.param("10.0", "7.2", "pc-q35-7.2", "dirty", False, id="10.0-to-7.2-q35-no-return-path"),
]


@pytest.mark.parametrize(
    ("source_qemu", "destination_qemu", "machine", "mode", "return_path"), CASES
)
def test_guest_goes_through_mig(
    lab, assert_goes_on, source_qemu, destination_qemu, machine, mode, return_path
):
    spec = lab.spec(machine, mode)
    source = lab.boot(source_qemu, spec)
    file = lab.path("vm.mig")

    received = lab.receive(source, file, "tcp:127.0.0.1:0", return_path=return_path)
    info = lab.mig("info", file, "--json").result()
    destination = lab.incoming(destination_qemu, spec)
    uri = f"unix:{lab.path('in')}"
    destination.migrate_incoming(uri)
    rp = "on" if return_path else "off"
    sent = lab.mig("send", file, uri, "-c", f"return-path={rp}", "--json").result()
    assert destination.wait_migration()["status"] == "completed"
    assert_goes_on(source, destination)

    assert received["status"] == sent["status"] == "completed"
    ram = {block["name"]: block for block in info["blocks"]}["pc.ram"]
    assert info["machine"].startswith(machine if "-" in machine else "pc-")
    assert ram["used-length"] == spec.memory_bytes
    assert ram["missing-pages"] == 0
    # the filled part of the guest's memory is random: none of it is zero
    assert ram["data-pages"] * info["page-size"] >= spec.fill_mib << 20
    names = [device["name"] for device in info["devices"]]
    assert names.count("cpu") == 1
    assert "globalstate" in names
    assert sent["ram"]["normal"] + sent["ram"]["duplicate"] == sum(
        block["data-pages"] + block["zero-pages"] for block in info["blocks"]
    )


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_qemu_reads_what_mig_wrote(lab, assert_goes_on, version):
    spec = lab.spec("pc")
    source = lab.boot(version, spec)
    file = lab.path("vm.mig")
    uri = f"unix:{lab.path('in')}"
    lab.receive(source, file, uri, return_path=True, options=("--format", "stream"))
    assert_goes_on(source, lab.incoming(version, spec, f"exec:cat {file}"))


@pytest.mark.parametrize(
    ("version", "form"),
    [("7.2", "exec"), ("10.0", "exec"), ("10.0", "file"), ("10.0", "offset")],
)
def test_mig_reads_what_qemu_wrote(lab, start_migration, assert_goes_on, version, form):
    spec = lab.spec("pc", "idle" if version == "7.2" else "dirty")
    source = lab.boot(version, spec)
    file = lab.path("qemu.stream")
    to, name = {
        "exec": (f"exec:cat > {file}", file),
        "file": (f"file:{file}", file),
        "offset": (f"file:{file},offset=0x3000", f"file:{file},offset=0x3000"),
    }[form]
    start_migration(source, to)
    assert source.wait_migration()["status"] == "completed"

    info = lab.mig("info", name, "--json").result()
    assert info["machine"].startswith("pc-i440fx")
    assert info["devices"]
    destination = lab.incoming(version, spec)
    destination.migrate_incoming("tcp:127.0.0.1:0")
    uri = destination.command("query-migrate")["socket-address"][0]
    uri = f"tcp:{uri['host']}:{uri['port']}"
    sent = lab.mig("send", name, uri, "--json").result()
    assert sent["status"] == "completed"
    assert_goes_on(source, destination)


def test_selftest_command(lab, qemus):
    command = lab.mig("selftest", "--qemu", str(qemus["7.2"].path), "--json")
    assert command.finish(120) == 0, command.stderr
    report = json.loads(command.stdout.splitlines()[-1])
    assert report["status"] == "completed"
    assert report["pages-bad"] == 0
    assert report["ticks-after"] >= 15
