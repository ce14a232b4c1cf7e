"""Which kernels there are, and what MIG_KERNEL demands."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from mig import _core
from mig.errors import KernelError

#: counts many ranges with the default family, and by looking at every bit
COUNT = """
import random, mig
from mig import _core
rng = random.Random(1)
bitmap = mig.Bitmap(5000)
for _ in range(2000):
    bitmap.set(rng.randrange(5000))
for _ in range(300):
    first = rng.randrange(5000)
    nbits = rng.randrange(5000 - first)
    assert bitmap.count(first, nbits) == sum(bitmap[first + i] for i in range(nbits))
print(_core.KERNELS.name)
"""


def run_python(code: str, kernel: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MIG_KERNEL": kernel}
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_scalar_is_always_there():
    assert "scalar" in _core.kernel_names()
    assert _core.kernels("scalar").name == "scalar"


def test_names_are_unique():
    assert len(set(_core.kernel_names())) == len(_core.kernel_names())


def test_a_family_answers_by_its_own_name(kernels):
    assert _core.kernels(kernels.name).name == kernels.name
    assert kernels.name in repr(kernels)


def test_the_default_is_the_first_that_this_cpu_runs():
    usable = []
    for name in _core.kernel_names():
        with contextlib.suppress(KernelError):
            usable.append(_core.kernels(name).name)
    assert _core.kernels().name == usable[0]


@pytest.mark.parametrize("name", ["", "sse9", "SCALAR", "scalar "])
def test_an_unknown_family_is_refused_with_the_list_of_those_there_are(name):
    with pytest.raises(KernelError, match="scalar") as caught:
        _core.kernels(name)
    for known in _core.kernel_names():
        assert known in str(caught.value)


def test_mig_kernel_is_used_and_counts_right(kernels):
    done = run_python(COUNT, kernels.name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kernels.name


def test_a_mig_kernel_that_cannot_be_had_fails_the_import():
    done = run_python("import mig", "sse9")
    assert done.returncode != 0
    assert "mig.errors.KernelError: no kernel is called 'sse9'" in done.stderr


def test_an_empty_mig_kernel_demands_nothing():
    done = run_python(COUNT, "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == _core.kernels().name
