"""What is done about a postcopy that is paused, without its owner: policy, apart from mechanics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from mig.errors import MigError


class Attempt(NamedTuple):
    """A recovery to come: in so many seconds, over a connection to ``uri``."""

    seconds: float
    uri: str


class RecoveryPolicy(Protocol):
    """What an outgoing migration asks when its postcopy is paused. Called by its own thread.

    Not asked when the owner has paused it. While it waits for the time to come the owner can still
    recover() or abandon().
    """

    def broken(self, uri: str, error: MigError) -> Attempt | None:
        """A connection to ``uri`` broke, or could not be made. None: let the owner see to it."""

    def recovered(self) -> None:
        """The destination goes on."""


class Retry:
    """Tries again and again, at growing distances.

    uris:    where to, in turn; none: where the connection was that broke
    first:   seconds until the first attempt
    factor:  how many times longer each wait is than the one before
    longest: seconds that are waited at most
    within:  seconds since the break after which it is left to the owner, None: never

    A QEMU that is paused waits for nobody until QMP command migrate-recover gives it an address:
    until then attempts are refused.
    """

    def __init__(
        self,
        *uris: str,
        first: float = 0.2,
        factor: float = 2.0,
        longest: float = 10.0,
        within: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if first < 0 or factor < 1 or longest < first:
            raise ValueError(f"waits from {first} to {longest} s that grow {factor} times")
        self._uris = uris
        self._first, self._factor, self._longest = first, factor, longest
        self._within = within
        self._clock = clock
        self._began: float | None = None
        self._next = first
        #: attempts since the break
        self.attempts = 0

    def broken(self, uri: str, error: MigError) -> Attempt | None:
        """Wait a little longer than the last time."""
        now = self._clock()
        if self._began is None:
            self._began = now
        seconds, self._next = self._next, min(self._next * self._factor, self._longest)
        if self._within is not None:
            left = self._began + self._within - now
            if left <= 0:
                self.recovered()
                return None
            seconds = min(seconds, left)
        if self._uris:
            uri = self._uris[self.attempts % len(self._uris)]
        self.attempts += 1
        return Attempt(seconds, uri)

    def recovered(self) -> None:
        """Begin anew at the next break."""
        self._began = None
        self._next = self._first
        self.attempts = 0
