"""What pytest's workers share: folders of one run of the tests, and locks on what is in them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return the folder of this name, which all workers see."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other workers out until the block is left."""
    # the kernel lets go of it if the process dies
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
