"""What gcc makes of the kernels, compiled as setup.py does: instructions counted, loads traced.

By Valgrind, which does not know AVX-512. Counts say what a change costs where the clock says
nothing. When a kernel got better, put the new counts here: the failing test prints them.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from native.programs import CACHE, Builder, run, tool

FAMILIES = ["avx2", "sse2", "scalar"]
#: other compilers than gcc 12 do it a little otherwise
MARGIN = 1.5
#: instructions of each of FAMILIES for one page of 4 KiB, one word of a bitmap ("bits-none",
#: "popcount", "merge", "combine"), one set bit or one run
COUNTS = {
    "zero-page": [404, 551, 893],
    "random-page": [27.3, 27.3, 27.3],
    "bits-none": [1.06, 1.62, 1.62],
    "bits-1%": [54.2, 43.3, 43.3],
    "runs-1%": [57.9, 61.4, 61.4],
    "bits-50%": [6.61, 9.8, 9.8],
    "runs-50%": [13.3, 20, 20],
    "popcount": [2.65, 9.52, 28],
    "merge": [3.77, 12, 34],
    "combine": [1.52, 3.52, 3.52],
    "encode-same": [707, 1428, 1407],
    "encode-sparse": [2324, 3471, 4074],
    "decode-sparse": [653, 653, 653],
    "encode-10%": [21907, 26728, 31676],
    "decode-10%": [12279, 12279, 12279],
    "encode-replaced": [1631, 4214, 11180],
    "cache-hit": [743, 1439, 1453],
    "lookup": [25.2, 25.2, 25.2],
}


@pytest.fixture(scope="module")
def valgrind() -> str:
    return tool("valgrind", "valgrind")


def counted(folder: Path) -> dict[str, dict[str, float]]:
    """Read Callgrind's dumps; return the instructions of a unit by workload and family."""
    counts: dict[str, dict[str, float]] = {}
    for file in folder.glob("counts.*"):
        text = file.read_text()
        named = re.search(r"^desc: Trigger: Client Request: (\S+) (\S+) (\d+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        assert named, text[:500]
        assert total, text[-500:]
        family, workload, units = named.groups()
        counts.setdefault(workload, {})[family] = int(total[1]) / int(units)
    return counts


def test_no_kernel_takes_more_instructions_than_it_did(
    tmp_path: Path, builder: Builder, valgrind: str
) -> None:
    gcc = tool("gcc", "gcc")
    program = builder(tmp_path / "program", gcc, ["instructions.c"], ["-O3"], parts=CACHE)
    out = f"--callgrind-out-file={tmp_path}/counts"
    run(valgrind, "-q", "--tool=callgrind", out, program, *FAMILIES)
    (tmp_path / "counts").unlink()
    counts = {
        workload: [round(counts[family], 2) for family in FAMILIES]
        for workload, counts in counted(tmp_path).items()
    }
    assert counts.keys() == COUNTS.keys()
    print(counts)
    for workload, recorded in COUNTS.items():
        for family, now, before in zip(FAMILIES, counts[workload], recorded, strict=True):
            assert now <= MARGIN * before, f"{workload}, {family}: {now}, was {before}"


def test_what_update_compares_is_what_it_stores(
    tmp_path: Path, builder: Builder, valgrind: str
) -> None:
    """A guest may write in between, so no byte is loaded again after it was compared."""
    gcc = tool("gcc", "gcc")
    program = builder(tmp_path / "program", gcc, ["reads.c"], ["-O3"], parts=CACHE)
    trace = tmp_path / "trace"
    output = run(
        valgrind, "--tool=lackey", "--trace-mem=yes", f"--log-file={trace}", program, *FAMILIES
    )
    loads = [
        (int(address, 16), int(size))
        for address, size in re.findall(
            r"^ [LM] ([0-9a-f]+),(\d+)$", trace.read_text(), re.MULTILINE
        )
    ]
    for family, address, length in (line.split() for line in output.splitlines()):
        page = range(int(address, 16), int(address, 16) + int(length))
        times = Counter(
            byte for start, size in loads if start in page for byte in range(start, start + size)
        )
        # groups of 256 bytes may be looked at first, to see whether anything has changed
        most = 1 if len(page) < 256 else 2
        assert (family, len(times), max(times.values())) == (family, len(page), most)
