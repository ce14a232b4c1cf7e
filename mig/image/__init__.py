"""Captured VMs: files that hold a whole stream."""

from mig.image.base import BlockPages, BlockSummary, Image
from mig.image.mapped import MappedImage
from mig.image.mappedcapture import MappedCapture
from mig.image.open import open_image
from mig.image.orderfile import OrderFile
from mig.image.stream import StreamImage
from mig.image.streamcapture import StreamCapture

__all__ = [
    "BlockPages",
    "BlockSummary",
    "Image",
    "MappedCapture",
    "MappedImage",
    "OrderFile",
    "StreamCapture",
    "StreamImage",
    "open_image",
]
