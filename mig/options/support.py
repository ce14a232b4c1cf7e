"""What of QEMU's options mig's engine does. A feature that arrives is entered here, only here."""

from __future__ import annotations

from typing import Final

from mig.options.capability import Capability

OUTGOING_CAPABILITIES: Final = frozenset({Capability.RETURN_PATH})
INCOMING_CAPABILITIES: Final = frozenset({Capability.RETURN_PATH, Capability.SWITCHOVER_ACK})

#: QMP names of the parameters that may differ from their defaults
SUPPORTED_PARAMETERS: Final = frozenset(
    {"max-bandwidth", "downtime-limit", "direct-io", "idle-timeout"}
)
