"""Opening channels: connecting out, listening for who comes in."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

from mig.channel.base import Channel, grow_pipe
from mig.channel.eventfd import EventFd
from mig.channel.uri import ExecUri, FdUri, FileUri, TcpUri, UnixUri, Uri, parse_uri
from mig.errors import CancelledError, ChannelError, IdleTimeoutError

#: what the socket module takes as an address: its shape depends on the family
Address = tuple[Any, ...] | str

#: connections that may wait to be accepted: all channels of a source with multifd may come at once
_BACKLOG = 512

#: seconds
_LONGEST_POLL = 1e6

#: asked for on unix sockets, whose default of 208 KiB makes both sides wait often
_UNIX_BUFFER = 4 << 20


def _fail(uri: Uri, error: OSError) -> ChannelError:
    return ChannelError(f"{uri}: {error.strerror or error}")


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _channel(sock: socket.socket, uri: Uri, timeout: float | None) -> Channel:
    _tune(sock)
    return Channel(sock.detach(), str(uri), timeout=timeout)


def _addresses(uri: TcpUri, *, passive: bool) -> list[tuple[int, tuple[Any, ...]]]:
    flags = socket.AI_PASSIVE if passive else 0
    try:
        found = socket.getaddrinfo(uri.host or None, uri.port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise ChannelError(f"{uri}: {error.strerror}") from error
    except UnicodeError as error:
        raise ChannelError(f"{uri}: not a host name") from error
    return [(family, address) for family, _, _, _, address in found]


def _shell(command: str, uri: Uri, *, reading: bool, timeout: float | None) -> Channel:
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=None if reading else pipe,
            stdout=pipe if reading else None,
            # so that what the shell starts can be ended with it
            process_group=0,
        )
    except OSError as error:
        raise _fail(uri, error) from error
    stream = process.stdout if reading else process.stdin
    assert stream is not None
    fd = os.dup(stream.fileno())
    stream.close()
    grow_pipe(fd)
    return Channel(fd, str(uri), timeout=timeout, process=process)


def _inherited(uri: FdUri, timeout: float | None) -> Channel:
    try:
        # our own copy: the caller's descriptor stays the caller's
        return Channel(os.dup(uri.fd), str(uri), timeout=timeout)
    except OSError as error:
        raise _fail(uri, error) from error


# ---- out -------------------------------------------------------------------------------------


class Cancel(EventFd):
    """A request to give up that ends waits in poll()."""

    def wait(self, fds: dict[int, int], timeout: float | None) -> list[int]:
        """Wait for events; returns the ready descriptors.

        fds: poll events by descriptor. CancelledError when set, IdleTimeoutError when nothing
        happens for ``timeout`` seconds.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        for fd, events in fds.items():
            poll.register(fd, events)
        ready: list[int] = []
        while not ready and (timeout is None or timeout >= 0):
            # poll() takes no more than 2^31 ms
            part = None if timeout is None else min(timeout, _LONGEST_POLL)
            ready = [fd for fd, _ in poll.poll(None if part is None else part * 1000)]
            timeout = None if timeout is None or part is None else timeout - part or -1
        if self.fd in ready:
            raise CancelledError("cancelled")
        if not ready:
            raise IdleTimeoutError("timed out")
        return ready


def _connect_socket(
    family: int, address: Address, cancel: Cancel, timeout: float | None
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            cancel.wait({sock.fileno(): select.POLLOUT}, timeout)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(text: str, cancel: Cancel, timeout: float | None = None) -> Channel:
    """Open the channel that a source writes to.

    timeout: idle limit in seconds of connecting and of every wait on the channel, None: none
    """
    uri = parse_uri(text)
    match uri:
        case TcpUri():
            last: ChannelError | None = None
            for family, address in _addresses(uri, passive=False):
                try:
                    return _channel(_connect_socket(family, address, cancel, timeout), uri, timeout)
                except OSError as error:
                    last = _fail(uri, error)
            raise last or ChannelError(f"{uri}: no address")
        case UnixUri(path):
            try:
                sock = _connect_socket(socket.AF_UNIX, path, cancel, timeout)
            except OSError as error:
                raise _fail(uri, error) from error
            return _channel(sock, uri, timeout)
        case FdUri():
            return _inherited(uri, timeout)
        case ExecUri(command):
            return _shell(command, uri, reading=False, timeout=timeout)
        case FileUri(path, offset):
            return _open_for_writing(uri, path, offset)


def _open_for_writing(uri: Uri, path: str, offset: int) -> Channel:
    """As QEMU does: what stands before the offset stays, what stood after it goes."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, offset)
            os.lseek(fd, offset, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise _fail(uri, error) from error
    return Channel(fd, str(uri))


# ---- in --------------------------------------------------------------------------------------


class Listener:
    """Waits for the connections of a source.

    uri: the address as bound: a port 0 is replaced by the one that was chosen

    For fd:, exec: and file: there is nothing to wait for: the first accept() opens it, and there
    is no second.
    """

    def __init__(self, text: str) -> None:
        uri = parse_uri(text)
        self._sockets: list[socket.socket] = []
        self._single: Uri | None = None
        self._path: str | None = None
        match uri:
            case TcpUri():
                uri = self._listen_tcp(uri)
            case UnixUri(path):
                self._listen_unix(uri, path)
            case _:
                self._single = uri
        self._uri = uri
        self.uri = str(uri)

    def _listen_tcp(self, uri: TcpUri) -> TcpUri:
        try:
            for family, address in _addresses(uri, passive=True):
                sock = socket.socket(family, socket.SOCK_STREAM)
                self._sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # every address of the name gets the same port, also when it was ours to choose
                sock.bind((address[0], uri.port, *address[2:]))
                sock.listen(_BACKLOG)
                sock.setblocking(False)
                uri = TcpUri(uri.host, sock.getsockname()[1])
        except OSError as error:
            self.close()
            raise _fail(uri, error) from error
        return uri

    def _listen_unix(self, uri: Uri, path: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sockets.append(sock)
        try:
            # a socket left over from an earlier listener would make bind fail
            if _is_stale(path):
                Path(path).unlink()
            sock.bind(path)
            self._path = path
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            self.close()
            raise _fail(uri, error) from error

    @property
    def accepts_more(self) -> bool:
        """Whether further connections can come."""
        return bool(self._sockets)

    def accept(self, cancel: Cancel, timeout: float | None = None) -> Channel:
        """Wait, without limit, for a connection.

        timeout: idle limit in seconds of the channel, None: none
        """
        if self._single is not None:
            return self._open_single(self._single, timeout)
        while True:
            ready = cancel.wait({s.fileno(): select.POLLIN for s in self._sockets}, None)
            for sock in self._sockets:
                if sock.fileno() in ready:
                    # who knocked may have gone again
                    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                        return self._accept_from(sock, timeout)

    def accept_waiting(self, timeout: float | None = None) -> Channel | None:
        """Return a connection that is there already, None when there is none; else as accept()."""
        for sock in self._sockets:
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                return self._accept_from(sock, timeout)
        return None

    def _accept_from(self, sock: socket.socket, timeout: float | None) -> Channel:
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            raise
        except OSError as error:
            raise _fail(self._uri, error) from error
        connection.setblocking(True)
        return _channel(connection, self._uri, timeout)

    def _open_single(self, uri: Uri, timeout: float | None) -> Channel:
        match uri:
            case FdUri():
                return _inherited(uri, timeout)
            case ExecUri(command):
                return _shell(command, uri, reading=True, timeout=timeout)
            case FileUri(path, offset):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    os.lseek(fd, offset, os.SEEK_SET)
                except OSError as error:
                    raise _fail(uri, error) from error
                return Channel(fd, str(uri), timeout=timeout)
        raise AssertionError(uri)

    def close(self) -> None:
        """Stop listening and remove a unix socket's path."""
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(self._path).unlink()
            self._path = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_stale(path: str) -> bool:
    """Whether ``path`` is a socket that nobody listens on.

    Asked with a datagram socket: a listener refuses it as of the wrong type, and does not notice.
    """
    if not Path(path).is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED
