"""Other processes that map a guest's memory, and wait for its pages in postcopy as it does."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mig import _core
from mig.dirty.track import is_anonymous
from mig.pages import HOST_PAGE_SIZE
from mig.postcopy.faults import unit_of

if TYPE_CHECKING:
    from mig.memory import GuestMemory


@dataclass(frozen=True, slots=True)
class SharedMapping:
    """A part of a block as another process maps it; all of it in whole pages of the block's host.

    address: where it begins in that process
    offset:  first byte of the block
    nbytes:  length; None: up to the end of the block
    """

    idstr: str
    address: int
    offset: int = 0
    nbytes: int | None = None


class SharedClients:
    """The processes that a guest shares memory with. Any thread."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._clients: list[_core.FaultClient] = []
        self._server: _core.FaultServer | None = None

    def register(self, fd: int, mappings: Iterable[SharedMapping]) -> _core.FaultClient:
        """Serve one, now or when pages begin to be missing.

        ValueError for a descriptor that is none of a userfaultfd, and for memory that is not shared
        or not there; OSError for too many clients.
        """
        client = _core.FaultClient(fd, [self._checked(mapping) for mapping in mappings])
        with self._lock:
            if self._server is not None:
                self._server.add_client(client)
            self._clients.append(client)
        return client

    def _checked(self, mapping: SharedMapping) -> tuple[bytes, int, int, int]:
        try:
            block = self._memory[mapping.idstr]
        except KeyError:
            raise ValueError(f"there is no block '{mapping.idstr}'") from None
        if is_anonymous(block):
            raise ValueError(f"block '{block.idstr}' is memory of this process alone")
        unit, offset, address = unit_of(block), mapping.offset, mapping.address
        nbytes = block.used_length - offset if mapping.nbytes is None else mapping.nbytes
        if not (0 <= offset < offset + nbytes <= block.used_length and 0 < address < 1 << 63):
            raise ValueError(
                f"{nbytes} bytes at {offset} of block '{block.idstr}', mapped at {address:#x}"
            )
        if offset % unit or nbytes % unit or address % HOST_PAGE_SIZE:
            raise ValueError(f"a mapping of block '{block.idstr}' is not made of pages of {unit}")
        return block.idstr.encode(), offset, nbytes, address

    def unregister(self, client: _core.FaultClient) -> None:
        """Serve it no more: its memory is as any other there. More than once is the same."""
        with self._lock:
            self._forget(client)

    def _forget(self, client: _core.FaultClient) -> None:
        if client in self._clients:
            self._clients.remove(client)
            if self._server is not None:
                self._server.remove_client(client)
            client.end()

    def begin(self, server: _core.FaultServer) -> None:
        """Have them served; ValueError, OSError."""
        with self._lock:
            self._server = server
            for client in self._clients:
                server.add_client(client)

    def end(self) -> None:
        """Pages are missing no more: who waits goes on, with what is there."""
        with self._lock:
            for client in tuple(self._clients):
                self._forget(client)
            self._server = None
