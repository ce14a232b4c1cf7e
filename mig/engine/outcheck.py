"""What must hold before a guest is sent."""

from __future__ import annotations

from mig.channel import carries_return_path, parse_uri, require_many_connections
from mig.engine.encoding import adapts
from mig.engine.mapped import require_mapped
from mig.errors import OptionError
from mig.guest import BlockingGuest, SourceGuest
from mig.options import Capability, Parameters
from mig.snapshot.memory import require_write_protection


def uses_return_path(capabilities: frozenset[Capability]) -> bool:
    """Whether there is a return path; postcopy cannot be without one, as with QEMU."""
    return bool({Capability.RETURN_PATH, Capability.POSTCOPY_RAM} & capabilities)


def reasons_of(guest: SourceGuest) -> tuple[str, ...]:
    """Return what the guest itself says against its migration."""
    return tuple(guest.blocked_reasons) if isinstance(guest, BlockingGuest) else ()


def check_recovery(capabilities: frozenset[Capability]) -> None:
    """OptionError when a postcopy that breaks can never go on."""
    if Capability.RELEASE_RAM in capabilities:
        raise OptionError("Postcopy recovery cannot work when release-ram capability is set")


def check_outgoing(
    uri: str, capabilities: frozenset[Capability], parameters: Parameters, guest: SourceGuest
) -> None:
    """OptionError when the URI or the guest cannot do what a capability needs."""
    if Capability.MAPPED_RAM in capabilities:
        require_mapped(uri, capabilities)
    elif {Capability.MULTIFD, Capability.POSTCOPY_PREEMPT} & capabilities:
        require_many_connections(uri)
    channels = Capability.MULTIFD in capabilities and Capability.MAPPED_RAM not in capabilities
    if channels and adapts(parameters) and not uses_return_path(capabilities):
        raise OptionError("multifd-compression adaptive needs capability 'return-path'")
    if Capability.BACKGROUND_SNAPSHOT in capabilities:
        require_write_protection()
    able = carries_return_path(parse_uri(uri))
    if uses_return_path(capabilities) and not able:
        named = "return-path" if Capability.RETURN_PATH in capabilities else "postcopy-ram"
        raise OptionError(f"capability '{named}' is not possible over {uri}")
    configuration = guest.configuration
    if Capability.VALIDATE_UUID in capabilities and not (configuration and configuration.uuid):
        raise OptionError("capability 'validate-uuid' needs a guest that has a UUID")
    needed = configuration.capabilities if configuration else None
    if Capability.X_IGNORE_SHARED in (needed or ()) and (
        Capability.X_IGNORE_SHARED not in capabilities
    ):
        raise OptionError(
            "capability 'x-ignore-shared' must be on: the guest is in a stream that was sent "
            "with it, which may lack shared memory"
        )
