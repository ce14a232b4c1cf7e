"""The destination's half of a postcopy: from the package of its devices to the last page."""

from __future__ import annotations

import contextlib
import struct
import threading
from typing import Protocol

from mig import _core
from mig.channel import Listener
from mig.channel.open import Cancel
from mig.errors import CancelledError, ChannelError, MigError, PeerError, StreamError, as_mig_error
from mig.guest import DestinationGuest, PostcopyTarget
from mig.postcopy.commands import encode_received, idstr_of
from mig.postcopy.load import PostcopyLoader
from mig.records import Command, ReturnMessage
from mig.state import Input
from mig.stream.reader import StreamReader
from mig.wire import PONG_LOADED, CommandType, ReturnType

#: how long a connection for urgent pages, which sources open early, is waited for (seconds)
_URGENT_PATIENCE = 5.0


class PostcopyGuest(DestinationGuest, PostcopyTarget, Protocol):
    """A guest that can be received in postcopy."""


class Line(Protocol):
    """The connection with the source, which may be another one after a break."""

    def move(self, input_: Input) -> None:
        """Feed the state machine."""

    def say(self, data: bytes) -> None:
        """Write on the return path, if there is one; ChannelError. Any thread."""

    def serve_urgent(self) -> bool:
        """Pages can come beside the main channel; whether they may."""

    def drain_urgent(self) -> None:
        """Wait for the pages that are still to come there; ChannelError when they do not."""

    def end_urgent(self) -> None:
        """Have nobody read there any more."""

    def abandon(self) -> None:
        """End every wait for the source."""

    def disconnect(self) -> None:
        """Let go of what is left of the connection, and of the address."""

    def reconnect(self, listener: Listener, cancel: Cancel) -> StreamReader:
        """Wait for the source to come back; raises when nobody can, and closes the listener."""


class IncomingPostcopy:
    """Loads the package while another thread, the listen thread, goes on reading the stream.

    Until the guest runs here a failure is one. From then on the guest is half here and half at the
    source: whatever goes wrong makes it wait for recover().
    """

    def __init__(self, line: Line, loader: PostcopyLoader, guest: PostcopyGuest) -> None:
        self._line = line
        self._loader = loader
        self._guest = guest
        self._decided = threading.Event()
        self._runs = False
        self._condition = threading.Condition()
        self._waiting = False
        # ends the wait for a source to connect again
        self._cancel = Cancel()
        self._abandoned = False
        # neither recovered nor abandoned any more
        self._over = False
        self._listener: Listener | None = None
        self._thread = threading.Thread(target=self._listen, name="mig-listen", daemon=True)
        self._error: MigError | None = None
        # what was wrong with the connection for urgent pages, and so ended the other one
        self._blamed: MigError | None = None
        # what ended the reading of a connection
        self._unread: MigError | None = None
        #: what broke the connection last
        self.interruption: MigError | None = None

    def run(self) -> None:
        """Do all of it; returns when every page is there."""
        guest, package = self._guest, self._loader.package
        assert package is not None
        server = guest.postcopy_server()
        self._loader.serve_by(server)
        urgent = self._line.serve_urgent()
        self._thread.start()
        try:
            if server is not None:
                self._await_readers(server, urgent)
            guest.load_devices(package.state)
            if server is not None:
                server.settle()
            for value in (*package.pings, PONG_LOADED):
                self._answer(ReturnMessage.pong(value).encode())
            guest.postcopy_run()
            self._runs = True
        finally:
            if server is not None and not self._runs:
                # nobody waits for the devices any more
                with contextlib.suppress(ChannelError):
                    server.settle()
            self._decided.set()
            if not self._runs:
                self._line.abandon()
            self._end_reading()
            if not self._runs:
                guest.postcopy_end()
        if self._error is not None:
            guest.postcopy_abandon()
            raise self._error
        guest.postcopy_end()

    def _end_reading(self) -> None:
        self._thread.join()
        # the source may leave that connection open to the end, but memory is not served any more
        self._line.end_urgent()
        with self._condition:
            self._over = True
            self._cancel.close()

    def _await_readers(self, server: _core.FaultServer, urgent: bool) -> None:
        """Wait until pages come without Python: who loads devices may touch what is missing.

        Then Python's lock is held until the page is there.
        """
        if not server.await_readers(1):
            # nobody would see that the devices wait for memory in vain
            raise self._unread or ChannelError("the source left before the devices were loaded")
        if urgent:
            # where it connects later, devices that touch memory have to take their chance
            server.await_readers(2, _URGENT_PATIENCE)

    def _answer(self, data: bytes) -> None:
        """Say something that nobody waits for: if it cannot be said, the listen thread notices."""
        with contextlib.suppress(ChannelError):
            self._line.say(data)

    # ---- the listen thread ------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while not self._read():
                pass
        except BaseException as error:
            self._error = as_mig_error(error)

    def _read(self) -> bool:
        """Read to the end of the stream, or until something is wrong: then wait for recover()."""
        try:
            self._loader.listen()
            self._line.drain_urgent()
        except BaseException as error:
            self._unread = as_mig_error(error)
            if isinstance(error, CancelledError) and self._blamed is not None:
                self._unread = self._blamed
            server = self._guest.postcopy_server()
            if server is not None:
                server.interrupt()
            self._decided.wait()
            if self._runs:
                self._interrupted(self._unread)
                return False
            # run() raises what it was
        return True

    def _interrupted(self, error: MigError) -> None:
        """Wait, for as long as it takes, until the source is there again."""
        self._line.disconnect()
        self._blamed = None
        with self._condition:
            if not self._abandoned:
                # else the connection was cut because of that
                self.interruption = error
            self._waiting = True
        self._require_owner()
        self._line.move(Input.INTERRUPT)
        reader = None
        while reader is None:
            with self._condition:
                self._condition.wait_for(lambda: self._abandoned or self._listener is not None)
                listener = self._listener
            if listener is not None:
                # who cannot be accepted is no reason to give up
                with contextlib.suppress(MigError):
                    reader = self._line.reconnect(listener, self._cancel)
            with self._condition:
                self._listener = None
                self._waiting = reader is None
            self._require_owner()
        self._loader.resume_on(reader)
        self._line.move(Input.CONNECTED)
        self._line.serve_urgent()

    def recover(self, listener: Listener) -> bool:
        """Give it an address to wait at; False when it does not wait, or has one. Any thread."""
        with self._condition:
            if not self._waiting or self._listener is not None:
                return False
            self._listener = listener
            self._condition.notify_all()
            return True

    def abandon(self) -> bool:
        """Have it fail; False when all is here, or it failed. Any thread.

        What reads the connection has to be interrupted afterwards.
        """
        with self._condition:
            if self._over:
                return False
            self._abandoned = True
            self._cancel.set()
            self._condition.notify_all()
            server = self._guest.postcopy_server()
            if server is not None:
                server.interrupt()
            return True

    def blame(self, error: MigError) -> None:
        """Say what is the reason if reading is cancelled now. Any thread."""
        self._blamed = error

    def _require_owner(self) -> None:
        with self._condition:
            if self._abandoned:
                why = "" if self.interruption is None else f" ({self.interruption})"
                raise PeerError(f"postcopy was given up: the rest of the guest is lost{why}")

    # ---- commands ---------------------------------------------------------------------------

    def obey(self, command: Command) -> None:
        """Do what only a postcopy is told."""
        if command.type == CommandType.RECV_BITMAP:
            self._tell_received(command)
        elif command.type == CommandType.POSTCOPY_RESUME:
            ack = ReturnMessage(ReturnType.RESUME_ACK, struct.pack(">I", 1))
            # before the source hears of it: then it may have sent everything at once
            self._line.move(Input.RESUMED)
            self._line.say(ack.encode())
            self._guest.postcopy_ask_again()

    def _tell_received(self, command: Command) -> None:
        try:
            idstr = idstr_of(command)
            received = self._guest.postcopy_received(idstr)
        except ValueError as error:
            raise StreamError(str(error)) from None
        except KeyError:
            raise StreamError("no such block to tell about", block=idstr) from None
        self._line.say(encode_received(idstr, received))
