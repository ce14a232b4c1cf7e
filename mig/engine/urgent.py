"""The connection of a destination that urgent pages come on (capability postcopy-preempt)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mig import _core
from mig.channel import Channel, Listener
from mig.channel.open import Cancel
from mig.errors import CancelledError, MigError, as_mig_error
from mig.postcopy.load import PostcopyLoader
from mig.ram.load import PageSink
from mig.records import BlockInfo
from mig.stream.reader import StreamReader


class UrgentChannel:
    """Accepts the second connection of a source, at any time, and reads RAM records from it.

    It has no header: what comes second is it. A source of 7.2 ends it with EOS, later ones leave
    it open to the end.

    on_error: told of what ended it before its time, by its thread
    """

    def __init__(self, listener: Listener, on_error: Callable[[MigError], None]) -> None:
        self._listener = listener
        self._on_error = on_error
        self._cancel = Cancel()
        self._changed = threading.Condition()
        self._loader: PostcopyLoader | None = None
        self._sink: PageSink | None = None
        self._channel: Channel | None = None
        self._closing = False
        self._over = False
        self.error: MigError | None = None
        self._thread = threading.Thread(target=self._run, name="mig-urgent", daemon=True)
        self._thread.start()

    def serve(self, loader: PostcopyLoader, sink: PageSink) -> None:
        """Pages can come: the blocks are known."""
        with self._changed:
            self._loader, self._sink = loader, sink
            self._changed.notify_all()

    def drain(self, wanted: Callable[[], int]) -> None:
        """Wait until nothing is wanted any more: the last pages may be on their way here."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not wanted())
            if self.error is not None:
                raise self.error

    # ---- PageSink, between the loader and the guest -----------------------------------------

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """Never called: the block list comes on the main channel."""
        raise AssertionError(blocks)

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Hand a burst on, and wake who waits for its pages."""
        assert self._sink is not None
        self._sink.put(parser, data, start)
        with self._changed:
            self._changed.notify_all()

    # ---- its thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._read()
        except CancelledError:
            pass  # somebody else knows why
        except BaseException as error:
            self.error = as_mig_error(error)
        finally:
            with self._changed:
                self._over = True
                closing = self._closing
                self._changed.notify_all()
        if self.error is not None and not closing:
            self._on_error(self.error)

    def _read(self) -> None:
        channel = self._listener.accept(self._cancel, None)
        with self._changed:
            self._channel = channel
            self._changed.wait_for(lambda: self._closing or self._loader is not None)
            if self._closing or self._loader is None:
                return
            loader = self._loader
        loader.beside(StreamReader(channel), self).load_payload()

    def close(self) -> None:
        """End it and let go of it; more than once is the same."""
        with self._changed:
            self._closing = True
            self._cancel.set()
            if self._channel is not None:
                self._channel.cancel()
            self._changed.notify_all()
        self._thread.join()
        self._cancel.close()
        if self._channel is not None:
            self._channel.close()
