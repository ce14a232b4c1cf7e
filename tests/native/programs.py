"""Programs of C, made from csrc/ and this folder: the package is not in them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_FLAGS = ["-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", f"-I{_CSRC}"]


def tool(name: str, package: str) -> str:
    """Return the path of a tool; the test fails, and names the Debian package, without it."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"no {name}: apt-get install {package}", pytrace=False)
    return path


def run(*command: str | Path) -> str:
    """Run a command, which must succeed; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def build(
    program: Path,
    compiler: str,
    sources: Sequence[str],
    flags: Sequence[str],
    *,
    codecs: bool = True,
) -> Path:
    """Compile sources of this folder together with csrc/; return the program.

    codecs: False leaves out what needs zlib and zstd, which only this machine's processor has
    """
    parts = [path for path in sorted(_CSRC.glob("*.c")) if codecs or not _needs_codecs(path)]
    libraries = ["-lz", "-lzstd"] if codecs else []
    files = [*(_HERE / name for name in sources), *parts]
    run(compiler, *_FLAGS, *files, *flags, *libraries, "-o", program)
    return program


def _needs_codecs(path: Path) -> bool:
    text = path.read_text()
    headers = ("<zlib.h>", "<zstd.h>", '"codec.h"', '"tally.h"', '"adaptive.h"', '"multifd.h"')
    return any(header in text for header in headers)
