"""Captured VMs: files that hold a whole stream."""

from mig.image.capture import StreamCapture
from mig.image.stream import StreamImage, open_image

__all__ = ["StreamCapture", "StreamImage", "open_image"]
