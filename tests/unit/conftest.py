"""Migrations of a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.boxes import Pair
from unit.postcopies import Lab, closed_lab


@pytest.fixture
def made() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()


@pytest.fixture
def postcopies(tmp_path: Path) -> Iterator[Lab]:
    """Postcopies by hand."""
    with closed_lab(tmp_path) as lab:
        yield lab
