"""The connection of a destination that urgent pages come on (capability postcopy-preempt)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mig.channel import Channel, Listener
from mig.channel.open import Cancel
from mig.errors import MigError, as_mig_error
from mig.postcopy.load import PostcopyLoader
from mig.stream.reader import StreamReader


class UrgentChannel:
    """Accepts the second connection of a source, at any time, and reads RAM records from it.

    It has no header: what comes second is it. A source of 7.2 ends it with EOS, later ones leave
    it open to the end.

    on_end: told by its thread when no more pages come, and why: None when the source has said so
    """

    def __init__(self, listener: Listener, on_end: Callable[[MigError | None], None]) -> None:
        self._listener = listener
        self._on_end = on_end
        self._cancel = Cancel()
        self._changed = threading.Condition()
        self._loader: PostcopyLoader | None = None
        self._channel: Channel | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mig-urgent", daemon=True)
        self._thread.start()

    def serve(self, loader: PostcopyLoader) -> None:
        """Pages can come: the blocks are known."""
        with self._changed:
            self._loader = loader
            self._changed.notify_all()

    # ---- its thread -------------------------------------------------------------------------

    def _run(self) -> None:
        error: MigError | None = None
        try:
            self._read()
        except BaseException as caught:
            error = as_mig_error(caught)
        with self._changed:
            closing = self._closing
        if not closing:
            self._on_end(error)

    def _read(self) -> None:
        channel = self._listener.accept(self._cancel, None)
        with self._changed:
            self._channel = channel
            self._changed.wait_for(lambda: self._closing or self._loader is not None)
            if self._closing or self._loader is None:
                return
            loader = self._loader
        loader.load_urgent(StreamReader(channel))

    def end(self) -> None:
        """Read no more; more than once is the same. The source may still say something."""
        with self._changed:
            self._closing = True
            self._cancel.set()
            if self._channel is not None:
                self._channel.cancel()
            self._changed.notify_all()
        self._thread.join()

    def close(self) -> None:
        """End it and let go of it; more than once is the same."""
        self.end()
        self._cancel.close()
        if self._channel is not None:
            self._channel.close()
