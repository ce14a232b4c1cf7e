"""Captured VMs: files that hold a whole stream."""

from mig.image.base import BlockPages, BlockSummary, Image
from mig.image.capture import StreamCapture
from mig.image.mapped import MappedImage
from mig.image.open import open_image
from mig.image.stream import StreamImage

__all__ = [
    "BlockPages",
    "BlockSummary",
    "Image",
    "MappedImage",
    "StreamCapture",
    "StreamImage",
    "open_image",
]
