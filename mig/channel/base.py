"""The Channel: one connection, file or command, read and written through descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Self

from mig._core import Descriptor, OutQueue, PageFile
from mig.errors import CancelledError, ChannelError, IdleTimeoutError

#: how long a peer that is to be told of a failure may keep us waiting (seconds)
LAST_WORDS = 1.0
#: Linux's number, which the socket module has from Python 3.12 on
_TCP_NOTSENT_LOWAT = 25
#: bytes that a socket may hold beyond those that are under way: enough to keep a wire busy for the
#: time that a sender takes to wake up
_SHORT_QUEUE = 128 << 10


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


class Channel:
    """Bytes in and out. Satisfies `mig.stream.reader.Source` and `mig.stream.writer.Sink`.

    fd:            owned by the channel from now on
    bidirectional: whether the same connection can carry a return path
    process:       the command at the other end of a pipe, leader of a process group

    One thread may read while another writes; `cancel` may be called by any thread and ends every
    wait with CancelledError.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        timeout: float | None = None,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.name = name
        self.bidirectional = _is_socket(fd)
        self._fd = fd
        self._direct_fd = -1
        self._process = process
        self._cancelled = False
        self._was_blocking = False
        if not self.bidirectional:
            # Waiting is done in poll(), together with the cancel descriptor. Sockets need no
            # flag for that, and the flag of an inherited one would be seen by its other owners.
            self._was_blocking = os.get_blocking(fd)
            os.set_blocking(fd, False)
        self._cancel_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._in = self._descriptor(timeout)
        self._out = self._descriptor(timeout)

    def _descriptor(self, timeout: float | None) -> Descriptor:
        return Descriptor(
            self._fd, cancel_fd=self._cancel_fd, is_socket=self.bidirectional, timeout=timeout
        )

    @property
    def timeout(self) -> float | None:
        """Seconds that reading may wait for a byte, None for ever."""
        return self._in.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._in.timeout = seconds

    def readinto(self, data: bytearray, start: int, at_least: int) -> int:
        """Fill ``data[start:]`` with ``at_least`` bytes or more; fewer mean end of stream."""
        self._check_cancelled()
        return self._in.readinto(data, start, at_least)

    def send(self, out: OutQueue) -> int:
        """Write and empty the queue; returns the number of bytes."""
        self._check_cancelled()
        return self._out.send(out)

    def read_by(self, loop: Callable[[Descriptor], None]) -> None:
        """Have a loop read that stays in C; `cancel` ends it."""
        self._check_cancelled()
        loop(self._in)

    def write_by(self, loop: Callable[[Descriptor], None]) -> None:
        """Have a loop write that stays in C; `cancel` ends it."""
        self._check_cancelled()
        loop(self._out)

    @property
    def peer(self) -> object:
        """Who is at the other end of a socket, to be compared: a process of this machine, or an
        address without port; None where nobody can tell.
        """
        if not self.bidirectional:
            return None
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as sock:
            if sock.family == socket.AF_UNIX:
                credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                return int.from_bytes(credentials[:4], sys.byteorder) or None
            return str(sock.getpeername()[0])
        return None

    @property
    def writes_to(self) -> Descriptor:
        """What it writes to; for who writes by turns with others, and lets go before close()."""
        return self._out

    def keep_queue_short(self) -> None:
        """What is sent from now on is not to wait behind much that was sent before.

        A socket takes megabytes that nobody has read yet; send() now waits instead.
        """
        if self.bidirectional:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as sock:
                if sock.family == socket.AF_UNIX:
                    # what the kernel keeps beside the bytes counts, too
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SHORT_QUEUE)
                else:
                    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _SHORT_QUEUE)

    # ---- regular files ----------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Offset of the file that is read or written next; ChannelError when there is none."""
        return self._seek(0)

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._fd).st_size

    def skip(self, nbytes: int) -> None:
        """Go forward without reading or writing; what is written behind leaves a hole."""
        self._seek(nbytes)

    def _seek(self, nbytes: int) -> int:
        try:
            return os.lseek(self._fd, nbytes, os.SEEK_CUR)
        except OSError as error:
            raise ChannelError(f"{self.name}: {error.strerror}") from error

    def page_file(self, *, nthreads: int = 1, direct_io: bool = False) -> PageFile:
        """Return what reads or writes pages at fixed places of the file, until close().

        direct_io: around the page cache where the file system can
        """
        if direct_io and self._direct_fd < 0:
            mode = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE
            # not every file system can
            with contextlib.suppress(OSError):
                flags = mode | os.O_DIRECT | os.O_CLOEXEC
                self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", flags)
        direct_fd = self._direct_fd if direct_io else -1
        return PageFile(self._fd, direct_fd=direct_fd, nthreads=nthreads)

    # ---- ends -------------------------------------------------------------------------------

    def check_cancelled(self) -> None:
        """CancelledError after cancel(), for who works on the file beside the channel."""
        self._check_cancelled()

    def _check_cancelled(self) -> None:
        # a peer that never lets us wait would never let us see the cancel descriptor
        if self._cancelled:
            raise CancelledError("cancelled")

    def fileno(self) -> int:
        """Return the descriptor, to wait for it; it stays the channel's."""
        return self._fd

    def cancel(self) -> None:
        """End every present and future wait. Any thread, any number of times."""
        self._cancelled = True
        if self._cancel_fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._cancel_fd, 1)

    def restore(self) -> None:
        """Undo cancel(), for last words: what is written now must not wait long."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._cancel_fd)
        self._cancelled = False
        self._out.timeout = LAST_WORDS

    def finish(self) -> None:
        """Nothing more will be written: tell the reader, and wait for a command to end.

        ChannelError when the command failed, IdleTimeoutError when it does not end.
        """
        if self.bidirectional:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as sock:
                sock.shutdown(socket.SHUT_WR)
        elif self._process is not None:
            self._close_fd()
            self._wait_for_exit(self._process.pid)
            code = self._process.wait()
            if code:
                raise ChannelError(f"command ended with status {code}: {self.name}")

    def _wait_for_exit(self, pid: int) -> None:
        """Wait for the command, which may take its time with what it was given."""
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.register(self._cancel_fd, select.POLLIN)
            limit = self._out.timeout
            ready = [fd for fd, _ in poll.poll(None if limit is None else limit * 1000)]
        finally:
            os.close(pidfd)
        self._check_cancelled()
        if not ready:
            raise IdleTimeoutError(f"command does not end: {self.name}")

    def _close_fd(self) -> None:
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1
        if self._fd >= 0:
            if self._was_blocking:
                with contextlib.suppress(OSError):
                    os.set_blocking(self._fd, True)
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Release everything; a command that is still running is killed."""
        self._close_fd()
        if self._process is not None:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._cancel_fd >= 0:
            os.close(self._cancel_fd)
            self._cancel_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def grow_pipe(fd: int, nbytes: int = 1 << 20) -> None:
    """Let a pipe hold more, so that writer and reader wait for each other less often."""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, nbytes)
