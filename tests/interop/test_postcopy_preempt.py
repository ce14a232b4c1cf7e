"""Urgent pages go to a QEMU over a connection of their own (postcopy-preempt)."""

from __future__ import annotations

import os
import socket
import time

import pytest

import mig

VERSIONS = ["7.2", "10.0"]
FOREVER = 60.0
CAPABILITIES = {"postcopy-ram": True, "postcopy-preempt": True}


def until(condition, what="it"):
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end, f"{what} never came about"
        time.sleep(0.01)


def cut(channel):
    with socket.socket(fileno=os.dup(channel._fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


class Restored:
    """A captured guest, and a QEMU that waits for it."""

    def __init__(self, lab, version, *, machine="pc", to=None):
        self.lab = lab
        # QEMU 7.2 under TCG loses writes as a source
        spec = lab.spec(machine, "dirty" if version == "10.0" else "idle")
        self.source = lab.boot(version, spec)
        self.file = lab.path("vm.mig")
        lab.receive(self.source, self.file, f"unix:{lab.path('in')}", return_path=True)
        self.qemu = lab.incoming(to or version, spec)
        self.qemu.set_capabilities(CAPABILITIES)
        self.uri = f"unix:{lab.path('out')}"
        self.qemu.migrate_incoming(self.uri)

    def sends(self, image, **options):
        migration = mig.OutgoingMigration(image, capabilities=CAPABILITIES, **options)
        migration.start_postcopy()
        return migration

    def waits_again(self, name):
        """Let the paused QEMU wait for another connection; returns where."""
        self.qemu.wait_migration(until=["postcopy-paused"])
        uri = f"unix:{self.lab.path(name)}"
        self.qemu.command("migrate-recover", uri=uri)
        return uri


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_asked_for_goes_beside_the_rest(lab, assert_goes_on, version):
    """The background creeps; the guest ticks nevertheless, by pages of the other connection."""
    restored = Restored(lab, version)
    with mig.open_image(restored.file) as image:
        migration = restored.sends(image, parameters={"max-postcopy-bandwidth": 1 << 20})
        migration.start(restored.uri)
        restored.qemu.wait_ticks(4, from_start=True)
        assert migration.status == mig.Status.POSTCOPY_ACTIVE
        ram = migration.query().ram
        assert ram.postcopy_requests > 0
        assert migration._requests.server.sent[2] > 0
        assert ram.remaining > ram.total // 2
        migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert migration.wait(FOREVER)
        assert migration.query().ram.remaining == 0
    assert_goes_on(restored.source, restored.qemu)
    assert restored.qemu.wait_migration()["status"] == "completed"


@pytest.mark.parametrize("version", VERSIONS)
def test_connections_break_and_are_made_again(lab, assert_goes_on, version):
    restored = Restored(lab, version)
    with mig.open_image(restored.file) as image:
        migration = restored.sends(image, parameters={"max-postcopy-bandwidth": 8 << 20})
        migration.start(restored.uri)
        for name in ("second", "third"):
            restored.qemu.wait_ticks(2)
            migration.pause()
            until(lambda: migration.status == mig.Status.POSTCOPY_PAUSED)
            migration.recover(restored.waits_again(name))
            until(lambda: migration.status == mig.Status.POSTCOPY_ACTIVE)
        migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert migration.wait(FOREVER)
    assert_goes_on(restored.source, restored.qemu)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("which", ["main", "urgent"])
def test_a_policy_mends_what_breaks(lab, assert_goes_on, version, which):
    """One of two connections is cut: both sides pause, and go on where QEMU is told to wait."""
    restored = Restored(lab, version)
    uri = f"unix:{lab.path('again')}"
    with mig.open_image(restored.file) as image:
        migration = restored.sends(
            image,
            parameters={"max-postcopy-bandwidth": 8 << 20},
            recovery=mig.Retry(uri, first=0.05, longest=0.2),
        )
        migration.start(restored.uri)
        restored.qemu.wait_ticks(2, from_start=True)
        cut(migration._channel if which == "main" else migration._urgent._channel)
        restored.waits_again("again")
        migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert migration.wait(FOREVER)
    assert_goes_on(restored.source, restored.qemu)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_command_does_it_too(lab, assert_goes_on, version):
    restored = Restored(lab, version)
    command = lab.mig(
        *("send", restored.file, restored.uri, "--postcopy", "--background", "4M", "--json"),
        *("-c", "postcopy-preempt"),
    )
    restored.qemu.wait_ticks(2, from_start=True)
    command.process.terminate()
    assert command.finish() == 1
    uri = restored.waits_again("again")
    again = lab.mig(
        "send", restored.file, uri, "--postcopy", "--resume", "--json", "-c", "postcopy-preempt"
    )
    assert again.result()["status"] == "completed"
    assert_goes_on(restored.source, restored.qemu)


def test_the_machine_type_decides_not_the_version(lab, assert_goes_on):
    """A guest of 7.2 in a QEMU 10.0: the connection comes early, and it is told of its end."""
    restored = Restored(lab, "7.2", machine="pc-i440fx-7.2", to="10.0")
    with mig.open_image(restored.file) as image:
        assert image.configuration.machine == "pc-i440fx-7.2"
        migration = restored.sends(image, parameters={"max-postcopy-bandwidth": 8 << 20})
        migration.start(restored.uri)
        restored.qemu.wait_ticks(2)
        migration.pause()
        until(lambda: migration.status == mig.Status.POSTCOPY_PAUSED)
        migration.recover(restored.waits_again("again"))
        restored.qemu.wait_ticks(2)
        migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert migration.wait(FOREVER)
    assert_goes_on(restored.source, restored.qemu)
    assert restored.qemu.wait_migration()["status"] == "completed"
