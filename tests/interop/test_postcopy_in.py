"""QEMU goes into postcopy with mig at the other end, which keeps the whole guest in a file."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import pytest

import mig
from mig.postcopy.faults import MemoryFaults

PAGE = 4096
FOREVER = 60.0
SLOW = 4 << 20


class Proxy:
    """Passes connections on to a unix socket until it is told to cut them."""

    def __init__(self, path: str, target: str) -> None:
        self.uri, self.target = f"unix:{path}", target.removeprefix("unix:")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(8)
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            far.connect(self.target)
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


def wait_for(qemu, *statuses):
    return qemu.wait_migration(FOREVER, until=(*statuses, "failed", "cancelled"))["status"]


def starts_postcopy(source, uri, preempt=False):
    """Migrate slowly, then switch."""
    source.set_capabilities({"postcopy-ram": True, "postcopy-preempt": preempt})
    source.set_parameters({"max-bandwidth": SLOW})
    source.migrate(uri)
    assert wait_for(source, "active") == "active"
    time.sleep(0.3)
    source.command("migrate-start-postcopy")
    assert wait_for(source, "postcopy-active", "completed") == "postcopy-active"


def receiver(lab, preempt):
    capabilities = ["-c", "postcopy-ram", *(["-c", "postcopy-preempt"] if preempt else [])]
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "--json", *capabilities)
    return command, command.wait_listening(), file


def restored(lab, version, spec, source, file, goes_on):
    destination = lab.incoming(version, spec)
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    assert lab.mig("send", file, uri, "--json").result()["status"] == "completed"
    goes_on(source, destination)


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_qemu_postcopies_into_a_file(lab, assert_goes_on, version, preempt):
    spec = lab.spec("pc", "idle" if version == "7.2" else "dirty")
    source = lab.boot(version, spec)
    command, uri, file = receiver(lab, preempt)
    starts_postcopy(source, uri, preempt)
    source.set_parameters({"max-postcopy-bandwidth": 0, "max-bandwidth": 0})
    assert command.result()["status"] == "completed"
    assert source.wait_migration()["status"] == "completed"
    info = lab.mig("info", file, "--json").result()
    ram = {block["name"]: block for block in info["blocks"]}["pc.ram"]
    assert ram["missing-pages"] == 0
    restored(lab, version, spec, source, file, assert_goes_on)


@pytest.mark.parametrize(
    ("version", "preempt"),
    [
        pytest.param("7.2", False, id="7.2-plain"),
        pytest.param("7.2", True, id="7.2-preempt"),
        pytest.param("10.0", True, id="10.0-preempt"),
    ],
)
def test_qemu_resumes_a_postcopy_into_a_file(lab, assert_goes_on, version, preempt):
    spec = lab.spec("pc", "idle" if version == "7.2" else "dirty")
    source = lab.boot(version, spec)
    command, uri, file = receiver(lab, preempt)
    proxy = Proxy(lab.path("proxy"), uri)
    lab.stack.callback(proxy.close)
    source.set_parameters({"max-postcopy-bandwidth": SLOW})
    starts_postcopy(source, proxy.uri, preempt)
    for _ in range(2):
        time.sleep(0.3)
        proxy.cut()
        assert wait_for(source, "postcopy-paused", "completed") == "postcopy-paused"
        command.wait_listening()
        source.command("migrate", uri=proxy.uri, resume=True)
        assert wait_for(source, "postcopy-active", "completed") == "postcopy-active"
    source.set_parameters({"max-postcopy-bandwidth": 0})
    assert command.result()["status"] == "completed"
    assert source.wait_migration()["status"] == "completed"
    restored(lab, version, spec, source, file, assert_goes_on)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_preempt_is_refused_by_name_where_it_is_off(lab, version):
    source = lab.boot(version, lab.spec("pc", "idle"))
    command, uri, file = receiver(lab, preempt=False)
    source.set_capabilities({"postcopy-ram": True, "postcopy-preempt": True})
    source.set_parameters({"max-bandwidth": SLOW})
    source.migrate(uri)
    if version == "10.0":
        assert wait_for(source, "active") == "active"
        source.command("migrate-start-postcopy")
    assert command.finish() == 1
    assert "postcopy-preempt" in command.stderr
    assert not os.path.exists(file)  # noqa: PTH110
    if version == "7.2":
        # long before the guest would have been handed over
        assert wait_for(source, "active") == "failed"
        assert source.command("query-status")["status"] == "running"


class Mirror(mig.MemoryGuest):
    """Has whatever memory the source has, and devices that nobody looks at."""

    def __init__(self) -> None:
        super().__init__("any", mig.GuestMemory())
        self.resumed = threading.Event()
        self._on_resume = self.resumed.set

    def configure(self, configuration) -> None:
        pass

    def postcopy_advise(self, advise) -> None:
        assert advise.page_sizes == PAGE
        self._faults = MemoryFaults(self.memory)

    def open_blocks(self, blocks, page_size) -> None:
        for info in blocks:
            self.memory.add(info.idstr, info.used_length)
        super().open_blocks(blocks, page_size)

    def load_devices(self, state) -> None:
        assert len(state.sections) > 10


def touched(block, number) -> bytes:
    """Read a page as a guest does: without Python's lock."""
    near, far = os.pipe()
    with block.view[number * PAGE : (number + 1) * PAGE] as page:
        os.write(far, page)
    os.close(far)
    data = os.read(near, PAGE)
    os.close(near)
    return data


@pytest.mark.parametrize("preempt", [False, True], ids=["plain", "preempt"])
@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_qemu_s_memory_comes_as_it_is_touched(lab, tmp_path, version, preempt):
    source = lab.boot(version, lab.spec("pc", "idle" if version == "7.2" else "dirty"))
    mirror = Mirror()
    capabilities = {"postcopy-ram": True, "postcopy-preempt": preempt}
    incoming = mig.IncomingMigration(mirror, capabilities=capabilities)
    incoming.listen(f"unix:{tmp_path / 'in'}")
    proxy = Proxy(lab.path("proxy"), incoming.uri)
    lab.stack.callback(proxy.close)
    source.set_parameters({"max-postcopy-bandwidth": SLOW})
    starts_postcopy(source, proxy.uri, preempt)
    assert mirror.resumed.wait(FOREVER)
    ram, seen = mirror.memory["pc.ram"], {}
    numbers = list(range(5, ram.pages.npages, ram.pages.npages // 80))
    for number in numbers[:40]:
        seen[number] = touched(ram, number)
    requests = mirror.postcopy_times().requests
    assert requests > 10
    proxy.cut()
    assert wait_for(source, "postcopy-paused") == "postcopy-paused"
    waiting = [
        threading.Thread(target=lambda n=n: seen.update({n: touched(ram, n)}), daemon=True)
        for n in numbers[40:]
    ]
    for thread in waiting:
        thread.start()
    while incoming.status != "postcopy-paused":
        time.sleep(0.01)
    incoming.recover(f"unix:{tmp_path / 'in'}")
    source.command("migrate", uri=proxy.uri, resume=True)
    for thread in waiting:
        thread.join(FOREVER)
    assert len(seen) == len(numbers)
    source.set_parameters({"max-postcopy-bandwidth": 0})
    assert incoming.wait(FOREVER)
    assert source.wait_migration()["status"] == "completed"
    # the guest stands still at the source, with all that it had
    file = tmp_path / "memory"
    source.command("pmemsave", val=0, size=ram.used_length, filename=str(file))
    theirs, mine = file.read_bytes(), bytes(ram.view)
    low = 0xA0000
    high = 0x100000
    assert mine[:low] == theirs[:low]
    assert mine[high:] == theirs[high:]
    for number, data in seen.items():
        assert data == mine[number * PAGE : (number + 1) * PAGE]
