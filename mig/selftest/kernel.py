# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Linux kernel for the self-test guest: the system's, a cached one, or Debian's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mig.selftest.errors import SelftestError
from mig.selftest.packages import (
    PrivateApt,
    debian_codename,
    default_cache,
    extract_one,
    locked,
    workspace,
)

_VARIABLE = "MIG_SELFTEST_KERNEL"
_METAPACKAGE = "linux-image-cloud-amd64"
_ADVICE = f"apt-get install {_METAPACKAGE}, or set {_VARIABLE} to an x86-64 vmlinuz"


def find_kernel(
    explicit: str | None = None, *, boot: Path = Path("/boot"), fetch: bool = True
) -> Path:
    """Return a kernel to boot the guest with, fetching one when none is found.

    The order is: `explicit`, $MIG_SELFTEST_KERNEL, a readable kernel in /boot (the newest,
    and cloud kernels first: they boot fastest), the cache, and `fetch_kernel`.
    """
    for named in (explicit, os.environ.get(_VARIABLE)):
        if named:
            return _readable(Path(named))
    cache = default_cache() / "kernel"
    for candidates in (
        boot.glob("vmlinuz*-cloud-amd64"),
        boot.glob("vmlinuz-*"),
        cache.glob("vmlinuz-*"),
    ):
        newest = _newest(candidates)
        if newest is not None:
            return newest
    if not fetch:
        raise SelftestError(f"there is no readable kernel in {boot} or {cache}: {_ADVICE}")
    return fetch_kernel(cache)


def fetch_kernel(cache_dir: Path | None = None) -> Path:
    """Fetch Debian's cloud kernel into `cache_dir`, once, without root; return it."""
    cache = default_cache() / "kernel" if cache_dir is None else cache_dir
    try:
        with locked(cache, "kernel"):
            return _newest(cache.glob("vmlinuz-*")) or _download(cache)
    except (SelftestError, OSError) as error:
        raise SelftestError(f"no kernel for the guest: {error}; {_ADVICE}") from error


def _download(cache: Path) -> Path:
    with workspace(cache) as directory:
        apt = PrivateApt(directory, (debian_codename(),))
        concrete = [
            name for name in apt.dependencies(_METAPACKAGE) if re.match(r"linux-image-\d", name)
        ]
        if not concrete:
            raise SelftestError(f"{_METAPACKAGE} depends on no kernel")
        (package,) = apt.download(concrete[:1])
        unpacked = directory / "vmlinuz"
        kernel = cache / extract_one(package, r"/boot/vmlinuz-[^/]+$", unpacked)
        # A rename, so that nobody ever sees half of it.
        return unpacked.rename(kernel)


def _readable(path: Path) -> Path:
    if not path.is_file() or not os.access(path, os.R_OK):
        raise SelftestError(f"the kernel {path} is not a file that can be read")
    return path


def _newest(candidates: Iterable[Path]) -> Path | None:
    usable = [path for path in candidates if path.is_file() and os.access(path, os.R_OK)]
    # Rescue kernels are named without a version and would sort as the newest.
    versioned = [path for path in usable if re.search(r"-\d", path.name)]
    return max(versioned, key=_version, default=None)


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]
