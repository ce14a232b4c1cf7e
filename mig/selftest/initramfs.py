# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's initial file system: one program and the console it writes to."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mig.selftest.errors import SelftestError

_DIRECTORY = 0o040755
_PROGRAM = 0o100755
_CONSOLE = 0o020600
_CONSOLE_DEVICE = (5, 1)


def guest_init() -> bytes:
    """Return the guest's init program, which comes with the package."""
    try:
        return files("mig.selftest").joinpath("guest-init").read_bytes()
    except FileNotFoundError:
        raise SelftestError(
            "the guest program mig/selftest/guest-init is missing: it is built from "
            "csrc/guest/init.c when mig is installed on x86-64 Linux with a C compiler"
        ) from None


def build_initramfs(init: bytes) -> bytes:
    """Return a newc cpio archive with `init` as /init, and /dev/console."""
    archive = b"".join(
        (
            _entry(1, "dev", _DIRECTORY),
            _entry(2, "dev/console", _CONSOLE, device=_CONSOLE_DEVICE),
            _entry(3, "init", _PROGRAM, init),
            _entry(0, "TRAILER!!!", 0),
        )
    )
    return archive + bytes(-len(archive) % 512)


def write_initramfs(path: Path, init: bytes | None = None) -> Path:
    """Write the archive to `path`, with the packaged init unless another is given."""
    path.write_bytes(build_initramfs(guest_init() if init is None else init))
    return path


def _entry(
    inode: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (
        inode,
        mode,
        0,  # user
        0,  # group
        2 if mode == _DIRECTORY else 1,  # links
        0,  # modification time: none, so that the archive is reproducible
        len(data),
        0,  # the archive's own device
        0,
        *device,
        len(encoded),
        0,  # checksum: unused in this format
    )
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
