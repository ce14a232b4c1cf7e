"""docs/vmstate.md shows what examples/device.py is; that the example works is tested elsewhere."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from unit.test_emulator import snippets

from mig import vmstate

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "vmstate.md").read_text()


def test_what_the_document_shows_is_the_example():
    code = (ROOT / "examples" / "device.py").read_text()
    shown = list(snippets(DOCUMENT, ""))
    assert len(shown) >= 6
    for snippet in shown:
        if not snippet.startswith("$ "):
            indented = [textwrap.indent(snippet, " " * depth) for depth in (0, 4, 8)]
            assert any(lines in code for lines in indented), snippet


def test_the_table_has_every_field_that_there_is():
    table = DOCUMENT.partition("## Fields")[2].partition("\n`kind`")[0]
    named = set(re.findall(r"`([A-Z]\w+)", table)) - {"Element"}
    fields = {
        name
        for name in vmstate.__all__
        if isinstance(kind := getattr(vmstate, name), type) and issubclass(kind, vmstate.Field)
    }
    assert named == fields - {"Field"}
