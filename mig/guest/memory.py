"""MemoryGuest: a guest made of GuestMemory and registered devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from mig import _core
from mig.dirty import DirtyLog
from mig.errors import MigError, MismatchError
from mig.guest.shared import SharedClients, SharedMapping
from mig.memory import GuestMemory
from mig.pages import HOST_PAGE_SIZE
from mig.postcopy.commands import Advise
from mig.postcopy.faults import MemoryFaults
from mig.postcopy.release import MemoryRelease
from mig.postcopy.times import PostcopyTimes
from mig.ram.search import SourceBlock
from mig.records import BlockInfo, Configuration, SectionHeader
from mig.savevm.devices import DeviceState
from mig.savevm.registry import DeviceRegistry
from mig.stream.reader import StreamReader
from mig.wire import DEFAULT_PAGE_BITS

_RAM_SECTION = 1


class MemoryGuest:
    """A guest that a program builds for itself; satisfies SourceGuest and DestinationGuest.

    machine:   name of the machine type; the destination must have the same
    memory:    its RAM
    devices:   everything else that it is
    uuid:      which machine it is; the destination refuses another (capability validate-uuid)
    dirty:     log of writes, None when nothing writes memory while it is sent
    on_stop, on_resume: stop the vCPUs, let them run again
    on_throttle: make them stand still for so many percent of their time

    discarded:   by block, (first page, number of pages) of memory that is not plugged in: it is
                 neither read nor sent
    """

    def __init__(
        self,
        machine: str,
        memory: GuestMemory,
        devices: DeviceRegistry | None = None,
        *,
        uuid: UUID | None = None,
        dirty: DirtyLog | None = None,
        on_stop: Callable[[], None] = lambda: None,
        on_resume: Callable[[], None] = lambda: None,
        on_throttle: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.memory = memory
        self._release = MemoryRelease(memory)
        self.devices = devices or DeviceRegistry()
        bits = memory.page_size.bit_length() - 1
        self.configuration: Configuration | None = Configuration(
            machine, page_bits=None if bits == DEFAULT_PAGE_BITS else bits, uuid=uuid
        )
        self.configuration.encode()  # ValueError for a name that cannot be sent
        self.ram_section_id = _RAM_SECTION
        self.footers = True
        self.switchover_start = False
        self._on_stop = on_stop
        self._on_resume = on_resume
        self._on_throttle = on_throttle
        self.discarded: dict[str, Sequence[tuple[int, int]]] = {}
        self._dirty = dirty
        self._machine = machine
        self._running = True
        self._uuid = uuid
        self._loading: list[tuple[_core.Pages, _core.Bitmap, bool]] = []
        # shared with the source, which must not send them: idstr by place in the block list
        self._ignored: dict[int, str] = {}
        self._faults: MemoryFaults | None = None
        self._clients = SharedClients(memory)
        #: ids of the threads that are its vCPUs, for the times they wait in postcopy; 0 stands for
        #: the next thread that waits. Read before the guest is resumed there.
        self.vcpu_threads: Sequence[int] = ()

    # ---- source -----------------------------------------------------------------------------

    def source_blocks(self) -> Sequence[SourceBlock]:
        """Return every block with all its pages dirty."""
        self.devices.begin()
        blocks = []
        for block in self.memory:
            dirty = _core.Bitmap(block.pages.npages, fill=True)
            blocks.append(
                SourceBlock(
                    block.idstr,
                    block.used_length,
                    block.pages,
                    detect_zero=True,
                    dirty=dirty,
                    discarded=tuple(self.discarded.get(block.idstr, ())),
                    shared=block.shared,
                    address=block.address,
                    host_page_size=block.host_page_size,
                )
            )
        return blocks

    def dirty_log(self) -> DirtyLog | None:
        """Return the log the guest was made with."""
        return self._dirty

    @property
    def running(self) -> bool:
        """Whether it runs: after resume() and before stop(), and at first until it is loaded."""
        return self._running

    def throttle(self, percent: int) -> None:
        """Have the vCPUs stand still for ``percent`` of their time, as the guest was made to."""
        self._on_throttle(percent)

    def stop(self) -> None:
        """Have the owner stop the vCPUs."""
        self._on_stop()
        self._running = False

    def resume(self) -> None:
        """Have the owner let them run."""
        self._on_resume()
        self._running = True

    @property
    def blocked_reasons(self) -> Sequence[str]:
        """What stands against its migration: devices that are unmigratable."""
        return self.devices.blocked_reasons

    def save_early_devices(self) -> bytes:
        """Return the sections of the registered devices that go before memory."""
        return self.devices.save_early(_RAM_SECTION + 1)

    def save_devices(self) -> bytes:
        """Return the registered devices' sections, EOF and description."""
        return self.devices.save(self.memory.page_size, _RAM_SECTION + 1)

    def release_pages(self, idstr: str, first: int, npages: int) -> None:
        """Give pages back that the destination has."""
        self._release.release(idstr, first, npages)

    # ---- destination ------------------------------------------------------------------------

    @property
    def uuid(self) -> UUID | None:
        """Which machine it is, if it knows."""
        return self._uuid

    def configure(self, configuration: Configuration | None) -> None:
        """MismatchError unless machine type, and UUID if both have one, are this guest's."""
        self._faults = None
        if configuration is None:
            raise MismatchError("the stream does not name its machine type")
        if configuration.machine != self._machine:
            raise MismatchError(
                f"the stream is of machine type '{configuration.machine}', "
                f"this guest is '{self._machine}'"
            )
        theirs, mine = configuration.uuid, self._uuid
        if theirs is not None and mine is not None and theirs != mine:
            raise MismatchError(f"UUID received is {theirs} and local is {mine}")

    def open_blocks(self, blocks: Sequence[BlockInfo], page_size: int) -> None:
        """MismatchError unless the blocks are this guest's, of the same page size and lengths.

        Shared blocks must be at the same guest-physical address in a stream that leaves them out.
        """
        if page_size != self.memory.page_size:
            raise MismatchError(
                f"the stream has pages of {page_size} bytes, this guest of {self.memory.page_size}"
            )
        mine = {block.idstr: block for block in self.memory}
        missing = mine.keys() - {info.idstr for info in blocks}
        if missing:
            raise MismatchError("the stream lacks a block of this guest", block=min(missing))
        for info in blocks:
            block = mine.get(info.idstr)
            if block is None:
                raise MismatchError("this guest has no such block", block=info.idstr)
            if block.used_length != info.used_length:
                raise MismatchError(
                    f"the stream's block has {info.used_length} bytes, this guest's "
                    f"{block.used_length}",
                    block=info.idstr,
                )
            ignored = block.shared and info.address is not None
            if ignored and info.address != block.address:
                raise MismatchError(
                    f"Mismatched GPAs for block {info.idstr} {info.address}!= {block.address}",
                    block=info.idstr,
                )
            block.pages.pin()
            received = _core.Bitmap(block.pages.npages)
            fresh = not ignored and block.take_fresh()
            if self._faults is not None:
                self._require_host_pages(info, block.host_page_size)
                self._faults.open_block(block, received)
                fresh = True
            self._loading.append((block.pages, received, fresh))
            if ignored:
                self._ignored[len(self._loading) - 1] = info.idstr

    @staticmethod
    def _require_host_pages(info: BlockInfo, mine: int) -> None:
        theirs = info.host_page_size or HOST_PAGE_SIZE
        if theirs != mine:
            raise MismatchError(
                f"Mismatched RAM page size {info.idstr} (local) {mine} != {theirs}",
                block=info.idstr,
            )

    def put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        """Copy a burst into memory."""
        if parser.npages:
            if parser.current in self._ignored:
                idstr = self._ignored[parser.current]
                raise _core.RamRecordError(f"block {idstr} should not be migrated")
            pages, received, fresh = self._loading[parser.current]
            parser.place(data, start, pages, received, fresh)

    def land(
        self, parser: _core.RamParser, fd: _core.Descriptor, data: bytearray, held: int
    ) -> tuple[int, int, bool] | None:
        """Read pages straight into memory that nobody has written yet."""
        pages, received, fresh = self._loading[parser.current]
        if not fresh or self._faults is not None or parser.current in self._ignored:
            return None
        return _core.land_in_memory(fd, parser, pages, received, data, held)

    def open_lanes(
        self, receiver: _core.MultifdReceiver, parser: _core.RamParser, section_id: int
    ) -> None:
        """Have the channels put pages straight into memory, but for memory that is shared."""
        for number, (pages, received, fresh) in enumerate(self._loading):
            if number in self._ignored:
                receiver.refuse(number)
            else:
                receiver.to_memory(number, pages, received, fresh)

    def mapped_blocks(self) -> Sequence[tuple[_core.Pages, bool]]:
        """Have a file's pages read straight into memory."""
        return [(pages, fresh) for pages, _, fresh in self._loading]

    def ram_started(self, section_id: int, footers: bool) -> None:
        """Nothing to note."""

    def switchover_started(self) -> None:
        """Nothing to note."""

    def load_early_device(self, header: SectionHeader, reader: StreamReader) -> None:
        """Give a section that comes before memory to its device."""
        self.devices.load_early(header, reader)

    def load_devices(self, state: DeviceState) -> None:
        """Give the sections to the registered devices."""
        self.devices.load(state)

    # ---- destination of a postcopy ----------------------------------------------------------
    #
    # Python code that touches memory which is not there yet keeps Python's lock while it waits.
    # The page still comes, as nothing that brings it needs the lock; but if the connection breaks
    # at that moment, nobody can call recover() any more.

    def postcopy_probe(self) -> str | None:
        """Return why this host, or this memory, cannot do it."""
        return MemoryFaults.probe(self.memory)

    def postcopy_advise(self, advise: Advise) -> None:
        """MismatchError unless both sides have pages of the same sizes."""
        faults = MemoryFaults(self.memory)
        faults.advise(advise)
        self._faults = faults

    def postcopy_discard(self, idstr: str, start: int, nbytes: int) -> None:
        """Give this memory back."""
        self._postcopy.discard(idstr, start, nbytes)

    def postcopy_listen(self, requests: _core.PageRequests) -> None:
        """Serve accesses to what is not there."""
        self._postcopy.listen(requests)
        server = self._postcopy.server
        assert server is not None
        self._clients.begin(server)

    def postcopy_run(self) -> None:
        """Resume the guest; its owner need not."""
        self._postcopy.count_waits(self.vcpu_threads)
        self.resume()

    def postcopy_server(self) -> _core.FaultServer | None:
        """Return what serves these accesses."""
        return self._faults.server if self._faults is not None else None

    def postcopy_received(self, idstr: str) -> _core.Bitmap:
        """Return which pages of a block are there."""
        return self._postcopy.received(idstr)

    def postcopy_ask_again(self) -> None:
        """Ask for what is missing on the new connection."""
        self._postcopy.ask_again()

    def postcopy_end(self) -> None:
        """Its memory is as any other, also where other processes map it."""
        self._clients.end()
        self._postcopy.end()

    def postcopy_abandon(self) -> None:
        """Stop the guest. It may wait for pages: these waits end, and it finds zeros."""
        with ThreadPoolExecutor(1) as pool:
            stopped = pool.submit(self.stop)
            self.postcopy_end()
        stopped.result()

    def postcopy_times(self) -> PostcopyTimes:
        """Return how long the guest waited for pages in its last postcopy."""
        return self._postcopy.times() if self._faults is not None else PostcopyTimes()

    def postcopy_register_shared_ufd(
        self, fd: int, mappings: Iterable[SharedMapping]
    ) -> _core.FaultClient:
        """Serve another process that maps blocks, too, in the postcopy that is on, or comes next.

        fd: its userfaultfd, with which it has registered the mappings for missing pages; it stays
            the caller's

        To be called before it may touch them, by any thread. When the migration is over, whichever
        way, they are registered no more. Returns what postcopy_unregister_shared_ufd() takes, for
        a process that leaves before. ValueError for a mapping of anything else than whole pages of
        a block that is memory of a file; OSError for more than 62 processes.
        """
        return self._clients.register(fd, mappings)

    def postcopy_unregister_shared_ufd(self, client: _core.FaultClient) -> None:
        """Serve it no more; more than once is the same. Any thread."""
        self._clients.unregister(client)

    @property
    def _postcopy(self) -> MemoryFaults:
        if self._faults is None:
            raise MigError("this guest is not the destination of a postcopy")
        return self._faults

    # ---- end --------------------------------------------------------------------------------

    def commit(self) -> None:
        """Release the memory to its owner."""
        self._let_go()

    def abort(self) -> None:
        """Release the memory to its owner; its contents are whatever had arrived."""
        self._clients.end()
        if self._faults is not None:
            self._faults.end()
        self._let_go()

    def _let_go(self) -> None:
        self._clients.end()
        for pages, _, _ in self._loading:
            pages.unpin()
        self._loading.clear()
        self._ignored.clear()
