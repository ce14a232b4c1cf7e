"""How the pages of an outgoing migration go: the encoder that its options ask for."""

from __future__ import annotations

from collections.abc import Callable

from mig.channel import Channel
from mig.engine.mapped import page_threads
from mig.engine.outlanes import OutgoingLanes
from mig.multifd.dialect import dialect_of
from mig.multifd.encode import MultifdEncoder
from mig.options import Capability, MultiFDCompression, Parameters, ZeroPageDetection
from mig.ram.compress import CompressEncoder
from mig.ram.delta import DeltaEncoder
from mig.ram.encode import PageEncoder, PlainEncoder, RecordWriter, ZeroFinder
from mig.ram.mapped import MappedEncoder
from mig.ram.search import PageSearch
from mig.stats import RamCounters
from mig.stream.writer import StreamWriter
from mig.wire import DEFAULT_PAGE_BITS


def adapts(parameters: Parameters) -> bool:
    """Whether each page goes in its own way."""
    return parameters.multifd_compression == MultiFDCompression.ADAPTIVE


class Encoding:
    """Makes the encoders of one migration.

    parameters: read at each use, so that they can change
    last_stage: whether the guest stands still
    """

    def __init__(
        self,
        search: PageSearch,
        counters: RamCounters,
        capabilities: frozenset[Capability],
        parameters: Callable[[], Parameters],
        last_stage: Callable[[], bool],
    ) -> None:
        self._search = search
        self._counters = counters
        self._capabilities = capabilities
        self._parameters = parameters
        self._last_stage = last_stage
        self._delta: DeltaEncoder | None = None

    def _zeros(self) -> ZeroFinder:
        def detects() -> bool:
            return self._parameters().zero_page_detection != ZeroPageDetection.NONE

        return ZeroFinder(detects)

    def _records(self, writer: StreamWriter) -> tuple[RecordWriter, ZeroFinder]:
        return RecordWriter(writer), self._zeros()

    def plain(self, writer: StreamWriter, *, shared: bool = False) -> PageEncoder:
        """Whole pages, on the main stream.

        shared: others write records into it, too, between batches
        """
        records = RecordWriter(writer, shared=shared)
        return PlainEncoder(records, self._zeros(), self._counters)

    def main_stream(self, writer: StreamWriter) -> PageEncoder:
        """What goes over the main stream alone."""
        records, zeros = self._records(writer)
        encoder: PageEncoder = PlainEncoder(records, zeros, self._counters)
        if Capability.COMPRESS in self._capabilities:
            parameters, listed = self._parameters(), self._search.listed
            encoder = CompressEncoder(
                records,
                zeros,
                self._counters,
                page_size=listed[0].pages.page_size if listed else 1 << DEFAULT_PAGE_BITS,
                nthreads=parameters.compress_threads,
                level=parameters.compress_level,
                waits=lambda: self._parameters().compress_wait_thread,
            )
        if Capability.XBZRLE not in self._capabilities:
            return encoder
        self._delta = DeltaEncoder(
            encoder,
            records,
            zeros,
            self._search,
            self._counters,
            cache_size=lambda: self._parameters().xbzrle_cache_size,
            last_stage=self._last_stage,
        )
        return self._delta

    def check(self, parameters: Parameters) -> None:
        """OptionError when a change to these parameters is not possible any more."""
        if self._delta is not None:
            self._delta.check_size(parameters.xbzrle_cache_size)

    def mapped(self, channel: Channel) -> PageEncoder:
        """Whole pages, each in its place of the file (capability mapped-ram).

        With multifd as many threads write as there are channels.
        """
        parameters, listed = self._parameters(), self._search.listed
        pages = channel.page_file(
            nthreads=page_threads(self._capabilities, parameters),
            direct_io=parameters.direct_io,
        )
        page_size = listed[0].pages.page_size if listed else 1 << DEFAULT_PAGE_BITS
        return MappedEncoder(channel, pages, self._zeros(), self._counters, page_size)

    def multifd(
        self, writer: StreamWriter, lanes: OutgoingLanes, machine: str | None
    ) -> PageEncoder:
        """What goes over the channels, as the machine type has it."""
        records, zeros = self._records(writer)

        def bandwidth() -> float:
            parameters = self._parameters()
            return parameters.max_bandwidth / parameters.multifd_channels

        return MultifdEncoder(
            lanes,
            records,
            zeros,
            self._counters,
            dialect_of(machine),
            lambda: self._parameters().zero_page_detection,
            self._search.listed,
            adaptive=adapts(self._parameters()),
            last_stage=self._last_stage,
            bandwidth=bandwidth,
        )
