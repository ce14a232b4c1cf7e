"""restore(): a guest that was kept runs at once, and its memory follows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping

from mig.engine.outgoing import OutgoingMigration
from mig.engine.recovery import RecoveryPolicy
from mig.events import Event, StatusChanged
from mig.guest import SourceGuest
from mig.image.orderfile import OrderFile
from mig.options import Capability
from mig.state import Status

#: statuses in which a restore is over, or may be: what was learnt is kept
_BREAKS = frozenset({Status.POSTCOPY_PAUSED, Status.COMPLETED, Status.FAILED})


def restore(
    image: SourceGuest,
    uri: str,
    *,
    resume: bool = False,
    background: bool = True,
    order: OrderFile | str | os.PathLike[str] | bool = True,
    record: bool = False,
    capabilities: Iterable[str] | Mapping[str, bool] = (),
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
    order:      begin with the pages that earlier restores have waited for: True: as the file
                beside the image says (PATH.order), if there is one; a path: as that file says;
                an OrderFile, which several restores may share; False: not
    record:     write that file, or make it better by what is asked for now, at every break and at
                the end (an OrderFile knows that itself)
    capabilities: besides postcopy-ram, such as postcopy-preempt
    recovery:   what to do when the connection breaks (Retry); by the caller when None
    parameters: values by QMP name; max-postcopy-bandwidth bounds the background alone

    Returns a migration that has been started. Its status becomes postcopy-active when the guest
    may run; when the connection breaks it is postcopy-paused, and recover() goes on.
    """
    if not isinstance(order, OrderFile):
        path = None if isinstance(order, bool) else order
        order = OrderFile(image, path, use=order is not False, record=record)
    keeper = order

    def tell(event: Event) -> None:
        if isinstance(event, StatusChanged) and event.status in _BREAKS:
            # a warning that was made an error is no reason to break a postcopy
            with contextlib.suppress(Warning):
                keeper.save()
        if on_event is not None:
            on_event(event)

    if not isinstance(capabilities, Mapping):
        capabilities = dict.fromkeys(capabilities, True)
    migration = OutgoingMigration(
        image,
        capabilities={**capabilities, Capability.POSTCOPY_RAM: True},
        parameters=parameters,
        recovery=recovery,
        on_event=tell,
    )
    migration.background = background
    migration.faults = keeper.log()
    if not resume:
        migration.start_postcopy()
    migration.start(uri, resume=resume)
    return migration
