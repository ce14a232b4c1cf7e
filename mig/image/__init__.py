"""Captured VMs: files that hold a whole stream."""

from mig.image.mappedcapture import MappedCapture
from mig.image.stream import StreamImage, open_image
from mig.image.streamcapture import StreamCapture

__all__ = ["MappedCapture", "StreamCapture", "StreamImage", "open_image"]
