"""Captured VMs: files that hold a whole stream."""

from mig.image.capture import StreamCapture
from mig.image.orderfile import OrderFile
from mig.image.stream import StreamImage, open_image

__all__ = ["OrderFile", "StreamCapture", "StreamImage", "open_image"]
