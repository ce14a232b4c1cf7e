"""Uninvited: refuses a source that opens connections which nobody reads here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from mig.channel import Channel, Listener
from mig.channel.open import Cancel
from mig.errors import CancelledError, ChannelError, IdleTimeoutError, MigError, UnsupportedError
from mig.stream.reader import StreamReader
from mig.wire import MULTIFD_MAGIC

#: how long a stranger may take to say what it is (seconds)
_PATIENCE = 5.0
#: how long the source itself may, once it has said that postcopy may come (seconds)
_NO_PATIENCE = 0.05


def multifd_refused(offset: int | None = None) -> UnsupportedError:
    """Return what is said to a source with multifd that was not expected."""
    return UnsupportedError(
        "the source opened multifd channels", capability="multifd", offset=offset
    )


def _preempt_refused() -> UnsupportedError:
    return UnsupportedError(
        "the source opened a connection for urgent pages", capability="postcopy-preempt"
    )


class Uninvited:
    """Looks at further connections, from its making to close().

    main:     the connection of the source; who else connects may be a stranger, and is let go
    refuse:   told by the thread `mig-accept` what the source has opened
    postcopy: whether the source has said that postcopy may come: it may have postcopy-preempt on

    A channel of multifd says so at once. The connection of postcopy-preempt is silent up to the
    first urgent page, for which the guest here would wait: who is silent is taken for one, if it
    is the source's own. QEMU opens it (from 8.0 on) just before it hands the guest over: who
    refuses it in time lets the guest run on there.
    """

    def __init__(
        self,
        listener: Listener,
        main: Channel,
        refuse: Callable[[MigError], None],
        postcopy: Callable[[], bool],
    ) -> None:
        self._listener = listener
        self._main = main.peer
        self._refuse = refuse
        self._postcopy = postcopy
        self._cancel = Cancel()
        self._lock = threading.Lock()
        self._extra: Channel | None = None
        self._ending = False
        # the source's connection that had said nothing when the thread was ended
        self._silent = False
        self._thread = threading.Thread(target=self._run, name="mig-accept", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Before the guest runs here: UnsupportedError if the source would send it urgent pages.

        A source that does has connected before it sends the package. Nobody is watched any more.
        """
        self._end()
        error = _preempt_refused() if self._silent else None
        while error is None:
            extra = self._listener.accept_waiting(_NO_PATIENCE)
            if extra is None:
                return
            with extra:
                error = self._look_at(extra)
        raise error

    def close(self) -> None:
        """End it; more than once is the same."""
        self._end()
        self._cancel.close()

    def _end(self) -> None:
        with self._lock:
            if not self._ending:
                self._cancel.set()
            self._ending = True
            if self._extra is not None:
                self._extra.cancel()
        self._thread.join()

    # ---- its thread -------------------------------------------------------------------------

    def _run(self) -> None:
        # ends when the migration does, or when nothing can be accepted any more
        with contextlib.suppress(CancelledError, ChannelError):
            while True:
                with self._listener.accept(self._cancel, _PATIENCE) as extra:
                    error = self._look_at(extra)
                if error is not None:
                    self._refuse(error)
                    return

    def _look_at(self, extra: Channel) -> UnsupportedError | None:
        """Return why the source is to be refused; strangers say nothing, or something else."""
        with self._lock:
            self._extra = extra
        try:
            if self._speaks(extra):
                return multifd_refused()
        except IdleTimeoutError:
            return _preempt_refused() if self._is_the_source(extra) else None
        except CancelledError:
            self._silent = self._is_the_source(extra)
        except MigError:
            pass
        finally:
            with self._lock:
                self._extra = None
        return None

    def _speaks(self, extra: Channel) -> bool:
        """Whether it says that it is a channel of multifd; IdleTimeoutError when it is silent."""
        reader = StreamReader(extra, buffer_size=64)
        extra.timeout = _NO_PATIENCE
        try:
            reader.fill(4)
        except IdleTimeoutError:
            if self._ending or self._is_the_source(extra):
                raise
            extra.timeout = _PATIENCE
        return reader.u32("a channel's magic") == MULTIFD_MAGIC

    def _is_the_source(self, extra: Channel) -> bool:
        return self._postcopy() and extra.peer is not None and extra.peer == self._main
