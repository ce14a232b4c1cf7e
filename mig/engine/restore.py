"""restore(): a guest that was kept runs at once, and its memory follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mig.engine.outgoing import OutgoingMigration
from mig.engine.recovery import RecoveryPolicy
from mig.events import Event
from mig.guest import SourceGuest
from mig.options import Capability


def restore(
    image: SourceGuest,
    uri: str,
    *,
    resume: bool = False,
    background: bool = True,
    capabilities: Iterable[str] = (),
    recovery: RecoveryPolicy | None = None,
    parameters: Mapping[str, object] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> OutgoingMigration:
    """Have the destination at ``uri`` run the guest now; pages follow as it needs them.

    image:      what open_image() returned, or any guest that does not run; to be kept open until
                wait() of the result returns
    uri:        where a QEMU (with capability postcopy-ram) or mig waits for a migration
    resume:     the destination is paused in postcopy, since who served it before is gone
    background: send also the pages that nobody waits for; without, the migration does not end
                until `background` of the result is set
    capabilities: besides postcopy-ram, such as postcopy-preempt
    recovery:   what to do when the connection breaks (Retry); by the caller when None
    parameters: values by QMP name; max-postcopy-bandwidth bounds the background alone

    Returns a migration that has been started. Its status becomes postcopy-active when the guest
    may run; when the connection breaks it is postcopy-paused, and recover() goes on.
    """
    migration = OutgoingMigration(
        image,
        capabilities={Capability.POSTCOPY_RAM, *capabilities},
        parameters=parameters,
        recovery=recovery,
        on_event=on_event,
    )
    migration.background = background
    if not resume:
        migration.start_postcopy()
    migration.start(uri, resume=resume)
    return migration
