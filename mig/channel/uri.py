"""QEMU's migration URIs."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from mig.errors import OptionError, UriError

FORMS = "tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, file:PATH[,offset=N]"


@dataclass(frozen=True, slots=True)
class TcpUri:
    """``tcp:HOST:PORT``; an IPv6 host stands in brackets, an empty one means every address."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixUri:
    """``unix:PATH``."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class FdUri:
    """``fd:N``: a descriptor that this process has inherited."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


@dataclass(frozen=True, slots=True)
class ExecUri:
    """``exec:COMMAND``: the standard input or output of a shell command."""

    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"


@dataclass(frozen=True, slots=True)
class FileUri:
    """``file:PATH[,offset=N]``: a stream in a file, from byte ``offset`` on."""

    path: str
    offset: int = 0

    def __str__(self) -> str:
        return f"file:{self.path}" + (f",offset={self.offset:#x}" if self.offset else "")


Uri = TcpUri | UnixUri | FdUri | ExecUri | FileUri


def carries_return_path(uri: Uri) -> bool:
    """Whether bytes can flow back over the same connection."""
    if isinstance(uri, FdUri):
        try:
            return stat.S_ISSOCK(os.fstat(uri.fd).st_mode)
        except OSError as error:
            raise UriError(f"{uri}: {error.strerror}") from error
    return isinstance(uri, TcpUri | UnixUri)


def require_seekable(text: str) -> None:
    """OptionError unless ``text`` is a file in which pages can have places (UriError: no URI)."""
    if not isinstance(parse_uri(text), FileUri):
        raise OptionError("Migration requires seekable transport (e.g. file)")


def require_many_connections(text: str) -> None:
    """OptionError unless more than one connection can be made to ``text`` (UriError: no URI)."""
    if not isinstance(parse_uri(text), TcpUri | UnixUri):
        raise OptionError("Migration requires multi-channel URIs (e.g. tcp)")


def parse_uri(text: str) -> Uri:
    """Read a URI; UriError says what is wrong with it."""
    scheme, colon, rest = text.partition(":")
    if not colon:
        raise UriError(f"'{text}' is not a migration URI; there are {FORMS}")
    match scheme:
        case "tcp":
            return _tcp(text, rest)
        case "unix" if rest:
            return UnixUri(rest)
        case "fd":
            if not rest.isdecimal() or int(rest) >= 1 << 31:
                raise UriError(f"'{text}': a descriptor number must follow fd:")
            return FdUri(int(rest))
        case "exec" if rest:
            return ExecUri(rest)
        case "file" if rest:
            return _file(text, rest)
        case "unix" | "exec" | "file":
            raise UriError(f"'{text}': nothing follows {scheme}:")
        case _:
            raise UriError(f"'{text}': scheme '{scheme}' is not known; there are {FORMS}")


def _tcp(text: str, rest: str) -> TcpUri:
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UriError(f"'{text}': expected tcp:HOST:PORT with a port of 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UriError(f"'{text}': write an IPv6 address in brackets, tcp:[{host}]:{port}")
    return TcpUri(host, int(port))


def _file(text: str, rest: str) -> FileUri:
    path, comma, option = rest.rpartition(",offset=")
    if not comma:
        return FileUri(rest)
    try:
        offset = int(option, 0)
    except ValueError:
        offset = -1
    if not 0 <= offset < 1 << 63 or not path:
        raise UriError(f"'{text}': expected file:PATH,offset=N with a number of bytes")
    return FileUri(path, offset)
