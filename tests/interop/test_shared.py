"""x-ignore-shared: a QEMU's memory stays in its file while the rest goes through mig."""

from __future__ import annotations

from pathlib import Path

import pytest

CAPABILITY = "x-ignore-shared"
VERSIONS = ["7.2", "10.0"]
#: 7.2 loses pages of a guest that writes while it is migrated under TCG; what is not sent, is not
#: lost: its shared memory may be written
MODE = "dirty"


def shared_spec(lab, machine: str, file: str, *, memory: str = "memory-backend-file"):
    """A guest whose RAM is ``file``, mapped shared."""
    plain = lab.spec(machine, MODE)
    where = f"mem-path={file}," if memory == "memory-backend-file" else ""
    backend = f"{memory},id=pc.ram,size={plain.memory_bytes},{where}share=on"
    extra = ("-object", backend, "-machine", "memory-backend=pc.ram")
    return lab.spec(machine, MODE, extra=extra)


def ram_of(info) -> dict[str, object]:
    return {block["name"]: block for block in info["blocks"]}["pc.ram"]


@pytest.mark.parametrize(
    ("source_qemu", "destination_qemu", "machine", "return_path"),
    [
        ("7.2", "7.2", "pc", True),
        ("10.0", "10.0", "q35", True),
        ("7.2", "10.0", "pc-q35-7.2", False),
    ],
)
def test_a_guest_goes_on_with_the_memory_it_had(
    lab, start_migration, assert_goes_on, source_qemu, destination_qemu, machine, return_path
):
    spec = shared_spec(lab, machine, lab.path("pc.ram"))
    source = lab.boot(source_qemu, spec, fresh=True)
    source.set_capabilities({CAPABILITY: True})
    file = lab.path("vm.mig")
    command = lab.mig("receive", "tcp:127.0.0.1:0", file, "-c", CAPABILITY, "--json")
    start_migration(source, command.wait_listening(), return_path=return_path)
    received = command.result()
    answer = source.wait_migration()
    assert answer["status"] == received["status"] == "completed"

    info = lab.mig("info", file, "--json").result()
    assert ram_of(info)["ignored"]
    assert ram_of(info)["missing-pages"] * info["page-size"] == spec.memory_bytes
    assert not any(block["ignored"] for block in info["blocks"] if block["name"] != "pc.ram")
    # guest memory alone has this many random bytes
    assert Path(file).stat().st_size < spec.fill_mib << 20

    destination = lab.incoming(destination_qemu, spec)
    destination.set_capabilities({CAPABILITY: True})
    uri = f"unix:{lab.path('in')}"
    destination.migrate_incoming(uri)
    sent = lab.mig(
        "send", file, uri, "-c", f"return-path={'on' if return_path else 'off'}", "--json"
    ).result()
    assert destination.wait_migration()["status"] == "completed"
    assert_goes_on(source, destination)
    # mig counts what QEMU counts
    assert sent["ram"]["total"] == answer["ram"]["total"]
    assert sent["ram"]["total"] < spec.memory_bytes


@pytest.mark.parametrize("version", VERSIONS)
def test_a_qemu_reads_the_file_that_mig_wrote(lab, start_migration, assert_goes_on, version):
    spec = shared_spec(lab, "pc", lab.path("pc.ram"))
    source = lab.boot(version, spec, fresh=True)
    source.set_capabilities({CAPABILITY: True})
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('out')}", file, "-c", CAPABILITY, "--json")
    start_migration(source, command.wait_listening(), return_path=True)
    command.result()
    destination = lab.incoming(version, spec)
    destination.set_capabilities({CAPABILITY: True})
    destination.migrate_incoming(f"exec:cat {file}")
    assert destination.wait_migration()["status"] == "completed"
    assert_goes_on(source, destination)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_that_qemu_wrote_is_read(lab, start_migration, version):
    """Only 7.2 also leaves out shared memory that has no name in a file system."""
    spec = shared_spec(lab, "pc", "", memory="memory-backend-memfd")
    source = lab.start(version, spec)
    source.set_capabilities({CAPABILITY: True})
    file = lab.path("vm.mig")
    start_migration(source, f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    info = lab.mig("info", file, "--json").result()
    assert ram_of(info)["ignored"] == (version == "7.2")
    assert ram_of(info)["address"] == 0
    assert {block["name"]: block for block in info["blocks"]}["pc.bios"]["address"] == 0xFFFC0000


# ---- who does not agree ----------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("qemu_s", "mig_s"), [("on", "off"), ("off", "on")])
def test_mig_refuses_in_qemu_s_words(lab, start_migration, version, qemu_s, mig_s):
    source = lab.start(version, shared_spec(lab, "pc", lab.path("pc.ram")))
    source.set_capabilities({CAPABILITY: qemu_s == "on"})
    file = lab.path("vm.mig")
    command = lab.mig("receive", "tcp:127.0.0.1:0", file, "-c", f"{CAPABILITY}={mig_s}")
    start_migration(source, command.wait_listening(), return_path=True)
    assert command.finish() == 1
    words = f"Capability {CAPABILITY} is {mig_s}, but received capability is {qemu_s}"
    assert words in command.stderr
    assert source.wait_migration()["status"] == "failed"
    source.wait_status("running")
    assert not Path(file).exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_words_are_qemu_s(lab, start_migration, version):
    """What a QEMU says whose capability is off to a stream that mig sends with it."""
    spec = shared_spec(lab, "pc", lab.path("pc.ram"))
    source = lab.start(version, spec)
    source.set_capabilities({CAPABILITY: True})
    file = lab.path("vm.mig")
    start_migration(source, f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    destination = lab.incoming(version, spec)
    uri = f"unix:{lab.path('in')}"
    destination.migrate_incoming(uri)
    command = lab.mig("send", file, uri)
    assert command.finish() == 1
    assert destination.wait_exit() == 1
    words = f"Capability {CAPABILITY} is off, but received capability is on"
    assert words in destination.stderr
