"""NewFile: a file that appears, complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from mig.errors import ChannelError


class NewFile:
    """A file that is being written and has no name yet.

    path:  the name that it is to have
    fsync: have it on stable storage before commit() returns

    ChannelError where it cannot be made, or `path` is something else than a regular file.
    """

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = False) -> None:
        self.path = Path(path)
        self._fsync = fsync
        #: the file; -1 when it is closed
        self.fd = -1
        self._direct_fd = -1
        self._partial: Path | None = None
        try:
            regular = stat.S_ISREG(self.path.stat().st_mode)
        except FileNotFoundError:
            regular = True
        except OSError as error:
            raise ChannelError(f"{self.path}: {error.strerror}") from error
        if not regular:
            raise ChannelError(f"{self.path} exists and is not a regular file")
        self.fd = self._open()

    def _open(self) -> int:
        """A file without a name where the file system can, else one that abort() removes."""
        folder = self.path.parent
        try:
            with contextlib.suppress(OSError, AttributeError):
                return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self._partial = self._beside()
            return os.open(self._partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ChannelError(f"{self.path}: {error.strerror}") from error

    def _beside(self) -> Path:
        # the name of the file itself may be as long as a name can be
        return self.path.with_name(f".mig-{secrets.token_hex(8)}.partial")

    @property
    def direct_fd(self) -> int:
        """The same file opened with O_DIRECT, to be written by whole blocks; -1: it cannot be."""
        if self._direct_fd < 0:
            # not every file system can
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
                self._direct_fd = os.open(f"/proc/self/fd/{self.fd}", flags)
        return self._direct_fd

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Have errors say which file it is."""
        try:
            yield
        except ChannelError as error:
            raise ChannelError(f"{self.path}: {error}") from error
        except OSError as error:
            raise ChannelError(f"{self.path}: {error.strerror}") from error

    # ---- ends -------------------------------------------------------------------------------

    def commit(self) -> None:
        """Give the file its name, replacing an older one, and close it."""
        with self.naming():
            if self._fsync:
                os.fsync(self.fd)
            os.fchmod(self.fd, 0o666 & ~_umask())
            if self._partial is None:
                self._partial = self._give_name()
            self._partial.replace(self.path)
            self._partial = None
            if self._fsync:
                _fsync_folder(self.path.parent)
        self.close()

    def _give_name(self) -> Path:
        """Link the nameless file beside its place: linkat() itself would not replace a file."""
        partial = self._beside()
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # only with a directory descriptor does Python follow the link in /proc
            source = f"/proc/self/fd/{self.fd}"
            os.link(source, partial.name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)
        return partial

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._partial is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink()
            self._partial = None
        self.close()

    def close(self) -> None:
        """Release the descriptors."""
        for fd in (self.fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._direct_fd = -1


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    with Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
