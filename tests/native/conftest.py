"""Programs of the tests of this folder."""

from __future__ import annotations

import pytest
from native.programs import Builder
from workers import shared_folder


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(shared_folder(tmp_path_factory, "native-objects"))
