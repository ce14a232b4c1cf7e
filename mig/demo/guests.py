"""The guests that can be shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from mig.dirty import DirtyLog, WriteTracker
from mig.errors import DirtyLogError
from mig.guest import GuestReport, ProcessGuest
from mig.memory import GuestMemory

#: what the demo calls the dirty logs
LOGS = ("tracked", "marked")


@dataclass(frozen=True, slots=True)
class Options:
    """What to show; names as in ProcessGuest.

    log: who notes writes: the kernel ('tracked') or the guest itself ('marked')
    """

    nbytes: int
    rate: int
    workers: int
    pattern: str
    working_set: float
    fill: str
    log: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo to_json()."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the options for another process."""
        return json.dumps(asdict(self))


def best_log(wanted: str | None) -> tuple[str, str | None]:
    """Return the log to use, and why not a better one; DirtyLogError for one that cannot be had."""
    if wanted == "marked":
        return "marked", None
    try:
        return "tracked", WriteTracker(GuestMemory()).reason
    except DirtyLogError as error:
        if wanted is not None:
            raise
        return "marked", str(error)


def make_guest(options: Options) -> ProcessGuest:
    """Make the guest; the one that is to be received is made of the same options."""
    log: Callable[[GuestMemory], DirtyLog] = WriteTracker
    return ProcessGuest(
        options.nbytes,
        workers=options.workers,
        rate=options.rate,
        pattern=options.pattern,
        working_set=options.working_set,
        fill=options.fill,
        dirty=log if options.log == "tracked" else "marked",
    )


def report_as_dict(report: GuestReport) -> dict[str, Any]:
    """Return a report for another process, or for people who read JSON."""
    return {
        **asdict(report),
        "corrupt": [str(page) for page in report.corrupt],
        "first_refused": [str(page) for page in report.first_refused],
        "ok": report.ok,
    }
