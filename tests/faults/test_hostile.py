"""Streams that claim much and hold little cost neither memory, disk nor time.

Each is loaded by a process of its own with little memory, processor time and file size to spare.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import streams
from faults.streams import MEM_SIZE, PAGE, PAGE_FLAG, Pieces, be32, be64, counted, part

# Limits are set after the imports, relative to what the process has then: a sanitizer's shadow
# memory is not counted.
CHILD = """
import json, pathlib, resource, sys, time
import mig
from mig.errors import MigError

how, source, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + (512 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
said = {"error": None, "kind": None}
try:
    if how == "image":
        with mig.open_image(source) as image:
            said["blocks"] = [b.used_length for b in image.blocks]
    else:
        incoming = mig.IncomingMigration(mig.StreamCapture(folder / "vm.mig"))
        incoming.listen(f"file:{source}")
        incoming.wait(60)
except MigError as error:
    said = {"error": str(error), "kind": type(error).__name__}
said["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said["files"] = {f.name: f.stat().st_blocks * 512 for f in folder.iterdir()}
print(json.dumps(said))
"""


def claim(total: int, records: bytes = b"", *, blocks: int = 1) -> bytes:
    """A whole stream of ``total`` bytes of RAM of which only ``records`` are sent."""
    sample = streams.sample()
    each = total // blocks
    listed = b"".join(counted(f"b{i}") + be64(each) for i in range(blocks))
    data = sample.encode()
    return (
        data[: sample.offset("total")]
        + be64(total | MEM_SIZE)
        + listed
        + data[sample.offset("list eos") : sample.offset("pc.ram part")]
        + part(records)
        + data[sample.offset("end") :]
    )


def page(index: int, fill: int = 1, name: str = "b0") -> bytes:
    return be64(index * PAGE | PAGE_FLAG) + counted(name) + bytes([fill]) * PAGE


def cut_behind(pieces: Pieces, label: str, data: bytes, *more: bytes) -> bytes:
    """The stream up to ``label``, which has the value ``data``, and then ``more``."""
    return pieces.encode()[: pieces.offset(label)] + data + b"".join(more)


SAMPLE = streams.sample()
HOSTILE = {
    "machine name": cut_behind(SAMPLE, "machine length", be32(0xFFFFFFFF)),
    "capabilities": cut_behind(
        SAMPLE,
        "start",
        b"\x05" + counted("configuration/capabilities") + be32(1) + be32(0xFFFFFFFF),
    ),
    "8 TiB and no list": cut_behind(SAMPLE, "total", be64(1 << 43 | MEM_SIZE)),
    "8 TiB and no end": cut_behind(
        SAMPLE, "total", be64(1 << 43 | MEM_SIZE), counted("b0"), be64(1 << 43), be64(0x10)
    ),
    "16 TiB and no page": claim(1 << 44),
    "16 TiB and one page": claim(1 << 44, page(0)),
    "16 TiB and the last page": claim(1 << 44, page((1 << 44) // PAGE - 1)),
    "16 TiB in many blocks": claim(1 << 44, page(0), blocks=4096),
    "description": cut_behind(SAMPLE, "description length", be32(0xFFFFFFFF), b"{" * 1000),
    "description at the limit": cut_behind(
        SAMPLE, "description length", be32(streams.DESCRIPTION_LIMIT), b"{" * 1000
    ),
    "description of depth": cut_behind(
        SAMPLE, "description", streams.description(b'{"devices": ' + b"[" * 1_000_000)
    ),
    "descriptions in a payload": cut_behind(
        SAMPLE, "timer payload", (b"\x00\x06" + be32(1 << 20) + b"{") * 150_000, bytes(1 << 20)
    ),
    "footers in a payload": cut_behind(
        SAMPLE, "timer payload", streams.footer(2) * 200_000, bytes(1 << 20)
    ),
    "sections in a payload": cut_behind(
        SAMPLE,
        "timer payload",
        b"".join(
            streams.footer(2 + i) + b"\x04" + be32(3 + i) + counted("x" * 200) + be32(0) + be32(1)
            for i in range(10_000)
        ),
    ),
}


def _run(how: str, source: Path, folder: Path) -> dict[str, Any]:
    # a sanitizer must hand out NULL as malloc() does
    options = os.environ.get("ASAN_OPTIONS", "")
    env = {**os.environ, "ASAN_OPTIONS": f"{options}:allocator_may_return_null=1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, how, str(source), str(folder)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-800:]}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("how", ["image", "capture"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_stream(name: str, how: str, tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "hostile.mig"
    source.write_bytes(HOSTILE[name])
    said = _run(how, source, folder)
    if said["error"] is None:
        # 16 TiB of RAM of which little was sent is a VM that can be kept
        assert name.startswith("16 TiB")
        assert sum(said["files"].values()) < 1 << 20
    else:
        assert said["files"] == {}
        # mig's own words, not those of whoever found no memory
        assert said["kind"] != "MigError", said
        assert "MemoryError" not in said["error"], said
    assert said["peak"] < 600 << 10, said
