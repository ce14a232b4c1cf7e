"""What the two ends of mig agree to before one of them says what no QEMU knows."""

from __future__ import annotations

from mig.engine.returnpath import ReturnPath
from mig.errors import PeerError
from mig.records import Command
from mig.stream.writer import StreamWriter
from mig.wire import ADAPTIVE_READY, PING_ADAPTIVE

#: seconds that the answer may take: QEMU with multifd reads nothing until its channels have come
_PATIENCE = 10.0


def agree_to_adapt(writer: StreamWriter, answers: ReturnPath, timeout: float | None) -> None:
    """Ask, in a way that every QEMU takes without harm, for multifd-compression adaptive.

    PeerError when the destination is no mig, or one without that parameter. timeout: seconds that
    the answer may take, but no more than ten; None: ten
    """
    writer.put(Command.ping(PING_ADAPTIVE).encode())
    writer.flush()
    refused = (
        "the destination does not take multifd-compression adaptive: it must be mig, with "
        "the same parameter"
    )
    patience = min(timeout or _PATIENCE, _PATIENCE)
    try:
        answers.wait_until(lambda: PING_ADAPTIVE in answers.pongs, patience)
    except PeerError as error:
        if answers.error is not None:
            raise
        raise PeerError(f"{refused} ({error})") from error
    if ADAPTIVE_READY not in answers.pongs:
        raise PeerError(refused)
