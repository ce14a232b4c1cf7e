"""Postcopy from a file: QEMU runs its guest at once, and its memory follows."""

from __future__ import annotations

import signal
import time

import pytest

import mig
from mig.errors import MigError

VERSIONS = ["7.2", "10.0"]
FOREVER = 60.0


def captured(lab, version, mode="idle"):
    """Capture a guest; returns the specification, the file and the source."""
    spec = lab.spec("pc", mode)
    source = lab.boot(version, spec)
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    return spec, file, source


def waiting(lab, version, spec):
    """A QEMU that waits for a postcopy, and where."""
    destination = lab.incoming(version, spec)
    destination.set_capabilities({"postcopy-ram": True})
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    return destination, uri


def until(condition):
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def recover(lab, destination, name):
    """Let a paused QEMU wait for another connection; returns where."""
    destination.wait_migration(until=["postcopy-paused"])
    uri = f"unix:{lab.path(name)}"
    destination.command("migrate-recover", uri=uri)
    return uri


@pytest.mark.parametrize("version", VERSIONS)
def test_a_guest_runs_before_its_memory_is_there(lab, assert_goes_on, version):
    """For a while only what it asks for is sent."""
    spec, file, source = captured(lab, version, "dirty" if version == "10.0" else "idle")
    destination, uri = waiting(lab, version, spec)
    with mig.open_image(file) as image:
        migration = mig.restore(image, uri, background=False)
        destination.wait_ticks(4, from_start=True)
        ram = migration.query().ram
        assert migration.status == mig.Status.POSTCOPY_ACTIVE
        assert ram.postcopy_requests > 0
        assert ram.remaining > ram.total // 2
        migration.background = True
        assert migration.wait(FOREVER)
        assert migration.query().ram.remaining == 0
    assert_goes_on(source, destination)
    assert destination.query_migrate()["status"] == "completed"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_connection_breaks_twice(lab, assert_goes_on, version):
    spec, file, source = captured(lab, version)
    destination, uri = waiting(lab, version, spec)
    with mig.open_image(file) as image:
        migration = mig.restore(image, uri, parameters={"max-postcopy-bandwidth": 8 << 20})
        for name in ("second", "third"):
            destination.wait_ticks(2)
            migration.pause()
            until(lambda: migration.status == mig.Status.POSTCOPY_PAUSED)
            migration.recover(recover(lab, destination, name))
            until(lambda: migration.status == mig.Status.POSTCOPY_ACTIVE)
        migration.set_parameters({"max-postcopy-bandwidth": 0})
        assert migration.wait(FOREVER)
    assert_goes_on(source, destination)


@pytest.mark.parametrize(("version", "how"), [("7.2", signal.SIGTERM), ("10.0", signal.SIGKILL)])
def test_another_process_resumes(lab, assert_goes_on, version, how):
    spec, file, source = captured(lab, version)
    destination, uri = waiting(lab, version, spec)
    first = lab.mig("send", file, uri, "--postcopy", "--background", "4M")
    destination.wait_ticks(2, from_start=True)
    first.process.send_signal(how)
    assert first.finish() != 0
    uri = recover(lab, destination, "again")
    second = lab.mig("send", file, uri, "--postcopy", "--resume", "--json")
    result = second.result()
    assert result["status"] == "completed"
    # what the first one had sent was not sent again
    ram = result["ram"]
    assert ram["normal"] + ram["duplicate"] < ram["total"] // ram["page-size"]
    assert_goes_on(source, destination)


def test_a_command_whose_destination_dies_says_so(lab):
    spec, file, _ = captured(lab, "10.0")
    destination, uri = waiting(lab, "10.0", spec)
    command = lab.mig("send", file, uri, "--postcopy", "--background", "off")
    destination.wait_ticks(2, from_start=True)
    destination.close()
    assert command.finish() == 1
    assert "the destination is paused (the destination went away" in command.stderr


def test_a_qemu_without_the_capability_refuses_and_keeps_nothing(lab):
    spec, file, _ = captured(lab, "10.0")
    destination = lab.incoming("10.0", spec)
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    with mig.open_image(file) as image:
        migration = mig.restore(image, uri)
        # whether the package had gone before QEMU left is a matter of moments
        until(lambda: migration.status in ("failed", "postcopy-paused"))
        if migration.status == mig.Status.POSTCOPY_PAUSED:
            migration.abandon()
        with pytest.raises(MigError):
            migration.wait(FOREVER)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_file_runs_many_guests(lab, version):
    spec, file, _ = captured(lab, version)
    guests = []
    with mig.open_image(file) as image:
        for number in range(3):
            destination = lab.incoming(version, spec)
            destination.set_capabilities({"postcopy-ram": True})
            uri = f"unix:{lab.path(f'out{number}')}"
            destination.migrate_incoming(uri)
            guests.append((destination, mig.restore(image, uri)))
        for destination, migration in guests:
            assert migration.wait(FOREVER)
            destination.wait_ticks(3)
            assert destination.bad_pages() == 0


def test_one_command_runs_many_guests_and_learns(lab, assert_goes_on):
    """What the first guests have waited for, the last one need not ask for."""
    spec, file, source = captured(lab, "10.0", "dirty")
    guests, uris = [], []
    for number in range(2):
        destination = lab.incoming("10.0", spec)
        destination.set_capabilities({"postcopy-ram": True})
        uris.append(f"unix:{lab.path(f'out{number}')}")
        destination.migrate_incoming(uris[-1])
        guests.append(destination)
    # slowly, so that they do wait
    options = ("--postcopy", "--background", "32M", "--json")
    result = lab.mig("send", file, *uris, *options, "--record-order").result()
    assert [m["status"] for m in result["migrations"]] == ["completed", "completed"]
    for destination in guests:
        assert_goes_on(source, destination)
        destination.close()
    asked = min(m["ram"]["postcopy-requests"] for m in result["migrations"])
    destination, uri = waiting(lab, "10.0", spec)
    last = lab.mig("send", file, uri, *options).result()
    assert_goes_on(source, destination)
    print(f"asked for {asked} pages, then for {last['ram']['postcopy-requests']}")
