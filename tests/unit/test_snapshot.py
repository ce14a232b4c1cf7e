"""Background snapshots: every page that is sent is the one at the pause, and the guest runs on."""

from __future__ import annotations

import os

import pytest
from unit.snapshots import (
    FOREVER,
    MARKS,
    MIB,
    PAGE,
    Remembering,
    await_frozen,
    await_writes,
    image_memory,
    snapshot,
    write_in_python,
    write_natively,
)

from mig import (
    GuestMemory,
    IncomingMigration,
    MemoryGuest,
    OutgoingMigration,
    ProcessGuest,
    SharedDirtyLog,
    Status,
    _core,
    open_image,
)
from mig.errors import KvmUnavailableError
from mig.events import StatusChanged
from mig.guest.kvm import KvmGuest, probe

pytestmark = MARKS


# ---- what is saved ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("pattern", "also"),
    [("full", ()), ("words", ()), ("sequential", ()), ("hot", ()), ("full", ("mapped-ram",))],
)
def test_every_page_is_the_one_at_the_pause(stack, tmp_path, pattern, also, workers, seed):
    guest = stack.enter_context(
        Remembering(4 * MIB, workers=workers, pattern=pattern, rate=0, seed=seed, fill="half")
    )
    guest.start()
    await_writes(guest, 300)
    outgoing = snapshot(guest, f"file:{tmp_path / 'vm'}", also=also)
    assert outgoing.wait(FOREVER)
    assert guest.running
    await_writes(guest, 300)
    assert image_memory(tmp_path / "vm") == guest.memory_then
    assert guest.verify().ok

    restored = stack.enter_context(ProcessGuest(4 * MIB))
    incoming = IncomingMigration(restored, capabilities=also)
    incoming.listen(f"file:{tmp_path / 'vm'}")
    assert incoming.wait(FOREVER)
    report = restored.verify()
    assert report.ok
    assert report.writes == guest.writes_then
    restored.resume()
    await_writes(restored, 300)
    assert restored.verify().ok


def test_memory_comes_first_each_page_once_then_the_devices_of_the_pause(stack, tmp_path):
    guest = stack.enter_context(Remembering(2 * MIB, rate=0, fill="half"))
    guest.start()
    outgoing = snapshot(guest, f"file:{tmp_path / 'vm'}")
    outgoing.wait(FOREVER)
    data = (tmp_path / "vm").read_bytes()
    # SECTION_END of ram: nothing was left, EOS, footer
    assert data.endswith(
        b"\x03\0\0\0\1" + b"\0\0\0\0\0\0\0\x10" + b"\x7e\0\0\0\1" + guest.devices_then
    )
    info = outgoing.query()
    npages = sum(block.pages.npages for block in guest.memory)
    assert info.ram.normal + info.ram.duplicate == npages
    assert info.ram.transferred == len(data)
    assert info.ram.remaining == 0
    assert info.status == Status.COMPLETED
    assert info.downtime == info.snapshot.pause > 0
    assert info.to_qmp()["status"] == "completed"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("write", [write_natively, write_in_python])
def test_random_writes_of_several_threads(block, tmp_path, write, seed):
    some = block()
    some.start(write, 3, seed)
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}")
    assert outgoing.wait(FOREVER)
    assert image_memory(tmp_path / "vm") == {"ram": some.then}


@pytest.mark.parametrize("populate", [False, True], ids=["", "populate"])
@pytest.mark.parametrize("kind", ["anonymous", "touched", "memfd", "larger pages"])
def test_kinds_of_memory(block, tmp_path, monkeypatch, kind, populate):
    """Also memory that nobody had touched, of which the kernel has no page to protect."""
    core = _core.Snapshot
    monkeypatch.setattr(
        _core, "Snapshot", lambda *a, **k: core(*a, **{**k, "populate": populate})
    )
    options: dict = {}
    if kind == "memfd":
        options["fd"] = os.memfd_create("ram")
    elif kind == "larger pages":
        options["host_page_size"] = 16 * PAGE
    some = block(4 * MIB, **options)
    if kind == "memfd":
        os.close(options["fd"])
    if kind == "touched":
        some.view[:] = 7
    some.view[MIB : MIB + 100] = 9
    some.start(write_natively, 2, 5)
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", max_bandwidth=64 * MIB)
    assert outgoing.wait(FOREVER)
    assert image_memory(tmp_path / "vm") == {"ram": some.then}
    assert outgoing.query().snapshot.faults > 0


def test_memory_that_the_destination_shares_is_left_alone(stack, tmp_path):
    memory = GuestMemory()
    stack.callback(memory.close)
    shared = memory.add("shared", MIB, path=tmp_path / "shared")
    own = memory.add("own", MIB)
    guest = MemoryGuest("m", memory)
    outgoing = OutgoingMigration(
        guest,
        capabilities={"background-snapshot", "x-ignore-shared"},
        parameters={"max-bandwidth": PAGE},
    )
    outgoing.start(f"file:{tmp_path / 'vm'}")
    await_frozen(outgoing)
    shared.view[:] = b"a" * MIB
    assert outgoing.query().snapshot.faults == 0
    own.view[:] = b"b" * MIB
    assert outgoing.wait(FOREVER)
    with open_image(tmp_path / "vm") as image:
        assert [(b.idstr, b.ignored, b.zero) for b in image.blocks] == [
            ("shared", True, 0),
            ("own", False, MIB // PAGE),
        ]


def test_the_statuses_are_those_of_qemu(block, tmp_path):
    events = []
    outgoing = OutgoingMigration(
        block().guest, capabilities={"background-snapshot"}, on_event=events.append
    )
    outgoing.start(f"file:{tmp_path / 'vm'}")
    outgoing.wait(FOREVER)
    assert events == [
        StatusChanged(Status.SETUP),
        StatusChanged(Status.ACTIVE),
        StatusChanged(Status.COMPLETED),
    ]


def test_untouched_memory_takes_none(block, tmp_path):
    some = block(64 * MIB)
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}")
    outgoing.wait(FOREVER)
    assert (tmp_path / "vm").stat().st_size < MIB
    info = outgoing.query()
    assert info.ram.duplicate == 64 * MIB // PAGE
    assert info.ram.normal == 0


def test_without_detection_zero_pages_are_pages(block, tmp_path):
    some = block()
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", zero_page_detection="none")
    outgoing.wait(FOREVER)
    assert outgoing.query().ram.duplicate == 0
    assert image_memory(tmp_path / "vm") == {"ram": bytes(2 * MIB)}


def test_memory_that_is_not_plugged_in_is_neither_read_nor_protected(block, tmp_path):
    some = block()
    some.guest.discarded = {"ram": [(0, 100), (300, 212)]}
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", max_bandwidth=PAGE)
    await_frozen(outgoing)
    some.view[: 100 * PAGE] = 1
    some.view[300 * PAGE :] = 1
    assert outgoing.query().snapshot.faults == 0
    some.view[100 * PAGE : 300 * PAGE] = 1
    assert outgoing.wait(FOREVER)
    with open_image(tmp_path / "vm") as image:
        (summary,) = image.blocks
        assert (summary.data, summary.zero, summary.missing) == (0, 200, 312)


# ---- the guest runs on -----------------------------------------------------------------------


def test_pages_that_are_written_to_are_not_held_up_by_the_bandwidth(block, tmp_path):
    """At a page a second the rest would take minutes."""
    some = block()
    some.view[:] = 3
    outgoing = snapshot(some.guest, f"file:{tmp_path / 'vm'}", max_bandwidth=PAGE)
    await_frozen(outgoing)
    some.view[:] = 4
    assert outgoing.wait(FOREVER)
    assert outgoing.query().snapshot.faults > 500
    assert image_memory(tmp_path / "vm") == {"ram": b"\3" * 2 * MIB}


def test_a_guest_that_stands_still_stays_so(block, tmp_path):
    some = block()
    some.guest.stop()
    resumed = []
    some.guest._on_resume = lambda: resumed.append(True)
    snapshot(some.guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    assert not some.guest.running
    assert not resumed


def test_to_a_destination_that_runs_it(stack, tmp_path):
    """Two guests of one origin."""
    guest = stack.enter_context(ProcessGuest(2 * MIB, workers=2, rate=0))
    guest.start()
    clone = stack.enter_context(ProcessGuest(2 * MIB))
    incoming = IncomingMigration(clone)
    incoming.listen(f"unix:{tmp_path / 's'}")
    outgoing = snapshot(guest, f"unix:{tmp_path / 's'}")
    assert incoming.wait(FOREVER)
    assert outgoing.wait(FOREVER)
    clone.resume()
    await_writes(clone, 100)
    await_writes(guest, 100)
    assert clone.verify().ok
    assert guest.verify().ok


def test_into_a_command(stack, tmp_path):
    guest = stack.enter_context(Remembering(2 * MIB, rate=0))
    guest.start()
    snapshot(guest, f"exec:cat > {tmp_path / 'vm'}").wait(FOREVER)
    assert image_memory(tmp_path / "vm") == guest.memory_then


def test_again_and_again(stack, tmp_path):
    guest = stack.enter_context(Remembering(MIB, rate=0))
    guest.start()
    for number in range(5):
        snapshot(guest, f"file:{tmp_path / str(number)}").wait(FOREVER)
        assert image_memory(tmp_path / str(number)) == guest.memory_then
    assert guest.verify().ok


def test_the_log_of_an_ordinary_migration_is_left_alone(stack, tmp_path):
    class Log(SharedDirtyLog):
        def start(self) -> None:
            raise AssertionError

    guest = stack.enter_context(
        ProcessGuest(MIB, dirty=lambda memory: Log({b.idstr: b.pages.npages for b in memory}))
    )
    guest.start()
    assert snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)


# ---- KVM -------------------------------------------------------------------------------------


def test_a_virtual_machine(stack, tmp_path):
    try:
        probe()
    except KvmUnavailableError as error:
        pytest.skip(f"KVM: {error}")

    def make() -> KvmGuest:
        memory = GuestMemory()
        memory.add("ram0", 1024 * PAGE)
        memory.add("ram1", 77 * PAGE)
        stack.callback(memory.close)
        guest = KvmGuest(memory, vcpus=2)
        stack.callback(guest.close)
        return guest

    guest = make()
    guest.boot()
    guest.resume()
    assert guest.wait_heartbeats(2, FOREVER)
    outgoing = snapshot(guest, f"file:{tmp_path / 'vm'}", max_bandwidth=20 * MIB)
    assert outgoing.wait(FOREVER)
    assert outgoing.query().snapshot.faults > 0
    assert guest.wait_heartbeats(2, FOREVER)
    guest.check()

    restored = make()
    incoming = IncomingMigration(restored)
    incoming.listen(f"file:{tmp_path / 'vm'}")
    assert incoming.wait(FOREVER)
    assert restored.verify() == []
    restored.resume()
    assert restored.wait_heartbeats(2, FOREVER)
    restored.stop()
    restored.check()
    assert restored.verify() == []
