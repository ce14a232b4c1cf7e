"""Every error that mig raises.

::

    MigError
     ├── OptionError            a capability or parameter that cannot be (also ValueError)
     │    └── UriError          a migration URI that cannot be read
     ├── StateError             an input that the present state does not accept
     ├── KernelError            the demanded kernel is unknown, not built, or not for this CPU
     ├── KvmError               KVM refused something
     │    └── KvmUnavailableError  this machine's KVM cannot run the KVM guest
     ├── XbzrleError            bytes that are no XBZRLE encoding of their page
     ├── BlockedError           the guest cannot be migrated now
     ├── DeviceStateError       a device's state is not what its description says; knows the field
     ├── DirtyLogError          writes to the guest's memory cannot be logged
     ├── ChannelError           the connection, file or command failed
     │    ├── IdleTimeoutError  no byte moved for the idle limit
     │    └── PeerError         the other side reported failure, or left without a word
     ├── CancelledError         somebody called cancel()
     └── StreamError            the bytes are wrong; knows offset, section and block
          ├── TruncatedError    the stream ended too early
          ├── UnsupportedError  a feature mig does not load; names the capability to switch off
          └── MismatchError     the stream is fine, but not for this guest
"""

from __future__ import annotations


class MigError(Exception):
    """Base of all errors of this package."""


class OptionError(MigError, ValueError):
    """Options that cannot be; ``violations`` lists every one of them."""

    def __init__(self, *violations: str) -> None:
        super().__init__("; ".join(violations))
        self.violations = violations


class UriError(OptionError):
    """A migration URI that cannot be read."""


class StateError(MigError):
    """``input`` is not accepted in ``status``."""

    def __init__(self, status: str, input_: str) -> None:
        super().__init__(f"migration is {status}: {input_} is not possible")
        self.status = status
        self.input = input_


class KernelError(MigError):
    """The demanded kernel cannot be had."""


class KvmError(MigError):
    """KVM refused something, or a vCPU left the guest for a reason that it should not have."""


class KvmUnavailableError(KvmError):
    """This machine's KVM cannot run the KVM guest; says what failed."""


class XbzrleError(MigError):
    """Bytes that are no XBZRLE encoding of the page they are laid over."""


class DirtyLogError(MigError):
    """Writes to the guest's memory cannot be logged, or are not any more."""


class ChannelError(MigError):
    """The connection, file or command failed."""


class IdleTimeoutError(ChannelError):
    """No byte moved for the idle limit (parameter ``idle-timeout``)."""


class PeerError(ChannelError):
    """The other side reported failure, or went away before it confirmed success."""


class BlockedError(MigError):
    """The guest cannot be migrated now, or a reason against it comes too late."""


class DeviceStateError(MigError):
    """The state of a device here cannot be saved: it is not what its description says.

    field: which part of it, after the device's name: ``uart.fifo[3]``
    """

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(f"{field}: {message}")
        self.message = message
        self.field = field


class CancelledError(MigError):
    """The migration was cancelled."""


class StreamError(MigError):
    """The bytes of a stream are wrong.

    offset:  position in the stream where the offending item starts, None when unknown
    section: idstr of the section being read, None outside of sections
    block:   name of the RAM block of the record, None where it does not matter
    """

    def __init__(
        self,
        message: str,
        *,
        offset: int | None = None,
        section: str | None = None,
        block: str | None = None,
    ) -> None:
        self.message = message
        self.offset = offset
        self.section = section
        self.block = block
        super().__init__(message)

    def __str__(self) -> str:
        where = []
        if self.offset is not None:
            where.append(f"offset {self.offset:#x}")
        if self.section is not None:
            where.append(f"section '{self.section}'")
        if self.block is not None:
            where.append(f"block '{self.block}'")
        return f"{self.message} (at {', '.join(where)})" if where else self.message


class TruncatedError(StreamError):
    """The stream ended in the middle of something."""


class UnsupportedError(StreamError):
    """The stream uses a feature that mig does not load.

    capability: QMP name of the capability to switch off at the source, None when there is none
    """

    def __init__(
        self,
        message: str,
        *,
        capability: str | None = None,
        offset: int | None = None,
        section: str | None = None,
        block: str | None = None,
    ) -> None:
        if capability is not None:
            message += f": switch off capability '{capability}' at the source"
        super().__init__(message, offset=offset, section=section, block=block)
        self.capability = capability


class MismatchError(StreamError):
    """The stream is in order but does not fit the guest that loads it."""


def as_mig_error(error: BaseException) -> MigError:
    """Return the error itself, or a MigError for a mistake of a guest's or a callback's own."""
    if isinstance(error, MigError):
        return error
    wrapped = MigError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
