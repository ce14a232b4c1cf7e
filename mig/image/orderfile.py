"""OrderFile: the fault order of a kept guest, in a file beside it."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mig.errors import ChannelError, OptionError, StreamError
from mig.guest import SourceGuest
from mig.postcopy.faultorder import MAX_NBYTES, FaultLog, FaultOrder, identity

#: what the name of an image is followed by in the name of its order
SUFFIX = ".order"


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


class OrderFile:
    """What restores of one guest know of the order of its pages, and add to it.

    image:  the guest
    path:   the file; default: beside the image, with SUFFIX
    use:    follow what is in the file. The default one is ignored with a warning when it cannot
            be used; one that was named raises StreamError (no fault order), MismatchError (of
            another guest) or ChannelError (cannot be read)
    record: note requests, for save()
    warn:   told of what is wrong and does not matter

    Restores that share it add to the same order.
    """

    def __init__(
        self,
        image: SourceGuest,
        path: str | os.PathLike[str] | None = None,
        *,
        use: bool = True,
        record: bool = False,
        warn: Callable[[str], None] = _warn,
    ) -> None:
        self._warn = warn
        self._record = record
        self._lock = threading.Lock()
        self._logs: list[FaultLog] = []
        self.path = _beside(image) if path is None else Path(path)
        if self.path is None and record:
            raise OptionError("a guest that is in no file needs a path for its fault order")
        #: what is followed, None: nothing is known
        self.order: FaultOrder | None = None
        self._empty: FaultOrder | None = None
        there = self.path is not None and self.path.exists()
        if use and path is not None and not there and not record:
            raise ChannelError(f"{path}: {os.strerror(errno.ENOENT)}")
        if record or (use and there):
            self._identify(image)
        if use and there:
            self.order = self._load(strict=path is not None)

    def _identify(self, image: SourceGuest) -> None:
        blocks = image.source_blocks()
        page_size = blocks[0].pages.page_size if blocks else 1
        named = [(block.idstr, block.used_length) for block in blocks]
        guest = identity(page_size, named, image.save_devices())
        self._npages = [block.pages.npages for block in blocks]
        self._empty = FaultOrder(page_size, guest, np.empty(0, dtype=np.uint64))

    def _load(self, *, strict: bool) -> FaultOrder | None:
        assert self.path is not None
        assert self._empty is not None
        try:
            order = FaultOrder.decode(_read(self.path))
            order.check(self._empty.page_size, self._empty.guest, self._npages)
        except (StreamError, ChannelError) as error:
            if strict:
                raise type(error)(f"{self.path}: {error}") from error
            self._warn(f"{self.path} is ignored: {error}")
            return None
        return order

    def log(self) -> FaultLog:
        """Return a log for one more restore."""
        log = FaultLog(self.order, record=self._record)
        with self._lock:
            self._logs.append(log)
        return log

    def save(self) -> None:
        """Write what was noted by all restores together; nothing when nothing is recorded.

        The file is replaced as a whole; what goes wrong is a warning. Any thread.
        """
        if not self._record or self.path is None:
            return
        known = self.order or self._empty
        assert known is not None
        with self._lock:
            try:
                _replace(self.path, known.merged(self._logs).encode())
            except OSError as error:
                self._warn(f"{self.path} is not written: {error.strerror}")


def _beside(image: SourceGuest) -> Path | None:
    path = getattr(image, "path", None)
    return None if path is None else Path(f"{os.fspath(path)}{SUFFIX}")


def _read(path: Path) -> bytes:
    """Return what a file has, but no more than a fault order can have and an octet."""
    try:
        # a pipe of that name would be waited for
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with os.fdopen(fd, "rb", closefd=False) as file:
                return file.read(MAX_NBYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise ChannelError(str(error.strerror)) from error


def _replace(path: Path, data: bytes) -> None:
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            # mkstemp makes files for secrets; this one only has numbers of pages
            os.fchmod(fd, 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
