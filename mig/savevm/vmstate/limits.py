"""What a peer may make a description load, checked before anything is allocated."""

from __future__ import annotations

from typing import Final

#: most elements of an array whose length comes from another field, where it names no limit
MAX_ELEMENTS: Final = 1 << 20
#: most bytes of a buffer whose length comes from another field, where it names no limit
MAX_BUFFER: Final = 256 << 20
#: longest name of a device, a subsection or a field
MAX_NAME: Final = 255
