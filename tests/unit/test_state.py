"""State is a table: every pair moves as listed or raises."""

from __future__ import annotations

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


@pytest.mark.parametrize("table", TABLES)
def test_every_running_status_can_fail_and_be_cancelled(table):
    for status in {s for s, _ in table} - {Status.NONE}:
        assert (status, Input.FAIL) in table
        assert table[status, Input.CANCEL] == Status.CANCELLING


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


@pytest.mark.parametrize("table", TABLES)
def test_the_diagram_has_a_line_for_every_entry(table):
    lines = [line.strip() for line in state.diagram(table).splitlines()]
    for (old, input_), new in table.items():
        assert f"{old} --> {new}: {input_}" in lines
    for status in FINAL:
        assert f"{status} --> [*]" in lines


def test_the_document_is_the_one_that_the_tables_give():
    assert DOCUMENT.is_file(), "make it from mig.state.document()"
    assert DOCUMENT.read_text() == state.document()
