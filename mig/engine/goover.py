"""When to go over to postcopy: policy, apart from its mechanics."""

from __future__ import annotations

from typing import Protocol


class PostcopyPolicy(Protocol):
    """What an outgoing migration asks at each pass over dirty memory. Called by its own thread."""

    def goes_over(self, passes: int, remaining: int) -> bool:
        """Whether the guest is to run at the destination now.

        passes:    that were sent; 0 before the first one
        remaining: bytes that are dirty
        """


class AfterPasses:
    """Goes over when so many passes were sent, if the guest could not be stopped by then.

    With 1 each page is sent once, and then those that were written meanwhile.
    """

    def __init__(self, passes: int = 1) -> None:
        if passes < 0:
            raise ValueError(f"{passes} passes")
        self._passes = passes

    def goes_over(self, passes: int, remaining: int) -> bool:
        """Count."""
        return passes >= self._passes


class WhenStuck:
    """Goes over when passes do not help: what is dirty no longer becomes smaller.

    factor: more than 1; how many times smaller a pass must make it to be worth the next one
    passes: so many in a row that were not worth it; one may be an exception
    """

    def __init__(self, factor: float = 1.25, passes: int = 2) -> None:
        if not factor > 1 or passes < 1:
            raise ValueError(f"factor {factor}, {passes} passes")
        self._factor = factor
        self._passes = passes
        self._best: int | None = None
        self._bad = 0

    def goes_over(self, passes: int, remaining: int) -> bool:
        """Compare with the least that was dirty after a pass."""
        if not passes:
            return False
        if self._best is None or remaining * self._factor <= self._best:
            self._best, self._bad = remaining, 0
        else:
            self._bad += 1
        return self._bad >= self._passes
