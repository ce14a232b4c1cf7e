"""When something goes wrong QEMU is told, and the guest that owned the data goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


def still_runs(source):
    assert source.status() == "running"
    source.wait_ticks(3)
    assert source.bad_pages() == 0


def fails(lab, source, command, file):
    """mig fails with one line, QEMU's migration fails, its guest runs, FILE is not there."""
    assert command.finish() == 1
    assert source.wait_migration()["status"] == "failed"
    still_runs(source)
    assert not Path(file).exists()
    assert not list(lab.folder.glob("*.partial"))
    lines = [line for line in command.stderr.splitlines() if "listening" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("mig: ")
    return lines[0]


@pytest.mark.parametrize(
    ("version", "capability", "return_path"),
    [
        ("7.2", "multifd", True),
        ("10.0", "multifd", False),
        ("7.2", "postcopy-ram", False),
        ("10.0", "postcopy-ram", True),
    ],
)
def test_feature_that_is_not_there_is_named(lab, start_migration, version, capability, return_path):
    source = lab.boot(version, lab.spec("pc"))
    source.set_capabilities({capability: True})
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file)
    start_migration(source, command.wait_listening(), return_path=return_path)
    line = fails(lab, source, command, file)
    assert f"switch off capability '{capability}' at the source" in line


def test_shared_memory_that_is_left_out_must_be_expected(lab, start_migration):
    source = lab.boot("7.2", lab.spec("pc"))
    source.set_capabilities({"x-ignore-shared": True})
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file)
    start_migration(source, command.wait_listening(), return_path=True)
    line = fails(lab, source, command, file)
    assert "Capability x-ignore-shared is off, but received capability is on" in line


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_receive(lab, sent):
    source = lab.boot("10.0", lab.spec("pc"))
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file)
    uri = command.wait_listening()
    source.set_capabilities({"return-path": True})
    source.set_parameters({"max-bandwidth": 8 << 20})
    source.migrate(uri)
    source.wait_ticks(2)
    command.process.send_signal(sent)
    assert "cancelled" in fails(lab, source, command, file)


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "no-return-path"])
def test_killed_receive(lab, start_migration, return_path):
    source = lab.boot("7.2", lab.spec("pc"))
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file)
    uri = command.wait_listening()
    source.set_capabilities({"return-path": return_path})
    source.set_parameters({"max-bandwidth": 8 << 20})
    source.migrate(uri)
    source.wait_ticks(2)
    command.process.kill()
    assert source.wait_migration()["status"] == "failed"
    still_runs(source)
    assert not Path(file).exists()


def test_send_to_a_machine_of_another_type(lab):
    source = lab.boot("10.0", lab.spec("pc"))
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    destination = lab.incoming("10.0", lab.spec("q35"))
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    command = lab.mig("send", file, uri)
    assert command.finish() == 1
    assert "the destination" in command.stderr
    assert Path(file).exists()


def test_send_when_nobody_listens(lab, tmp_path):
    source = lab.boot("7.2", lab.spec("pc"))
    file = lab.path("vm.mig")
    lab.receive(source, file, "tcp:127.0.0.1:0", return_path=False)
    command = lab.mig("send", file, "tcp:127.0.0.1:1")
    assert command.finish() == 1
    assert "Connection refused" in command.stderr
