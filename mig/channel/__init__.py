"""Channels: connections, files and commands that carry a stream, opened from QEMU's URIs."""

from mig.channel.base import Channel
from mig.channel.open import Listener, connect
from mig.channel.uri import (
    carries_return_path,
    parse_uri,
    require_many_connections,
    require_seekable,
)

__all__ = [
    "Channel",
    "Listener",
    "carries_return_path",
    "connect",
    "parse_uri",
    "require_many_connections",
    "require_seekable",
]
