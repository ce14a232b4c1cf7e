"""Objects of a failed migration are cyclic garbage: its error's traceback knows the migration.

Collecting them must neither crash the interpreter (hence processes of their own) nor leave guest
memory pinned.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faults.streams import Pieces

PAGE_LOG = """
import gc, os
from mig import _core

gc.disable()
parser = _core.RamParser([(b"ram", 4), (b"vga", 2)], 1024)
log = _core.PageLog(os.memfd_create("log"), parser)
box = [log]
box.append(box)
del log, box
gc.collect()
print("alive")
"""

OUT_QUEUE = """
import gc
import numpy as np
from mig import _core

gc.disable()
pages = _core.Pages(bytearray(4096), 1024, writable=True)
out = _core.OutQueue()
out.encode(pages, b"ram", np.arange(4, dtype=np.uint64))
box = [out]
box.append(box)
del out, box
gc.collect()
pages.release()
print("alive")
"""

FAILED_CAPTURE = """
import gc, socket, sys
import mig

gc.disable()
data = bytes.fromhex(sys.argv[1])
for _ in range(20):
    mine, theirs = socket.socketpair()
    migration = mig.IncomingMigration(mig.StreamCapture(sys.argv[2]))
    migration.listen(f"fd:{theirs.fileno()}")
    mine.sendall(data)
    mine.close()
    try:
        migration.wait(30)
    except mig.MigError:
        pass
    theirs.close()
    del migration
    gc.collect()
print("alive")
"""


def _survives(code: str, *args: str) -> None:
    command = [sys.executable, "-P", "-X", "faulthandler", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-800:]


@pytest.mark.parametrize("code", [PAGE_LOG, OUT_QUEUE], ids=["page log", "out queue"])
def test_garbage_of_the_core(code: str) -> None:
    _survives(code)


@pytest.mark.parametrize("nbytes", [1300, 2500, 3400])
def test_garbage_of_a_failed_capture(stream: Pieces, nbytes: int, tmp_path: Path) -> None:
    _survives(FAILED_CAPTURE, stream.encode()[:nbytes].hex(), str(tmp_path / "vm.mig"))
