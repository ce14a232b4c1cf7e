"""StreamCapture: a destination that keeps the VM as an ordinary migration stream."""

from __future__ import annotations

from mig import _core
from mig.image.capture import EOS, Capture
from mig.records import encode_continuation
from mig.savevm.devices import DeviceState
from mig.wire import SectionType


class StreamCapture(Capture):
    """A capture that any QEMU resumes from, by ``-incoming "exec:cat FILE"``; see Capture.

    A page that comes again is rewritten in its place. With direct_io that costs a read of its
    surroundings.
    """

    _log: _core.PageLog | None = None

    @property
    def _has_pages(self) -> bool:
        return self._log is not None

    def _open_pages(self, parser: _core.RamParser) -> None:
        """Everything up to the first page, then the log of pages."""
        if self._log is not None:
            return
        head = [self._head(self._configuration), self._blocks.encode(), EOS, self._footer()]
        head.append(encode_continuation(SectionType.PART, self._section_id))
        self._log = _core.PageLog(self._file.fd, parser, direct_fd=self._direct_fd)
        self._log.append(b"".join(head))

    def _put(
        self, parser: _core.RamParser, data: bytes | bytearray | memoryview, start: int
    ) -> None:
        assert self._log is not None
        self._log.put(data, start, parser)

    def _serve_lanes(self, receiver: _core.MultifdReceiver) -> None:
        """One channel at a time: records follow one another."""
        assert self._log is not None
        receiver.to_log(self._log)

    def _write_end(self, state: DeviceState) -> None:
        log = self._log
        assert log is not None
        if self._postcopy and self._received is not None:
            for number, received in enumerate(self._received.values()):
                _core.blank_missing(log, number, received)
        log.put_zeros()
        log.append(self._tail(state))
        log.finish()

    def close(self) -> None:
        """Release the descriptor."""
        self._log = None
        super().close()
