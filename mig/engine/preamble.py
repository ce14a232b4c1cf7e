"""What a stream starts with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mig.engine.outcheck import uses_return_path
from mig.guest import EarlyGuest, SourceGuest
from mig.options import AGREED, Capability
from mig.postcopy.source import advise
from mig.ram.search import PageSearch
from mig.records import Command, FileHeader
from mig.wire import PING_SETUP, CommandType


def preamble(
    guest: SourceGuest, capabilities: frozenset[Capability], search: PageSearch
) -> Iterator[bytes]:
    """Everything before RAM."""
    yield FileHeader().encode()
    configuration = guest.configuration
    if configuration is not None:
        if Capability.VALIDATE_UUID not in capabilities:
            configuration = replace(configuration, uuid=None)
        agreed = tuple(str(name) for name in AGREED if name in capabilities)
        yield replace(configuration, capabilities=agreed or None).encode()
    if uses_return_path(capabilities):
        yield Command(CommandType.OPEN_RETURN_PATH).encode()
        yield Command.ping(PING_SETUP).encode()
    if Capability.POSTCOPY_RAM in capabilities:
        yield advise(search)
    if isinstance(guest, EarlyGuest):
        yield guest.save_early_devices()
