"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import pytest

from mig import _core
from mig.errors import KernelError


def built_families() -> list[str]:
    """Those that this build has; tests/kernels/test_selection.py says which these have to be."""
    names = []
    for name in _core.kernel_names():
        try:
            _core.kernels(name)
        except KernelError as error:
            if "not in this build" in str(error):
                continue
        names.append(name)
    return names


@pytest.fixture(params=built_families())
def kernels(request: pytest.FixtureRequest) -> _core.Kernels:
    """Every family of kernels, by name; a CPU that lacks one skips it, and says so."""
    try:
        return _core.kernels(request.param)
    except KernelError as error:
        pytest.skip(str(error))
