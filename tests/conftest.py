"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import pytest

from mig import _core
from mig.errors import KernelError


@pytest.fixture(params=_core.kernel_names())
def kernels(request: pytest.FixtureRequest) -> _core.Kernels:
    """Every family of kernels, by name; a CPU that lacks one skips it, and says so."""
    try:
        return _core.kernels(request.param)
    except KernelError as error:
        pytest.skip(str(error))
