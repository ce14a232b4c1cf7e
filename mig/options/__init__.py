"""Capabilities and parameters of QEMU 10.0: names, ranges, rules, and what of them mig does.

`Options.choose` reads and checks everything at once. docs/options.md is generated from the tables.
"""

from mig.options.bitmaps import BitmapAlias, NodeAlias
from mig.options.capability import AGREED, CAPABILITIES, REMOVED_CAPABILITIES, Capability
from mig.options.choose import Options, capabilities_to_qmp, capability_set, unsupported
from mig.options.parameters import (
    REMOVED_PARAMETERS,
    MigMode,
    MultiFDCompression,
    Parameters,
    ParameterSpec,
    ZeroPageDetection,
)
from mig.options.support import (
    INCOMING_CAPABILITIES,
    OUTGOING_CAPABILITIES,
    SUPPORTED_PARAMETERS,
)

__all__ = [
    "AGREED",
    "CAPABILITIES",
    "INCOMING_CAPABILITIES",
    "OUTGOING_CAPABILITIES",
    "REMOVED_CAPABILITIES",
    "REMOVED_PARAMETERS",
    "SUPPORTED_PARAMETERS",
    "BitmapAlias",
    "Capability",
    "MigMode",
    "MultiFDCompression",
    "NodeAlias",
    "Options",
    "ParameterSpec",
    "Parameters",
    "ZeroPageDetection",
    "capabilities_to_qmp",
    "capability_set",
    "unsupported",
]
