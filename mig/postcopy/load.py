"""Loading a main stream that may switch to postcopy, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

from mig import _core
from mig.errors import StreamError, TruncatedError
from mig.postcopy.commands import Advise, Discard, Package
from mig.records import Command
from mig.savevm.load import LoadTarget, StreamLoader
from mig.stream.reader import StreamReader
from mig.wire import MAX_PACKAGE, RAM_IDSTR, CommandType, SectionType


class PostcopyState(IntEnum):
    """How far the destination is, with QEMU's numbers (PostcopyState)."""

    NONE = 0
    ADVISE = 1
    DISCARD = 2
    LISTENING = 3
    RUNNING = 4
    END = 5


@runtime_checkable
class LoopSource(Protocol):
    """A source of bytes that a loop in C can read from."""

    def read_by(self, loop: Callable[[_core.Descriptor], None]) -> None:
        """Have it do so."""


class PostcopyLoadTarget(LoadTarget, Protocol):
    """What such a stream is loaded into."""

    def postcopy_advise(self, advise: Advise) -> None:
        """Postcopy may come; MismatchError when it cannot be done with these page sizes."""

    def postcopy_discard(self, idstr: str, start: int, nbytes: int) -> None:
        """Forget this part of a block, whatever was put there; MismatchError to refuse."""


class PostcopyLoader(StreamLoader):
    """A StreamLoader that knows the commands of postcopy.

    run() ends with the stream, or with its ``package``; then listen() reads the rest of it. What
    wants to be answered goes to on_command: PING, RECV_BITMAP and POSTCOPY_RESUME too.
    """

    def __init__(
        self,
        reader: StreamReader,
        target: PostcopyLoadTarget,
        *,
        on_command: Callable[[Command], None],
        **options: Any,
    ) -> None:
        super().__init__(reader, target, on_command=on_command, **options)
        self._postcopy_target = target
        self.state = PostcopyState.NONE
        self.package: Package | None = None
        self._server: _core.FaultServer | None = None
        # between a break and POSTCOPY_RESUME only questions may come
        self._resuming = False

    def run(self) -> None:
        """Read up to the package, or the whole stream when it has none."""
        self._load_start()
        while self.package is None and not self._ram_ended:
            self._load_item()
        if self.package is None:
            self._load_devices()

    # ---- before the switch ------------------------------------------------------------------

    def _obey(self, command: Command, at: int) -> None:
        match command.type:
            case CommandType.POSTCOPY_ADVISE:
                self._advise(command, at)
            case CommandType.POSTCOPY_RAM_DISCARD:
                self._discard(command, at)
            case CommandType.PACKAGED:
                self._unpack(command, at)
            case CommandType.POSTCOPY_LISTEN | CommandType.POSTCOPY_RUN:
                raise StreamError(f"{command.type.name} outside of a package", offset=at)
            case CommandType.RECV_BITMAP | CommandType.POSTCOPY_RESUME:
                raise self._wrong_state(command, at)
            case _:
                super()._obey(command, at)

    def _wrong_state(self, command: Command, at: int) -> StreamError:
        name = f"CMD_{command.type.name}"
        return StreamError(f"{name} in wrong postcopy state ({self.state:d})", offset=at)

    def _advise(self, command: Command, at: int) -> None:
        if self.state != PostcopyState.NONE or self._ram is not None:
            raise self._wrong_state(command, at)
        try:
            advise = Advise.parse(command.data)
        except ValueError as error:
            raise StreamError(str(error), offset=at) from None
        if advise is None:
            raise StreamError("RAM postcopy is enabled but have 0 byte advise", offset=at)
        if advise.target_page != self._page_size:
            raise StreamError(
                f"Postcopy needs matching target page sizes (s={advise.target_page} "
                f"d={self._page_size})",
                offset=at,
            )
        with self._located(at, None):
            self._postcopy_target.postcopy_advise(advise)
        self.state, self._host_pages = PostcopyState.ADVISE, True

    def _discard(self, command: Command, at: int) -> None:
        if self.state not in (PostcopyState.ADVISE, PostcopyState.DISCARD) or self._ram is None:
            raise self._wrong_state(command, at)
        try:
            discard = Discard.parse(command.data)
        except ValueError as error:
            raise StreamError(str(error), offset=at) from None
        lengths = {block.idstr: block.used_length for block in self._ram.blocks}
        idstr = discard.idstr
        if idstr not in lengths:
            raise StreamError("no such block to discard", offset=at, block=idstr)
        for start, nbytes in discard.ranges:
            if start % self._page_size or nbytes % self._page_size:
                raise StreamError(
                    f"Unaligned discard of {nbytes} bytes at {start:#x}", offset=at, block=idstr
                )
            if start + nbytes > lengths[idstr]:
                raise StreamError(
                    f"Overrun discard of {nbytes} bytes at {start:#x}", offset=at, block=idstr
                )
            with self._located(at, None):
                self._postcopy_target.postcopy_discard(idstr, start, nbytes)
        self.state = PostcopyState.DISCARD

    def _unpack(self, command: Command, at: int) -> None:
        if self.state not in (PostcopyState.ADVISE, PostcopyState.DISCARD) or self._ram is None:
            raise self._wrong_state(command, at)
        nbytes = command.value
        if nbytes > MAX_PACKAGE:
            raise StreamError(f"Unreasonably large packaged state: {nbytes}", offset=at)
        begin = self._reader.offset
        blob = self._reader.read(nbytes, "the package")
        self.package = Package.parse(blob, begin, footers=bool(self._footers))
        self.state = PostcopyState.LISTENING

    # ---- after it ---------------------------------------------------------------------------

    def serve_by(self, server: _core.FaultServer | None) -> None:
        """Have pages placed without Python from now on, where there is such a server."""
        self._server = server

    def load_urgent(self, reader: StreamReader) -> None:
        """Read the connection that urgent pages come on, up to EOS."""
        assert self._ram is not None
        reader.section = RAM_IDSTR
        loader = self._ram.beside(reader)
        if self._server is None:
            loader.load_payload()
        elif loader.parser is not None:
            self._place(reader, loader.parser, bare=True)

    def listen(self) -> None:
        """Read the rest of the stream, through its EOF."""
        while self.state != PostcopyState.END:
            if self._server is None or self._resuming:
                self._load_late_item()
            else:
                assert self._ram is not None
                assert self._ram.parser is not None
                self._place(self._reader, self._ram.parser, bare=False)
                self.state = PostcopyState.END

    def _place(self, reader: StreamReader, parser: _core.RamParser, *, bare: bool) -> None:
        """Have the rest of a connection read and its pages placed."""
        assert self._server is not None
        source = reader.source
        assert isinstance(source, LoopSource)
        begin = reader.offset
        data = reader.take(reader.available)
        pages = _core.PageReader(
            self._server,
            parser,
            data=data,
            section_id=self._ram_id,
            footers=bool(self._footers),
            bare=bare,
        )
        try:
            source.read_by(lambda descriptor: self._run(pages, descriptor, begin))
        finally:
            reader.went_past(pages.offset - len(data))
            self._counters.add(pages.normal + pages.zero, pages.zero)

    def _run(self, pages: _core.PageReader, source: _core.Descriptor, begin: int) -> None:
        try:
            if pages.run(source):
                return
            raise StreamError("what does not belong into postcopy", offset=begin + pages.offset)
        except EOFError:
            at = begin + pages.offset
            raise TruncatedError("stream ends before its end", offset=at) from None
        except _core.RamRecordError as error:
            at = begin + pages.offset
            raise StreamError(str(error), offset=at, section=RAM_IDSTR) from error

    def resume_on(self, reader: StreamReader) -> None:
        """Have listen() go on with another connection, which begins with the handshake."""
        assert self._ram is not None
        self._reader, self._resuming = reader, True
        # what the source had said to be the end was not
        self.state, self._ram_ended = PostcopyState.LISTENING, False
        self._ram.move_to(reader)

    def _load_late_item(self) -> None:
        reader = self._reader
        reader.section = None
        at = reader.offset
        kind = reader.u8("the stream, before its end")
        if kind == SectionType.COMMAND:
            self._obey_late(Command.read(reader), at)
        elif self._resuming:
            raise reader.error(f"type {kind:#04x} before the postcopy is resumed", offset=at)
        elif kind == SectionType.EOF and self._ram_ended:
            self.state = PostcopyState.END
        elif kind in (SectionType.PART, SectionType.END) and not self._ram_ended:
            self._continue_section(at, SectionType(kind))
        else:
            raise reader.error(f"section type {kind:#04x} in postcopy", offset=at)

    def _obey_late(self, command: Command, at: int) -> None:
        if command.type == CommandType.POSTCOPY_RESUME:
            if not self._resuming:
                raise StreamError("illegal resume received", offset=at)
            self._on_command(command)
            self._resuming = False
        elif command.type in (CommandType.PING, CommandType.RECV_BITMAP):
            self._on_command(command)
        elif command.type != CommandType.OPEN_RETURN_PATH:
            raise self._wrong_state(command, at)
