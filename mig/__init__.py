"""mig: QEMU's live-migration engine as a library.

The other end of a stock QEMU::

    incoming = mig.IncomingMigration(mig.StreamCapture("vm.mig"))
    incoming.listen("tcp:127.0.0.1:4444"); incoming.wait()

    with mig.open_image("vm.mig") as image:
        outgoing = mig.OutgoingMigration(image, capabilities={"return-path"})
        outgoing.start("tcp:127.0.0.1:4445"); outgoing.wait()

A stock QEMU runs a captured guest at once, its memory follows as it is needed::

    mig.restore(image, "tcp:127.0.0.1:4445").wait()

A guest of your own is a `MemoryGuest`, or any object that satisfies `SourceGuest` and
`DestinationGuest`. A `ProcessGuest` is one to try things with: it writes its memory and checks it.

The kernels stand on their own, too: `Bitmap`, `zero_pages`, `xbzrle` and `XbzrleCache`.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

try:
    from mig._core import Bitmap, XbzrleCache
except ModuleNotFoundError as _error:
    if _error.name != "mig._core":
        raise
    raise ImportError(
        "mig's compiled core is missing: this is the source tree, not an installed package. "
        "Install it with `pip install .` and run Python from another directory, or build it in "
        "place with `pip install -e .`"
    ) from None

from mig import errors, xbzrle
from mig.dirty import DirtyLog, SharedDirtyLog, WriteTracker
from mig.engine import (
    AfterPasses,
    Blockers,
    IncomingMigration,
    Moment,
    OutgoingMigration,
    Patient,
    Retry,
    WhenStuck,
    restore,
)
from mig.errors import MigError
from mig.guest import DestinationGuest, MemoryGuest, ProcessGuest, SourceGuest, UnpluggingGuest
from mig.image import (
    Image,
    MappedCapture,
    MappedImage,
    OrderFile,
    StreamCapture,
    StreamImage,
    open_image,
)
from mig.memory import GuestMemory, RamBlock
from mig.options import Capability, Parameters
from mig.savevm import vmstate
from mig.savevm.registry import DeviceRegistry
from mig.state import Status
from mig.zero import is_zero, zero_pages

if TYPE_CHECKING:
    # by the names of their modules: from the packages a type checker takes these for the modules
    from mig.analysis import Analysis
    from mig.analysis.analyze import analyze
    from mig.conversion.convert import convert

    __version__: str

__all__ = [
    "AfterPasses",
    "Analysis",
    "Bitmap",
    "Blockers",
    "Capability",
    "DestinationGuest",
    "DeviceRegistry",
    "DirtyLog",
    "GuestMemory",
    "Image",
    "IncomingMigration",
    "MappedCapture",
    "MappedImage",
    "MemoryGuest",
    "MigError",
    "Moment",
    "OrderFile",
    "OutgoingMigration",
    "Parameters",
    "Patient",
    "ProcessGuest",
    "RamBlock",
    "Retry",
    "SharedDirtyLog",
    "SourceGuest",
    "Status",
    "StreamCapture",
    "StreamImage",
    "UnpluggingGuest",
    "WhenStuck",
    "WriteTracker",
    "XbzrleCache",
    "__version__",
    "analyze",
    "convert",
    "errors",
    "is_zero",
    "open_image",
    "restore",
    "vmstate",
    "xbzrle",
    "zero_pages",
]

# What a migration has no use for is loaded when it is asked for.
_LATER = {
    "Analysis": "mig.analysis",
    "analyze": "mig.analysis",
    "convert": "mig.conversion",
    "__version__": "mig.version",
}
_PACKAGES = ("analysis", "conversion")

# a type checker that saw it would take any name for one of mig's
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _PACKAGES:
            return _import_module(f"mig.{name}")
        if name not in _LATER:
            raise AttributeError(f"module 'mig' has no attribute '{name}'")
        value = globals()[name] = getattr(_import_module(_LATER[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
