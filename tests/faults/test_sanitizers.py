"""The C half under AddressSanitizer and UndefinedBehaviorSanitizer, without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    *["-g", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-D_GNU_SOURCE"],
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
]


def build(program: Path, *sources: str, flags: list[str]) -> None:
    compiler = shutil.which("clang") or shutil.which("gcc")
    assert compiler, "neither clang nor gcc: apt-get install clang"
    kernels = sorted(str(path) for path in (ROOT / "csrc").glob("*.c"))
    done = subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, *kernels, "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_every_kernel_at_the_end_of_its_memory(tmp_path: Path) -> None:
    build(tmp_path / "driver", str(Path(__file__).with_name("driver.c")), flags=FLAGS)
    assert "scalar: fine" in run(str(tmp_path / "driver"))


def test_fuzz_target(tmp_path: Path) -> None:
    """A few thousand inputs, so that the target cannot rot; fuzz longer by hand."""
    if shutil.which("clang") is None:
        pytest.fail("libFuzzer comes with clang: apt-get install clang")
    flags = [*FLAGS, "-fsanitize=fuzzer"]
    build(tmp_path / "fuzz", str(ROOT / "tests/fuzz/fuzz_ramio.c"), flags=flags)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    page = b"\x5a" * 64
    (corpus / "pages").write_bytes(
        b"\x0c"
        + b"\0\0\0\0\0\0\0\x08\x03ram"
        + page
        + b"\0\0\0\0\0\0\0\x68"
        + page
        + b"\0\0\0\0\0\0\0\xa2\0"
        + b"\0\0\0\0\0\0\0\x10"
    )
    artifacts = f"-artifact_prefix={tmp_path}/"
    run(str(tmp_path / "fuzz"), "-runs=3000", "-seed=1", "-max_len=2048", artifacts, str(corpus))
