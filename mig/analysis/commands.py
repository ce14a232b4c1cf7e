"""What commands carry, by name."""

from __future__ import annotations

from typing import Any

from mig.postcopy.commands import Advise, Discard, idstr_of
from mig.records import Command
from mig.wire import CommandType


def arguments_of(command: Command) -> dict[str, Any]:
    """Return what a command says; ValueError when its data are wrong."""
    match command.type:
        case CommandType.PING:
            return {"value": command.value}
        case CommandType.PACKAGED:
            return {"nbytes": command.value}
        case CommandType.POSTCOPY_ADVISE:
            advise = Advise.parse(command.data)
            if advise is None:
                return {}
            return {"page-sizes": advise.page_sizes, "target-page": advise.target_page}
        case CommandType.POSTCOPY_RAM_DISCARD:
            discard = Discard.parse(command.data)
            return {"block": discard.idstr, "ranges": [list(pair) for pair in discard.ranges]}
        case CommandType.RECV_BITMAP:
            return {"block": idstr_of(command)}
        case _:
            return {}
