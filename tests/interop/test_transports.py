"""Every URI, in both directions. One source guest is migrated again and again."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

VERSION = "10.0"


@pytest.fixture(scope="module")
def spec(module_lab):
    return module_lab.spec("pc", "dirty")


@pytest.fixture(scope="module")
def source(module_lab, spec):
    return module_lab.boot(VERSION, spec)


@pytest.fixture
def running(source):
    """The source guest, running again after a migration before."""
    if source.status() == "postmigrate":
        source.command("cont")
    source.wait_ticks(1)
    yield source
    if source.query_migrate().get("status") in ("setup", "active", "device"):
        source.command("migrate_cancel")


@pytest.fixture(scope="module")
def image(module_lab, source):
    """A captured VM."""
    file = module_lab.path("image.mig")
    if source.status() == "postmigrate":
        source.command("cont")
    module_lab.receive(source, file, "tcp:127.0.0.1:0", return_path=True)
    return file


SOCKETS = ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0", "unix"]


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "no-return-path"])
@pytest.mark.parametrize("uri", SOCKETS)
def test_receive_socket(lab, running, uri, return_path):
    uri = f"unix:{lab.path('socket')}" if uri == "unix" else uri
    result = lab.receive(running, lab.path("vm.mig"), uri, return_path=return_path)
    assert result["status"] == "completed"
    assert lab.mig("info", lab.path("vm.mig"), "--json").result()["devices"]
    assert not Path(lab.path("socket")).exists()


def test_receive_fd_socket(lab, start_migration, running):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = lab.mig(
            "receive", f"fd:{ours.fileno()}", lab.path("vm.mig"), "--json", pass_fds=[ours.fileno()]
        )
        running.get_fd("mig", theirs.fileno())
    start_migration(running, "fd:mig", return_path=True)
    assert command.result()["status"] == "completed"
    assert running.wait_migration()["status"] == "completed"


def test_receive_fd_pipe(lab, start_migration, running):
    reading, writing = os.pipe()
    command = lab.mig("receive", f"fd:{reading}", lab.path("vm.mig"), "--json", pass_fds=[reading])
    running.get_fd("mig", writing)
    os.close(reading)
    os.close(writing)
    start_migration(running, "fd:mig")
    assert command.result()["status"] == "completed"
    assert running.wait_migration()["status"] == "completed"


def test_receive_exec(lab, start_migration, running):
    fifo = lab.path("fifo")
    os.mkfifo(fifo)
    command = lab.mig("receive", f"exec:cat {fifo}", lab.path("vm.mig"), "--json")
    start_migration(running, f"exec:cat > {fifo}")
    assert command.result()["status"] == "completed"
    assert running.wait_migration()["status"] == "completed"


@pytest.mark.parametrize("offset", [0, 12345])
def test_receive_file(lab, start_migration, running, offset):
    stream = f"file:{lab.path('stream')}" + (f",offset={offset}" if offset else "")
    start_migration(running, stream)
    assert running.wait_migration()["status"] == "completed"
    assert lab.mig("receive", stream, lab.path("vm.mig"), "--json").result()["ram"]["normal"] > 0
    assert lab.mig("info", lab.path("vm.mig"), "--json").result()["devices"]


# ---- sending: a fresh QEMU each time ---------------------------------------------------------


def resumes(destination):
    assert destination.wait_migration()["status"] == "completed"
    destination.wait_status("running")
    destination.wait_ticks(3)
    assert destination.bad_pages() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_send_tcp(lab, spec, image, host):
    destination = lab.incoming(VERSION, spec)
    destination.migrate_incoming(f"tcp:{host}:0")
    port = destination.query_migrate()["socket-address"][0]["port"]
    assert lab.mig("send", image, f"tcp:{host}:{port}", "--json").result()["status"] == "completed"
    resumes(destination)


def test_send_fd_socket(lab, spec, image):
    ours, theirs = socket.socketpair()
    destination = lab.incoming(
        VERSION, spec, f"fd:{theirs.fileno()}", pass_fds=[theirs.fileno()]
    )
    with ours, theirs:
        command = lab.mig(
            "send", image, f"fd:{ours.fileno()}", "--json", pass_fds=[ours.fileno()]
        )
    assert command.result()["status"] == "completed"
    resumes(destination)


def test_send_exec(lab, spec, image):
    os.mkfifo(lab.path("fifo"))
    destination = lab.incoming(VERSION, spec, f"exec:cat {lab.path('fifo')}")
    command = lab.mig("send", image, f"exec:cat > {lab.path('fifo')}", "--json")
    assert command.result()["status"] == "completed"
    resumes(destination)


@pytest.mark.parametrize("offset", [0, 4096])
def test_send_file(lab, spec, image, offset):
    stream = f"file:{lab.path('stream')}" + (f",offset={offset}" if offset else "")
    Path(lab.path("stream")).write_bytes(b"kept" * 1024)
    assert lab.mig("send", image, stream, "--json").result()["status"] == "completed"
    if offset:
        assert Path(lab.path("stream")).read_bytes()[:4096] == b"kept" * 1024
    destination = lab.incoming(VERSION, spec)
    destination.migrate_incoming(stream)
    resumes(destination)


def test_send_unix_at_limited_bandwidth(lab, spec, image):
    destination = lab.incoming(VERSION, spec)
    uri = f"unix:{lab.path('socket')}"
    destination.migrate_incoming(uri)
    result = lab.mig("send", image, uri, "-p", "max-bandwidth=64000000", "--json").result()
    assert result["total-time"] >= 1000 * result["ram"]["transferred"] / 64e6 * 0.8
    resumes(destination)
