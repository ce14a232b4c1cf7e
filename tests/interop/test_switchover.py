"""Features around the switchover, with QEMU at the other end."""

from __future__ import annotations

import threading
import time
from uuid import UUID

import pytest

import mig
from mig.errors import MigError

MINE = "11111111-2222-3333-4444-555555555555"
OTHER = "11111111-2222-3333-4444-666666666666"
FOREVER = 60.0


def captured(lab, version="10.0", **options):
    """Capture an idle guest; returns the specification and the file."""
    spec = lab.spec("pc", **options)
    source = lab.boot(version, spec)
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    source.close()
    return spec, file


def waiting(lab, version, spec, capabilities=()):
    """A QEMU that waits for a migration, and where."""
    destination = lab.incoming(version, spec)
    destination.set_capabilities(dict.fromkeys(capabilities, True))
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    return destination, uri


def resumes(destination):
    destination.wait_status("running")
    destination.wait_ticks(3)
    assert destination.bad_pages() == 0


def test_qemu_agrees_to_the_switchover(lab):
    spec, file = captured(lab)
    destination, uri = waiting(lab, "10.0", spec, ["return-path", "switchover-ack"])
    command = lab.mig("send", file, uri, "--json", "-c", "switchover-ack")
    assert command.result()["status"] == "completed"
    resumes(destination)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_mig_waits_before_the_switchover(lab, version):
    spec, file = captured(lab, version)
    destination, uri = waiting(lab, version, spec)
    with mig.open_image(file) as image:
        outgoing = mig.OutgoingMigration(
            image, capabilities={"return-path", "pause-before-switchover"}
        )
        outgoing.start(uri)
        end = time.monotonic() + FOREVER
        while outgoing.status != mig.Status.PRE_SWITCHOVER:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert destination.status() == "inmigrate"
        outgoing.migrate_continue()
        assert outgoing.wait(FOREVER)
    resumes(destination)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_qemu_waits_before_the_switchover(lab, version):
    source = lab.boot(version, lab.spec("pc"))
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "--json")
    source.set_capabilities({"return-path": True, "pause-before-switchover": True})
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(command.wait_listening())
    end = time.monotonic() + FOREVER
    while source.query_migrate()["status"] != "pre-switchover":
        assert time.monotonic() < end
        time.sleep(0.01)
    source.command("migrate-continue", state="pre-switchover")
    assert command.result()["status"] == "completed"
    assert source.wait_migration()["status"] == "completed"


def test_qemu_slows_its_guest_down_until_mig_has_it(lab):
    source = lab.boot("10.0", lab.spec("pc", "dirty", dirty_kib=32768), fresh=True)
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "--json")
    source.set_capabilities({"return-path": True, "auto-converge": True})
    source.set_parameters(
        {"max-bandwidth": 24 << 20, "cpu-throttle-initial": 60, "cpu-throttle-increment": 20}
    )
    source.migrate(command.wait_listening())
    assert command.result()["status"] == "completed"
    assert source.wait_migration()["status"] == "completed"


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_a_migration_that_qemu_cancels_leaves_its_guest_running(lab, version):
    source = lab.boot(version, lab.spec("pc"))
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "--json")
    source.set_capabilities({"return-path": True})
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.migrate(command.wait_listening())
    threading.Event().wait(0.5)
    source.command("migrate_cancel")
    assert command.finish() == 1
    assert source.wait_migration()["status"] == "cancelled"
    source.wait_ticks(3)
    assert source.bad_pages() == 0


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_the_machine_s_uuid_comes_and_goes(lab, version):
    spec = lab.spec("pc", extra=("-uuid", MINE))
    source = lab.boot(version, spec)
    source.set_capabilities({"validate-uuid": True})
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    source.close()
    with mig.open_image(file) as image:
        assert image.configuration.uuid == UUID(MINE)
    destination, uri = waiting(lab, version, spec, ["validate-uuid"])
    command = lab.mig("send", file, uri, "--json", "-c", "validate-uuid")
    assert command.result()["status"] == "completed"
    resumes(destination)


def test_qemu_refuses_another_machine_s_uuid(lab):
    spec = lab.spec("pc", extra=("-uuid", MINE))
    source = lab.boot("10.0", spec)
    source.set_capabilities({"validate-uuid": True})
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    source.close()
    other = lab.spec("pc", extra=("-uuid", OTHER))
    _, uri = waiting(lab, "10.0", other, ["validate-uuid"])
    with mig.open_image(file) as image:
        outgoing = mig.OutgoingMigration(image, capabilities={"return-path", "validate-uuid"})
        outgoing.start(uri)
        with pytest.raises(MigError):
            outgoing.wait(FOREVER)
