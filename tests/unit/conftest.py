"""Migrations of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from unit.boxes import Pair
from unit.postcopies import Lab, closed_lab
from unit.snapshots import Block, closed_blocks, nothing_left


@pytest.fixture
def made() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()


@pytest.fixture(params=["plain", "preempt"])
def postcopies(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    """Postcopies by hand, with a connection for urgent pages and without."""
    with closed_lab(tmp_path, {"postcopy-preempt"} if request.param == "preempt" else ()) as lab:
        yield lab


@pytest.fixture
def block() -> Iterator[Callable[..., Block]]:
    """Makes blocks for snapshots, and ends them and their writers."""
    with closed_blocks() as make:
        yield make


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    with nothing_left():
        yield
