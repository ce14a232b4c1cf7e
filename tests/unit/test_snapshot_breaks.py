"""Background snapshots that fail, are cancelled, or cannot be: the guest runs on."""

from __future__ import annotations

import contextlib
import random
import socket
import time

import pytest
from unit.snapshots import (
    FOREVER,
    LIBC,
    MARKS,
    MIB,
    PAGE,
    await_frozen,
    await_writes,
    check_runs_on,
    snapshot,
    write_in_python,
    write_natively,
)

from mig import GuestMemory, MemoryGuest, OutgoingMigration, ProcessGuest, Status, open_image
from mig.errors import CancelledError, ChannelError, OptionError
from mig.snapshot import memory as snapshot_memory

pytestmark = MARKS


# ---- a destination that does not read --------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch):
    """The URI of a connection that takes a little, and then nothing."""
    monkeypatch.setattr(snapshot_memory, "LIMIT", 64 * PAGE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        yield f"fd:{ours.fileno()}"


@pytest.mark.parametrize("write", [write_natively, write_in_python])
def test_who_writes_does_not_wait_for_ever(block, stuck, write):
    # the walk has 4 MiB of them when it gets stuck
    some = block(16 * MIB)
    some.view[:] = 1
    outgoing = snapshot(some.guest, stuck)
    await_frozen(outgoing)
    if write is write_natively:
        LIBC.memset(some.address, 2, some.nbytes)
    else:
        some.view[:] = 2
    assert outgoing.query().snapshot.waits > 0
    outgoing.cancel()
    with pytest.raises(CancelledError):
        outgoing.wait(FOREVER)
    assert (some.view == 2).all()


def test_a_cancel_wakes_who_waits(stack, stuck):
    guest = stack.enter_context(ProcessGuest(8 * MIB, workers=3, rate=0, seed=8))
    guest.start()
    outgoing = snapshot(guest, stuck)
    end = time.monotonic() + FOREVER
    while outgoing.query().snapshot is None or not outgoing.query().snapshot.waits:
        assert time.monotonic() < end
        time.sleep(0.001)
    outgoing.cancel()
    with pytest.raises(CancelledError):
        outgoing.wait(FOREVER)
    assert outgoing.status == Status.CANCELLED
    check_runs_on(guest, 5000)


@pytest.mark.parametrize("bandwidth", [0, MIB])
@pytest.mark.parametrize("command", ["false", "head -c 100000 >/dev/null", "exit 3; cat"])
def test_a_failure_leaves_the_guest_as_it_was(stack, command, bandwidth):
    guest = stack.enter_context(ProcessGuest(4 * MIB, workers=2, rate=0, seed=9))
    guest.start()
    outgoing = snapshot(guest, f"exec:{command}", max_bandwidth=bandwidth)
    with pytest.raises(ChannelError):
        outgoing.wait(FOREVER)
    assert outgoing.status == Status.FAILED
    check_runs_on(guest, 2000)


@pytest.mark.parametrize("where", ["stop", "save_devices", "resume"])
def test_what_fails_at_the_pause_leaves_nothing_behind(stack, tmp_path, where, monkeypatch):
    guest = stack.enter_context(ProcessGuest(MIB, rate=0))
    guest.start()
    original, failed = getattr(guest, where), []

    def fail() -> bytes:
        result = original()
        if not failed:
            failed.append(True)
            raise RuntimeError("on purpose")
        return result

    monkeypatch.setattr(guest, where, fail)
    with pytest.raises(Exception, match="on purpose"):
        snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    assert guest.running
    await_writes(guest, 100)
    assert guest.verify().ok


def test_a_cancel_at_any_time(stack, tmp_path):
    guest = stack.enter_context(ProcessGuest(4 * MIB, workers=2, rate=0, seed=10))
    guest.start()
    rng = random.Random(1)
    for number in range(12):
        outgoing = snapshot(guest, f"file:{tmp_path / str(number)}", max_bandwidth=200 * MIB)
        time.sleep(rng.random() * 0.02)
        outgoing.cancel()
        with contextlib.suppress(CancelledError):
            outgoing.wait(FOREVER)
        assert outgoing.status in (Status.CANCELLED, Status.COMPLETED)
        assert guest.running
    await_writes(guest, 500)
    assert guest.verify().ok


# ---- what cannot be --------------------------------------------------------------------------


CONFLICTS = [
    "postcopy-ram",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "compress",
    "xbzrle",
    "validate-uuid",
]


@pytest.mark.parametrize("other", CONFLICTS)
def test_what_it_does_not_go_with_in_the_words_of_qemu(block, other):
    with pytest.raises(OptionError, match=f"Background-snapshot is not compatible with {other}"):
        OutgoingMigration(block().guest, capabilities={"background-snapshot", other})


def test_a_kernel_that_does_not_do_it(block, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot_memory, "refusal", lambda method: "Linux 5.7 can")
    outgoing = OutgoingMigration(block().guest, capabilities={"background-snapshot"})
    with pytest.raises(
        OptionError, match=r"Background-snapshot is not supported by host kernel: Linux 5\.7 can"
    ):
        outgoing.start(f"file:{tmp_path / 'vm'}")
    assert outgoing.status == Status.NONE


def test_memory_that_cannot_be_protected(tmp_path):
    buffer = bytearray(64 * PAGE + 1)
    memory = GuestMemory()
    memory.add("ram", 32 * PAGE, memoryview(buffer)[1 : 32 * PAGE + 1])
    guest = MemoryGuest("m", memory)
    with pytest.raises(
        OptionError,
        match="Background-snapshot is not compatible with guest memory configuration: the memory",
    ):
        snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    assert guest.running
    memory.close()


def test_an_image_cannot_be_one(stack, tmp_path):
    guest = stack.enter_context(ProcessGuest(MIB))
    guest.start()
    snapshot(guest, f"file:{tmp_path / 'vm'}").wait(FOREVER)
    with open_image(tmp_path / "vm") as image, pytest.raises(OptionError, match="memory"):
        snapshot(image, f"file:{tmp_path / 'again'}").wait(FOREVER)
