"""The pure ring decides what to say; it does no I/O, owns no thread and looks at no clock."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mig

ROOT = Path(mig.__file__).parent
PURE = ["postcopy/faultorder", "wire", "records", "mapped", "pages", "state", "events", "stats"]
PURE += ["errors"]
PURE_PACKAGES = ["options", "ram", "savevm", "stream"]
BANNED = {"socket", "os", "select", "threading", "time", "asyncio"}

MODULES = sorted(
    [ROOT / f"{name}.py" for name in PURE]
    + [path for name in PURE_PACKAGES for path in (ROOT / name).rglob("*.py")]
)


def imported_names(source: str) -> set[str]:
    """Top-level packages that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names


def file_of(name: str) -> Path | None:
    """The file of a module of mig, None when it is none (a name in a module, or compiled)."""
    base = ROOT.joinpath(*name.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def files_of_mig_imported_by(source: str) -> set[Path]:
    """Modules of mig that a module imports; the package itself, which imports all, is left out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {path for n in names if n.startswith("mig.") and (path := file_of(n)) is not None}


def reached_from(path: Path) -> set[Path]:
    """A module, and every module of mig that comes with it."""
    seen, todo = set(), {path}
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= files_of_mig_imported_by(path.read_text()) - seen
    return seen


def test_the_list_of_modules_is_not_empty():
    assert len(MODULES) >= 17
    assert all(path.is_file() for path in MODULES)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pure_modules_import_nothing_that_waits(path):
    assert not imported_names(path.read_text()) & BANNED


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_waits_comes_with_a_pure_module(path):
    for other in reached_from(path):
        assert not imported_names(other.read_text()) & BANNED, other


def test_the_checks_see_every_way_to_import():
    source = "import os.path\nfrom socket import socket\ndef f():\n    import time as t\n"
    assert imported_names(source) & BANNED == {"os", "socket", "time"}
    channel = ROOT / "channel" / "__init__.py"
    for text in ("mig.channel", "mig.channel as c"):
        assert channel in files_of_mig_imported_by(f"import {text}")
    for text in ("from mig.channel import Channel", "from mig import channel"):
        assert channel in files_of_mig_imported_by(text)
    assert ROOT / "wire.py" in files_of_mig_imported_by("from mig import wire")
    assert ROOT / "channel" / "base.py" in reached_from(channel)
