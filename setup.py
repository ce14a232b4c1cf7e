"""Extension modules and the guest of `mig selftest`; everything else is in pyproject.toml.

Build switches (environment):
  MIG_WERROR=1            C warnings are errors
  MIG_SANITIZE=1          AddressSanitizer and UndefinedBehaviorSanitizer
"""

import os
import platform
import shlex
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ON_X86_64_LINUX = platform.system() == "Linux" and platform.machine() == "x86_64"
GUEST_SOURCE = "csrc/guest/init.c"
GUEST_FLAGS = ["-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie"]

warnings = ["-Wall", "-Wextra"]
if os.environ.get("MIG_WERROR"):
    warnings.append("-Werror")
compile_args = ["-std=gnu11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden", *warnings]
link_args: list[str] = []
# Cython's own output is not ours to mend
cython_args = ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-sign-compare"]
if os.environ.get("MIG_SANITIZE"):
    sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
    # a third of the time of -O3, which the checks make no faster
    compile_args += [*sanitize, "-O1"]
    link_args += sanitize


class BuildExt(build_ext):
    """Builds the extension, and the static init of the selftest's Linux guest as package data."""

    def run(self) -> None:
        super().run()
        if ON_X86_64_LINUX:
            self.build_guest()

    def build_guest(self) -> None:
        base = Path("mig/selftest") if self.inplace else Path(self.build_lib, "mig/selftest")
        base.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run(
            [*compiler, *GUEST_FLAGS, *warnings, GUEST_SOURCE, "-o", str(base / "guest-init")],
            check=True,
        )

    def get_outputs(self) -> list[str]:
        guest = [str(Path(self.build_lib, "mig/selftest/guest-init"))] if ON_X86_64_LINUX else []
        return [*super().get_outputs(), *guest]


sources = sorted(str(path) for path in Path("csrc").glob("*.c"))
setup(
    ext_modules=cythonize(
        [
            Extension(
                "mig._core",
                ["mig/_core.pyx", *sources],
                include_dirs=["csrc"],
                depends=[*map(str, Path("csrc").glob("*.h")), *map(str, Path("mig").glob("*.pxi"))],
                libraries=["z", "zstd"],
                extra_compile_args=[*compile_args, *cython_args],
                extra_link_args=link_args,
            )
        ],
    ),
    cmdclass={"build_ext": BuildExt},
)
