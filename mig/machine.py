"""Machine types: their names tell which QEMU's ways both ends follow."""

from __future__ import annotations

import re

_VERSION = re.compile(r"-(\d+)\.(\d+)$")


def machine_version(machine: str | None) -> tuple[int, int] | None:
    """Return the version in the name of a machine type, None where there is none.

    ``pc-i440fx-7.2`` is (7, 2). QEMU's compatibility properties go by it, not by the version of
    the program.
    """
    found = _VERSION.search(machine or "")
    return (int(found[1]), int(found[2])) if found else None
