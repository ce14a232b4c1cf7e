"""A link between the ends of a migration that breaks after so many bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path


class Cutter:
    """Passes unix connections on to ``target``, and cuts them all, once, at a given byte.

    forward, backward: bytes that pass from who connects, and to him, None: all
    """

    def __init__(
        self, path: Path, target: str, *, forward: int | None = None, backward: int | None = None
    ) -> None:
        self.uri, self._target = f"unix:{path}", target.removeprefix("unix:")
        self._left = {True: forward, False: backward}
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.cuts = 0
        self._spawn(self._accept)

    def _spawn(self, work, *arguments) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            self._sockets += [near, far]
            try:
                far.connect(self._target)
            except OSError:
                near.shutdown(socket.SHUT_RDWR)
                continue
            self._spawn(self._pass_on, near, far, True)
            self._spawn(self._pass_on, far, near, False)

    def _pass_on(self, one: socket.socket, other: socket.socket, forward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 14):
                with self._lock:
                    left = self._left[forward]
                    if left is not None:
                        self._left[forward] = max(left - len(data), 0)
                if left is not None and left <= len(data):
                    other.sendall(data[:left])
                    self._cut()
                    return
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        self.cuts += 1
        for end in tuple(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in tuple(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()
