"""What of QEMU's options mig's engine does. A feature that arrives is entered here, only here."""

from __future__ import annotations

from typing import Final

from mig.options.capability import Capability

OUTGOING_CAPABILITIES: Final = frozenset(
    {
        Capability.AUTO_CONVERGE,
        Capability.BACKGROUND_SNAPSHOT,
        Capability.COMPRESS,
        Capability.DIRTY_LIMIT,
        Capability.MAPPED_RAM,
        Capability.MULTIFD,
        Capability.PAUSE_BEFORE_SWITCHOVER,
        Capability.POSTCOPY_PREEMPT,
        Capability.POSTCOPY_RAM,
        Capability.RELEASE_RAM,
        Capability.RETURN_PATH,
        Capability.SWITCHOVER_ACK,
        Capability.VALIDATE_UUID,
        Capability.X_IGNORE_SHARED,
        Capability.XBZRLE,
        Capability.ZERO_COPY_SEND,
    }
)
INCOMING_CAPABILITIES: Final = frozenset(
    {
        Capability.COMPRESS,
        Capability.MAPPED_RAM,
        Capability.MULTIFD,
        Capability.POSTCOPY_BLOCKTIME,
        Capability.POSTCOPY_PREEMPT,
        Capability.POSTCOPY_RAM,
        Capability.RETURN_PATH,
        Capability.SWITCHOVER_ACK,
        Capability.VALIDATE_UUID,
        Capability.X_IGNORE_SHARED,
        Capability.XBZRLE,
    }
)

#: QMP names of the parameters that may differ from their defaults
SUPPORTED_PARAMETERS: Final = frozenset(
    {
        "avail-switchover-bandwidth",
        "compress-level",
        "compress-threads",
        "compress-wait-thread",
        "cpu-throttle-increment",
        "cpu-throttle-initial",
        "cpu-throttle-tailslow",
        "decompress-threads",
        "direct-io",
        "downtime-limit",
        "idle-timeout",
        "max-bandwidth",
        "max-cpu-throttle",
        "max-postcopy-bandwidth",
        "mode",
        "multifd-channels",
        "multifd-compression",
        "multifd-zlib-level",
        "multifd-zstd-level",
        "throttle-trigger-threshold",
        "vcpu-dirty-limit",
        "x-vcpu-dirty-limit-period",
        "xbzrle-cache-size",
        "zero-page-detection",
    }
)

#: values of supported parameters that mig does not do, by QMP names
UNSUPPORTED_VALUES: Final = {"mode": frozenset({"cpr-transfer"})}
