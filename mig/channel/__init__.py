"""Channels: connections, files and commands that carry a stream, opened from QEMU's URIs."""

from mig.channel.base import Channel
from mig.channel.open import Listener, connect
from mig.channel.uri import parse_uri

__all__ = ["Channel", "Listener", "connect", "parse_uri"]
