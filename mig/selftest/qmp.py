# SPDX-License-Identifier: LGPL-2.1-or-later
"""A synchronous QMP connection: the asyncio client runs in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine, Mapping
from typing import TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from mig.selftest.errors import SelftestError

_Result = TypeVar("_Result")


class QmpCommandError(SelftestError):
    """QEMU refused a command."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class QmpConnectionError(SelftestError):
    """The connection is gone, or QEMU did not answer in time."""


class QmpConnection:
    """A connection to one QEMU, over a connected Unix socket that it takes over."""

    def __init__(self, connected: socket.socket, timeout: float = 60) -> None:
        self._timeout = timeout
        self._client = QMPClient()
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._events: list[dict[str, object]] = []
        self._collector: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._call(self._open(connected), "connecting to QMP")
        except SelftestError:
            connected.close()
            self.close()
            raise

    def execute(
        self, command: str, arguments: Mapping[str, object], *, fd: int | None = None
    ) -> object:
        """Run a command, handing over `fd` with it, and return what QEMU returns."""
        return self._call(self._execute(command, arguments, fd), command)

    def events(self) -> list[dict[str, object]]:
        """Return the events received so far."""
        return list(self._events)

    def close(self) -> None:
        """Disconnect and end the thread."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(SelftestError):
            self._call(self._shut(), "disconnecting")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._timeout)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, coroutine: Coroutine[object, object, _Result], what: str) -> _Result:
        if not self._thread.is_alive():
            coroutine.close()
            raise QmpConnectionError(f"{what}: the QMP connection is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(self._timeout)
        except ExecuteError as error:
            raise QmpCommandError(what, error.error_class, str(error)) from error
        except TimeoutError as error:
            future.cancel()
            raise QmpConnectionError(f"{what}: no answer in {self._timeout} seconds") from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpConnectionError(f"{what}: {error or type(error).__name__}") from error

    async def _open(self, connected: socket.socket) -> None:
        await self._client.connect(connected)
        self._collector = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        async for event in self._listener:
            self._events.append(dict(event))

    async def _execute(
        self, command: str, arguments: Mapping[str, object], fd: int | None
    ) -> object:
        if fd is not None:
            self._client.send_fd_scm(fd)
        return await self._client.execute(command, arguments)

    async def _shut(self) -> None:
        try:
            await self._client.disconnect()
        finally:
            if self._collector is not None:
                self._collector.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._collector
