"""Which options do not go together, in QEMU 10.0's words.

What depends on the host or on the guest is left to the engine: userfaultfd for postcopy-ram and
background-snapshot, KVM's dirty ring for dirty-limit, the kind of URI for multifd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mig.options.capability import Capability as Cap

if TYPE_CHECKING:
    from mig.options.parameters import Parameters


def _always(parameters: Parameters) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """Broken when every capability of ``on`` is on, ``without`` is off, and ``given`` holds.

    words: what QEMU says then
    """

    words: str
    on: frozenset[Cap]
    without: Cap | None = None
    given: Callable[[Parameters], bool] = _always

    def broken(self, capabilities: frozenset[Cap], parameters: Parameters) -> bool:
        """Whether the options break the rule."""
        if not self.on <= capabilities or self.without in capabilities:
            return False
        return self.given(parameters)


def _compressed(parameters: Parameters) -> bool:
    return parameters.multifd_compression != "none"


def _encrypted(parameters: Parameters) -> bool:
    return parameters.tls_creds != ""


def _cpr(parameters: Parameters) -> bool:
    return parameters.mode != "normal"


def _throttle_empty(parameters: Parameters) -> bool:
    return parameters.max_cpu_throttle < parameters.cpu_throttle_initial


_ZERO_COPY = "Zero copy only available for non-compressed non-TLS multifd migration"

#: what a background snapshot cannot go with
_NOT_IN_SNAPSHOT = (
    Cap.POSTCOPY_RAM,
    Cap.DIRTY_BITMAPS,
    Cap.POSTCOPY_BLOCKTIME,
    Cap.LATE_BLOCK_ACTIVATE,
    Cap.RETURN_PATH,
    Cap.MULTIFD,
    Cap.PAUSE_BEFORE_SWITCHOVER,
    Cap.AUTO_CONVERGE,
    Cap.RELEASE_RAM,
    Cap.RDMA_PIN_ALL,
    Cap.COMPRESS,
    Cap.XBZRLE,
    Cap.X_COLO,
    Cap.VALIDATE_UUID,
    Cap.ZERO_COPY_SEND,
)


def _both(first: Cap, second: Cap) -> frozenset[Cap]:
    return frozenset({first, second})


def _one(capability: Cap) -> frozenset[Cap]:
    return frozenset({capability})


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "Parameter 'max-cpu-throttle' expects an integer in the range of cpu-throttle-initial "
        "to 99",
        frozenset(),
        given=_throttle_empty,
    ),
    Rule(
        "Postcopy is not compatible with ignore-shared",
        _both(Cap.POSTCOPY_RAM, Cap.X_IGNORE_SHARED),
    ),
    Rule("Postcopy is not yet compatible with multifd", _both(Cap.POSTCOPY_RAM, Cap.MULTIFD)),
    *(
        Rule(
            f"Background-snapshot is not compatible with {other}",
            _both(Cap.BACKGROUND_SNAPSHOT, other),
        )
        for other in _NOT_IN_SNAPSHOT
    ),
    Rule(_ZERO_COPY, _one(Cap.ZERO_COPY_SEND), without=Cap.MULTIFD),
    Rule(_ZERO_COPY, _both(Cap.ZERO_COPY_SEND, Cap.XBZRLE)),
    Rule(_ZERO_COPY, _one(Cap.ZERO_COPY_SEND), given=_compressed),
    Rule(_ZERO_COPY, _one(Cap.ZERO_COPY_SEND), given=_encrypted),
    Rule(
        "Postcopy preempt requires postcopy-ram",
        _one(Cap.POSTCOPY_PREEMPT),
        without=Cap.POSTCOPY_RAM,
    ),
    Rule(
        "Capability 'switchover-ack' requires capability 'return-path'",
        _one(Cap.SWITCHOVER_ACK),
        without=Cap.RETURN_PATH,
    ),
    Rule(
        "dirty-limit conflicts with auto-converge either of then available currently",
        _both(Cap.DIRTY_LIMIT, Cap.AUTO_CONVERGE),
    ),
    Rule(
        "Postcopy is not currently compatible with compression",
        _both(Cap.POSTCOPY_RAM, Cap.COMPRESS),
    ),
    Rule("Multifd is not compatible with compress", _both(Cap.MULTIFD, Cap.COMPRESS)),
    Rule(
        "Mapped-ram migration is incompatible with compression", _both(Cap.MAPPED_RAM, Cap.COMPRESS)
    ),
    Rule("Multifd is not compatible with xbzrle", _both(Cap.MULTIFD, Cap.XBZRLE)),
    Rule("Mapped-ram migration is incompatible with xbzrle", _both(Cap.MAPPED_RAM, Cap.XBZRLE)),
    Rule(
        "Mapped-ram migration is incompatible with postcopy",
        _both(Cap.MAPPED_RAM, Cap.POSTCOPY_RAM),
    ),
    Rule("Cannot use TLS with mapped-ram", _one(Cap.MAPPED_RAM), given=_encrypted),
    Rule("Cannot use compression with mapped-ram", _one(Cap.MAPPED_RAM), given=_compressed),
    Rule("Cannot use postcopy with CPR", _one(Cap.POSTCOPY_RAM), given=_cpr),
    Rule("Cannot use postcopy with CPR", _one(Cap.DIRTY_BITMAPS), given=_cpr),
    Rule("Cannot use background snapshot with CPR", _one(Cap.BACKGROUND_SNAPSHOT), given=_cpr),
    Rule("Cannot use COLO with CPR", _one(Cap.X_COLO), given=_cpr),
)


def broken_rules(capabilities: frozenset[Cap], parameters: Parameters) -> list[str]:
    """Return the words of every rule that is broken, each once."""
    broken = [rule.words for rule in RULES if rule.broken(capabilities, parameters)]
    return list(dict.fromkeys(broken))
