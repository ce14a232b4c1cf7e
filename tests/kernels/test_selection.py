"""Which kernels there are, which is the default, and what MIG_KERNEL demands."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mig import _core
from mig.errors import KernelError

FAMILIES = ("avx512", "avx512-256", "avx2", "sse2", "neon", "scalar")
#: what has to be in a build for each architecture, and what each of its CPUs runs
BUILT = {
    "x86_64": {"avx512", "avx512-256", "avx2", "sse2", "scalar"},
    "aarch64": {"neon", "scalar"},
}.get(platform.machine(), {"scalar"})
EVERYWHERE = BUILT & {"sse2", "neon", "scalar"}

#: asks the default family for everything it does and looks at every bit and byte itself
WORK = """
import random, mig
from mig import _core
rng = random.Random(1)
bitmap = mig.Bitmap(5000)
for _ in range(2000):
    bitmap.set(rng.randrange(5000))
bits = list(bitmap)
for _ in range(300):
    first = rng.randrange(5000)
    nbits = rng.randrange(5000 - first)
    assert bitmap.count(first, nbits) == sum(bits[first:first + nbits])
    assert bitmap.indexes(first).tolist() == [i for i in range(first, 5000) if bits[i]]
assert sum(end - first for first, end in bitmap.runs().tolist()) == sum(bits)
other = mig.Bitmap(5000, fill=True)
other -= bitmap
assert bitmap.merge(other) == 5000 - sum(bits)
data = bytearray(64 * 4096)
for page in range(0, 64, 3):
    data[page * 4096 + rng.randrange(4096)] = 1
zero, count = mig.zero_pages(data)
assert zero.indexes().tolist() == [page for page in range(64) if page % 3]
assert count == 42 and mig.is_zero(bytes(5000)) and not mig.is_zero(data)
print(_core.KERNELS.name)
"""


def run_python(code: str, kernel: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MIG_KERNEL"}
    if kernel is not None:
        environment["MIG_KERNEL"] = kernel
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def possible_defaults() -> list[str]:
    """Which of the two that have AVX-512 is faster is measured, and either may be."""
    usable = _core.kernel_names(usable=True)
    return list(usable[:2] if usable[0] == "avx512" else usable[:1])


def test_the_families_are_known_by_name_and_best_first():
    assert _core.kernel_names() == FAMILIES


def test_scalar_is_always_there():
    assert _core.kernels("scalar").name == "scalar"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_in_every_build_for_its_architecture_and_in_no_other(name):
    refusal = ""
    try:
        assert _core.kernels(name).name == name
    except KernelError as error:
        refusal = str(error)
    if name not in BUILT:
        assert refusal == f"kernel {name!r} is not in this build of mig"
    elif name in EVERYWHERE:
        assert refusal == ""
    else:
        assert refusal in ("", f"this CPU cannot run kernel {name!r}")


def test_a_cpu_that_runs_a_family_runs_those_below_it():
    # one that has AVX-512 has AVX2; the two with AVX-512 want the same of it
    usable = _core.kernel_names(usable=True)
    assert ("avx512" in usable) == ("avx512-256" in usable)
    assert "avx2" in usable or "avx512" not in usable
    assert set(usable) >= EVERYWHERE


def test_a_family_answers_by_its_own_name(kernels):
    assert _core.kernels(kernels.name).name == kernels.name
    assert repr(kernels) == f"<Kernels {kernels.name!r}>"


def test_the_default_is_the_best_that_this_cpu_runs():
    for _ in range(20):
        assert _core.kernels().name in possible_defaults()
        assert _core.kernels(None).name in possible_defaults()


@pytest.mark.parametrize(
    "name",
    ["", "sse9", "SCALAR", "scalar ", " scalar", "avx", "avx51", "avx512-25", "avx512-2566", "é"],
)
def test_an_unknown_family_is_refused_with_the_list_of_those_there_are(name):
    with pytest.raises(KernelError, match="scalar") as caught:
        _core.kernels(name)
    assert str(caught.value) == f"no kernel is called {name!r}; there are {', '.join(FAMILIES)}"


def test_a_name_does_not_end_at_a_zero_byte():
    with pytest.raises((KernelError, ValueError)):
        _core.kernels("scalar\0and more")


# ---- MIG_KERNEL ------------------------------------------------------------------------------


def test_mig_kernel_is_used_and_gives_the_right_answers(kernels):
    done = run_python(WORK, kernels.name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kernels.name


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - BUILT))
def test_a_mig_kernel_that_is_not_built_fails_the_import(name):
    done = run_python("import mig", name)
    assert done.returncode != 0
    assert f"mig.errors.KernelError: kernel {name!r} is not in this build of mig" in done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", "scalar ", "avx512-"])
def test_a_mig_kernel_that_nobody_knows_fails_the_import(name):
    done = run_python("import mig", name)
    assert done.returncode != 0
    assert f"mig.errors.KernelError: no kernel is called {name!r}; there are" in done.stderr
    for known in FAMILIES:
        assert known in done.stderr


@pytest.mark.parametrize("kernel", ["", None])
def test_an_empty_mig_kernel_demands_nothing_and_neither_does_none(kernel):
    done = run_python(WORK, kernel)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in possible_defaults()


def test_kernels_of_no_name_are_the_scalar_ones():
    # the type can be called, and must not crash
    assert type(_core.KERNELS)().name == "scalar"
