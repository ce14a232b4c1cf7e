"""What a source says when it goes over to postcopy."""

from __future__ import annotations

from collections.abc import Iterator

from mig.ram.search import PageSearch, SourceBlock
from mig.records import Command
from mig.savevm.devices import sections_of
from mig.wire import MAX_DISCARD_RANGES, PING_PACKAGE, PING_POSTCOPY, PING_RUN, CommandType


def advise(search: PageSearch) -> bytes:
    """POSTCOPY_ADVISE: the page sizes that both sides must have."""
    sizes = 0
    for block in search.listed:
        sizes |= block.host_page_size
    return Command.postcopy_advise(sizes, search.listed[0].pages.page_size).encode()


def discards(search: PageSearch) -> Iterator[bytes]:
    """POSTCOPY_RAM_DISCARD of every page that is still to be sent; host pages go as a whole.

    There is at least one: QEMU 7.2 takes a LISTEN that follows straight on ADVISE for something
    else. Matches ram_postcopy_send_discard_bitmap().
    """
    said = False
    # the walk begins anew: it could go on in the middle of a host page
    search.rewind()
    for block in search.blocks:
        per_host_page = max(1, block.host_page_size // block.pages.page_size)
        before = block.dirty.count()
        if per_host_page > 1:
            block.dirty.fill_groups(per_host_page)
            search.remaining += (block.dirty.count() - before) * block.pages.page_size
        for command in _discards_of(block):
            said = True
            yield command
    if not said and search.blocks:
        block = search.blocks[0]
        block.dirty.set(0, block.host_page_end(0))
        search.remaining += block.dirty.count() * block.pages.page_size
        yield from _discards_of(block)


def _discards_of(block: SourceBlock) -> Iterator[bytes]:
    page_size, at = block.pages.page_size, 0
    while at < block.pages.npages:
        runs = block.dirty.runs(at, MAX_DISCARD_RANGES)
        if not len(runs):
            return
        pairs = [(int(first), int(end)) for first, end in runs]
        at = pairs[-1][1]
        ranges = [(first * page_size, (end - first) * page_size) for first, end in pairs]
        yield Command.discard(block.idstr, ranges).encode()


def package(device_state: bytes) -> bytes:
    """PING 2, the package that makes the destination run its guest, and PING 4.

    device_state: what SourceGuest.save_devices() returns
    """
    nested = b"".join(
        (
            Command(CommandType.POSTCOPY_LISTEN).encode(),
            sections_of(device_state),
            Command.ping(PING_RUN).encode(),
            Command(CommandType.POSTCOPY_RUN).encode(),
        )
    )
    return b"".join(
        (
            Command.ping(PING_PACKAGE).encode(),
            Command.packaged(len(nested)).encode(),
            nested,
            Command.ping(PING_POSTCOPY).encode(),
        )
    )
