"""The two ends of a device's payload: both know which field they are at."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from mig.errors import DeviceStateError, MismatchError, TruncatedError
from mig.savevm.vmstate.describe import DEFAULT_DIALECT
from mig.stream.reader import StreamReader


class _Path:
    """Where in the state of a device we are: ``uart.fifo[3]``."""

    def __init__(self, device: str) -> None:
        self._path = [device]

    @property
    def path(self) -> str:
        """The field, with the device's name before it."""
        return "".join(self._path)

    def at(self, part: str) -> Self:
        """Go to a part (``.fifo``, ``[3]``) for a `with` statement; an error stays there."""
        self._path.append(part)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._path.pop()


class StateWriter(_Path):
    """Collects the payload of a device.

    dialect: QEMU whose description is written, (major, minor)
    """

    def __init__(self, device: str, dialect: tuple[int, int] = DEFAULT_DIALECT) -> None:
        super().__init__(device)
        self.dialect = dialect
        self._data = bytearray()

    @property
    def nbytes(self) -> int:
        """Number of bytes written so far."""
        return len(self._data)

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self._data += data

    def data(self) -> bytes:
        """Return all that was written."""
        return bytes(self._data)

    def error(self, message: str) -> DeviceStateError:
        """Return an error that names the field."""
        return DeviceStateError(message, field=self.path)


class StateReader(_Path):
    """Reads the payload of a device from a stream that may go on behind it."""

    def __init__(self, device: str, reader: StreamReader) -> None:
        super().__init__(device)
        self.reader = reader

    def read(self, nbytes: int) -> bytes:
        """Return that many bytes; TruncatedError names the field."""
        reader = self.reader
        if not reader.fill(nbytes):
            raise TruncatedError(
                f"{self.path}: {nbytes} bytes are missing, there are {reader.available}",
                offset=reader.offset,
                section=reader.section,
            )
        return reader.read(nbytes, self.path)

    def error(self, message: str, *, offset: int | None = None) -> MismatchError:
        """Return an error that names field, section, and this place or ``offset``."""
        at = self.reader.offset if offset is None else offset
        return MismatchError(f"{self.path}: {message}", offset=at, section=self.reader.section)
