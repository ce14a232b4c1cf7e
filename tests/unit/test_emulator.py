"""examples/emulator.py: that its check can fail, and that docs/guest.md shows what it is.

That it moves is tested with the other examples.
"""

from __future__ import annotations

import importlib.util
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mig

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "emulator.py"
_SECTION = "## Your VMM in an afternoon"


@pytest.fixture(scope="module")
def emulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulator", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(emulator, "RAM_NBYTES", 2 << 20)
    machine = emulator.Machine()
    machine.boot()
    return machine


def go(machine: Any, rounds: int) -> None:
    machine.run(rounds=rounds)
    machine.join()


def test_the_guest_notices_a_page_that_is_an_older_one(emulator: ModuleType, machine: Any) -> None:
    go(machine, 2)
    assert machine.pc != emulator.CORRUPT
    # not where it is right now
    page = emulator.DATA + 200 * 4096
    machine.ram.view[page + 8 : page + 16] = (machine.rounds - 1).to_bytes(8, "little")
    go(machine, 3)
    assert machine.pc == emulator.CORRUPT
    assert machine.rounds < 5


def test_when_the_destination_is_gone_the_guest_goes_on_here(
    emulator: ModuleType, machine: Any
) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    machine.run()
    machine.throttle(50)
    outgoing = mig.OutgoingMigration(machine.guest, capabilities={"return-path"})
    with ours:
        outgoing.start(f"fd:{ours.fileno()}")
        with pytest.raises(mig.MigError):
            outgoing.wait()
    assert machine.guest.running
    machine.stop()
    go(machine, 2)
    assert machine.pc != emulator.CORRUPT


def test_a_cpu_is_refused_that_is_none(machine: Any) -> None:
    with pytest.raises(mig.errors.MismatchError, match="no CPU"):
        machine.load_cpu(b"x", 1)


def snippets(text: str, section: str = _SECTION) -> Iterator[str]:
    """Yield the runs of indented lines, without the indentation that Markdown needs.

    section: where they are; "": anywhere
    """
    section = text.partition(section)[2].partition("\n## ")[0] if section else text
    block: list[str] = []
    for line in [*section.splitlines(), "end"]:
        if line.startswith("    ") or (not line and block):
            block.append(line.removeprefix("    "))
        elif block:
            yield "\n".join(block).rstrip("\n")
            block = []


def test_what_the_document_shows_is_the_file() -> None:
    code = EXAMPLE.read_text()
    shown = list(snippets((ROOT / "docs" / "guest.md").read_text()))
    assert len(shown) >= 6
    for snippet in shown:
        if not snippet.startswith("$ "):
            indented = [textwrap.indent(snippet, " " * depth) for depth in (0, 4, 8)]
            assert any(lines in code for lines in indented), snippet
