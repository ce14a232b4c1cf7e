"""Migrations of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from unit.boxes import Pair


@pytest.fixture
def made() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()
