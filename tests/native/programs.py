"""Programs of C, made from csrc/ and this folder: the package is not in them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from workers import locked

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_FLAGS = ["-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", f"-I{_CSRC}"]

# parts of csrc/, by what they do; what lacks one does not link, and the linker says which
KERNELS = frozenset(
    {"bitscan", "bitwords", "cpu", "families", "xbzrle_decode", "xbzrle_encode", "zeropage"}
)
CACHE = KERNELS | {"pagecache"}
PAGES = KERNELS | {"aio", "appender", "bitmap", "pagelog", "ramplace"}
RECORDS = PAGES | {"ramio"}


def tool(name: str, package: str) -> str:
    """Return the path of a tool; the test fails, and names the Debian package, without it."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"no {name}: apt-get install {package}", pytrace=False)
    return path


def run(*command: str | Path, cwd: str | None = None) -> str:
    """Run a command, which must succeed; return what it printed."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


class Builder:
    """Compiles each part of csrc/ once for a compiler and its flags, whatever program it is in.

    folder: of the objects, which pytest's workers share
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self,
        program: Path,
        compiler: str,
        sources: Sequence[str],
        flags: Sequence[str],
        *,
        parts: Collection[str],
        libraries: Sequence[str] = (),
        linked: Sequence[str] = (),
    ) -> Path:
        """Compile sources of this folder together with parts of csrc/; return the program.

        linked: more flags for `sources` and the linker; not for the parts
        """
        objects = self._objects(compiler, flags, parts)
        files = [_HERE / name for name in sources]
        command = [compiler, *_FLAGS, *flags, *linked, *files, *objects, *libraries]
        run(*command, "-o", program)
        return program

    def _objects(self, compiler: str, flags: Sequence[str], parts: Collection[str]) -> list[Path]:
        name = hashlib.sha256(repr((compiler, *flags)).encode()).hexdigest()[:16]
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        objects = [folder / f"{part}.o" for part in sorted(parts)]
        with locked(self._folder / f"{name}.lock"), TemporaryDirectory(dir=self._folder) as new:
            missing = [path for path in objects if not path.exists()]
            if missing:
                files = [_CSRC / f"{path.stem}.c" for path in missing]
                run(compiler, *_FLAGS, *flags, "-c", *files, cwd=new)
            for path in missing:
                (Path(new) / path.name).rename(path)
        return objects
