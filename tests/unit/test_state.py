"""State is a table: every pair moves as listed or raises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mig import state
from mig.errors import StateError
from mig.state import FINAL, INCOMING, OUTGOING, Input, Machine, Status

PAIRS = [(status, input_) for status in Status for input_ in Input]
TABLES = [pytest.param(OUTGOING, id="outgoing"), pytest.param(INCOMING, id="incoming")]
DOCUMENT = Path(__file__).parents[2] / "docs" / "states.md"


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("status", "input_"), PAIRS)
def test_every_pair_moves_as_listed_or_raises_and_stays(table, status, input_):
    machine = Machine(table)
    machine.status = status
    if (status, input_) in table:
        assert machine.feed(input_) == machine.status == table[status, input_]
    else:
        with pytest.raises(StateError) as caught:
            machine.feed(input_)
        assert (caught.value.status, caught.value.input) == (status, input_)
        assert machine.status == status


@pytest.mark.parametrize("table", TABLES)
def test_a_machine_begins_with_none(table):
    assert Machine(table).status == Status.NONE


@pytest.mark.parametrize("table", TABLES)
def test_final_statuses_have_no_way_out_and_all_others_have(table):
    left = {status for status, _ in table}
    entered = set(table.values())
    assert not left & FINAL
    assert entered - left <= FINAL
    assert entered >= FINAL


#: where QEMU 10.0 calls migrate_set_state() with these two, and for what
QEMU_OUTGOING = {
    ("none", "setup"): "migrate_init",
    ("setup", "failed"): "no connection",
    ("setup", "active"): "qemu_savevm_wait_unplug",
    ("setup", "wait-unplug"): "qemu_savevm_wait_unplug",
    ("wait-unplug", "active"): "qemu_savevm_wait_unplug",
    ("active", "failed"): "migration_detect_error",
    ("active", "pre-switchover"): "migration_switchover_prepare",
    ("active", "device"): "migration_switchover_prepare",
    ("pre-switchover", "device"): "migration_switchover_prepare",
    ("device", "failed"): "migration_completion_failed",
    ("device", "completed"): "migration_completion_end",
    ("active", "completed"): "migration_completion_end, of a background snapshot",
    # 10.0 itself never comes to colo: it still asks for active, which is over (mended later)
    ("device", "colo"): "migration_completion",
    ("colo", "completed"): "primary_vm_do_failover",
    ("device", "postcopy-active"): "postcopy_start",
    ("postcopy-active", "completed"): "migration_completion_end",
    ("postcopy-active", "failed"): "migration_completion_failed",
    ("postcopy-active", "postcopy-paused"): "postcopy_pause",
    ("postcopy-paused", "postcopy-recover-setup"): "migrate_prepare",
    ("postcopy-recover-setup", "postcopy-recover"): "migration_connect",
    ("postcopy-recover-setup", "postcopy-paused"): "no connection",
    ("postcopy-recover", "postcopy-active"): "migrate_handle_rp_resume_ack",
    ("postcopy-recover", "postcopy-paused"): "postcopy_pause",
    ("setup", "cancelling"): "migration_cancel",
    ("wait-unplug", "cancelling"): "migration_cancel",
    ("active", "cancelling"): "migration_cancel",
    ("pre-switchover", "cancelling"): "migration_cancel",
    ("device", "cancelling"): "migration_cancel",
    ("colo", "cancelling"): "migration_cancel",
    ("cancelling", "cancelling"): "migration_cancel",
    ("cancelling", "completed"): "migration_completion_end, which does not look",
    ("cancelling", "cancelled"): "migration_cleanup",
}
#: QEMU leaves these two with the next step, and then fails
OWN_OUTGOING = {
    ("wait-unplug", "failed"),
    ("pre-switchover", "failed"),
    # given up by the owner
    ("postcopy-paused", "failed"),
    ("postcopy-recover-setup", "failed"),
    ("postcopy-recover", "failed"),
    # taken over from another process
    ("none", "postcopy-recover-setup"),
}

QEMU_INCOMING = {
    ("none", "setup"): "migration_incoming_state_setup",
    ("setup", "active"): "process_incoming_migration_co",
    ("setup", "failed"): "migration_channel_process_incoming",
    ("active", "failed"): "process_incoming_migration_co",
    ("active", "completed"): "process_incoming_migration_bh",
    ("active", "postcopy-active"): "postcopy_ram_listen_thread",
    ("postcopy-active", "completed"): "postcopy_ram_listen_thread",
    ("postcopy-active", "failed"): "postcopy_ram_listen_thread",
    ("postcopy-active", "postcopy-paused"): "postcopy_pause_incoming",
    ("postcopy-paused", "postcopy-recover"): "postcopy_try_recover",
    ("postcopy-recover", "postcopy-active"): "loadvm_postcopy_handle_resume",
    ("postcopy-recover", "postcopy-paused"): "postcopy_pause_incoming",
    ("active", "colo"): "colo_process_incoming_thread",
    ("colo", "completed"): "secondary_vm_do_failover",
}
#: QEMU's destination is not cancelled, but killed
OWN_INCOMING = {
    ("setup", "cancelling"),
    ("active", "cancelling"),
    ("cancelling", "cancelling"),
    ("cancelling", "completed"),
    ("cancelling", "cancelled"),
    # given up by the owner
    ("postcopy-paused", "failed"),
    ("postcopy-recover", "failed"),
}


@pytest.mark.parametrize(
    ("table", "qemu", "own"),
    [
        pytest.param(OUTGOING, QEMU_OUTGOING, OWN_OUTGOING, id="outgoing"),
        pytest.param(INCOMING, QEMU_INCOMING, OWN_INCOMING, id="incoming"),
    ],
)
def test_a_migration_moves_as_qemus_does(table, qemu, own):
    moves = {(str(old), str(new)) for (old, _), new in table.items()}
    assert moves == set(qemu) | own
    assert not set(qemu) & own


def test_every_status_of_qemu_is_there():
    used = {status for pair in QEMU_OUTGOING for status in pair}
    assert used == set(Status)
    assert len(Status) == 15


#: here half of the guest is on either side, or there is nobody who could fail
PAST_FAILING = {
    Status.POSTCOPY_PAUSED,
    Status.POSTCOPY_RECOVER_SETUP,
    Status.POSTCOPY_RECOVER,
    Status.COLO,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_running_status_can_fail_and_be_cancelled_until_the_guest_is_elsewhere(table):
    for status in {s for s, _ in table} - {Status.NONE} - PAST_FAILING:
        assert (status, Input.FAIL) in table
        if status != Status.POSTCOPY_ACTIVE:
            assert table[status, Input.CANCEL] == Status.CANCELLING


@pytest.mark.parametrize("table", TABLES)
def test_a_postcopy_is_not_cancelled(table):
    for status in Status:
        if status.startswith("postcopy"):
            assert (status, Input.CANCEL) not in table


@pytest.mark.parametrize("table", TABLES)
def test_what_fails_while_it_is_cancelled_is_cancelled(table):
    assert table[Status.CANCELLING, Input.FAIL] == Status.CANCELLED
    assert table[Status.CANCELLING, Input.FINISH] == Status.COMPLETED


def test_the_way_of_a_migration_that_succeeds():
    machine = Machine(OUTGOING)
    inputs = [Input.START, Input.CONNECTED, Input.SWITCHOVER, Input.FINISH]
    assert [machine.feed(i) for i in inputs] == ["setup", "active", "device", "completed"]
    machine = Machine(INCOMING)
    inputs = [Input.START, Input.CONNECTED, Input.FINISH]
    assert [machine.feed(i) for i in inputs] == ["setup", "active", "completed"]


def test_the_way_of_a_postcopy_whose_connection_breaks():
    machine = Machine(OUTGOING)
    inputs = ["start", "connected", "switchover", "postcopy", "interrupt"]
    recovery = ["recover", "interrupt", "recover", "connected", "interrupt"]
    again = ["recover", "connected", "resumed", "finish"]
    seen = [machine.feed(Input(i)) for i in inputs + recovery + again]
    assert seen[3:] == [
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
        "postcopy-active",
        "completed",
    ]


@pytest.mark.parametrize("table", TABLES)
def test_the_diagram_shows_every_way_but_fail_and_cancel(table):
    lines = [line.strip() for line in state.diagram(table).splitlines()]
    drawn = set()
    for line in lines:
        if ": " in line:
            old, new, inputs = re.fullmatch(r"(\w+) --> (\w+): ([\w, ]+)", line).groups()
            drawn |= {(old.replace("_", "-"), i, new.replace("_", "-")) for i in inputs.split(", ")}
    assert drawn == {
        (old, input_, new)
        for (old, input_), new in table.items()
        if input_ not in (Input.FAIL, Input.CANCEL) and old != Status.CANCELLING
    }
    # mermaid takes no hyphen in a name: each such status is declared
    for status in {status for old, _, new in drawn for status in (old, new) if "-" in status}:
        assert f'state "{status}" as {status.replace("-", "_")}' in lines


@pytest.mark.parametrize("table", TABLES)
def test_the_list_has_every_entry(table):
    listed = set()
    for line in state.listing(table).splitlines()[2:]:
        old, cells = re.fullmatch(r"\| (\S+) \| (.+) \|", line).groups()
        for cell in cells.split("; "):
            inputs, new = re.fullmatch(r"(.+): \*\*(.+)\*\*", cell).groups()
            listed |= {(old, input_, new) for input_ in inputs.split(", ")}
    assert listed == {(old, input_, new) for (old, input_), new in table.items()}


def test_the_document_is_the_one_that_the_tables_give():
    assert DOCUMENT.is_file(), "make it from mig.state.document()"
    assert DOCUMENT.read_text() == state.document()
